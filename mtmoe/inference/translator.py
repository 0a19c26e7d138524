"""Text in, text out: the one class that commands, evaluation and services translate with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from mtmoe.checkpoint import LanguageSet, StoredModel, open_model
from mtmoe.errors import CheckpointError, UnknownLanguage
from mtmoe.inference.decoding import SearchOptions, search
from mtmoe.inference.model import Transformer
from mtmoe.inference.vocabulary import EOS, PADDING, Vocabulary
from mtmoe.languages import canonical

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types that a model can run in, by name."""

MAX_LENGTH_A, MAX_LENGTH_B = 2.0, 20
"""A translation has at most 2 x source tokens + 20 tokens: enough for scripts that SentencePiece cuts fine, and
a model that repeats itself is stopped long before fairseq's 200."""


class Translator:
    """A model with its vocabulary and languages. It may be used from several threads.

    Args:
        model: the network.
        vocabulary: its pieces and tags.
        languages: what it translates.
    """

    def __init__(self, model: Transformer, vocabulary: Vocabulary, languages: LanguageSet) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.language_set = languages
        self._device = next(model.parameters()).device
        self._forbidden = torch.tensor(vocabulary.unspoken, device=self._device)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        data: str | PathLike[str] | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int | None = None,
        verify: bool | None = None,
    ) -> Translator:
        """Read a model.

        Args:
            path: a model folder, a fairseq checkpoint, or a run folder, whose best checkpoint is taken.
            data: folder of prepared data for a checkpoint; by default the one beside it or the one it names.
            device: torch's name of a device.
            dtype: float32 or bfloat16.
            threads: for torch's operators in this whole process; None leaves them as they are.
            verify: compare a folder's weights with their checksums; None does so up to 1 GB.

        Raises:
            CheckpointError: the model is missing, damaged, unsafe or incomplete.
            ValueError: an unknown device or dtype, or threads below 1.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; choose one of: {', '.join(DTYPES)}")
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads={threads} must be at least 1")
            torch.set_num_threads(threads)
        stored = open_model(Path(path), None if data is None else Path(data), verify=verify)
        return cls.from_stored(stored, device=device, dtype=dtype)

    @classmethod
    def from_stored(cls, stored: StoredModel, *, device: str = "cpu", dtype: str = "float32") -> Translator:
        """Make a translator of what a format's reader gave.

        Raises:
            CheckpointError: vocabulary and weights do not fit.
            ValueError: an unknown device.
        """
        known = stored.languages
        vocabulary = Vocabulary.load(stored.dictionary, stored.sentencepiece, known.languages, known.tags)
        rows = stored.config.vocabulary_size
        if len(vocabulary) != rows:
            raise CheckpointError(
                f"{stored.dictionary} makes {len(vocabulary)} entries with the 4 special ones, "
                f"but the model has {rows}; is it another model's?"
            )
        model = Transformer.from_tensors(stored.config, stored.tensors, DTYPES[dtype])
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={device!r} cannot be used: {error}") from error
        return cls(model, vocabulary, known)

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages that the model knows."""
        return self.language_set.languages

    @property
    def directions(self) -> tuple[str, ...]:
        """Directions that the model was trained or evaluated on; others are zero-shot."""
        return self.language_set.directions

    def resolve(self, language: str) -> str:
        """The model's own code of a language.

        Args:
            language: any code that `mtmoe.languages.canonical` takes, as "de" or "deu_Latn".

        Raises:
            UnknownLanguage: the model does not have it; the text lists those that it has.
        """
        if language in self.languages:
            return language
        try:
            code = canonical(language)
        except UnknownLanguage as error:
            raise UnknownLanguage(f"{error} (this model knows: {', '.join(self.languages)})") from error
        if code not in self.languages:
            raise UnknownLanguage(f"language {language!r} is not in this model; it knows: {', '.join(self.languages)}")
        return code

    def translate(
        self,
        texts: Sequence[str],
        source: str,
        target: str,
        *,
        beam: int = 4,
        max_tokens: int = 2048,
        length_penalty: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Translate texts, each on its own.

        A text of white space stays empty. One that is longer than the model's greatest source length is cut there, and
        a warning is logged. The unknown piece and language tags are never produced.

        Args:
            texts: sentences or short paragraphs, in any order.
            source: their language.
            target: the language to translate into.
            beam: hypotheses kept; 1 is greedy and fastest.
            max_tokens: source tokens of a batch, padding included; a longer text makes a batch of its own.
            length_penalty: above 1 favours long translations, below 1 short ones.
            progress: called after each batch with the number of texts done and of all.

        Returns:
            The translations, in the order of `texts`.

        Raises:
            UnknownLanguage: the model does not have a language.
            ValueError: an option is out of range.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a sequence of strings, not one string")
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        options = SearchOptions(
            beam=beam,
            length_penalty=length_penalty,
            max_length_a=MAX_LENGTH_A,
            max_length_b=MAX_LENGTH_B,
            unknown_penalty=float("inf"),
        )
        source, target = self.resolve(source), self.resolve(target)
        if f"{source}-{target}" not in self.directions:
            logger.warning("%s-%s is no direction that this model was trained on; quality may be poor", source, target)
        encoded = self._encode(texts, source, target)
        results = [""] * len(texts)
        waiting = [index for index, ids in enumerate(encoded) if ids]
        done = len(texts) - len(waiting)
        for batch in batches_by_tokens([len(ids) for ids in encoded], waiting, max_tokens):
            for index, text in zip(batch, self._search([encoded[i] for i in batch], target, options), strict=True):
                results[index] = text
            done += len(batch)
            if progress is not None:
                progress(done, len(texts))
        return results

    def decoder_prefix(self, target: str) -> list[int]:
        """The ids that the decoder begins with for a target language: its tag, after the end symbol in some models."""
        tag = self.vocabulary.tags[target]
        return [EOS, tag] if self.language_set.decoder_start == "eos_tag" else [tag]

    def _encode(self, texts: Sequence[str], source: str, target: str) -> list[list[int]]:
        """Framed ids of each text; nothing for one without pieces."""
        tagged = source if self.language_set.encoder_langtok == "src" else target
        room = self.model.config.max_source_positions - 2
        encoded, cut = [], 0
        for text in texts:
            ids = self.vocabulary.encode(text)
            cut += len(ids) > room
            encoded.append(self.vocabulary.frame(ids[:room], tagged) if ids else [])
        if cut:
            logger.warning("%d of %d texts were cut to the model's %d source tokens", cut, len(texts), room)
        return encoded

    def _search(self, sources: list[list[int]], target: str, options: SearchOptions) -> list[str]:
        batch = pad(sources, self._device)
        start = torch.tensor([self.decoder_prefix(target)] * len(sources), device=self._device)
        found = search(
            self.model,
            batch,
            start,
            options,
            max_positions=self.model.config.max_target_positions,
            forbidden=self._forbidden,
        )
        return [self.vocabulary.decode(hypotheses[0].tokens) if hypotheses else "" for hypotheses in found]


def pad(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tensor:
    """Sequences as one tensor, (batch, longest) int64, padding on the right."""
    longest = max(len(sequence) for sequence in sequences)
    rows = [[*sequence, *[PADDING] * (longest - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, device=device)


def batches_by_tokens(lengths: Sequence[int], chosen: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Group items of similar length, the longest first.

    Args:
        lengths: tokens of each item.
        chosen: numbers of the items to group.
        max_tokens: most tokens of a group, padding included; a longer item stands alone.

    Yields:
        Numbers of the items of a group.
    """
    batch: list[int] = []
    for index in sorted(chosen, key=lambda index: -lengths[index]):
        # The first of a batch is its longest, so it tells what each of them takes.
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
