"""The way back from the inference model to the names and matrices that a model folder holds."""

from __future__ import annotations

from torch import Tensor

from mtmoe.checkpoint.stored import expected_shapes
from mtmoe.inference.model import FUSED, Transformer, rename


def stored_tensors(model: Transformer) -> dict[str, Tensor]:
    """The weights of a model as `Transformer.from_tensors` takes them: fairseq's names, fused matrices apart.

    Returns:
        Views of the model's own weights; shared matrices once.
    """
    weights = model.state_dict()
    tensors = {}
    for name in expected_shapes(model.config):
        for (module, parts), fused in FUSED.items():
            part = next((one for one in parts if f".{module}.{one}." in name), None)
            if part is not None:
                whole = weights[name.replace(f"{module}.{part}", fused)]
                tensors[name] = whole.chunk(len(parts))[parts.index(part)]
                break
        else:
            tensors[name] = weights[rename(name)]
    return tensors
