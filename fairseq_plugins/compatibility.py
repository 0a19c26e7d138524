"""Repairs of fairseq 0.12, each in one function that can be deleted when fairseq needs it no more."""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from fairseq import checkpoint_utils, optim
from fairseq import utils as fairseq_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.optim.fp16_optimizer import FP16Optimizer
from fairseq.trainer import Trainer
from omegaconf import OmegaConf
from torch.distributed import distributed_c10d

from fairseq_plugins import checkpoints, sharded_checkpoints
from fairseq_plugins.processes import COLLECTIVE_TIMEOUT, record_errors
from fairseq_plugins.restarting import restart_at_phases
from fairseq_plugins.rollback import recovering
from fairseq_plugins.stopping import stopping
from fairseq_plugins.tasks.validation import TRAIN_SAMPLE
from mtmoe.checkpoint.sharded import plain_types
from mtmoe.errors import ConfigError

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
        share_out_optimizer_state()
        train_in_bf16()
        start_without_gpu()
        limit_waiting()
        record_errors()
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


def share_out_optimizer_state() -> None:
    """Let ``--zero-sharding os`` work with `mtmoe_adamw`, which shares its state out itself; fairseq wants fairscale.

    For that, and for ``--offload-expert-state``, the optimiser has to know the model before it loads a checkpoint.
    """
    shard, build = optim.shard_, Trainer._build_optimizer

    def shard_(optimizer: Any, group: Any) -> None:
        if not hasattr(optimizer, "prepare"):
            shard(optimizer, group)

    def build_optimizer(self: Any) -> None:
        if hasattr(self._optimizer, "release_experts"):
            self._optimizer.release_experts()
        build(self)
        if hasattr(self._optimizer, "prepare"):
            sharded = self.cfg.distributed_training.zero_sharding == "os"
            self._optimizer.prepare(self.model, self.data_parallel_process_group, sharded)

    optim.shard_, Trainer._build_optimizer = shard_, build_optimizer


def train_in_bf16() -> None:
    """Let ``--bf16`` work with `mtmoe_adamw`, which has fp32 master copies of its own, and on CPUs.

    fairseq's command line takes the option for a wish for a TPU, whatever there is. Its wrapper for 16 bits asks for a
    GPU; it also holds a second copy of all gradients, in fp32. Checkpoints get the master copies as the model's weights
    (fairseq writes these in fp32 anyway), so that they read as those of a training in fp32.
    """
    build, state_dict = FP16Optimizer.build_optimizer.__func__, Trainer.state_dict

    def without_tpu(convert: Any) -> Any:
        def wrapped(args: Any) -> Any:
            if args.bf16 and find_spec("torch_xla") is None:
                args.tpu = False
            return convert(args)

        return wrapped

    for module in _training_modules():
        module.convert_namespace_to_omegaconf = without_tpu(module.convert_namespace_to_omegaconf)

    def build_optimizer(cls: Any, cfg: Any, params: Any, **kwargs: Any) -> Any:
        if cfg.common.bf16 and getattr(cfg.optimizer, "_name", "") == "mtmoe_adamw":
            return optim.build_optimizer(cfg.optimizer, params)
        return build(cls, cfg, params, **kwargs)

    def with_master_copies(self: Any) -> dict[str, Any]:
        state = state_dict(self)
        if self.cfg.common.bf16 and hasattr(self.optimizer, "master_copies"):
            copies = self.optimizer.master_copies(self.get_model(), state.get("last_optimizer_state"))
            state["model"].update(copies)
        return state

    FP16Optimizer.build_optimizer = classmethod(build_optimizer)
    Trainer.state_dict = with_master_copies


def start_without_gpu() -> None:
    """Let torchrun start training on CPUs, on one machine or several, and with fewer processes than GPUs.

    Without GPUs fairseq takes each process for a run of its own, and all would write the same checkpoints; told
    otherwise, it divides by the number of GPUs, asks for NCCL, and starts as many processes as there are GPUs: none.
    With ``--cpu`` on a machine that has GPUs it asks for NCCL as well. And it takes the number of a process among all
    machines for that of its GPU, which only fits where each has as many processes as GPUs.
    """
    infer, call_main = distributed_utils.infer_init_method, distributed_utils.call_main

    def infer_init_method(cfg: Any, force_distributed: bool = False) -> None:
        started = all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"))
        if cfg.distributed_init_method is None and started and int(os.environ["WORLD_SIZE"]) > 1:
            cfg.distributed_init_method = "env://"
            cfg.distributed_world_size, cfg.distributed_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
            cfg.device_id = int(os.environ.get("LOCAL_RANK", 0))
            cfg.distributed_no_spawn = True
            return
        slurm = "SLURM_JOB_NODELIST" in os.environ or "SLURM_STEP_NODELIST" in os.environ
        alone = cfg.distributed_init_method is None and not slurm and not torch.cuda.is_available()
        if alone and cfg.distributed_world_size > 1:
            count = cfg.distributed_world_size
            raise ConfigError(
                f"--distributed-world-size {count} without GPUs: nobody starts the other processes; use "
                f"`mtmoe train --nproc {count}` or `torchrun --nproc-per-node {count}`"
            )
        infer(cfg, force_distributed)

    def main_on_cpus(cfg: Any, main: Any, **kwargs: Any) -> None:
        distributed = cfg.distributed_training
        if distributed.distributed_init_method is None:
            infer_init_method(distributed)
        if distributed.distributed_init_method is not None and (cfg.common.cpu or not torch.cuda.is_available()):
            distributed.distributed_no_spawn = True
            distributed.distributed_backend = "gloo"
            if distributed.ddp_backend in ("c10d", "pytorch_ddp"):
                distributed.ddp_backend = "legacy_ddp"  # the other one is given a GPU's number
        call_main(cfg, main, **kwargs)

    distributed_utils.infer_init_method, distributed_utils.call_main = infer_init_method, main_on_cpus


def limit_waiting() -> None:
    """Let processes wait for each other for ``--collective-timeout`` seconds at most.

    fairseq gives no limit to the groups that it makes. They take torch's default, which is half an hour with gloo.
    """
    call_main = distributed_utils.call_main

    def main_with_limit(cfg: Any, main: Any, **kwargs: Any) -> None:
        limit = timedelta(seconds=getattr(cfg.task, "collective_timeout", COLLECTIVE_TIMEOUT))
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
        call_main(cfg, main, **kwargs)

    distributed_utils.call_main = main_with_limit


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
