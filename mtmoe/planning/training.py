"""How a model is trained, as far as memory and time depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from mtmoe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes a value, under one of the number types."""

    weight: int
    gradient: int
    master: int
    """Of an fp32 master copy; 0 = there is none."""
    product: int
    """Of what matrix products read and write."""
    residual: int
    """Of what runs along the residual connections."""


DTYPES: dict[str, Bytes] = {
    "fp32": Bytes(4, 4, 0, 4, 4),
    "autocast": Bytes(4, 4, 0, 2, 4),
    "bf16": Bytes(2, 2, 4, 2, 2),
    "fp16": Bytes(2, 2, 4, 2, 2),
}
"""fp32 throughout; fp32 weights with bf16 products (``--autocast bfloat16``); bf16 and fp16 weights with fp32 master
copies (fairseq's ``--bf16`` and ``--fp16``)."""

ADAMW_STATES = 8
"""Bytes of AdamW's two moments for each parameter, fp32."""

PAYLOADS = {"compute": 0, "fp32": 4, "bf16": 2}
"""What the all-to-all sends -> bytes a value; 0 = the type of the products."""

GATING_DROPOUT_MODES = ("gate", "gate_expert")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """Choices of a training that cost or save memory, bytes or time."""

    tokens: int = 4096
    """Real target tokens a GPU in a batch, and as many source tokens."""
    length: int = 64
    """Tokens of a sentence on either side; attention's scores grow with it."""
    accumulate: int = 1
    """Batches a GPU in one update (``--update-freq``)."""
    dtype: str = "autocast"
    """One of `DTYPES`."""
    dropout: bool = True
    """Dropout is above 0, and its masks are kept for the backward pass."""
    zero1: bool = False
    """Optimiser states and master copies of what is replicated are sharded over all GPUs (ZeRO-1)."""
    offload: bool = False
    """Optimiser states and master copies of experts are in host memory, and AdamW steps there."""
    recompute: bool = False
    """Activations within layers are computed again in the backward pass (``--checkpoint-activations``)."""
    payload: str = "compute"
    """Number type of what the all-to-all sends, one of `PAYLOADS`."""
    gating_dropout: float = 0.0
    """Share of steps on which tokens stay on their GPU (Gating Dropout)."""
    gating_dropout_mode: str = "gate"
    """On those steps: gate uses the experts of the own GPU, gate_expert none."""
    bilevel: bool = False
    """Route to a node first, then to top_k experts on it (SMILE)."""
    overlap: bool = False
    """All-to-all hides behind the shared network of CMR."""

    def __post_init__(self) -> None:
        for name in ("tokens", "length", "accumulate"):
            if not 1 <= getattr(self, name) <= 1 << 30:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 1 and {1 << 30:,}")
        if self.length > self.tokens:
            raise ConfigError(f"length={self.length} must not exceed tokens={self.tokens}, one GPU's batch")
        for name, allowed in (
            ("dtype", tuple(DTYPES)), ("payload", tuple(PAYLOADS)), ("gating_dropout_mode", GATING_DROPOUT_MODES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; choose one of: {', '.join(allowed)}")
        if not 0 <= self.gating_dropout <= 1:
            raise ConfigError(f"gating_dropout={self.gating_dropout} must be between 0 and 1")

    @property
    def bytes(self) -> Bytes:
        """Bytes a value."""
        return DTYPES[self.dtype]

    @property
    def payload_bytes(self) -> int:
        """Bytes a value in the all-to-all."""
        return PAYLOADS[self.payload] or self.bytes.product

    @property
    def exchange_share(self) -> float:
        """Share of steps that exchange tokens between GPUs."""
        return 1 - self.gating_dropout

    @property
    def expert_share(self) -> float:
        """Share of steps that run experts."""
        return self.exchange_share if self.gating_dropout_mode == "gate_expert" else 1.0
