"""Beam search as one would explain it: one sentence, Python lists, no cache. Slow and obvious."""

import math
from collections.abc import Callable, Sequence

PADDING, EOS, UNKNOWN = 1, 2, 3


def beam_search(
    next_scores: Callable[[Sequence[int]], Sequence[float]],
    *,
    beam: int,
    greatest_length: int,
    min_length: int = 1,
    length_penalty: float = 1.0,
    unknown_penalty: float = 0.0,
    forbidden: Sequence[int] = (),
) -> list[tuple[float, tuple[int, ...]]]:
    """Search as fairseq's SequenceGenerator does.

    `next_scores` gives the log-probability of each token after a prefix (without the start token).
    Returns (score, tokens without end symbol), best first.
    """
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for step in range(greatest_length + 1):
        candidates = []
        for total, prefix in live:
            for token, score in enumerate(next_scores(prefix)):
                if token == UNKNOWN:
                    score -= unknown_penalty
                ruled_out = (
                    token == PADDING
                    or token in forbidden
                    or (token == EOS and step < min_length)
                    or (token != EOS and step == greatest_length)
                )
                if not ruled_out and score > -math.inf:
                    candidates.append((total + score, (*prefix, token)))
        candidates.sort(key=lambda candidate: -candidate[0])
        for total, tokens in candidates[:beam]:
            if tokens[-1] == EOS and len(ended) < beam:
                ended.append((total / len(tokens) ** length_penalty, tokens[:-1]))
        if len(ended) == beam:
            break
        live = [candidate for candidate in candidates[: 2 * beam] if candidate[1][-1] != EOS][:beam]
    return sorted(ended, key=lambda hypothesis: -hypothesis[0])
