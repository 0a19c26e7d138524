"""Token dropout over a batch of several directions; see `mtmoe.training.token_dropout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary
from numpy.typing import NDArray
from torch import Tensor

from mtmoe.errors import ConfigError
from mtmoe.training.token_dropout import drop_tokens, share_by_passes


class TokenDropout:
    """Replaces random words of a training batch by the unknown one.

    Args:
        source: rate in the encoder's input.
        target: rate in the decoder's input; what it is to predict stays whole.
        scale: passes over a direction's text at which 63 % of the rate is reached; 0 = the full rate for all.
        dictionary: knows which ids are no words.
        directions: names behind the ``direction`` numbers of a sample.
    """

    def __init__(
        self, source: float, target: float, scale: float, dictionary: Dictionary, directions: Sequence[str]
    ) -> None:
        for name, rate in (("source", source), ("target", target)):
            if not 0.0 <= rate < 1.0:
                raise ConfigError(f"--{name}-token-dropout {rate} must be at least 0 and below 1")
        if scale < 0.0:
            raise ConfigError(f"--token-dropout-passes {scale} must not be negative; 0 = the full rate for all")
        self.rates, self.scale, self.directions = (source, target), scale, list(directions)
        self.kept, self.unknown = (dictionary.pad(), dictionary.eos()), dictionary.unk()
        self._of: Mapping[str, float] | None = None
        self._shares = np.ones(len(self.directions))

    @classmethod
    def from_config(cls, cfg: Any, dictionary: Dictionary, directions: Sequence[str]) -> TokenDropout | None:
        """Make one from the task's options; None where both rates are 0.

        Raises:
            ConfigError: a rate or the scale is out of range.
        """
        if cfg.source_token_dropout == 0 and cfg.target_token_dropout == 0:
            return None
        source, target = cfg.source_token_dropout, cfg.target_token_dropout
        return cls(source, target, cfg.token_dropout_passes, dictionary, directions)

    def drop(self, sample: dict[str, Any], passes: Mapping[str, float], key: Sequence[int]) -> dict[str, Any]:
        """The sample with words replaced.

        Args:
            sample: a training batch; it is not changed. An empty one stays empty.
            passes: direction -> passes over its text.
            key: what the choice depends on.
        """
        if not sample:
            return sample
        if passes is not self._of:  # it changes with each epoch, not with each update
            self._of = passes
            self._shares = np.array([share_by_passes(passes.get(name, 0.0), self.scale) for name in self.directions])
        shares: NDArray[np.float64] = self._shares[sample["direction"].cpu().numpy()]
        net_input = dict(sample["net_input"])
        for side, (name, rate) in enumerate(zip(("src_tokens", "prev_output_tokens"), self.rates, strict=True)):
            if rate:
                net_input[name] = self._drop(net_input[name], rate * shares, (*key, side))
        return {**sample, "net_input": net_input}

    def _drop(self, tokens: Tensor, rates: NDArray[np.float64], key: Sequence[int]) -> Tensor:
        dropped = drop_tokens(tokens.cpu().numpy(), rates, self.kept, self.unknown, key)
        return torch.from_numpy(dropped).to(tokens.device)
