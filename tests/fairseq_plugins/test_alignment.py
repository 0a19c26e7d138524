"""--attention-init aligned: where attention over the source looks before any training."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary

from fairseq_plugins.models.mtmoe_transformer import MtmoeTransformerModel, mtmoe_transformer_tiny
from mtmoe.errors import ConfigError


def build(**options: object) -> MtmoeTransformerModel:
    """A small model of known seed."""
    dictionary = Dictionary()
    for number in range(40):
        dictionary.add_symbol(f"w{number}")
    args = Namespace(encoder_embed_dim=128, encoder_ffn_embed_dim=128, num_experts=4, dropout=0.0, **options)
    mtmoe_transformer_tiny(args)
    torch.manual_seed(0)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    return MtmoeTransformerModel.build_model(args, task)


def copying_batch(length: int = 12) -> dict[str, torch.Tensor]:
    """``[tag] words`` as source, ``[tag] words`` without the last one as what the decoder reads."""
    words = torch.randint(6, 44, (8, length), generator=torch.Generator().manual_seed(1))
    source = torch.cat([torch.full((8, 1), 4), words], dim=1)
    previous = torch.cat([torch.full((8, 1), 5), words[:, :-1]], dim=1)
    return {"src_tokens": source, "src_lengths": torch.full((8,), length + 1), "prev_output_tokens": previous}


def attention_at(offset: int, **options: object) -> torch.Tensor:
    """Mean attention of each decoder layer on the source position `offset` after the decoder's."""
    model, data = build(**options).eval(), copying_batch()
    steps = torch.arange(data["prev_output_tokens"].shape[1] - 2)
    weights = [model(**data, alignment_layer=layer)[1]["attn"][0] for layer in range(2)]
    return torch.stack([layer[:, steps, steps + offset].mean() for layer in weights])


def test_aligned_attention_looks_where_the_next_word_of_a_copy_stands():
    uniform = attention_at(1, attention_init="drawn")
    aligned = attention_at(1, attention_init="aligned")
    assert (uniform < 0.12).all()
    assert (aligned > 0.2).all()
    assert (aligned > 3 * attention_at(-2, attention_init="aligned")).all()


def test_aligned_attention_passes_on_the_word():
    """The word that a copy goes on with is far likelier than under drawn weights; nothing has been trained."""
    data, nll = copying_batch(), {}
    wanted = data["src_tokens"][:, 1:]
    for choice in ("drawn", "aligned"):
        output = build(attention_init=choice).eval()(**data)[0].log_softmax(-1)
        nll[choice] = -output.gather(2, wanted[..., None]).mean()
    assert nll["aligned"] < nll["drawn"] - 2


def test_the_encoder_looks_at_neighbours():
    """Heads look at the position before their own, their own, the next one, and (drawn) everywhere, in turn."""
    model, data = build(attention_init="aligned").eval(), copying_batch()
    layer = model.encoder.layers[0]
    x = layer.self_attn_layer_norm(model.encoder.forward_embedding(data["src_tokens"])[0])
    projections = layer.self_attn.q_proj, layer.self_attn.k_proj
    query, key = (each(x).unflatten(-1, (4, 32)).transpose(1, 2) for each in projections)
    weights = (query @ key.transpose(2, 3) / 32**0.5).softmax(dim=-1)  # (batch, heads, time, time)
    inner = torch.arange(1, x.shape[1] - 1)
    for head, offset in enumerate((-1, 0, 1)):
        mean = torch.stack([weights[:, head, inner, inner + shift].mean() for shift in (-1, 0, 1)])
        assert mean.argmax() == offset + 1
        assert mean[offset + 1] > 0.3
    assert weights[:, 3].max() < 0.3


def test_only_attention_and_embeddings_start_differently():
    drawn, aligned = (build(attention_init=choice).state_dict() for choice in ("drawn", "aligned"))
    assert drawn.keys() == aligned.keys()
    changed = {name for name in drawn if not torch.equal(drawn[name], aligned[name])}
    may_change = ("attn.", "embed_tokens", "output_projection")
    assert changed and all(any(part in name for part in may_change) for name in changed)


def test_what_it_cannot_do_is_explained():
    with pytest.raises(ConfigError, match="attention_init='diagonal' must be one of: drawn, aligned"):
        build(attention_init="diagonal")
    with pytest.raises(ConfigError, match="needs sinusoidal positions"):
        build(attention_init="aligned", encoder_learned_pos=True)
    with pytest.raises(ConfigError, match="needs attention over the source"):
        build(attention_init="aligned", no_cross_attention=True)
