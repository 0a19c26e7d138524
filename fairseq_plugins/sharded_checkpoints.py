"""Checkpoints of runs with expert parallelism: a directory with a file for each place, written while training goes on.

fairseq's own function decides when to save, under which names, and what to remove. While it runs here, it writes
nothing: the state is copied, and names are remembered, which become links once the directory is complete.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils, utils
from omegaconf import open_dict

from fairseq_plugins.processes import from_first
from mtmoe.checkpoint import sharded
from mtmoe.checkpoint.sharded import ExpertTensor, SavePlan, SplitState
from mtmoe.checkpoint.sharded.writing import PATIENCE
from mtmoe.checkpoint.writing import NotWritten
from mtmoe.errors import CheckpointError

logger = logging.getLogger(__name__)

PATIENCE_AT_END = 20.0
"""Seconds without progress on disk after which a save is given up when this process is ending, by an error or a signal:
a process that has not begun to write then never will. torchrun kills 30 seconds after its signal."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands among those that share out the experts."""

    rank: int = 0
    """In the whole run."""
    world_size: int = 1
    expert_parallel_size: int = 1

    @property
    def place(self) -> int:
        """In its expert-parallel group, which is of consecutive ranks."""
        return self.rank % self.expert_parallel_size

    @property
    def writes(self) -> bool:
        """Whether it saves: of the ranks with the same experts the first does."""
        return self.rank < self.expert_parallel_size


def place_of(trainer: Any) -> Place:
    """Where the process of a trainer stands; without expert parallelism each has all experts."""
    parallel = getattr(trainer.task, "parallel", None)
    size = 1 if parallel is None else parallel.size
    return Place(trainer.data_parallel_rank, trainer.data_parallel_world_size, size)


# Saving


@dataclass
class Recording:
    """What fairseq's function would have written."""

    split: Callable[[Any], SplitState]
    names: list[Path] = field(default_factory=list)
    """Of the one checkpoint; empty if none is due."""
    state: SplitState | None = None
    """Copied."""

    def write(self, state: Any, filename: str) -> None:
        """Stands for writing a file."""
        self.names.append(Path(filename))
        self.state = _copied(self.split(state))


def _copied(split: SplitState) -> SplitState:
    return SplitState(sharded.copy_to_cpu(split.shared), sharded.copy_to_cpu(split.experts))


_recording: Recording | None = None


def recording() -> Recording | None:
    """What collects the files that fairseq writes now; None = they are to be written."""
    return _recording


def save(
    save_checkpoint: Callable[[], str | None], cfg: Any, trainer: Any, epoch_itr: Any
) -> tuple[str | None, Callable[[], None] | None]:
    """Run fairseq's function of that name in all processes, and copy what this one has to save.

    Args:
        save_checkpoint: that function, with its arguments.
        cfg: of checkpoints.
        trainer: of this process.
        epoch_itr: where training is.

    Returns:
        What fairseq's function returns, and the job that writes; None where nothing is to do.

    Raises:
        CheckpointError: the same in all processes, if the first has failed.
    """
    global _recording
    place = place_of(trainer)
    split = functools.partial(
        sharded.split_state, parameters=parameter_names(trainer), expert=expert_names(trainer).__contains__
    )
    mine = Recording(split)
    saved, error = None, None
    _recording = mine
    try:
        saved = save_checkpoint()
    except OSError as problem:
        error = NotWritten(f"{cfg.save_dir}: {problem.strerror or problem}")
    except CheckpointError as problem:
        error = problem
    finally:
        _recording = None

    def choose() -> SavePlan | None:
        if error is not None:
            raise error
        return _plan(cfg, trainer, epoch_itr, place) if mine.names else None

    plan = from_first(choose)
    if plan is None or not place.writes:
        return saved, None
    if place.rank > 0:
        experts = split(trainer.state_dict()).experts
        # As fairseq does in the first process, which makes fp32 of half precision.
        values = utils.move_to_cpu({name: each.values for name, each in experts.items()})
        mine.state = _copied(SplitState({}, {name: ExpertTensor(values[name], experts[name].form) for name in experts}))
    return saved, functools.partial(_write, plan, mine, place, cfg)


def _plan(cfg: Any, trainer: Any, epoch_itr: Any, place: Place) -> SavePlan:
    name = f"checkpoint_{epoch_itr.epoch}_{trainer.get_num_updates()}"
    return SavePlan(
        directory=sharded.free_directory(Path(cfg.save_dir), name),
        attempt=secrets.token_hex(4),
        world_size=place.world_size,
        expert_parallel_size=place.expert_parallel_size,
    )


def _write(plan: SavePlan, mine: Recording, place: Place, cfg: Any) -> None:
    assert mine.state is not None
    if place.rank > 0:
        sharded.write_experts(plan, place.place, mine.state.experts)
        return
    try:
        sharded.write_experts(plan, place.place, mine.state.experts)
        sharded.write_shared(plan, mine.state.shared)
    except (OSError, CheckpointError):
        sharded.give_up(plan)
        raise
    sharded.commit(plan, sharded.describe(mine.state.shared), patience=_patience)
    for name in mine.names:
        sharded.give_name(plan.directory, name)
    remove_old_names(cfg)
    logger.info("%s is complete: %s", plan.directory, ", ".join(name.name for name in mine.names))


def _patience() -> float:
    from fairseq_plugins.stopping import stopper  # which saves, so it imports this

    ends = stopper.signal or not threading.main_thread().is_alive()
    return PATIENCE_AT_END if ends else PATIENCE


def remove_old_names(cfg: Any) -> None:
    """Remove names by fairseq's three rules of rotation, which it has applied before the new names were there."""
    rules = []
    if cfg.keep_interval_updates > 0:
        paths = checkpoint_utils.checkpoint_paths(cfg.save_dir, r"checkpoint_\d+_(\d+)\.pt", keep_match=True)
        spared = cfg.keep_interval_updates_pattern
        rules.append(([p for p, n in paths if spared == -1 or n % spared != 0], cfg.keep_interval_updates))
    if cfg.keep_last_epochs > 0:
        rules.append((checkpoint_utils.checkpoint_paths(cfg.save_dir, r"checkpoint(\d+)\.pt"), cfg.keep_last_epochs))
    if cfg.keep_best_checkpoints > 0:
        pattern = rf"checkpoint\.best_{cfg.best_checkpoint_metric}_(\d+\.?\d*)\.pt"
        paths = checkpoint_utils.checkpoint_paths(cfg.save_dir, pattern)
        rules.append((paths if cfg.maximize_best_checkpoint_metric else paths[::-1], cfg.keep_best_checkpoints))
    for paths, keep in rules:
        for path in paths[keep:]:
            Path(path).unlink(missing_ok=True)


def only_with_all_experts(save_checkpoint: Callable[..., str | None]) -> Callable[..., str | None]:
    """Wrap the trainer's method of that name: where experts are shared out, nothing is written but by `save`.

    fairseq's ``crash.pt`` would hold those of one process, which writes it while the others go on, or wait.
    """

    @functools.wraps(save_checkpoint)
    def wrapped(trainer: Any, filename: str, extra_state: Any) -> str | None:
        if place_of(trainer).expert_parallel_size > 1 and recording() is None:
            logger.warning("%s is not written: this process holds only its own experts", filename)
            return None
        return save_checkpoint(trainer, filename, extra_state)

    return wrapped


def expert_names(trainer: Any) -> set[str]:
    """Names of the parameters that this process shares out with others."""
    return {name for name, each in trainer.get_model().named_parameters() if hasattr(each, "expert")}


def parameter_names(trainer: Any) -> list[str]:
    """Names of the optimiser's parameters, in the order in which fairseq hands them over."""
    modules = (("", trainer.get_model()), ("criterion.", trainer.get_criterion()))
    return [prefix + name for prefix, each in modules for name, p in each.named_parameters() if p.requires_grad]


# Reading


_place: ContextVar[Place] = ContextVar("place", default=Place())  # noqa: B039 - it is frozen


def loading_directories(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the trainer's method of that name: of a directory each process reads what it needs.

    A file is read by the first process, which sends it to all; each takes its own experts from it.
    """

    @functools.wraps(load_checkpoint)
    def wrapped(trainer: Any, filename: str, *args: Any, **kwargs: Any) -> Any:
        directory = _directory(filename)
        if directory is None:
            return load_checkpoint(trainer, filename, *args, **kwargs)
        token = _place.set(place_of(trainer))
        try:
            with changed(trainer.cfg.checkpoint, load_checkpoint_on_all_dp_ranks=True):
                # fairseq asks whether it is a file.
                return load_checkpoint(trainer, str(directory / sharded.SHARED), *args, **kwargs)
        finally:
            _place.reset(token)

    return wrapped


def joining(load_checkpoint_to_cpu: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap fairseq's function of that name: read directories too; all experts, or those of a trainer's process."""

    @functools.wraps(load_checkpoint_to_cpu)
    def wrapped(path: str, *args: Any, **kwargs: Any) -> Any:
        directory, place = _directory(path), _place.get()
        if directory is None:
            return load_checkpoint_to_cpu(path, *args, **kwargs)
        manifest = sharded.read_manifest(directory)
        sharded.check_files(directory, manifest, [sharded.SHARED])
        state = load_checkpoint_to_cpu(str(directory / sharded.SHARED), *args, **kwargs)
        sharded.fill(state, directory, manifest, place=place.place, places=place.expert_parallel_size)
        return state

    return wrapped


def _directory(path: str) -> Path | None:
    """The sharded checkpoint that a path means, or its shared file; None = it is another file."""
    given = Path(path)
    candidates = [given, given.parent] if given.name == sharded.SHARED else [given]
    return next((each for each in candidates if sharded.is_sharded(each)), None)


@contextlib.contextmanager
def changed(cfg: Any, **values: Any) -> Iterator[None]:
    """Options with other values, for a while."""
    before = {key: cfg[key] for key in values}
    with open_dict(cfg):
        try:
            cfg.update(values)
            yield
        finally:
            cfg.update(before)
