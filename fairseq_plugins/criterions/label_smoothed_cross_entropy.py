"""Label-smoothed cross entropy plus the auxiliary losses of routing, each of them logged."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, nn

from mtmoe.errors import ConfigError
from mtmoe.moe.losses import cmr_budget_loss
from mtmoe.training.cross_entropy import label_smoothed_cross_entropy, label_smoothed_cross_entropy_from_logits

AUXILIARY = (
    "load_balance_loss", "node_balance_loss", "inner_balance_loss", "router_z_loss", "cluster_variance_loss",
    "cmr_loss",
)  # fmt: skip
"""Auxiliary losses, under the names that they are logged and weighted by."""


@dataclass
class MtmoeCriterionConfig(FairseqDataclass):
    """Options of ``--criterion mtmoe_label_smoothed_cross_entropy``."""

    label_smoothing: float = field(default=0.0, metadata={"help": "epsilon of label smoothing, 0 = none"})
    load_balance_loss_weight: float = field(
        default=0.01, metadata={"help": "weight of the load balance loss, summed over layers, for each target token"}
    )
    node_balance_loss_weight: float = field(
        default=0.005, metadata={"help": "weight of the bilevel gate's balance over nodes, as load_balance_loss_weight"}
    )
    inner_balance_loss_weight: float = field(
        default=0.005,
        metadata={"help": "weight of the bilevel gate's balance inside nodes, as load_balance_loss_weight"},
    )
    router_z_loss_weight: float = field(
        default=0.0, metadata={"help": "weight of the router z-loss, summed over layers, for each target token"}
    )
    cluster_variance_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of the variance of routing within clusters of experts, summed over layers, for each target "
            "token; needs expert_clusters"
        },
    )
    cmr_loss_weight: float = field(
        default=0.1, metadata={"help": "weight of the budget loss of conditional MoE routing, for each target token"}
    )
    cmr_budget: float = field(
        default=0.8, metadata={"help": "share of tokens that conditional MoE routing may send to the experts"}
    )
    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion("mtmoe_label_smoothed_cross_entropy", dataclass=MtmoeCriterionConfig)
class MtmoeLabelSmoothedCrossEntropy(FairseqCriterion):
    """``LS-NLL + tokens * (w_lb * load balance + w_z * router z + w_cv * cluster variance + w_cmr * budget loss)``.

    Under the bilevel gate two load balance losses, over nodes and inside them, take the place of the one.
    A model says what its routing did in ``net_output[1]["routing"]``: (layer name, `mtmoe.moe.MoEOutput`) pairs; a
    dense one has none, and its loss and logs are those of fairseq's ``label_smoothed_cross_entropy``. In validation the
    auxiliary losses are logged but not added, so that losses of different models compare.
    """

    def __init__(
        self,
        task: Any,
        label_smoothing: float,
        load_balance_loss_weight: float,
        node_balance_loss_weight: float,
        inner_balance_loss_weight: float,
        router_z_loss_weight: float,
        cluster_variance_loss_weight: float,
        cmr_loss_weight: float,
        cmr_budget: float,
        sentence_avg: bool,
    ) -> None:
        super().__init__(task)
        self.label_smoothing, self.sentence_avg, self.cmr_budget = label_smoothing, sentence_avg, cmr_budget
        weights = (
            load_balance_loss_weight, node_balance_loss_weight, inner_balance_loss_weight, router_z_loss_weight,
            cluster_variance_loss_weight, cmr_loss_weight,
        )  # fmt: skip
        self.weights = dict(zip(AUXILIARY, weights, strict=True))
        self.collect_routing = True
        """Whether the next forward pass gathers entropy and load by layer; the task sets it where they are shown."""

    def forward(self, model: Any, sample: dict, reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        """Compute the loss of a sample.

        Args:
            model: the model, maybe in a wrapper.
            sample: a batch of the task.
            reduce: must be true; there is no loss by token.

        Returns:
            The loss, a sum over tokens; its divisor; what to log: detached scalars.
        """
        if not reduce:
            raise ValueError("this criterion has no loss by token; use fairseq's label_smoothed_cross_entropy for that")
        target = sample["target"]
        loss, nll, extra = self._cross_entropy(model, sample["net_input"], target)
        tokens = sample["ntokens"]
        sample_size = target.shape[0] if self.sentence_avg else tokens
        log: dict[str, Any] = {
            "loss": loss.detach(),
            "nll_loss": nll.sum(),
            "ntokens": tokens,
            "nsentences": target.shape[0],
            "sample_size": sample_size,
        }
        routing = extra.get("routing") if isinstance(extra, dict) else None
        if routing:
            auxiliary = self.auxiliary_losses(routing)
            log.update({name: value.detach() * tokens for name, value in auxiliary.items()})
            if model.training:
                for name, value in auxiliary.items():
                    if self.weights[name]:
                        loss = loss + (self.weights[name] * tokens) * value
                log["loss"] = loss.detach()
            if self.collect_routing:
                log.update(routing_log(routing))
        if not model.training and "direction" in sample:
            log.update(self._by_direction(nll.view_as(target), target, sample["direction"]))
        return loss, sample_size, log

    def auxiliary_losses(self, routing: Sequence[tuple[str, Any]]) -> dict[str, Tensor]:
        """The auxiliary losses that a model has, unweighted: sums over its layers, CMR's over all layers at once.

        Args:
            routing: (layer name, output of its MoE layer).

        Returns:
            Name -> () fp32.

        Raises:
            ConfigError: the cluster variance is weighted, but experts have no clusters.
        """
        losses = {}
        for key in ("load_balance", "node_balance", "inner_balance", "router_z", "cluster_variance"):
            values = [output.losses[key] for _, output in routing if key in output.losses]
            if values:
                losses[f"{key}_loss"] = torch.stack(values).sum()
        weight = self.weights["cluster_variance_loss"]
        if weight and "cluster_variance_loss" not in losses:
            raise ConfigError(f"cluster_variance_loss_weight={weight} needs expert_clusters; give their number")
        gates = [output.statistics for _, output in routing if output.statistics.cmr_gate_sum is not None]
        if gates:
            losses["cmr_loss"] = cmr_budget_loss(
                [each.cmr_gate_sum for each in gates], [each.cmr_gate_count for each in gates], self.cmr_budget
            )
        return losses

    def _cross_entropy(self, model: Any, net_input: dict, target: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Loss, (tokens,) negative log likelihoods and the model's extra output; without logits where the model can."""
        projection = getattr(getattr(model, "decoder", None), "output_projection", None)
        options = {"label_smoothing": self.label_smoothing, "ignore_index": self.padding_idx}
        if isinstance(projection, nn.Linear) and projection.bias is None:
            features, extra = model(**net_input, features_only=True)
            features = features.reshape(-1, features.shape[-1])
            loss, nll = label_smoothed_cross_entropy(features, projection.weight, target.view(-1), **options)
        else:
            logits, extra = model(**net_input)
            logits = logits.reshape(-1, logits.shape[-1])
            loss, nll = label_smoothed_cross_entropy_from_logits(logits, target.view(-1), **options)
        return loss, nll, extra

    def _by_direction(self, nll: Tensor, target: Tensor, direction: Tensor) -> dict[str, float]:
        """Sums of each direction; all directions are listed, so that processes can add them up."""
        names = self.task.directions
        sums = torch.stack([nll.sum(dim=1), target.ne(self.padding_idx).sum(dim=1).float()])  # (2, sentences)
        nlls, tokens = sums.new_zeros(2, len(names)).index_add_(1, direction, sums).tolist()
        log = {f"nll_loss_{name}": value for name, value in zip(names, nlls, strict=True)}
        log |= {f"ntokens_{name}": value for name, value in zip(names, tokens, strict=True)}
        return log

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log the sums of all micro-batches and processes; one transfer from the device for all of them."""
        total = _sums(logging_outputs)
        tokens, sample_size = total.pop("ntokens"), total.pop("sample_size")
        loss, nll = total.pop("loss"), total.pop("nll_loss")
        if math.isfinite(loss) and math.isfinite(nll):
            metrics.log_scalar("loss", loss / sample_size / math.log(2), sample_size, round=3)
            metrics.log_scalar("nll_loss", nll / tokens / math.log(2), tokens, round=3)
        else:  # a skipped update: named, so that fairseq does not log -1, but without weight
            metrics.log_scalar("loss", 0.0, weight=0, round=3)
            metrics.log_scalar("nll_loss", 0.0, weight=0, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        for name in AUXILIARY:
            value = total.pop(name, math.nan)
            if math.isfinite(value):
                metrics.log_scalar(name, value / tokens, tokens, priority=30, round=4)
        micro_batches = total.pop("routing_micro_batches", 0.0)
        for name, value in total.items():
            if name.startswith("nll_loss_") and total[f"ntokens_{name[9:]}"] > 0:
                count = total[f"ntokens_{name[9:]}"]
                metrics.log_scalar(name, value / count / math.log(2), count, priority=40, round=3)
            elif name.startswith("routing_") and math.isfinite(value):
                # The weight 0 keeps the latest value: these are gathered only where they are logged.
                metrics.log_scalar(name[8:], value / micro_batches, weight=0, priority=50, round=3)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """All that is logged is a sum."""
        return True


def routing_log(routing: Sequence[tuple[str, Any]]) -> dict[str, float]:
    """What the routing of a batch looked like: by layer and on average; one transfer from the device.

    Returns:
        ``routing_<layer>_…`` and ``routing_…``: ``entropy_gating`` (nats), ``overflow`` (% of the choices that found no
        slot), ``load_max`` and ``load_min`` (× an even share), ``unused_expert_count``; with CMR ``cmr_gate`` (mean).
    """
    names = ["entropy_gating", "overflow", "load_max", "load_min", "unused_expert_count", "cmr_gate"]
    rows = []
    for _, output in routing:
        statistics = output.statistics
        load = statistics.load
        gate = load.new_tensor(math.nan)
        if statistics.cmr_gate_sum is not None:
            gate = statistics.cmr_gate_sum.detach() / statistics.cmr_gate_count.clamp(min=1)
        rows += [statistics.entropy, 100 * statistics.dropped_share, load.max(), load.min(), (load == 0).sum(), gate]
    values = torch.stack([row.float() for row in rows]).view(len(routing), len(names))
    log = {"routing_micro_batches": 1.0}
    for (layer, _), row in zip(routing, values.tolist(), strict=True):
        log |= {f"routing_{layer}_{name}": value for name, value in zip(names, row, strict=True) if value == value}
    means = values.mean(dim=0).tolist()
    log |= {f"routing_{name}": value for name, value in zip(names, means, strict=True) if value == value}
    return log


def _sums(logging_outputs: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Sum of each key over micro-batches; tensors are fetched together."""
    total: dict[str, float] = {}
    tensors: list[tuple[str, Tensor]] = []
    for log in logging_outputs:
        for name, value in log.items():
            if isinstance(value, Tensor):
                tensors.append((name, value))
            else:
                total[name] = total.get(name, 0.0) + value
    if tensors:
        numbers = torch.stack([value.double() for _, value in tensors]).tolist()
        for (name, _), number in zip(tensors, numbers, strict=True):
            total[name] = total.get(name, 0.0) + number
    return total
