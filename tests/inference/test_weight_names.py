"""There and back between a folder's names and the model's."""

import pytest
import torch
from reference.models import toy_model

from mtmoe.inference.model import Transformer
from mtmoe.inference.weight_names import stored_tensors


@pytest.mark.parametrize(
    "shape",
    [
        {"moe": True},
        {"moec": True, "share_all_embeddings": False},
        {"share_all_embeddings": False, "share_decoder_input_output_embed": False, "encoder_learned_positions": True,
         "layernorm_embedding": True, "decoder_pre_norm": False},
    ],
    ids=["moe", "moec", "dense"],
)  # fmt: skip
def test_round_trip(vocabulary, shape):
    stored = toy_model(vocabulary, **shape)
    back = stored_tensors(Transformer.from_tensors(stored.config, stored.tensors))
    assert back.keys() == stored.tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.tensors.items())
