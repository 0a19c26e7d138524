"""One SentencePiece model for all languages, and fairseq's dictionary of its pieces and the language tags."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from mtmoe.data.clean import read_sides
from mtmoe.data.recipe import Vocabulary
from mtmoe.data.rows import Pair
from mtmoe.errors import DataError
from mtmoe.files import replacing, write_text
from mtmoe.languages import tag

_THREADS = 4
"""Fixed, not the number of cores: SentencePiece sums per thread, and another number rounds differently."""

SPECIAL_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
"""fairseq's ids 0 to 3; the lines of dict.txt follow."""


def sample_sentences(sentences: Mapping[str, Sequence[str]], settings: Vocabulary) -> list[str]:
    """Draw sentences of each language by temperature.

    Language l gets a share proportional to ``(n_l / sum n) ** (1 / temperature)``. Where it has fewer sentences than
    that, all of them are repeated as often as it takes.

    Args:
        sentences: language -> its distinct train sentences.
        settings: `temperature`, `sentences` (the most in all) and `seed`.

    Returns:
        The sentences, language by language; the same for the same arguments.
    """
    total = sum(map(len, sentences.values()))
    weights = {code: (len(lines) / total) ** (1 / settings.temperature) for code, lines in sentences.items() if lines}
    drawn: list[str] = []
    for code in sorted(weights):
        lines = sentences[code]
        share = round(min(settings.sentences, total) * weights[code] / sum(weights.values()))
        whole, rest = divmod(max(share, 1), len(lines))
        chosen = sorted(random.Random(f"{settings.seed}|{code}").sample(range(len(lines)), rest))
        drawn.extend(lines * whole if isinstance(lines, list) else list(lines) * whole)
        drawn.extend(lines[number] for number in chosen)
    return drawn


def train_vocabulary(text: Path, pairs: Iterable[Pair], settings: Vocabulary, model: Path) -> None:
    """Train SentencePiece on the train text and write ``spm.model`` and, beside it, ``spm.vocab``.

    Args:
        text: folder that `write_clean_text` filled.
        pairs: the pairs in it.
        settings: the recipe's section.
        model: where the model belongs.

    Raises:
        DataError: SentencePiece refuses, for instance since the text is too small for so many pieces.
    """
    by_language: dict[str, dict[str, None]] = {}  # dict: distinct, in the order they came
    for pair in pairs:
        for language, lines in zip(pair, read_sides(text, "train", pair), strict=True):
            by_language.setdefault(language, {}).update(dict.fromkeys(lines))
    drawn = sample_sentences({code: list(lines) for code, lines in by_language.items()}, settings)
    if not drawn:
        raise DataError(f"{text}: nothing is left to train on")
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(drawn),
            model_writer=trained,
            model_type=settings.model,
            vocab_size=settings.size,
            character_coverage=settings.character_coverage,
            byte_fallback=settings.byte_fallback,
            normalization_rule_name=settings.normalisation,
            num_threads=_THREADS,
            train_extremely_large_corpus=len(drawn) > 5_000_000,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = (str(error).split("] ")[-1].strip() or str(error)).rstrip(".")
        raise DataError(
            f"SentencePiece cannot make {settings.size} pieces of {len(drawn)} sentences: {reason}; "
            "change vocabulary.size or character_coverage in the recipe"
        ) from None
    with replacing(model) as temporary:
        temporary.write_bytes(trained.getvalue())
    processor = load_vocabulary(model)
    lines = [f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n" for i in range(processor.get_piece_size())]
    write_text(model.with_suffix(".vocab"), "".join(lines))


def load_vocabulary(model: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model that has the three special pieces where SentencePiece puts them by default."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    if (processor.unk_id(), processor.bos_id(), processor.eos_id()) != (0, 1, 2):
        raise DataError(f"{model}: expected <unk>, <s>, </s> as pieces 0, 1, 2")
    return processor


def fairseq_ids(processor: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """Give the table from SentencePiece's ids to fairseq's.

    Returns:
        (pieces,) int64: <unk>, <s>, </s> go to 3, 0, 2, and each other piece one up, since fairseq also has <pad>.
    """
    table = np.arange(1, processor.get_piece_size() + 1, dtype=np.int64)
    table[[processor.unk_id(), processor.bos_id(), processor.eos_id()]] = [3, 0, 2]
    return table


def dictionary_text(
    processor: sentencepiece.SentencePieceProcessor, counts: np.ndarray, languages: Iterable[str]
) -> str:
    """Give the text of fairseq's dict.txt: a line for each piece with its count, then one for each language tag.

    Args:
        processor: the SentencePiece model.
        counts: (fairseq ids,) how often each id stands in the train data.
        languages: mtmoe's codes.

    Raises:
        DataError: a piece reads like one of fairseq's special symbols or a language tag.
    """
    pieces = [processor.id_to_piece(number) for number in range(3, processor.get_piece_size())]
    tags = [tag(code) for code in sorted(languages)]
    clash = sorted(set(pieces) & {*tags, *SPECIAL_SYMBOLS})
    if clash:
        raise DataError(f"the text has {', '.join(clash)} so often that it became a piece; take it out of the text")
    lines = [f"{piece} {counts[number]}\n" for number, piece in enumerate(pieces, len(SPECIAL_SYMBOLS))]
    return "".join(lines) + "".join(f"{language_tag} 1\n" for language_tag in tags)
