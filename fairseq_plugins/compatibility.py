"""Repairs of fairseq 0.12, each in one function that can be deleted when fairseq needs it no more."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq import utils as fairseq_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

from fairseq_plugins import checkpoints, sharded_checkpoints
from fairseq_plugins.restarting import restart_at_phases
from fairseq_plugins.rollback import recovering
from fairseq_plugins.stopping import stopping
from fairseq_plugins.tasks.validation import TRAIN_SAMPLE
from mtmoe.checkpoint.sharded import plain_types

_done = False


def repair() -> None:
    """Apply all repairs, once in a process."""
    global _done
    if not _done:
        _done = True
        reload_checkpoints()
        share_checkpoints()
        save_atomically()
        share_out_checkpoints()
        stop_and_recover()
        score_train_sample()
        restart_at_phases()
        start_without_gpu()
        seed_without_gpu()
        read_options_fast()
        quiet()


def reload_checkpoints() -> None:
    """Let torch ≥ 2.6 read fairseq's checkpoints: its weights-only loader refuses what the config and meters hold.

    The types below are plain values; the loader still runs no code from the file.
    """
    torch.serialization.add_safe_globals(plain_types())


def share_checkpoints() -> None:
    """Let several processes resume: the first sends them the checkpoint, options and all.

    fairseq reads what arrives with ``torch.load``, which since torch 2.6 refuses its own options. What comes from
    another process of the run is no file of strangers: torch's own function, which unpickles, will do.
    """

    def broadcast_object_slow(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
        box = [obj]
        torch.distributed.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
        return box[0]

    distributed_utils._broadcast_object_slow = broadcast_object_slow


def save_atomically() -> None:
    """Never leave half a checkpoint under its final name.

    fairseq writes the first file of a save beside its place and renames it, but without fsync, and *copies* it over
    the others: a kill while ``checkpoint_last.pt`` was being overwritten lost it. See `fairseq_plugins.checkpoints`.
    """
    checkpoint_utils.torch_persistent_save = checkpoints.write_checkpoint
    PathManager.copy = staticmethod(checkpoints.copy_checkpoint)
    checkpoint_utils.save_checkpoint = checkpoints.saving(checkpoint_utils.save_checkpoint)
    checkpoint_utils.load_checkpoint = checkpoints.loading(checkpoint_utils.load_checkpoint)


def share_out_checkpoints() -> None:
    """Take directories wherever fairseq takes a checkpoint; in training each process reads its own experts only."""
    checkpoint_utils.load_checkpoint_to_cpu = sharded_checkpoints.joining(checkpoint_utils.load_checkpoint_to_cpu)
    Trainer.load_checkpoint = sharded_checkpoints.loading_directories(Trainer.load_checkpoint)
    Trainer.save_checkpoint = sharded_checkpoints.only_with_all_experts(Trainer.save_checkpoint)


def stop_and_recover() -> None:
    """Look for a signal after each update, and go back when training diverges; see `stopping` and `rollback`."""
    for module in _training_modules():
        module.validate_and_save = stopping(module.validate_and_save)
        module.train = recovering(module.train)


def score_train_sample() -> None:
    """Let each validation end with the task's sample of its training set, where it keeps one.

    fairseq takes only splits that lie in files, and it chooses checkpoints by the first subset: this one comes last.
    """

    def scoring(validate: Any) -> Any:
        def wrapped(cfg: Any, trainer: Any, task: Any, epoch_itr: Any, subsets: list[str]) -> Any:
            sample = [TRAIN_SAMPLE] if TRAIN_SAMPLE in task.datasets else []
            return validate(cfg, trainer, task, epoch_itr, [*subsets, *sample])

        return wrapped

    for module in _training_modules():
        module.validate = scoring(module.validate)


def _training_modules() -> list[Any]:
    # Only where it is there already: to import it would send the logs of the other commands to their output.
    modules = [sys.modules.get(name) for name in ("fairseq_cli.train", "__main__")]  # `python -m fairseq_cli.train`
    return [module for module in modules if module is not None and hasattr(module, "validate_and_save")]


def start_without_gpu() -> None:
    """Let torchrun start training on CPUs.

    Without GPUs fairseq takes each process for a run of its own, and all would write the same checkpoints; told
    otherwise, it divides by the number of GPUs and asks for NCCL.
    """
    if torch.cuda.is_available():
        return
    infer = distributed_utils.infer_init_method

    def infer_init_method(cfg: Any, force_distributed: bool = False) -> None:
        started = all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"))
        if cfg.distributed_init_method is not None or not started or int(os.environ["WORLD_SIZE"]) == 1:
            infer(cfg, force_distributed)
            return
        cfg.distributed_init_method = "env://"
        cfg.distributed_world_size, cfg.distributed_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        cfg.device_id = int(os.environ.get("LOCAL_RANK", 0))
        cfg.distributed_no_spawn = True
        cfg.distributed_backend = "gloo"
        if cfg.ddp_backend in ("c10d", "pytorch_ddp"):
            cfg.ddp_backend = "legacy_ddp"  # the other one is given a GPU's number

    distributed_utils.infer_init_method = infer_init_method


def seed_without_gpu() -> None:
    """Seed the CPU alone where there is no GPU.

    fairseq seeds before each update; torch then queues the seed for a GPU that may come, with a formatted traceback,
    for ever: 0.5 ms an update, and memory that only grows.
    """
    if torch.cuda.is_available():
        return

    def set_torch_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    fairseq_utils.set_torch_seed = set_torch_seed


class _Options(dict):
    """A mapping whose keys are attributes; pickled as a plain dict."""

    __getattr__ = dict.__getitem__

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def read_options_fast() -> None:
    """Give fairseq's train step a plain copy of the options: 60 look-ups through OmegaConf take 1 ms an update."""
    original = Trainer.train_step

    def plain(value: Any) -> Any:
        return _Options({key: plain(each) for key, each in value.items()}) if isinstance(value, dict) else value

    def train_step(self: Any, samples: Any, raise_oom: bool = False) -> Any:
        full = self.cfg
        if not OmegaConf.is_config(full):  # a step inside a step: fairseq tries a batch again
            return original(self, samples, raise_oom)
        if not hasattr(self, "plain_cfg"):
            self.plain_cfg = plain(OmegaConf.to_container(full, resolve=True))
        self.cfg = self.plain_cfg
        try:
            return original(self, samples, raise_oom)
        finally:
            self.cfg = full

    Trainer.train_step = train_step


def quiet() -> None:
    """Silence what fairseq's own calls make torch warn about, since no user can act on it."""
    texts = (r"`?torch\.cuda\.amp\.", r".*nested_tensor", r".*pin_memory", r"Support for mismatched key_padding_mask",
             r"hydra\.experimental", r"[\s\S]*version_base parameter", r".*deprecated keyword in package header",
             r"[\s\S]*validated against ConfigStore schema", r"[\s\S]*strict flag in the compose API")  # fmt: skip
    for text in texts:
        warnings.filterwarnings("ignore", message=text)
