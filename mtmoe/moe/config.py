"""What one MoE layer needs to know, checked on construction."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from dataclasses import dataclass

SECOND_EXPERT_POLICIES = ("all", "sampling", "random", "threshold")
WEIGHT_NORMALISATIONS = ("after_drop", "before_drop", "none")
MASKING_SCALES = ("eval", "inverted")
CMR_GATE_DROP_MODES = ("inverted", "mask")
GATING_DROPOUT_MODES = ("gate", "gate_expert")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """One MoE layer; stored unchanged with the model. Rates are probabilities, 0 switches a method off."""

    d_model: int
    """Width of a token."""
    d_ffn: int
    """Width inside an expert."""
    num_experts: int = 8
    """Experts in each MoE layer, over all ranks."""
    top_k: int = 2
    """Experts that each token uses; 1 is Switch, 2 is GShard."""
    gate: str = "topk"
    """Gate family, a key of `mtmoe.moe.gates.GATES`."""
    activation: str = "relu"
    """Between the two matrices of an expert: relu, gelu or silu."""
    second_expert_policy: str = "all"
    """When a choice after the first is kept: all; sampling (drawn in proportion to its probability); random (kept with
    probability 2 x its normalised weight, GShard); threshold (kept above second_expert_threshold). Draws are for
    training only."""
    second_expert_threshold: float = 0.2
    """Normalised weight that a choice after the first must exceed under the threshold policy."""
    normalize_weights: str = "after_drop"
    """Make a token's weights sum to 1: after_drop (over the experts that seated it, NLLB), before_drop (over its
    choices), none (raw probabilities, as Switch; the only one possible for top_k 1)."""
    jitter: float = 0.0
    """Training multiplies the gate's input by a uniform draw from [1 - jitter, 1 + jitter] (Switch: 0.01)."""
    batch_prioritized: bool = False
    """Seat tokens by descending best gate probability instead of by position when capacity binds."""
    capacity_factor: float = 0.0
    """Slots of an expert in training, x top_k x ceil(tokens / num_experts); 0 drops no token."""
    eval_capacity_factor: float = 0.0
    """As capacity_factor, in evaluation; 0 drops no token."""
    eval_capacity_token_fraction: float = 0.0
    """If above 0, an expert has ceil(fraction x tokens) slots in evaluation instead (NLLB: 1.0, which never drops)."""
    dropout: float = 0.0
    """Dropout on an expert's output, before the gate's weight."""
    activation_dropout: float = 0.0
    """Dropout between the two matrices of an expert."""
    eom: float = 0.0
    """Expert Output Masking: rate at which a (token, expert) output is masked in training."""
    fom: float = 0.0
    """Final Output Masking: rate at which a token's whole output of the layer is masked in training."""
    masking_scale: str = "eval"
    """Where EOM and FOM keep the expectation: eval (outputs x (1 - rate) in evaluation, NLLB) or inverted (outputs /
    (1 - rate) in training)."""
    cmr: bool = False
    """Conditional MoE Routing: each token mixes a shared FFN and the experts by a learned gate."""
    cmr_d_ffn: int = 0
    """Width inside the shared FFN of CMR; 0 takes d_ffn."""
    cmr_gate_drop: float = 0.0
    """Rate at which a token's CMR gate is dropped in training (NLLB: 0.2)."""
    cmr_gate_drop_mode: str = "inverted"
    """inverted scales the surviving gates by 1 / (1 - rate), as NLLB's release; mask only zeroes the dropped ones."""
    gating_dropout: float = 0.0
    """Rate of training steps on which a layer skips the exchange between ranks (Gating Dropout; 0.3 in the paper)."""
    gating_dropout_mode: str = "gate"
    """On such steps: gate sends tokens to the experts of their own rank, gate_expert skips the experts (0.2)."""
    gating_dropout_ranks: int = 0
    """Ranks emulated in one process for gating dropout; 0 means one expert a rank."""
    load_balance_include_padding: bool = False
    """Count padding in the load-balance loss, as NLLB's release does."""
    init_scale: float = 1.0
    """Scale of the variance of an expert's initial weights (Switch: 0.1)."""

    def __post_init__(self) -> None:
        for name in ("d_model", "d_ffn", "num_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be between 1 and num_experts={self.num_experts}")
        for name in ("dropout", "activation_dropout", "eom", "fom", "cmr_gate_drop", "gating_dropout", "jitter"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1")
        for name, allowed in (
            ("second_expert_policy", SECOND_EXPERT_POLICIES),
            ("normalize_weights", WEIGHT_NORMALISATIONS),
            ("masking_scale", MASKING_SCALES),
            ("cmr_gate_drop_mode", CMR_GATE_DROP_MODES),
            ("gating_dropout_mode", GATING_DROPOUT_MODES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of: {', '.join(allowed)}")
        for name in ("capacity_factor", "eval_capacity_factor", "init_scale", "cmr_d_ffn"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0.0 <= self.eval_capacity_token_fraction <= 1.0:
            fraction = self.eval_capacity_token_fraction
            raise ValueError(f"eval_capacity_token_fraction={fraction} must be between 0 and 1 (1 never drops)")
        if self.top_k == 1 and self.normalize_weights != "none":
            # A normalised single weight is the constant 1: the task loss would give the gate no gradient at all.
            raise ValueError(
                f"normalize_weights={self.normalize_weights!r} with top_k=1 would never train the gate; use 'none'"
            )
        if self.cmr_gate_drop > 0 and not self.cmr:
            raise ValueError(f"cmr_gate_drop={self.cmr_gate_drop} needs cmr; switch cmr on or set cmr_gate_drop to 0")
        for name in ("eom", "fom", "cmr_gate_drop"):
            inverted = self.masking_scale if name != "cmr_gate_drop" else self.cmr_gate_drop_mode
            if getattr(self, name) == 1.0 and inverted == "inverted":
                raise ValueError(f"{name}=1.0 cannot be scaled by 1 / (1 - rate); use a rate below 1")
        if self.num_experts % self.ranks:
            raise ValueError(
                f"gating_dropout_ranks={self.gating_dropout_ranks} must divide num_experts={self.num_experts}"
            )

    @property
    def ranks(self) -> int:
        """Emulated ranks of gating dropout, with 0 resolved to one expert a rank."""
        return self.gating_dropout_ranks or self.num_experts


def field_help() -> dict[str, str]:
    """The line of documentation under each field of `MoEConfig`, for the help of options made from it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(MoEConfig))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, following in itertools.pairwise(body.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            texts[statement.target.id] = " ".join(str(following.value.value).split())
    return texts
