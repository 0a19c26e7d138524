"""How few experts will do: the smallest number that keeps a promise, or the greatest that fits into a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mtmoe.checkpoint.expert_scores import LayerKey
from mtmoe.checkpoint.expert_selection import ExpertSelection

Choose = Callable[[int], ExpertSelection]
"""choose(n): the n experts that stay."""


def smallest_that_holds(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Search the smallest number between `low` and `high` for which something holds, asking log2(high - low) times.

    It finds it wherever what holds for a number holds for greater ones too. Where it does not, as with noisy scores,
    it still finds a number that holds and whose predecessor does not, or `low`. `high` is taken to hold, unasked.

    Args:
        low: least number to try.
        high: greatest, such as all experts, which lose nothing.
        holds: whether a number is enough; never asked twice about one.
    """
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high


def most_within(
    size: int, full: int, bytes_of_expert: Mapping[LayerKey, int], low: int, high: int, choose: Choose
) -> int:
    """The most experts with which a model is no larger than a size.

    Args:
        size: allowed, in bytes.
        full: of the model with all experts, in bytes.
        bytes_of_expert: MoE layer -> bytes of one expert.
        low: fewest experts that work.
        high: all experts.
        choose: which experts stay.

    Raises:
        ValueError: the model is larger even with the fewest experts.
    """
    for count in range(high, low - 1, -1):
        selection = choose(count)
        if full - bytes_removed(selection, bytes_of_expert) <= size:
            return count
    least = full - bytes_removed(choose(low), bytes_of_expert)
    raise ValueError(
        f"max_size={size:,} bytes is too small: with the fewest experts, {low} of {high}, the model still takes "
        f"{least:,}"
    )


def bytes_removed(selection: ExpertSelection, bytes_of_expert: Mapping[LayerKey, int]) -> int:
    """Bytes that a model loses with the experts that a selection does not keep."""
    return sum(len(selection.removed(layer)) * size for layer, size in bytes_of_expert.items())
