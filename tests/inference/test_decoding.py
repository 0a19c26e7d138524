"""Search against the slow obvious one, and what must hold for any model."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.models import toy_config, toy_tensors
from reference.search import beam_search
from torch import Tensor

from mtmoe.inference import SearchOptions, Transformer, search
from mtmoe.inference.translator import pad


@dataclass
class TableState:
    """Rows of the sentences that are alive."""

    rows: Tensor
    steps: int = 0

    def keep(self, sentences: Tensor) -> None:
        self.rows = self.rows[sentences]


class TableModel:
    """Logits depend on the sentence (its first id), the step and the last token: any search can be set up."""

    def __init__(self, vocabulary: int, seed: int, sharpness: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(5, 4, vocabulary, vocabulary, generator=generator) * sharpness
        self.steps = 0

    def start(self, source: Tensor) -> TableState:
        return TableState(source[:, 0])

    def step(self, tokens: Tensor, state: TableState, visible: Tensor | None) -> Tensor:
        self.steps += 1
        state.steps += 1
        return self.table[state.rows[:, None] % 5, (state.steps - 1) % 4, tokens]

    def next_scores(self, row: int, start: int):
        def scores(prefix):
            return self.table[row % 5, len(prefix) % 4, prefix[-1] if prefix else start].log_softmax(-1).tolist()

        return scores


def assert_same(found, expected):
    assert [hypothesis.tokens for hypothesis in found] == [tokens for _, tokens in expected]
    for hypothesis, (score, _) in zip(found, expected, strict=True):
        assert hypothesis.score == pytest.approx(score, abs=1e-4)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(8, 14),
    sharpness=st.sampled_from([0.3, 1.0, 3.0]),
    lengths=st.lists(st.integers(2, 6), min_size=1, max_size=4),
    beam=st.integers(1, 5),
    length_penalty=st.sampled_from([0.0, 0.6, 1.0, 2.0]),
    max_length_a=st.sampled_from([0.0, 1.0, 1.7]),
    max_length_b=st.integers(2, 6),
    min_length=st.integers(0, 2),
    unknown_penalty=st.sampled_from([0.0, 1.5, -1.0, math.inf]),
    forbid=st.booleans(),
)
def test_agrees_with_the_obvious_search(
    seed,
    vocabulary,
    sharpness,
    lengths,
    beam,
    length_penalty,
    max_length_a,
    max_length_b,
    min_length,
    unknown_penalty,
    forbid,
):
    model = TableModel(vocabulary, seed, sharpness)
    source = pad([[4 + number, *[5] * (length - 2), 2] for number, length in enumerate(lengths)])
    options = SearchOptions(
        beam=beam,
        length_penalty=length_penalty,
        max_length_a=max_length_a,
        max_length_b=max_length_b,
        min_length=min_length,
        unknown_penalty=unknown_penalty,
    )
    forbidden = [0, 6] if forbid else []
    found = search(
        model,
        source,
        torch.full((len(lengths),), 4),
        options,
        max_positions=9,
        forbidden=torch.tensor(forbidden) if forbid else None,
    )
    for number, length in enumerate(lengths):
        expected = beam_search(
            model.next_scores(4 + number, 4),
            beam=beam,
            greatest_length=min(int(max_length_a * length + max_length_b), 8),
            min_length=min_length,
            length_penalty=length_penalty,
            unknown_penalty=unknown_penalty,
            forbidden=forbidden,
        )
        assert_same(found[number], expected)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    beam=st.integers(1, 4),
    moe=st.booleans(),
    lengths=st.lists(st.integers(2, 7), min_size=1, max_size=3),
    start=st.lists(st.integers(2, 15), min_size=1, max_size=3),
)
def test_transformer_with_cache_agrees_with_whole_prefixes(seed, beam, moe, lengths, start):
    # Keys of other hypotheses lie in the cache: only the right mask gives the scores of the prefix alone.
    config = toy_config(vocabulary_size=16, moe=moe)
    model = Transformer.from_tensors(config, toy_tensors(config, seed))
    generator = torch.Generator().manual_seed(seed)
    sources = [[*torch.randint(4, 16, (length - 1,), generator=generator).tolist(), 2] for length in lengths]
    options = SearchOptions(beam=beam, max_length_b=6)
    found = search(model, pad(sources), torch.tensor([start] * len(sources)), options, max_positions=64)
    for source, hypotheses in zip(sources, found, strict=True):

        def scores(prefix, source=source):
            logits = model(torch.tensor([source]), torch.tensor([[*start, *prefix]]))
            return logits[0, -1].log_softmax(-1).tolist()

        assert_same(hypotheses, beam_search(scores, beam=beam, greatest_length=6))


def test_a_batch_of_one_equals_a_batch_of_many():
    config = toy_config(vocabulary_size=30, moe=True)
    model = Transformer.from_tensors(config, toy_tensors(config))
    generator = torch.Generator().manual_seed(3)
    sources = [[*torch.randint(4, 30, (length,), generator=generator).tolist(), 2] for length in range(1, 20)]
    options = SearchOptions(beam=3, max_length_a=1.5, max_length_b=3)
    many = search(model, pad(sources), torch.full((len(sources),), 5), options, max_positions=64)
    for source, expected in zip(sources, many, strict=True):
        [alone] = search(model, pad([source]), torch.tensor([5]), options, max_positions=64)
        assert_same(alone, [(hypothesis.score, hypothesis.tokens) for hypothesis in expected])


def test_finished_sentences_leave_the_batch():
    model = TableModel(8, 0, 0.0)
    model.table[4, :, :, 2] = 50.0  # the sentence that begins with 4 ends at once
    sizes = []
    step = model.step
    model.step = lambda tokens, state, visible: (sizes.append(len(tokens)), step(tokens, state, visible))[1]
    search(model, pad([[4, 2], [5, 2]]), torch.tensor([4, 4]), SearchOptions(beam=1, max_length_b=4), max_positions=64)
    assert sizes == [2, 2, 1, 1, 1]  # min_length keeps it for one token


def test_not_a_number_is_never_chosen():
    model = TableModel(8, 1, 1.0)
    model.table[..., 5] = math.nan
    found = search(model, pad([[4, 2]]), torch.tensor([4]), SearchOptions(beam=2, max_length_b=3), max_positions=64)
    assert all(5 not in hypothesis.tokens for hypothesis in found[0])


def test_no_sentences():
    empty = torch.zeros(0, 0, dtype=torch.long)
    assert search(TableModel(8, 1, 1.0), empty, empty[:, 0:0].flatten(), SearchOptions(), max_positions=64) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"beam": 0}, "beam=0 must be at least 1"),
        ({"min_length": -1}, "min_length=-1 must not be negative"),
        ({"max_length_a": -0.5}, "max_length_a=-0.5"),
        ({"length_penalty": math.nan}, "length_penalty=nan"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        SearchOptions(**options)


def test_a_least_length_above_the_greatest():
    options = SearchOptions(min_length=5, max_length_b=3)
    with pytest.raises(ValueError, match="min_length=5 is above the greatest length 3"):
        search(TableModel(8, 1, 1.0), pad([[4, 2]]), torch.tensor([4]), options, max_positions=64)
