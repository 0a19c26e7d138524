"""Expert parallelism under fairseq: the ranks of a run, and what a step's random choices depend on."""

import contextlib
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.distributed.legacy_distributed_data_parallel import LegacyDistributedDataParallel
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor

from fairseq_plugins.processes import distributed
from mtmoe.errors import ConfigError
from mtmoe.moe.keyed import DrawKeys, token_numbers
from mtmoe.parallel import EXPERT_GRADIENT_SCALES, ExpertParallel, Layout, Traffic, build_groups

logger = logging.getLogger(__name__)

EXCHANGE_DTYPES = {"compute": None, "bfloat16": torch.bfloat16}
"""Value of --exchange-dtype -> what `ExpertParallel` calls the payload."""


@dataclass
class ExpertParallelOptions(FairseqDataclass):
    """Options of the task about processes that work together."""

    expert_parallel_size: int = field(
        default=1, metadata={"help": "processes that share out the experts; divides the number of processes"}
    )
    expert_gradient_scale: ChoiceEnum(list(EXPERT_GRADIENT_SCALES)) = field(  # type: ignore[valid-type]
        default="world_size",
        metadata={
            "help": "of experts that are shared out: world_size, as in one process; sqrt_world_size, that times the "
            "root of --expert-parallel-size (NLLB)"
        },
    )
    layout_invariant: bool = field(
        default=False,
        metadata={
            "help": "sum routing losses over all processes and key the random choices of MoE layers by sentence and "
            "position, so that any number of processes trains alike; always with --expert-parallel-size above 1"
        },
    )
    hierarchical_exchange: bool = field(
        default=False,
        metadata={
            "help": "send rows to experts in two steps, between hosts and then inside one, so that each crosses "
            "once to a host; hosts need equally many processes"
        },
    )
    exchange_dtype: ChoiceEnum(list(EXCHANGE_DTYPES)) = field(  # type: ignore[valid-type]
        default="compute",
        metadata={
            "help": "type that rows and their gradients travel to experts and back in: compute, that of the matrix "
            "products; bfloat16, rounded to it"
        },
    )
    overlap_exchange: bool = field(
        default=False,
        metadata={"help": "with --cmr, run the shared network while rows travel to experts and back; same numbers"},
    )
    store_ema: bool = II("ema.store_ema")  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Step:
    """What the MoE layers of a model need to know of a micro-batch, so that it does not matter which process has it."""

    seed: int
    update: int
    sentences: Tensor
    """(batch,) int64, their numbers in the data set."""
    counts: bool
    """False for a batch that a process runs only because the others have one."""

    def keys(self, layer: int, length: int) -> DrawKeys:
        """Keys of a layer's draws for (length, batch) tokens."""
        return DrawKeys(self.seed, self.update, layer, token_numbers(self.sentences, length))

    def padding(self, mask: Tensor | None, length: int) -> Tensor | None:
        """(length, batch) bool: `mask`, or all of a batch that does not count."""
        if self.counts:
            return mask
        return torch.ones(length, len(self.sentences), dtype=torch.bool, device=self.sentences.device)


def in_any_layout(cfg: Any) -> bool:
    """Whether training is to be the same however processes share the work; `cfg` is that of the task."""
    return bool(cfg.layout_invariant or cfg.expert_parallel_size > 1)


def start(cfg: Any) -> ExpertParallel | None:
    """Make the groups that the options ask for; all processes have to call this together.

    Args:
        cfg: of the task.

    Returns:
        None in one process, and where each process is to route for itself.

    Raises:
        ConfigError: the options do not go together.
    """
    if not in_any_layout(cfg) or not distributed():
        return None
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    check(cfg)
    hosts: list[str] = [""] * world
    torch.distributed.all_gather_object(hosts, socket.gethostname())
    numbers = tuple(sorted(set(hosts)).index(host) for host in hosts)
    layout = Layout(world_size=world, expert_parallel_size=cfg.expert_parallel_size, rank=rank, hosts=numbers)
    logger.info(
        "%d processes on %d hosts: experts are shared out over %d, and %d hold the same",
        world, len(set(hosts)), layout.expert_parallel_size, layout.data_parallel_size,
    )  # fmt: skip
    if cfg.hierarchical_exchange and layout.nodes == 1:
        logger.info("the processes that share out experts are on one host: --hierarchical-exchange changes nothing")
    groups = build_groups(layout, hierarchical=cfg.hierarchical_exchange)
    return ExpertParallel(groups, EXCHANGE_DTYPES[str(cfg.exchange_dtype)], cfg.overlap_exchange)


def check(cfg: Any) -> None:
    """Refuse what would treat the experts of one process as those of all.

    Raises:
        ConfigError: there is one.
    """
    if cfg.expert_parallel_size > 1 and cfg.store_ema:
        raise ConfigError("--store-ema does not work with --expert-parallel-size above 1; leave it out")


def check_training(cfg: Any) -> None:
    """Refuse to train with fewer processes than the experts are to be shared out over.

    Raises:
        ConfigError: there is only one process.
    """
    if cfg.expert_parallel_size > 1 and not distributed():
        raise ConfigError(
            f"--expert-parallel-size {cfg.expert_parallel_size} needs as many processes, but there is one; start "
            f"training with torchrun --nproc_per_node {cfg.expert_parallel_size}, or through Slurm"
        )


@contextlib.contextmanager
def counting(parallel: ExpertParallel | None, log: dict[str, Any]) -> Iterator[None]:
    """Add to `log` the bytes that the exchange of rows sends meanwhile from this process to others."""
    traffic = Traffic() if parallel is None else parallel.traffic
    near, far = traffic.same_host, traffic.other_hosts
    yield
    if parallel is not None and parallel.size > 1:
        log |= {"sent_same_host": traffic.same_host - near, "sent_other_hosts": traffic.other_hosts - far}


def log_sent(logging_outputs: list[dict[str, Any]]) -> None:
    """Log what all processes sent in an update, in MB (10^6 bytes)."""
    for name in ("sent_same_host", "sent_other_hosts"):
        if any(name in log for log in logging_outputs):
            total = sum(log.get(name, 0) for log in logging_outputs)
            metrics.log_scalar(f"{name}_mb", total / 1e6, weight=0, priority=530, round=3)


def share(model: Any, optimizer: Any, parallel: ExpertParallel, scale: str) -> None:
    """Tell an optimiser whose gradients to sum.

    Args:
        model: in fairseq's wrapper, which must leave the gradients of experts alone.
        optimizer: of fairseq.
        parallel: the ranks.
        scale: one of `EXPERT_GRADIENT_SCALES`.

    Raises:
        ConfigError: the wrapper or the optimiser is none that can.
    """
    if parallel.size == 1:
        return
    if not isinstance(getattr(model, "module", None), LegacyDistributedDataParallel):
        raise ConfigError(
            "--expert-parallel-size above 1 needs --ddp-backend legacy_ddp: the others average experts over all "
            "processes, though each has its own"
        )
    if not hasattr(optimizer, "share_experts"):
        raise ConfigError(
            "--expert-parallel-size above 1 needs --optimizer mtmoe_adamw, without --fp16 or --amp; --bf16 and "
            "--autocast bfloat16 work"
        )
    optimizer.share_experts(parallel, scale)
