"""Many-to-many translation with language tags: the task ``mtmoe_translation`` for all of fairseq's commands."""

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask, register_task
from torch import Tensor

from fairseq_plugins import expert_parallel
from fairseq_plugins.stopping import stopper
from fairseq_plugins.tasks.batch_iterators import FixedBatches, TrainingEpochs
from fairseq_plugins.tasks.options import MtmoeTranslationConfig
from fairseq_plugins.tasks.parallel_dataset import Direction, ParallelDataset, Side, read_sides
from fairseq_plugins.tasks.token_dropout import TokenDropout
from fairseq_plugins.tasks.validation import TRAIN_SAMPLE, check_metric, log_means, read_groups
from fairseq_plugins.update_guard import UpdateGuard
from mtmoe.data.shards import has_side
from mtmoe.errors import ConfigError, DataError, UnknownLanguage
from mtmoe.parallel import ExpertParallel
from mtmoe.training import curriculum
from mtmoe.training.auto_curriculum import AutoCurriculum
from mtmoe.training.sampling import Pool, keyed_uniform

logger = logging.getLogger(__name__)


@register_task("mtmoe_translation", dataclass=MtmoeTranslationConfig)
class MtmoeTranslationTask(FairseqTask):
    """Encoder input ``[source tag] source </s>``; the decoder starts from ``[target tag]``, which is never searched."""

    cfg: MtmoeTranslationConfig

    def __init__(self, cfg: MtmoeTranslationConfig, dictionary: Dictionary, directions: Sequence[str]) -> None:
        super().__init__(cfg)
        self.dictionary = dictionary
        self.directions = list(directions)
        """Names behind the ``direction`` numbers of a sample."""
        self.groups = read_groups(Path(cfg.data), self.directions)
        self.guard = UpdateGuard(cfg.max_nonfinite_updates, cfg.spike_factor)
        self.num_updates = 0
        self.epochs: TrainingEpochs | None = None
        self.parallel: ExpertParallel | None = None
        """The processes that share the work of MoE layers; None while there is no model, or each works for itself."""
        self.tokens = TokenDropout.from_config(cfg, dictionary, self.directions)
        self._micro_batch = (-1, 0)
        self._validated = 0
        self._sides: dict[tuple[Path, str], Sequence[Side]] = {}

    @classmethod
    def setup_task(cls, cfg: MtmoeTranslationConfig, **kwargs: Any) -> "MtmoeTranslationTask":
        """Read dictionary and directions from the data folder.

        Raises:
            DataError: it is no folder of prepared data.
            UnknownLanguage: a direction has a language without a tag in the dictionary.
            ConfigError: options contradict each other.
        """
        folder = Path(cfg.data)
        for name in ("dict.txt", "languages.json"):
            if not (folder / name).is_file():
                raise DataError(f"{folder / name} is missing; give the folder that `mtmoe prepare` wrote")
        dictionary = Dictionary.load(str(folder / "dict.txt"))
        listed = json.loads((folder / "languages.json").read_text(encoding="utf-8"))
        if (cfg.source_lang is None) != (cfg.target_lang is None):
            raise ConfigError("give both --source-lang and --target-lang, or neither")
        if cfg.source_lang is not None:
            directions = [f"{cfg.source_lang}-{cfg.target_lang}"]
        elif cfg.directions is not None:
            directions = [name.strip() for name in cfg.directions.split(",") if name.strip()]
        else:
            directions = list(listed["directions"])
        for name in directions:
            if name.count("-") != 1:
                raise ConfigError(f"direction {name!r} must be written source-target, such as en-de")
            for language in name.split("-"):
                if dictionary.index(f"__{language}__") == dictionary.unk():
                    raise UnknownLanguage(
                        f"language {language!r} of {name} has no tag in {folder / 'dict.txt'}; "
                        f"it has: {', '.join(listed['languages'])}"
                    )
        if cfg.collective_timeout <= 0:
            raise ConfigError(f"collective-timeout={cfg.collective_timeout:g} must be above 0 seconds")
        if not 0 < cfg.rollback_lr_factor <= 1:
            raise ConfigError(f"rollback-lr-factor={cfg.rollback_lr_factor:g} must be above 0, and 1 at most")
        logger.info("%d directions, %d words in the dictionary", len(directions), len(dictionary))
        return cls(cfg, dictionary, directions)

    # What fairseq asks of every task

    @property
    def source_dictionary(self) -> Dictionary:
        """The dictionary; both sides share it."""
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        """The dictionary; both sides share it."""
        return self.dictionary

    def max_positions(self) -> tuple[int, int]:
        """Most tokens of source (with its tag) and target."""
        return self.cfg.max_source_positions, self.cfg.max_target_positions

    def has_sharded_data(self, split: str) -> bool:
        """The data is one folder."""
        return False

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Make the model, with this process's share of the experts; called by fairseq in all processes."""
        self.parallel = expert_parallel.start(self.cfg)
        return super().build_model(cfg, from_checkpoint)

    # Data

    def load_dataset(self, split: str, combine: bool = False, task_cfg: Any = None, **kwargs: Any) -> None:
        """Load all directions of a split as one data set.

        Raises:
            DataError: no direction has this split, or files are damaged.
        """
        training = split == self.cfg.train_subset and self.cfg.source_lang is None
        directions, missing = [], []
        for name in self.directions:
            source, target = name.split("-")
            a, b = sorted((source, target))
            prefix = Path(self.cfg.data) / "bin" / f"{split}.{a}-{b}"
            if not has_side(prefix, source) and not has_side(prefix, target):
                missing.append(name)
                continue
            directions.append(self._direction(name, self._sides_of(prefix, source), self._sides_of(prefix, target)))
        if not directions or (missing and (self.cfg.directions or self.cfg.source_lang)):
            raise DataError(f"{self.cfg.data}/bin has no {split} files for {', '.join(missing) or 'any direction'}")
        if missing:
            logger.info("%s: nothing for %s, which are only evaluated or only trained", split, ", ".join(missing))
        limit = 0 if training or self.cfg.source_lang is not None else self.cfg.valid_limit
        dataset = ParallelDataset(directions, pad=self.dictionary.pad(), limit=limit, training=training)
        logger.info("%s: %d pairs in %d directions", split, len(dataset), len(directions))
        self.datasets[split] = dataset
        if training and self.cfg.train_sample:
            self.datasets[TRAIN_SAMPLE] = dataset.sample(self.cfg.train_sample)
        if training:
            check_metric(self.cfg.best_checkpoint_metric, self.directions, self.groups)
        self._sides.clear()

    def build_dataset_for_inference(
        self, src_tokens: list[Tensor], src_lengths: list[int], constraints: Tensor | None = None, **kwargs: Any
    ) -> ParallelDataset:
        """Make a data set of source sentences, for ``fairseq-interactive``.

        Args:
            src_tokens: of each sentence its ids, with ``</s>``.
            src_lengths: their lengths.
            constraints: packed constraints of each sentence, for ``--constraints``.
        """
        self._one_direction()
        tokens = torch.cat(src_tokens).numpy() if src_tokens else np.zeros(0, dtype=np.int64)
        side = Side(tokens, np.asarray(src_lengths, dtype=np.int64))
        dataset = ParallelDataset([self._direction(self.directions[0], side, None)], pad=self.dictionary.pad())
        dataset.constraints = constraints
        return dataset

    def get_batch_iterator(
        self,
        dataset: ParallelDataset,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        max_positions: Any = None,
        ignore_invalid_inputs: bool = False,
        required_batch_size_multiple: int = 1,
        seed: int = 1,
        num_shards: int = 1,
        shard_id: int = 0,
        epoch: int = 1,
        **kwargs: Any,
    ) -> TrainingEpochs | FixedBatches:
        """Iterate over batches; epochs are drawn anew for the training set, the others come in one fixed order.

        fairseq's ``--num-workers`` and ``--data-buffer-size`` have no effect: a batch takes less time than a worker
        needs to hand it over.

        Raises:
            DataError: a sentence is too long and `ignore_invalid_inputs` is off, or none is short enough.
        """
        pools, longest = dataset.usable(max_positions, max_tokens)
        too_long = len(dataset) - sum(map(len, pools.values()))
        if too_long:
            text = (
                f"{too_long} of {len(dataset)} pairs are longer than {max_positions} positions or "
                f"max-tokens={max_tokens}, the longest {dataset.size(longest)}"
            )
            if not (ignore_invalid_inputs or dataset is self.datasets.get(TRAIN_SAMPLE)):
                raise DataError(f"{text}; skip them with --skip-invalid-size-inputs-valid-test, or raise the limits")
            if too_long == len(dataset):
                raise DataError(text)
            logger.warning("%s: skipped", text)
        if not dataset.training:
            indices = np.concatenate([pool.all() for pool in pools.values()])
            batches = dataset.batches(indices, max_tokens, max_sentences, required_batch_size_multiple)
            return FixedBatches(dataset, batches, num_shards, shard_id)
        expert_parallel.check_training(self.cfg)
        before = self.epochs  # fairseq asks for an iterator at each epoch
        self.epochs = TrainingEpochs(
            dataset, before.schedule if before is not None else self._schedule(dataset.names, pools), pools,
            temperature=self.cfg.sampling_temperature, epoch_size=self.cfg.virtual_epoch_size,
            seed=self.cfg.seed, epoch=epoch, update_freq=self.cfg.update_freq,
            num_shards=num_shards, shard_id=shard_id, progress=self,
            limits={
                "max_tokens": max_tokens, "max_sentences": max_sentences, "multiple": required_batch_size_multiple,
            },
            block=self.cfg.draw_block, after=before,
        )  # fmt: skip
        return self.epochs

    def _schedule(self, names: Sequence[str], pools: Mapping[str, Pool]) -> curriculum.Schedule | AutoCurriculum:
        if self.learns_from_validation:
            if self.cfg.curriculum_restart != "none":
                raise ConfigError("--curriculum-restart is for phases; the curriculum auto has none")
            sizes = {name: len(pool) for name, pool in pools.items()}
            return AutoCurriculum(sizes, self.cfg.sampling_temperature, self.cfg.max_update)
        phases = curriculum.load(self.cfg.curriculum_file) if self.cfg.curriculum_file else []
        schedule = curriculum.resolve(phases, names, self.cfg.max_update)
        for boundary in schedule.boundaries[1:]:
            joining = [name for name, start in schedule.starts.items() if start == boundary]
            logger.info("curriculum: from update %d also %s", boundary, ", ".join(joining))
        return schedule

    # Progress that a checkpoint keeps with the iterator

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of the task."""
        return {"num_updates": self.num_updates, **self.guard.state()}

    def restore(self, counters: dict[str, Any]) -> None:
        """Take it back from a checkpoint, at the start or in the middle of training."""
        self.num_updates = counters["num_updates"]
        self.guard.restore(counters)
        self._micro_batch = (-1, 0)

    # Steps

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """Watch for signals from the first update on."""
        stopper.install()

    def train_step(
        self, sample: dict, model: Any, criterion: Any, optimizer: Any, update_num: int, ignore_grad: bool = False
    ) -> tuple[Tensor, Any, dict]:
        """Forward and backward of a micro-batch, under autocast, maybe as a copying exercise.

        Returns:
            The loss, the divisor of the gradient, and what to log.
        """
        micro = self._micro_batch[1] + 1 if self._micro_batch[0] == update_num else 0
        self._micro_batch = (update_num, micro)
        self.guard.watch(optimizer)
        if hasattr(optimizer, "watch_experts"):
            optimizer.watch_experts(model)
        model.set_num_updates(update_num)
        if self.parallel is not None:
            expert_parallel.share(model, optimizer, self.parallel, self.cfg.expert_gradient_scale)
        if expert_parallel.in_any_layout(self.cfg) and hasattr(model, "set_step"):
            model.set_step(expert_parallel.Step(self.cfg.seed, update_num, sample["id"], counts=not ignore_grad))
        if hasattr(criterion, "collect_routing"):
            criterion.collect_routing = (update_num + 1) % self.cfg.log_interval == 0
        if self._copies(update_num, micro):
            sample = identity_sample(sample, self.dictionary.pad(), self.cfg.max_source_positions)
        if self.tokens is not None and self.epochs is not None:
            key = (self.cfg.seed, update_num, micro, self.epochs.shard_id)
            sample = self.tokens.drop(sample, self.epochs.passes, key)
        sent: dict[str, Any] = {}
        with expert_parallel.counting(self.parallel, sent):
            with self._autocast(sample):
                loss, sample_size, logging_output = criterion(model, sample)
            if ignore_grad:
                loss = loss * 0
            optimizer.backward(self.guard.poison(loss))
        return loss, sample_size, {**logging_output, **sent}

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        """Step, unless loss or gradient were not finite or far too large."""
        self.num_updates = update_num + 1
        self.guard.step(optimizer, model, update_num + 1)

    def valid_step(self, sample: dict, model: Any, criterion: Any) -> tuple[Tensor, Any, dict]:
        """Forward pass of a validation batch, under autocast."""
        if not self.learns_from_validation:
            stopper.interrupt()
        model.eval()
        if hasattr(criterion, "collect_routing"):
            criterion.collect_routing = False
        with torch.no_grad(), self._autocast(sample):
            return criterion(model, sample)

    def restarted_at(self, update: int) -> int:
        """Update at which optimiser and learning rate last began anew; 0 = never, or not yet."""
        if self.cfg.curriculum_restart == "none" or self.epochs is None:
            return 0
        return max(boundary for boundary in (0, *self.epochs.schedule.boundaries) if boundary <= update)

    @property
    def learns_from_validation(self) -> bool:
        """Whether training depends on each validation, so that none may be left out."""
        return self.cfg.curriculum_file == curriculum.AUTO

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        """The first set that is scored now is the one to learn from."""
        self._validated = 0

    def post_validate(self, model: Any, stats: dict[str, Any], agg: Any) -> None:
        """Log effective epochs with the first validation set, and let the curriculum auto learn from it."""
        self._validated += 1
        if self._validated > 1 or self.epochs is None:
            return
        epochs = self.epochs.effective_epochs()
        stats |= {f"epochs_{name}": round(value, 3) for name, value in epochs.items()}
        if isinstance(self.epochs.schedule, AutoCurriculum):
            losses = {name: stats[f"nll_loss_{name}"] for name in epochs if f"nll_loss_{name}" in stats}
            decisions = self.epochs.schedule.validated(self.num_updates, losses, epochs)
            for decision in decisions:
                logging.getLogger("curriculum").info(json.dumps({"num_updates": self.num_updates, **asdict(decision)}))
            if any(decision.action != "move" for decision in decisions):
                self.epochs.redraw()

    def reduce_metrics(self, logging_outputs: list[dict], criterion: Any) -> None:
        """Log speed, size and losses; the loss of a skipped update stays out of the averages."""
        tokens = sum(log["ntokens"] for log in logging_outputs)
        metrics.log_scalar("wpb", tokens, priority=180, round=1)
        metrics.log_speed("wps", tokens, priority=90, round=1)
        sentences = sum(log["nsentences"] for log in logging_outputs)
        metrics.log_scalar("bsz", sentences, priority=190, round=1)
        self.guard.log()
        expert_parallel.log_sent(logging_outputs)
        criterion.__class__.reduce_metrics(logging_outputs)
        log_means(logging_outputs, self.groups)

    # Decoding

    def build_generator(
        self, models: Any, args: Any, seq_gen_cls: Any = None, extra_gen_cls_kwargs: Any = None, **kwargs: Any
    ) -> Any:
        """Fairseq's generator, told never to produce a language tag."""
        tags = [word for word in self.dictionary.symbols if word.startswith("__") and word.endswith("__")]
        extra = dict(extra_gen_cls_kwargs or {})
        if seq_gen_cls is None and not getattr(args, "score_reference", False):
            extra.setdefault("tokens_to_suppress", tags)
        return super().build_generator(models, args, seq_gen_cls, extra, **kwargs)

    def inference_step(
        self, generator: Any, models: Any, sample: dict, prefix_tokens: Any = None, constraints: Any = None
    ) -> Any:
        """Decode a batch of one direction: every hypothesis starts from the target tag, which is not searched."""
        self._one_direction()
        words = {"prefix_tokens": prefix_tokens, "constraints": constraints}
        with torch.no_grad(), self._autocast(sample):
            if not hasattr(generator, "beam_size"):  # --score-reference: nothing is searched
                return generator.generate(models, sample, **words)
            tag = self.dictionary.index(f"__{self.directions[0].split('-')[1]}__")
            return generator.generate(models, sample, bos_token=tag, **words)

    # Parts

    def _sides_of(self, prefix: Path, language: str) -> Sequence[Side]:
        key = (prefix, language)
        if key not in self._sides:
            self._sides[key] = read_sides(prefix, language)
        return self._sides[key]

    def _direction(self, name: str, source: Side | Sequence[Side], target: Sequence[Side] | None) -> Direction:
        tags = [self.dictionary.index(f"__{language}__") for language in name.split("-")]
        encoder_tag = tags[0] if self.cfg.encoder_langtok == "src" else tags[1]
        return Direction(name, source, target, encoder_tag, tags[1], self.directions.index(name))

    def _one_direction(self) -> None:
        if len(self.directions) != 1:
            raise ConfigError("decoding needs one direction: give --source-lang and --target-lang, such as -s en -t de")

    def _copies(self, update_num: int, micro: int) -> bool:
        """Whether this micro-batch is a copying exercise; a function of (seed, update, micro-batch, process)."""
        warmup, length = self.cfg.identity_warmup, max(self.cfg.identity_warmup_updates, 1)
        probability = max(self.cfg.identity_floor, warmup * (1.0 - update_num / length))
        if probability <= 0.0:
            return False
        rank = self.epochs.shard_id if self.epochs is not None else 0
        return keyed_uniform(self.cfg.seed, update_num, micro, rank) < probability

    def _autocast(self, sample: dict) -> contextlib.AbstractContextManager:
        if self.cfg.autocast == "off":
            return contextlib.nullcontext()
        return torch.autocast(sample["net_input"]["src_tokens"].device.type, dtype=torch.bfloat16)


def identity_sample(sample: dict, pad: int, max_source_positions: int) -> dict:
    """The sample with its target in the place of its source: ``[target tag] target </s>``.

    Args:
        sample: a training batch; it is not changed.
        pad: id of padding.
        max_source_positions: a batch whose targets do not fit into the encoder stays as it is.
    """
    target, previous = sample["target"], sample["net_input"]["prev_output_tokens"]
    if target.shape[1] + 1 > max_source_positions:
        return sample
    source = torch.cat([previous[:, :1], target], dim=1)
    lengths = target.ne(pad).sum(dim=1) + 1
    return {**sample, "net_input": {**sample["net_input"], "src_tokens": source, "src_lengths": lengths}}
