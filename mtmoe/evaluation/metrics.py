"""chrF++ and BLEU by sacrebleu, length ratio and untranslated copies, of one direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mtmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

CHRF_WORD_ORDER = 2
"""2 makes it chrF++; sacrebleu's default of 0 is plain chrF, whose figures lie higher and do not compare."""

METRICS = ("chrf++", "bleu")
"""The metrics that `build_metric` knows, under the names that they have in evaluation.json."""

BLEU_TOKENISERS: dict[str, tuple[str, str | None]] = {
    "ja": ("ja-mecab", "MeCab"),
    "ko": ("ko-mecab", "mecab_ko"),
    "zh": ("zh", None),
    "yue": ("zh", None),
    "wuu": ("zh", None),
    # These write no spaces between words, and sacrebleu has no segmenter for them: 13a would score whole clauses.
    "th": ("char", None),
    "lo": ("char", None),
    "km": ("char", None),
    "my": ("char", None),
    "bo": ("char", None),
    "dz": ("char", None),
}
"""Target language -> (sacrebleu's tokeniser, the module that it needs); every other language takes 13a."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What one direction's outputs are worth, with the signatures that tell how it was computed."""

    chrf: float
    """chrF++, 0 to 100."""
    bleu: float
    """BLEU, 0 to 100."""
    length_ratio: float
    """Tokens of the output over tokens of the reference, in BLEU's tokenisation; 1.0 is right."""
    sentences: int
    """Segments scored."""
    copy_chrf: float
    """chrF++ of the source itself as output: what doing nothing earns."""
    untranslated: float
    """Share of segments whose output is the source again although the reference is not, 0 to 1."""
    chrf_signature: str
    """sacrebleu's signature of `chrf` and `copy_chrf`."""
    bleu_signature: str
    """sacrebleu's signature of `bleu`."""


def base_language(language: str) -> str:
    """Give the language of a code without its script or region: ``sr_Latn`` is ``sr``."""
    return language.replace("-", "_").split("_")[0]


@cache
def bleu_tokeniser(target: str) -> str:
    """Choose sacrebleu's BLEU tokeniser for a target language.

    Japanese and Korean want MeCab (``pip install sacrebleu[ja]``, ``sacrebleu[ko]``). Without it BLEU is over
    characters; the signature then says ``tok:char``, so that figures made in different ways can be told apart.
    """
    tokeniser, module = BLEU_TOKENISERS.get(base_language(target), ("13a", None))
    return tokeniser if module is None or find_spec(module) else "char"


def build_metric(name: str, target: str) -> CHRF | BLEU:
    """Build sacrebleu's metric `name`, set for outputs in the language `target`.

    Raises:
        ValueError: the metric is not one of `METRICS`.
        ConfigError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ConfigError("scoring needs sacrebleu, which is not installed: pip install 'mtmoe[eval]'") from error
    if name == "chrf++":
        return CHRF(word_order=CHRF_WORD_ORDER)
    if name == "bleu":
        # force only silences a warning that is wrong for languages whose text does end in a detached full stop.
        return BLEU(tokenize=bleu_tokeniser(target), force=True)
    raise ValueError(f"metric={name!r} is unknown; choose one of: {', '.join(METRICS)}")


def score(sources: Sequence[str], outputs: Sequence[str], references: Sequence[str], target: str) -> Scores:
    """Score the outputs of one direction, corpus level, against one reference each.

    Args:
        sources: the segments that were translated.
        outputs: their translations in the same order, detokenised; an empty one is scored as empty.
        references: the right translations in the same order.
        target: language of the outputs, which decides how BLEU tokenises.

    Raises:
        DataError: there are no segments, or the three differ in number.
    """
    if not references:
        raise DataError("there is nothing to score: the reference has no segments")
    if not len(sources) == len(outputs) == len(references):
        raise DataError(
            f"{len(sources)} sources, {len(outputs)} outputs and {len(references)} references do not belong together: "
            "each source needs one output and one reference"
        )
    chrf = build_metric("chrf++", target)
    bleu = build_metric("bleu", target)
    chrf_score = chrf.corpus_score(outputs, [references])
    bleu_score = bleu.corpus_score(outputs, [references])
    return Scores(
        chrf=chrf_score.score,
        bleu=bleu_score.score,
        length_ratio=bleu_score.sys_len / max(1, bleu_score.ref_len),
        sentences=len(references),
        copy_chrf=chrf.corpus_score(sources, [references]).score,
        untranslated=untranslated_share(sources, outputs, references),
        chrf_signature=str(chrf.get_signature()),
        bleu_signature=str(bleu.get_signature()),
    )


def untranslated_share(sources: Sequence[str], outputs: Sequence[str], references: Sequence[str]) -> float:
    """Share of segments whose output repeats the source although the reference does not, 0 to 1.

    Case and runs of whitespace do not count. A name or a number that the reference keeps as well is a right answer.
    """
    copies = 0
    for source, output, reference in zip(sources, outputs, references, strict=True):
        plain = _plain(source)
        copies += _plain(output) == plain and _plain(reference) != plain
    return copies / len(references)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
