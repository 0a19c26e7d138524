"""Token dropout: training reads random words as unknown ones, more of them the more often a direction has been seen.

Replacing words at random keeps a small model from learning its few sentences by heart (Sennrich & Zhang 2019, for
low-resource translation). A rate that is right for a direction seen forty times is a loss to one seen twice, so the
rate of each direction follows the passes over its text: that part is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def share_by_passes(passes: float, scale: float) -> float:
    """The share of the full rate for a direction that has been seen `passes` times: ``1 - exp(-passes / scale)``.

    Args:
        passes: how often the average sentence of the direction has been trained on.
        scale: passes after which the share is 63 %; 0 = always 1.

    Raises:
        ValueError: a number is negative.
    """
    if passes < 0.0 or scale < 0.0:
        raise ValueError(f"passes={passes:g} and scale={scale:g} must not be negative")
    return 1.0 if scale == 0.0 else float(-np.expm1(-passes / scale))


def drop_tokens(
    tokens: NDArray[np.int64], rates: NDArray[np.float64], kept: Sequence[int], unknown: int, key: Sequence[int]
) -> NDArray[np.int64]:
    """Replace random tokens by the unknown word; the first column, which holds the language tag, stays.

    Args:
        tokens: (sentences, length) ids.
        rates: (sentences,) probability that a token is replaced.
        kept: ids that are never replaced, such as padding and the end of a sentence.
        unknown: id of the unknown word.
        key: what the choice depends on, such as (seed, update, micro-batch, process, side); a resumed run has the same.

    Returns:
        (sentences, length) a copy.
    """
    drawn = np.random.Generator(np.random.SFC64(list(key))).random(tokens.shape, dtype=np.float32)
    dropped = drawn < rates[:, None]
    dropped[:, 0] = False
    for word in kept:
        dropped &= tokens != word
    return np.where(dropped, unknown, tokens)
