"""Options of ``--task mtmoe_translation``."""

from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import ChoiceEnum
from omegaconf import II, MISSING

from fairseq_plugins.expert_parallel import ExpertParallelOptions
from fairseq_plugins.processes import COLLECTIVE_TIMEOUT
from mtmoe.training.drawing import DRAW_BLOCK


@dataclass
class MtmoeTranslationConfig(ExpertParallelOptions):
    """Options of ``--task mtmoe_translation``."""

    data: str = field(default=MISSING, metadata={"help": "folder that `mtmoe prepare` wrote"})
    directions: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "directions to train and validate, as en-de,de-en (default: those of the data)"}
    )
    source_lang: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "source language, to decode or validate one direction", "argparse_alias": "-s"}
    )
    target_lang: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "target language, to decode or validate one direction", "argparse_alias": "-t"}
    )
    encoder_langtok: ChoiceEnum(["src", "tgt"]) = field(  # type: ignore[valid-type]
        default="src", metadata={"help": "language whose tag goes before the source"}
    )
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "sample directions in proportion to n^(1/T); 1 = as they are, larger = flatter"}
    )
    curriculum_file: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": "YAML file of phases: directions that join training late; auto: training decides"},
    )
    curriculum_restart: ChoiceEnum(["none", "warmup"]) = field(  # type: ignore[valid-type]
        default="none",
        metadata={"help": "where a phase begins: go on, or begin anew with moments and learning rate (warmup)"},
    )
    virtual_epoch_size: int = field(
        default=0, metadata={"help": "sentence pairs in an epoch (0 = as many as the active directions have)"}
    )
    draw_block: int = field(
        default=DRAW_BLOCK,
        metadata={"help": "most sentence pairs that are drawn at once; of more, each part is an epoch for fairseq"},
    )
    valid_limit: int = field(
        default=0, metadata={"help": "validate on that many pairs of each direction, spread evenly (0 = all)"}
    )
    train_sample: int = field(
        default=0,
        metadata={"help": "also score that many training pairs of each direction at each validation (0 = none)"},
    )
    autocast: ChoiceEnum(["off", "bfloat16"]) = field(  # type: ignore[valid-type]
        default="off", metadata={"help": "number format of matrix products; unlike --bf16 it works on CPUs"}
    )
    identity_warmup: float = field(
        default=0.0, metadata={"help": "probability at update 0 that a batch copies its target, to teach attention"}
    )
    identity_warmup_updates: int = field(
        default=500, metadata={"help": "updates over which --identity-warmup falls linearly to 0"}
    )
    identity_floor: float = field(
        default=0.0, metadata={"help": "least probability that a training batch copies its target"}
    )
    source_token_dropout: float = field(
        default=0.0, metadata={"help": "probability that training reads a source word as unknown"}
    )
    target_token_dropout: float = field(
        default=0.0, metadata={"help": "probability that training reads a word of the target so far as unknown"}
    )
    token_dropout_passes: float = field(
        default=0.0,
        metadata={
            "help": "scale both rates by 1 - exp(-passes / this), passes over the text of each direction; 0 = do not"
        },
    )
    max_nonfinite_updates: int = field(
        default=20, metadata={"help": "training has diverged after that many skipped updates in a row (0 = never)"}
    )
    spike_factor: float = field(
        default=10.0,
        metadata={"help": "skip an update whose gradient norm is more than that many times the median of the last 128 "
                  "(0 = none)"},
    )
    rollbacks: int = field(
        default=2, metadata={"help": "times that diverged training goes back to the last good checkpoint"}
    )
    rollback_lr_factor: float = field(
        default=0.5, metadata={"help": "multiplies the learning rate, from there on, each time that it goes back"}
    )
    collective_timeout: float = field(
        default=COLLECTIVE_TIMEOUT,
        metadata={"help": "seconds that a process waits for the others before it ends training with an error"},
    )
    max_source_positions: int = field(default=1024, metadata={"help": "most tokens of a source, with its tag"})
    max_target_positions: int = field(default=1024, metadata={"help": "most tokens of a target"})
    seed: int = II("common.seed")
    log_interval: int = II("common.log_interval")
    max_update: int = II("optimization.max_update")
    update_freq: list[int] = II("optimization.update_freq")  # type: ignore[assignment]
    train_subset: str = II("dataset.train_subset")
    best_checkpoint_metric: str = II("checkpoint.best_checkpoint_metric")
