"""The network: steps against the whole, padding, and the ways a shape can vary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.models import toy_config, toy_tensors

from mtmoe.inference import Transformer
from mtmoe.inference.positions import number_positions, sinusoidal_positions

TOLERANCE = 2e-5  # fp32, logits of size 10

SHAPES = {
    "pre-norm": {},
    "post-norm": {"encoder_pre_norm": False, "decoder_pre_norm": False},
    "learned": {"encoder_learned_positions": True, "decoder_learned_positions": True},
    "norm on embedding": {"layernorm_embedding": True, "scale_embedding": False},
    "gelu": {"activation": "gelu"},
    "own embeddings": {"share_all_embeddings": False, "share_decoder_input_output_embed": False},
    "own encoder embedding": {"share_all_embeddings": False},
    "moe": {"moe": True},
    "MoEC": {"moec": True},
    "SMILE": {"bilevel": True},
}


def build(**changes) -> Transformer:
    config = toy_config(vocabulary_size=40, **changes)
    return Transformer.from_tensors(config, toy_tensors(config))


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_steps_equal_the_whole(changes):
    model = build(**changes)
    source, target = tokens(3, 6), tokens(3, 9, seed=1)
    source[1, 4:] = 1
    whole = model(source, target)
    state = model.start(source)
    steps = [model.step(target[:, i : i + 1], state, None) for i in range(9)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=TOLERANCE, rtol=0)
    assert whole.std() > 0.1


def test_every_shape_computes_something_else():
    outputs = [build(**changes)(tokens(2, 5), tokens(2, 4)) for changes in SHAPES.values()]
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in outputs[:i])


@settings(max_examples=25)
@given(left=st.integers(0, 4), right=st.integers(0, 4), moe=st.booleans())
def test_padding_of_the_source_changes_nothing(left, right, moe):
    model = build(moe=moe)
    source, target = tokens(1, 5), tokens(1, 4)
    padded = torch.nn.functional.pad(source, (left, right), value=1)
    torch.testing.assert_close(model(padded, target), model(source, target), atol=TOLERANCE, rtol=0)


def test_the_cache_grows_and_the_model_goes_on_past_its_first_block():
    model = build()
    source, target = tokens(2, 4), tokens(2, 150)
    state = model.start(source)
    steps = [model.step(target[:, i : i + 1], state, None) for i in range(150)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(source, target), atol=5 * TOLERANCE, rtol=0)


def test_sentences_that_stay_keep_their_past():
    model = build(moe=True)
    source, target = tokens(4, 6), tokens(4, 8, seed=1)
    source[3, 2:] = 1
    whole = model(source, target)
    state = model.start(source)
    for i in range(4):
        model.step(target[:, i : i + 1], state, None)
    keep = torch.tensor([1, 3])
    state.keep(keep)
    for i in range(4, 8):
        logits = model.step(target[keep, i : i + 1], state, None)
        torch.testing.assert_close(logits[:, 0], whole[keep, i], atol=TOLERANCE, rtol=0)


def test_tied_weights_are_one():
    model = build()
    assert model.decoder.output.weight is model.encoder.embed.tokens.weight
    assert model.decoder.embed.tokens.weight is model.encoder.embed.tokens.weight
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_bfloat16_is_near():
    config = toy_config(vocabulary_size=40, moe=True)
    exact = Transformer.from_tensors(config, toy_tensors(config))
    rounded = Transformer.from_tensors(config, toy_tensors(config), torch.bfloat16)
    source, target = tokens(2, 5), tokens(2, 4)
    difference = rounded(source, target).float() - exact(source, target)
    assert rounded(source, target).dtype == torch.bfloat16
    # A router may send a token elsewhere on a tie, so the middle counts, not the extreme.
    assert difference.abs().median() < 0.05 * exact(source, target).std()


def test_missing_and_unknown_weights():
    config = toy_config()
    tensors = toy_tensors(config)
    del tensors["decoder.layers.1.fc2.bias"]
    with pytest.raises(ValueError, match=r"missing \['decoder.layers.1.feed_forward.fc2.bias'\]"):
        Transformer.from_tensors(config, tensors)


def test_positions_count_real_tokens():
    real = torch.tensor([[True, True, True], [False, True, True], [True, True, False]])
    assert number_positions(real).tolist() == [[2, 3, 4], [1, 2, 3], [2, 3, 1]]


@pytest.mark.parametrize("d_model", [8, 9])
def test_sinusoids_are_those_of_fairseq(d_model):
    embedding = pytest.importorskip("fairseq.modules.sinusoidal_positional_embedding")
    expected = embedding.SinusoidalPositionalEmbedding.get_embedding(50, d_model, 1)
    assert torch.equal(sinusoidal_positions(50, d_model), expected)
