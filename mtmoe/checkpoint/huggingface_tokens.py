"""The vocabulary of Hugging Face's NLLB and M2M-100 tokenisers as fairseq's dictionary, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from mtmoe.checkpoint.stored import read_json
from mtmoe.errors import CheckpointError, UnknownLanguage
from mtmoe.languages import canonical

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""The first four ids of both tokenisers, as of fairseq."""

FIRST_PIECE = 3
"""SentencePiece's own ids 0 to 2 are its special symbols; its piece 3 is the tokeniser's id 4."""

NLLB_TAG, M2M_TAG = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}"), re.compile(r"__(\w+)__")
"""Tags of languages: deu_Latn, __de__."""

MASK = "<mask>"

M2M_CODES = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht hu hy "
    "id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru "
    "sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
)
"""The languages of M2M-100 in the order of their tags' ids; its tokeniser knows them, its files need not name them."""

M2M_TAGS = [f"__{code}__" for code in M2M_CODES.split()]


def read_pieces(path: Path, rows: int) -> list[str]:
    """What each row of the embedding stands for, in order.

    Args:
        path: folder of the tokeniser: vocab.json if it is M2M-100's, sentencepiece.bpe.model, and what it has of
            tokenizer_config.json, tokenizer.json and special_tokens_map.json.
        rows: of the embedding; what the tokeniser has no name for becomes ``madeupword`` with its id.

    Raises:
        CheckpointError: a file is damaged, or has ids beyond `rows`.
    """
    pieces = _own_pieces(path)
    names = dict(enumerate(pieces))
    names.update(_added_tokens(path, len(pieces)))
    beyond = sorted(index for index in names if not 0 <= index < rows)
    if beyond:
        raise CheckpointError(
            f"{path}: the tokeniser has the id {beyond[-1]} ({names[beyond[-1]]!r}), the embedding {rows} rows; "
            "is it another model's?"
        )
    for index, name in enumerate(SPECIALS):
        if names.get(index) != name:
            raise CheckpointError(f"{path}: id {index} of the tokeniser must be {name}, not {names.get(index)!r}")
    return [names.get(index, f"madeupword{index}") for index in range(rows)]


def read_tags(pieces: Sequence[str]) -> dict[str, str]:
    """The language tags among pieces: mtmoe's code -> tag. A code that is not known or not unique stays as it is."""
    found: dict[str, str] = {}
    for piece in pieces:
        match = M2M_TAG.fullmatch(piece)
        if match is None and not NLLB_TAG.fullmatch(piece):
            continue
        code = match[1] if match else piece
        try:
            known = canonical(code)
        except UnknownLanguage:
            known = code
        found[code if known in found else known] = piece
    return found


def tokenizer_files(pieces: Sequence[str], model: Path, tags: Mapping[str, str]) -> dict[str, Any]:
    """The JSON files that make transformers' tokeniser give the ids of a dictionary.

    Args:
        pieces: what each row of the embedding stands for.
        model: SentencePiece.
        tags: code -> tag.

    Returns:
        File name -> content; nothing where neither tokeniser can give these ids.
    """
    ids = {piece: index for index, piece in enumerate(pieces)}
    named = sorted(tags.values(), key=lambda tag: ids[tag])
    own = _sentencepieces(model)
    if list(pieces[: len(own)]) == own:
        added = {ids[piece]: piece for piece in (*SPECIALS, *named, MASK) if piece in ids}
        entries = {
            str(index): {
                "content": piece, "lstrip": piece == MASK, "normalized": piece == MASK, "rstrip": False,
                "single_word": False, "special": True,
            }
            for index, piece in sorted(added.items())
        }  # fmt: skip
        config = {"tokenizer_class": "NllbTokenizer", "added_tokens_decoder": entries, "src_lang": named[0]}
        return {"tokenizer_config.json": config | {"additional_special_tokens": named}}
    first = ids[named[0]]
    if named == M2M_TAGS and list(pieces[first : first + len(named)]) == named:
        return {
            "vocab.json": {piece: index for index, piece in enumerate(pieces[:first])},
            "tokenizer_config.json": {"tokenizer_class": "M2M100Tokenizer", "language_codes": "m2m100"},
            "special_tokens_map.json": {"additional_special_tokens": named},
        }
    return {}


def _own_pieces(path: Path) -> list[str]:
    """Pieces without added tokens: of vocab.json where there is one (M2M-100), else SentencePiece's own order."""
    vocabulary = path / "vocab.json"
    if not vocabulary.is_file():
        return _sentencepieces(path / "sentencepiece.bpe.model")
    values = read_json(vocabulary)
    if not isinstance(values, dict) or sorted(map(str, values.values())) != sorted(map(str, range(len(values)))):
        raise CheckpointError(f"{vocabulary} must give each piece an id from 0 on, each once; fetch it again")
    return sorted(values, key=lambda piece: int(values[piece]))


def _sentencepieces(model: Path) -> list[str]:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{model} is no SentencePiece model: {error}") from error
    return [*SPECIALS, *(processor.id_to_piece(index) for index in range(FIRST_PIECE, processor.get_piece_size()))]


def _added_tokens(path: Path, after: int) -> dict[int, str]:
    """Ids of added tokens, from the first file that has them; a mere list goes on after the other pieces."""
    config, whole = path / "tokenizer_config.json", path / "tokenizer.json"
    values = _object(config)
    numbered = values.get("added_tokens_decoder")
    if isinstance(numbered, dict) and any(_is_tag(_content(token)) for token in numbered.values()):
        return {_id(index, config): _content(token) for index, token in numbered.items()}
    entries = _object(whole).get("added_tokens")
    if isinstance(entries, list) and any(_is_tag(_content(entry)) for entry in entries):
        return {_id(entry.get("id"), whole): _content(entry) for entry in entries if isinstance(entry, dict)}
    listed = _object(path / "special_tokens_map.json").get("additional_special_tokens")
    listed = listed or values.get("additional_special_tokens") or []
    names = [_content(token) for token in listed]
    if not names and (path / "vocab.json").is_file():
        names = M2M_TAGS
    tokens = {after + number: name for number, name in enumerate(names)}
    if names and NLLB_TAG.fullmatch(names[0]):
        tokens[after + len(names)] = MASK
    return tokens


def _is_tag(piece: str) -> bool:
    return bool(NLLB_TAG.fullmatch(piece) or M2M_TAG.fullmatch(piece))


def _object(path: Path) -> dict[str, Any]:
    values = read_json(path) if path.is_file() else {}
    return values if isinstance(values, dict) else {}


def _id(value: Any, path: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise CheckpointError(f"{path}: {value!r} is no id of an added token; fetch it again") from None


def _content(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)
