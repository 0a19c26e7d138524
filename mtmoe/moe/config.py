"""What one MoE layer needs to know, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass

SECOND_EXPERT_POLICIES = ("all", "sampling", "random", "threshold")
WEIGHT_NORMALISATIONS = ("after_drop", "before_drop", "none")
MASKING_SCALES = ("eval", "inverted")
CMR_GATE_DROP_MODES = ("inverted", "mask")
GATING_DROPOUT_MODES = ("gate", "gate_expert")
RATES = (
    "dropout", "activation_dropout", "eom", "fom", "cmr_gate_drop", "gating_dropout", "jitter",
    "cluster_expert_dropout",
)  # fmt: skip
CLUSTER_VARIANCE_SCALES = ("mean", "sum")

LATER_FIELDS = (
    "cosine_gate_dim", "gate_bias", "eval_capacity",
    "expert_clusters", "cluster_variance_type", "cluster_variance_scale",
    "cluster_expert_dropout", "cluster_expert_dropout_interval", "expert_nodes",
)  # fmt: skip
"""Fields that models saved by earlier versions lack; at its default each leaves a layer as it was without the field."""


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
    """topk: one linear map (Switch, GShard); moec: cosine similarity to each expert with a learnt temperature, top_k 1
    (MoEC); bilevel: a node, then top_k experts inside it, normalize_weights none (SMILE)."""
    expert_nodes: int = 0
    """Nodes of the bilevel gate: groups of experts with consecutive numbers, those of a host where ranks share them
    out."""
    cosine_gate_dim: int = 32
    """Width in which the moec gate compares tokens with experts."""
    gate_bias: bool = False
    """Give each expert of the topk gate a bias beside its row of weights."""
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
    eval_capacity: int = 0
    """If above 0, an expert has so many slots in evaluation, however many tokens there are;
    eval_capacity_token_fraction comes first."""
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
    """Ranks emulated in one process for gating dropout; 0 means one expert a rank. Where ranks share out experts,
    those are meant, and this stays 0."""
    expert_clusters: int = 0
    """Clusters of experts with consecutive numbers (MoEC), for cluster_variance_loss_weight and cluster_expert_dropout,
    under either gate; 0 means none."""
    cluster_variance_type: int = 1
    """Variance of the gate's mean probabilities that the cluster loss holds down: 0 over all experts, 1 within each
    cluster (MoEC), 2 the same over exp(gap), which also parts a token's best group of experts from its next."""
    cluster_variance_scale: str = "mean"
    """mean: the variance is of means over tokens, so that its weight suits any batch; sum: of sums over tokens, as in
    MoEC (weight 0.01 there), x the tokens of a batch."""
    cluster_expert_dropout: float = 0.0
    """Share of each cluster's experts that takes no part in training for a while, rounded down (MoEC: 0.5); one at
    least takes part."""
    cluster_expert_dropout_interval: int = 250
    """Updates after which cluster_expert_dropout draws other experts."""
    load_balance_include_padding: bool = False
    """Count padding in the load-balance loss, as NLLB's release does."""
    init_scale: float = 1.0
    """Scale of the variance of an expert's initial weights (Switch: 0.1)."""

    def __post_init__(self) -> None:
        for name in ("d_model", "d_ffn", "num_experts", "cosine_gate_dim", "cluster_expert_dropout_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be between 1 and num_experts={self.num_experts}")
        for name in RATES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1")
        for name, allowed in (
            ("second_expert_policy", SECOND_EXPERT_POLICIES),
            ("normalize_weights", WEIGHT_NORMALISATIONS),
            ("masking_scale", MASKING_SCALES),
            ("cmr_gate_drop_mode", CMR_GATE_DROP_MODES),
            ("gating_dropout_mode", GATING_DROPOUT_MODES),
            ("cluster_variance_scale", CLUSTER_VARIANCE_SCALES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of: {', '.join(allowed)}")
        for name in (
            "capacity_factor", "eval_capacity_factor", "eval_capacity", "init_scale", "cmr_d_ffn", "expert_clusters",
        ):  # fmt: skip
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
        self._check_clusters()
        self._check_nodes()

    def _check_clusters(self) -> None:
        clusters, rate = self.expert_clusters, self.cluster_expert_dropout
        if self.gate == "moec" and self.top_k != 1:
            raise ValueError(f"gate='moec' sends a token to one expert: set top_k=1 instead of {self.top_k}")
        if self.gate == "moec" and self.gate_bias:
            raise ValueError("gate='moec' compares directions, which have no bias: leave gate_bias out")
        if self.cluster_variance_type not in (0, 1, 2):
            raise ValueError(f"cluster_variance_type={self.cluster_variance_type} must be 0, 1 or 2")
        if clusters and self.num_experts % clusters:
            raise ValueError(f"expert_clusters={clusters} must divide num_experts={self.num_experts}")
        if clusters == 1 and self.cluster_variance_type == 2:
            raise ValueError("cluster_variance_type=2 compares clusters: set expert_clusters to 2 or more")
        if rate == 0:
            return
        if not clusters:
            raise ValueError(f"cluster_expert_dropout={rate} needs expert_clusters; give their number")
        size = self.num_experts // clusters
        if self.cluster_survivors == size:
            raise ValueError(
                f"cluster_expert_dropout={rate} drops no expert of clusters of {size}; raise it, or set fewer clusters"
            )
        if clusters * self.cluster_survivors < self.top_k:
            raise ValueError(
                f"cluster_expert_dropout={rate} leaves {clusters * self.cluster_survivors} experts, fewer than "
                f"top_k={self.top_k}"
            )
        if self.gating_dropout > 0 and self.gating_dropout_mode == "gate":
            raise ValueError(
                "gating_dropout would send tokens to experts that cluster_expert_dropout leaves out; use one of the "
                "two, or gating_dropout_mode='gate_expert'"
            )

    def _check_nodes(self) -> None:
        nodes = self.expert_nodes
        if self.gate != "bilevel":
            if nodes:
                raise ValueError(f"expert_nodes={nodes} needs gate='bilevel'; set it, or leave expert_nodes at 0")
            return
        if nodes < 1 or self.num_experts % nodes:
            raise ValueError(
                f"gate='bilevel' needs expert_nodes that divide num_experts={self.num_experts}, got {nodes}; give the "
                "number of hosts that the experts are on, or any number of groups in one process"
            )
        if self.top_k > self.node_experts:
            raise ValueError(
                f"gate='bilevel' chooses top_k={self.top_k} experts inside a node, which has {self.node_experts}; "
                "lower top_k or expert_nodes"
            )
        if self.normalize_weights != "none":
            # The node's probability would cancel: the task loss would give its router no gradient.
            raise ValueError(
                f"normalize_weights={self.normalize_weights!r} would never train the node router of gate='bilevel'; "
                "use 'none'"
            )
        if self.expert_clusters:
            raise ValueError(
                f"expert_clusters={self.expert_clusters} does not work with gate='bilevel', whose nodes are groups "
                "already; leave it at 0"
            )

    @property
    def node_experts(self) -> int:
        """Experts of each node of the bilevel gate."""
        return self.num_experts // (self.expert_nodes or 1)

    @property
    def ranks(self) -> int:
        """Emulated ranks of gating dropout, with 0 resolved to one expert a rank."""
        return self.gating_dropout_ranks or self.num_experts

    @property
    def cluster_survivors(self) -> int:
        """Experts of each cluster that take part at a time under cluster_expert_dropout."""
        size = self.num_experts // (self.expert_clusters or 1)
        # The small term: 0.29 * 100 is 28.999… in floating point, and means 29.
        return max(1, size - int(self.cluster_expert_dropout * size + 1e-6))
