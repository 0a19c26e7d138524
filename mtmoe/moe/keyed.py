"""Random numbers that are a function of seed, update, layer and token, whatever process the token is in.

torch's generator draws by position in the batch, so the same token gets other draws once batches are cut in another
way. Here a number depends on its key alone, on every device alike: the finaliser of splitmix64 (Steele, Lea & Flood
2014) over the words of the key, one after another, in 64-bit integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PURPOSES = ("jitter", "choice", "gating_dropout", "eom", "cmr", "fom")
"""What is drawn for; each draws for itself, so that switching one on leaves the others as they were."""

POSITIONS = 1 << 20
"""More than any sentence has tokens."""

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class DrawKeys:
    """The keys of a layer's draws for one batch.

    A sentence that is in one update twice has the same draws twice, in micro-batches of one process as in batches of
    several: an update does not tell how it was cut.
    """

    seed: int
    """Of the run."""
    update: int
    """Number of updates done."""
    layer: int
    """Number of the layer in its model."""
    tokens: Tensor
    """(…) int64, a number for each token, of the shape of the layer's input without its last dimension."""

    def uniform(self, purpose: str, choices: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw for each token.

        Args:
            purpose: one of `PURPOSES`.
            choices: draws a token.
            dtype: float type of the result; each value is one of 2^24, so that all types that can hold them agree.

        Returns:
            (tokens, choices) in [0, 1).
        """
        state = _mix(self.tokens.reshape(-1) ^ _signed(self._key(purpose)))
        column = torch.arange(1, choices + 1, device=state.device) * _signed(_GOLDEN)
        words = _mix(state[:, None] + column)
        return _shift(words, 40).to(dtype) * 2.0**-24

    def once(self, purpose: str) -> float:
        """Draw for all tokens together, so for all processes: a number in [0, 1), without waiting for a device."""
        return (_mix_number(self._key(purpose)) >> 11) / float(1 << 53)

    def _key(self, purpose: str) -> int:
        state = _GOLDEN
        for word in (self.seed, self.update, self.layer, PURPOSES.index(purpose)):
            state = _mix_number(state ^ (word & _MASK)) + _GOLDEN & _MASK
        return state


def token_numbers(sentences: Tensor, length: int) -> Tensor:
    """Numbers of tokens from those of their sentences.

    Args:
        sentences: (batch,) int64, a number for each sentence of the data set, below 2^43.
        length: positions.

    Returns:
        (length, batch) int64, for time-first tensors.
    """
    return sentences * POSITIONS + torch.arange(length, device=sentences.device)[:, None]


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _shift(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own copies the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mix(words: Tensor) -> Tensor:
    words = (words ^ _shift(words, 30)) * _signed(_MULTIPLIERS[0])
    words = (words ^ _shift(words, 27)) * _signed(_MULTIPLIERS[1])
    return words ^ _shift(words, 31)


def _mix_number(word: int) -> int:
    """`_mix` of one number, without a tensor."""
    word = (word ^ (word >> 30)) * _MULTIPLIERS[0] & _MASK
    word = (word ^ (word >> 27)) * _MULTIPLIERS[1] & _MASK
    return word ^ (word >> 31)
