"""Text to ids and back: SentencePiece cuts, the dictionary numbers, language tags frame."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import sentencepiece

from mtmoe.errors import CheckpointError
from mtmoe.normalise import normalise

PADDING, EOS, UNKNOWN = 1, 2, 3
"""fairseq's ids of padding, the end symbol and the unknown piece."""

NO_TEXT = re.compile(r"<mask>|madeupword\d+")
"""Entries of foreign dictionaries that stand for no text: fillers of the embedding, and pre-training's mask."""

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""What fairseq puts before the lines of a dictionary."""


class Vocabulary:
    """The pieces and language tags of a model.

    Args:
        pieces: every row of the embedding in order, specials and tags included.
        processor: SentencePiece with the model's own model.
        tags: the tag of each language; it must be among `pieces`.

    Raises:
        CheckpointError: a tag is missing.
    """

    def __init__(
        self, pieces: Sequence[str], processor: sentencepiece.SentencePieceProcessor, tags: Mapping[str, str]
    ) -> None:
        self.pieces = list(pieces)
        self.processor = processor
        self.ids = {piece: index for index, piece in enumerate(self.pieces)}
        missing = [language for language, tag in tags.items() if tag not in self.ids]
        if missing:
            raise CheckpointError(f"the dictionary lacks the tags of: {', '.join(missing)}")
        self.tags = {language: self.ids[tag] for language, tag in tags.items()}
        fillers = [index for piece, index in self.ids.items() if NO_TEXT.fullmatch(piece)]
        self.unspoken = [0, *self.tags.values(), *fillers]
        """Ids that no translation has: the start symbol, tags, fillers."""

    @classmethod
    def load(
        cls, dictionary: Path, model: Path, languages: Sequence[str], tags: Mapping[str, str] | None = None
    ) -> Vocabulary:
        """Read ``dict.txt`` and ``spm.model``.

        Args:
            dictionary: dict.txt.
            model: spm.model.
            languages: codes.
            tags: the tags of languages for which it is not ``__code__``.

        Raises:
            CheckpointError: a file is missing or damaged, or the dictionary lacks a tag.
        """
        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{model} is no SentencePiece model: {error}") from error
        named = {language: (tags or {}).get(language, tag(language)) for language in languages}
        return cls(SPECIALS + tuple(read_dictionary(dictionary)), processor, named)

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """The pieces of a text as ids, without tag and end symbol; nothing for white space.

        The text is cleaned as that of training was: white space, control characters, NFC.
        """
        pieces = self.processor.encode(normalise(text), out_type=str)
        return [self.ids.get(piece, UNKNOWN) for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without tags; an unknown piece reads "⁇"."""
        return str(self.processor.decode([self.pieces[index] for index in ids]))

    def frame(self, ids: Sequence[int], language: str) -> list[int]:
        """What the encoder gets: a language's tag, the pieces, the end symbol."""
        return [self.tags[language], *ids, EOS]


def tag(language: str) -> str:
    """The token that stands for a language, unless a model says otherwise."""
    return f"__{language}__"


def read_dictionary(path: Path) -> list[str]:
    """The entries of a fairseq dictionary file, in order, without the specials.

    Raises:
        CheckpointError: the file is missing, is not UTF-8, or a line is not an entry and its count.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            break
        entry, _, count = line.removesuffix(" #fairseq:overwrite").rpartition(" ")
        if not entry or not count.isdecimal():
            raise CheckpointError(f"{path}, line {number}: expected an entry and its count, not {line!r}")
        entries.append(entry)
    return entries
