"""One run of an experiment from data to its result file; each step goes on where it was stopped."""

from __future__ import annotations

import fcntl
import json
import lzma
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mtmoe.errors import ConfigError, DataError, MtmoeError
from mtmoe.evaluation.buckets import assign_buckets, training_pairs
from mtmoe.evaluation.metrics import score
from mtmoe.evaluation.test_sets import PreparedData, read_json
from mtmoe.experiments.plan import Run
from mtmoe.files import replacing, write_json, write_text
from mtmoe.training import curriculum, launcher
from mtmoe.training.curves import judge_all

SPLITS = ("valid", "test")
"""What a finished model translates. Test outputs are stored, but nobody looks at their scores before the end."""

SECONDS = "seconds.json"
"""File of a run folder: wall time spent on the run, over all its starts."""


class RunFailed(MtmoeError):
    """Training ended with an error or was stopped.

    Args:
        text: the message.
        status: of fairseq-train; 130 and 143 are signals.
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep two programs from working on one run.

    Raises:
        ConfigError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder} is being worked on by another program; wait for it or stop it") from error
        yield


def execute(run: Run, report: Callable[[str], None] = print) -> None:
    """Train, convert, translate valid and test text, and write the result.

    Raises:
        RunFailed: training did not come to its end.
        ConfigError, DataError: something is missing or wrong.
    """
    if run.result.is_file():
        report(f"{run.name}: done, see {run.result}")
        return
    with alone(run.folder), _counting_seconds(run.folder / SECONDS):
        preset = run.preset(_phases(run))
        write_text(run.folder / "preset.yaml", yaml.safe_dump(_plain(preset), sort_keys=False))
        model = run.folder / "model"
        if not (model / "config.json").is_file():
            status = launcher.train(preset, report=report)
            if status != 0:
                text = f"{run.name}: training ended with status {status}; run the same command to go on"
                raise RunFailed(text, status)
            _convert(run, model)
        for split in SPLITS:
            report(f"{run.name}: translating {split}")
            translate_split(run, model, split)
        if preset.options.get("moe-freq"):
            save_routing(run, model)
        found = result(run, model)
    write_json(run.result, found | {"total_seconds": read_json(run.folder / SECONDS, "time spent")["seconds"]})
    report(f"{run.name}: wrote {run.result}")


@contextmanager
def _counting_seconds(path: Path) -> Iterator[None]:
    """Add the time of the block to that of earlier starts."""
    before = read_json(path, "time spent")["seconds"] if path.is_file() else 0.0
    start = time.perf_counter()
    try:
        yield
    finally:
        write_json(path, {"seconds": round(before + time.perf_counter() - start, 1)})


def _plain(preset: Any) -> dict[str, Any]:
    return {name: getattr(preset, name) for name in preset.__dataclass_fields__}


def _phases(run: Run) -> Sequence[Mapping[str, Any]] | str | None:
    """The curriculum of a run, a derived one worked out from the run that it needs."""
    derived, needed = run.configuration.derived, run.needs
    if derived is None or needed is None:
        return run.configuration.curriculum
    if not needed.result.is_file():
        raise ConfigError(f"{run.name} takes its curriculum from {needed.name}, which is not done; run that one first")
    found = json.loads(needed.result.read_text(encoding="utf-8"))
    losses: dict[str, list[tuple[int, float]]] = {}
    for point in found["valid"]:
        for direction, loss in point["nll_loss"].items():
            losses.setdefault(direction, []).append((point["update"], loss))
    schedule = curriculum.derive(judge_all(losses), found["updates"], shares=derived.shares, fit=derived.fit)
    phases = yaml.safe_load(curriculum.dump(schedule))
    assert isinstance(phases, list)
    return phases


def _convert(run: Run, model: Path) -> None:
    # torch takes seconds to load, and a plan should be printed at once.
    from mtmoe.checkpoint import open_model
    from mtmoe.checkpoint.folder import write_folder

    checkpoint = run.folder / "checkpoints" / f"checkpoint_{run.experiment.checkpoint}.pt"
    write_folder(model, open_model(checkpoint, run.experiment.data))


def translate_split(run: Run, model: Path, split: str) -> Path:
    """Translate one split in all directions; nothing is scored.

    Returns:
        The file of outputs: a JSON object for each direction, xz-packed.
    """
    path = outputs_path(run, split)
    if path.is_file():
        return path
    import torch

    from mtmoe.inference import Translator

    torch.set_num_threads(run.experiment.threads)
    data = PreparedData(run.experiment.data)
    translator = Translator.load(model)
    with replacing(path) as temporary, lzma.open(temporary, "wt", encoding="utf-8", newline="\n") as stream:
        for direction in data.choose_directions(None, split):
            test_set = data.read(direction, split)
            hypotheses = translator.translate(
                test_set.sources, test_set.source, test_set.target,
                beam=run.experiment.beam, length_penalty=run.experiment.length_penalty,
            )  # fmt: skip
            line = {"direction": direction, "test_set": test_set.fingerprint, "hypotheses": list(hypotheses)}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def outputs_path(run: Run, split: str) -> Path:
    """Where a run's translations of a split are kept."""
    return run.experiment.results / "outputs" / f"{run.name}.{split}.jsonl.xz"


def result(run: Run, model: Path) -> dict[str, Any]:
    """What came of a run, read from its folder: see docs/experiments/README.md for each key."""
    data = PreparedData(run.experiment.data)
    described = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    records = _records(run.folder / "log.jsonl")
    inner = [record for record in records if record["kind"] == "train_inner"]
    buckets = assign_buckets(data.directions, data.description)
    header = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return {
        "experiment": run.experiment.name,
        "config": run.configuration.name,
        "title": run.configuration.title,
        "seed": run.seed,
        "command": anywhere(described["command"]),
        "settings": described["config"],
        "model": header,
        "data_fingerprint": described["data_fingerprint"],
        "git_revision": described["git_revision"],
        "versions": described["versions"],
        "machine": described["machine"],
        "threads": run.experiment.threads,
        "checkpoint": run.experiment.checkpoint,
        "updates": inner[-1]["num_updates"],
        "seconds": round(sum(record["train_wall"] for record in inner), 1),  # fairseq's meter begins anew each time
        "words_per_second": statistics.median(record["wps"] for record in inner),
        "parameters": _parameters(model),
        "pairs": training_pairs(data.directions, data.description),
        "bucket": buckets.of,
        "train": [{"update": r["num_updates"], "loss": r["loss"], "nll_loss": r["nll_loss"]} for r in inner],
        "valid": curves(records, "valid"),
        "train_sample": curves(records, "train_sample"),
        "dropped_share": statistics.fmean(record.get("overflow", 0.0) for record in inner),
        "valid_scores": scores(run, "valid"),
        "test_scores": None,
    }


def save_routing(run: Run, model: Path) -> None:
    """Keep what the gates choose on validation text; see `mtmoe.routing_table.RoutingTable`."""
    from mtmoe.inference import Translator
    from mtmoe.inference.routing import collect_routing

    path = run.experiment.results / "routing" / f"{run.name}.json"
    if path.is_file():
        return
    data = PreparedData(run.experiment.data)
    directions = data.choose_directions(None, "valid")
    sets = (data.read(direction, "valid") for direction in directions)
    texts = ((one.direction, one.sources, one.references) for one in sets)
    collect_routing(Translator.load(model), texts, directions, model=run.name).save(path)


def score_test(run: Run) -> None:
    """Score a finished run's test outputs, and add the scores to its result.

    Raises:
        ConfigError: the run is not done.
    """
    if not run.result.is_file():
        raise ConfigError(f"{run.name} is not done; test sets are scored when all runs are")
    found = json.loads(run.result.read_text(encoding="utf-8"))
    found["test_scores"] = scores(run, "test")
    write_json(run.result, found)


def scores(run: Run, split: str) -> dict[str, dict[str, float]]:
    """Score the stored outputs of a split.

    Returns:
        Direction -> ``chrf++`` and ``bleu``.

    Raises:
        DataError: the outputs are of another text than the data has.
    """
    data = PreparedData(run.experiment.data)
    path = outputs_path(run, split)
    found = {}
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as stream:
        for line in stream:
            record = json.loads(line)
            test_set = data.read(record["direction"], split)
            if record["test_set"] != test_set.fingerprint:
                raise DataError(f"{path}: {record['direction']} is of other {split} text than {data.folder} has")
            figures = score(test_set.sources, record["hypotheses"], test_set.references, test_set.target)
            found[test_set.direction] = {"chrf++": figures.chrf, "bleu": figures.bleu}
    return found


def anywhere(command: Sequence[str]) -> list[str]:
    """The command without folders of the machine that ran it: program and plugins by their names."""
    words = list(command)
    words[0] = Path(words[0]).name
    if "--user-dir" in words:
        place = words.index("--user-dir") + 1
        words[place] = Path(words[place]).name
    return words


def curves(records: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Losses by direction at each validation; of an update that was validated twice, the later one."""
    points: dict[int, dict[str, float]] = {}
    for record in records:
        if record["kind"] == kind:
            losses = {
                key.removeprefix("nll_loss_"): value
                for key, value in record.items()
                if key.startswith("nll_loss_") and "-" in key
            }
            points[record["num_updates"]] = losses
    return [{"update": update, "nll_loss": losses} for update, losses in sorted(points.items())]


def _records(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _parameters(model: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(os.fspath(path), framework="pt") as tensors:  # type: ignore[no-untyped-call]
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                size = 1
                for dimension in tensors.get_slice(name).get_shape():
                    size *= dimension
                total += size
    return total
