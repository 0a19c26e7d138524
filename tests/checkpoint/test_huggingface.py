"""Hugging Face's NllbMoe and M2M100 against ours: the same logits, the same texts, and back to the bit.

What compares with transformers needs version 4.57 of it beside the project's own packages, as `make test-huggingface`
installs it from benchmarks/requirements.txt; the rest needs nothing.
"""

import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.fairseq_file import Hostile
from reference.models import toy_model, toy_sentence

from mtmoe.checkpoint import huggingface
from mtmoe.checkpoint.folder import read_folder, write_folder
from mtmoe.checkpoint.huggingface import is_huggingface, reading
from mtmoe.checkpoint.huggingface_export import write_huggingface
from mtmoe.checkpoint.huggingface_tokens import read_tags
from mtmoe.errors import CheckpointError
from mtmoe.inference import SearchOptions, Transformer, Translator, search
from mtmoe.inference.translator import pad
from mtmoe.inference.vocabulary import read_dictionary
from mtmoe.moe import MoEConfig

EXPERTS = {"d_model": 16, "num_experts": 4, "top_k": 2, "eom": 0.2}


def nllb_moe(**changes):
    """A shape that NllbMoe has too."""
    sides = {side: MoEConfig(**EXPERTS, d_ffn=width) for side, width in (("encoder", 32), ("decoder", 24))}
    return {
        "encoder_moe": sides["encoder"], "decoder_moe": sides["decoder"], "encoder_moe_freq": 2, "decoder_moe_freq": 1,
    } | changes  # fmt: skip


@pytest.mark.parametrize("moe", [True, False])
@pytest.mark.parametrize("part_bytes", [10**9, 5000])
def test_our_own_model_comes_back_to_the_bit(vocabulary, tmp_path, moe, part_bytes):
    model = toy_model(vocabulary, **(nllb_moe() if moe else {}))
    assert write_huggingface(tmp_path / "hf", model, part_bytes=part_bytes)
    assert is_huggingface(tmp_path / "hf") and not is_huggingface(tmp_path)
    assert (tmp_path / "hf" / "model.safetensors").is_file() == (part_bytes > 5000)
    with reading(tmp_path / "hf") as found:
        assert found.languages == model.languages
        assert found.tensors.keys() == model.tensors.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in model.tensors.items())
        assert read_dictionary(found.dictionary) == read_dictionary(model.dictionary)
        config = found.config.to_json()
        expected = model.config.to_json()
        for side in ("encoder_moe", "decoder_moe"):
            if moe:  # without a capacity and with one for all tokens no token is dropped
                expected[side] |= {"eval_capacity_token_fraction": 1.0}
        assert config == expected


def test_what_hugging_face_has_not_is_listed(vocabulary, tmp_path):
    with pytest.raises(CheckpointError, match=r"no encoder_moe\.cmr=True \(only False\); no encoder_moe\.d_ffn=24"):
        write_huggingface(tmp_path / "hf", toy_model(vocabulary, moe=True))
    with pytest.raises(CheckpointError, match=r"layer norm after sublayers .*; no layer norm on embeddings"):
        write_huggingface(tmp_path / "hf", toy_model(vocabulary, encoder_pre_norm=False, layernorm_embedding=True))
    wide = replace(nllb_moe()["encoder_moe"], num_experts=2)
    with pytest.raises(CheckpointError, match=r"num_experts of its own on each side \(2 and 4\)"):
        write_huggingface(tmp_path / "hf", toy_model(vocabulary, **nllb_moe(encoder_moe=wide)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is no Hugging Face model; it is left as it is"):
        write_huggingface(tmp_path / "mine", toy_model(vocabulary))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.fixture
def exported(vocabulary, tmp_path):
    write_huggingface(tmp_path / "hf", toy_model(vocabulary, **nllb_moe()))
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "bart"}, "model_type 'bart' is none of nllb-moe, m2m_100"),
        ({"d_model": None}, r"config\.json lacks d_model"),
        ({"pad_token_id": 0}, "pad_token_id=0 is not supported, only 1"),
        ({"activation_function": "gelu_new"}, "activation='gelu_new' is unknown|activation='gelu_new' must be one of"),
        ({"d_model": 15}, "heads=2 must divide d_model=15"),
        ({"num_experts": 5}, r"lacks .*expert_4\.fc1\.weight"),
        ({"encoder_layers": 1}, r"has unknown .*layers\.1\.ffn"),
        ({"router_bias": True}, r"lacks model\.encoder\.layers\.1\.ffn\.router\.classifier\.bias"),
        ({"vocab_size": 9}, "shape|the embedding 9 rows"),
        ({"moe_eval_capacity_token_fraction": 0.5, "router_ignore_padding_tokens": True}, "gives padding a place"),
        ({"moe_eval_capacity_token_fraction": 0, "expert_capacity": 0}, "needs expert_capacity above 0"),
    ],
)
def test_a_config_that_does_not_fit(exported, change, text):
    values = json.loads((exported / "config.json").read_text())
    values.update(change)
    given = {key: value for key, value in values.items() if value is not None}
    (exported / "config.json").write_text(json.dumps(given))
    with pytest.raises(CheckpointError, match=text):
        with reading(exported):
            pass


def test_missing_files(exported):
    (exported / "sentencepiece.bpe.model").unlink()
    with pytest.raises(CheckpointError, match=r"lacks sentencepiece\.bpe\.model"):
        with reading(exported):
            pass
    (exported / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the weights: none of model\.safetensors"):
        with reading(exported):
            pass


def test_pickled_weights_only_by_the_weights_only_loader(exported, tmp_path):
    with reading(exported) as model:
        expected = {name: model.tensors[name].clone() for name in model.tensors}
    theirs = dict(huggingface._read_weights(exported))
    (exported / "model.safetensors").unlink()
    torch.save(theirs, exported / "pytorch_model.bin")
    with reading(exported) as model:
        assert all(torch.equal(model.tensors[name], tensor) for name, tensor in expected.items())
    names = sorted(theirs)
    for part in range(2):
        torch.save({name: theirs[name] for name in names[part::2]}, exported / f"pytorch_model-{part}.bin")
    places = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(names)}
    (exported / "pytorch_model.bin").unlink()
    (exported / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with reading(exported) as model:
        assert all(torch.equal(model.tensors[name], tensor) for name, tensor in expected.items())
    trace = tmp_path / "trace"
    torch.save(theirs | {"evil": Hostile(eval, f"open({str(trace)!r}, 'w')")}, exported / "pytorch_model-1.bin")
    with pytest.raises(CheckpointError, match="damaged, or asking for more than weights"):
        with reading(exported):
            pass
    assert not trace.exists()
    (exported / "pytorch_model-1.bin").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(CheckpointError, match=r"pytorch_model-1\.bin"):
        with reading(exported):
            pass


def test_an_index_that_leads_elsewhere(exported):
    (exported / "model.safetensors").unlink()
    (exported / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"weight_map\.a must be a file of this folder"):
        with reading(exported):
            pass


def test_codes_of_tags():
    pieces = ["<s>", "sat_Beng", "deu_Latn", "zho_Hant", "__ns__", "__no__", "de", "__x"]
    expected = {"sat": "sat_Beng", "de": "deu_Latn", "zh_Hant": "zho_Hant", "ns": "__ns__", "nb": "__no__"}
    assert read_tags(pieces) == expected


# Against transformers itself


@pytest.fixture(scope="module")
def transformers():
    found = pytest.importorskip("transformers", reason="transformers is not installed; make test-huggingface brings it")
    if not found.__version__.startswith("4.57."):
        pytest.skip(f"transformers {found.__version__} is installed; NllbMoe is compared with 4.57")
    return found


MOE_SHAPES = {
    "plain": {},
    "bias, normalised before": {"router_bias": True, "normalize_router_prob_before_dropping": True},
    "gelu, no scale, no mask": {"activation_function": "gelu", "scale_embedding": False, "moe_token_dropout": 0.0},
    "experts in every encoder layer": {"encoder_sparse_step": 1, "decoder_sparse_step": 0},
    "half the capacity": {"moe_eval_capacity_token_fraction": 0.3},
    "half, prioritised": {"moe_eval_capacity_token_fraction": 0.3, "batch_prioritized_routing": True},
    "half, normalised before": {
        "moe_eval_capacity_token_fraction": 0.3, "normalize_router_prob_before_dropping": True,
    },
    "three slots": {"moe_eval_capacity_token_fraction": 0.0, "expert_capacity": 3},
}  # fmt: skip


def build(
    transformers, kind, folder, vocabulary, *, seed=1, safe=True, max_shard_size="5GB", tokenizer="nllb", **changes
):
    """A random model and its tokeniser, saved as the hub has them; returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    words = _tokenizer(transformers, tokenizer, vocabulary, folder)
    sizes = {
        "vocab_size": words.vocab_size + 250, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
        "encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40,
        "max_position_embeddings": 64,
    }  # fmt: skip
    if kind == "moe":
        sizes |= {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
        model = transformers.NllbMoeForConditionalGeneration(transformers.NllbMoeConfig(**(sizes | changes)))
    else:
        model = transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**(sizes | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 + ("norm.weight" in name))
        model.model.shared.weight[1] = 0
    model.eval().save_pretrained(folder, safe_serialization=safe, max_shard_size=max_shard_size)
    words.save_pretrained(folder)
    return model, words


def _tokenizer(transformers, kind, vocabulary, folder):
    if kind == "nllb":
        return transformers.NllbTokenizer(str(vocabulary / "spm.model"))
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *read_dictionary(vocabulary / "dict.txt")]
    pieces = [piece for piece in pieces if not piece.startswith("__")]
    shuffled = pieces[4:]
    random.Random(1).shuffle(shuffled)  # M2M-100's ids are not in SentencePiece's order
    (folder / "vocab.json").write_text(json.dumps({piece: id_ for id_, piece in enumerate(pieces[:4] + shuffled)}))
    return transformers.M2M100Tokenizer(str(folder / "vocab.json"), str(vocabulary / "spm.model"))


def batch_of(words, count=5, seed=1, *, padded=True):
    """Random sources with tag and end symbol, and targets, as ids."""
    generator = random.Random(seed)
    tag = words.convert_tokens_to_ids("eng_Latn" if "eng_Latn" in words.get_vocab() else "__en__")
    lengths = [generator.randint(1, 9) if padded else 7 for _ in range(count)]
    sources = [[tag, *(generator.randrange(4, 50) for _ in range(length)), 2] for length in lengths]
    targets = [[2, tag + 1, *(generator.randrange(4, 50) for _ in range(6))] for _ in range(count)]
    return pad(sources), torch.tensor(targets)


def logits_of(model, source, target):
    with torch.inference_mode():
        return model(input_ids=source, attention_mask=source.ne(1).long(), decoder_input_ids=target).logits


@pytest.mark.slow
@pytest.mark.parametrize("shape", MOE_SHAPES)
def test_nllb_moe_has_the_same_logits_here_and_there(transformers, vocabulary, tmp_path, shape):
    theirs, words = build(transformers, "moe", tmp_path / "hf", vocabulary, **MOE_SHAPES[shape])
    source, target = batch_of(words)
    expected = logits_of(theirs, source, target)
    with reading(tmp_path / "hf") as stored:
        write_folder(tmp_path / "model", stored)
        found = Transformer.from_tensors(stored.config, stored.tensors)(source, target)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    stored = read_folder(tmp_path / "model")
    assert write_huggingface(tmp_path / "back", stored)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(theirs)
    state = again.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    torch.testing.assert_close(logits_of(again, source, target), expected, atol=1e-5, rtol=0)
    old, new = theirs.config.to_dict(), again.config.to_dict()
    for name in huggingface.MOE_DEFAULTS | huggingface.DEFAULTS:
        if name in old and name not in ("expert_capacity",):
            assert new[name] == old[name], name


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tokenizer"), [("dense", "nllb"), ("dense", "m2m100")])
def test_dense_models_have_the_same_logits(transformers, vocabulary, tmp_path, kind, tokenizer):
    theirs, words = build(transformers, kind, tmp_path / "hf", vocabulary, tokenizer=tokenizer)
    source, target = batch_of(words)
    expected = logits_of(theirs, source, target)
    with reading(tmp_path / "hf") as stored:
        found = Transformer.from_tensors(stored.config, stored.tensors)(source, target)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert write_huggingface(tmp_path / "back", stored)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(logits_of(again, source, target), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_shards_of_either_kind(transformers, vocabulary, tmp_path, safe):
    theirs, _ = build(transformers, "moe", tmp_path / "hf", vocabulary, safe=safe, max_shard_size="60KB")
    assert len(list((tmp_path / "hf").glob("*.index.json"))) == 1
    with reading(tmp_path / "hf") as stored:
        state = theirs.state_dict()
        stacked = stored.tensors["encoder.layers.1.moe.experts.w_in"]
        for expert in range(4):
            name = f"model.encoder.layers.1.ffn.experts.expert_{expert}.fc1.weight"
            assert torch.equal(stacked[expert], state[name])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tokenizer"), [("moe", "nllb"), ("dense", "m2m100")])
def test_greedy_search_gives_the_same_tokens(transformers, vocabulary, tmp_path, kind, tokenizer):
    theirs, words = build(transformers, kind, tmp_path / "hf", vocabulary, tokenizer=tokenizer, init_std=0.3)
    source, target = batch_of(words, count=24)
    tag = int(target[0, 1])
    with torch.inference_mode():
        generated = theirs.generate(
            input_ids=source, attention_mask=source.ne(1).long(), forced_bos_token_id=tag, num_beams=1,
            do_sample=False, max_new_tokens=16,
        )  # fmt: skip
    with reading(tmp_path / "hf") as stored:
        ours = Transformer.from_tensors(stored.config, stored.tensors)
    options = SearchOptions(beam=1, max_length_b=15, min_length=0)
    start = torch.tensor([[2, tag]] * len(source))
    found = search(ours, source, start, options, max_positions=64)
    for row, hypotheses in zip(generated.tolist(), found, strict=True):
        expected = row[2:]
        assert row[:2] == [2, tag]
        expected = expected[: expected.index(2)] if 2 in expected else expected
        assert list(hypotheses[0].tokens) == expected[:15]
    assert len({hypotheses[0].tokens for hypotheses in found}) > 3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tokenizer"), [("moe", "nllb"), ("dense", "m2m100")])
def test_text_to_text_is_the_same(transformers, vocabulary, tmp_path, kind, tokenizer):
    theirs, words = build(transformers, kind, tmp_path / "hf", vocabulary, tokenizer=tokenizer)
    with reading(tmp_path / "hf") as stored:
        write_folder(tmp_path / "model", stored)
    translator = Translator.load(tmp_path / "model")
    english, german = ("eng_Latn", "deu_Latn") if tokenizer == "nllb" else ("en", "de")
    words.src_lang = english
    texts = [toy_sentence(seed) for seed in range(12)] + ["ka Ω ta"]
    tag = translator.vocabulary.tags["de"]
    forbidden = [1, 3, *translator.vocabulary.unspoken]
    assert {0, tag, len(translator.vocabulary) - 1} <= set(forbidden)
    for text in texts:
        inputs = words(text, return_tensors="pt")
        ids = translator.vocabulary.frame(translator.vocabulary.encode(text), "en")
        assert inputs["input_ids"][0].tolist() == ids
        generated = theirs.generate(
            **inputs, decoder_input_ids=torch.tensor([[2, tag]]), num_beams=1, do_sample=False, min_new_tokens=1,
            max_new_tokens=2 * len(ids) + 20, suppress_tokens=forbidden,
        )  # fmt: skip
        [found] = translator.translate([text], "en", german, beam=1)
        assert found == words.decode(generated[0][2:], skip_special_tokens=True)
    with_tokenizer = read_folder(tmp_path / "model")
    assert write_huggingface(tmp_path / "back", with_tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back", use_fast=False, src_lang=english)
    assert [again(text)["input_ids"] for text in texts] == [words(text)["input_ids"] for text in texts]
    assert again.convert_tokens_to_ids(words.convert_ids_to_tokens(tag)) == tag


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000),
    layers=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    steps=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    experts=st.integers(2, 6),
    heads=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    before=st.booleans(),
    fraction=st.sampled_from([1.0, 0.5, 0.2]),
)
def test_any_shape_has_the_same_logits(
    transformers, vocabulary, tmp_path_factory, seed, layers, steps, experts, heads, bias, before, fraction
):
    folder = tmp_path_factory.mktemp("shape")
    theirs, words = build(
        transformers, "moe", folder / "hf", vocabulary, seed=seed, encoder_layers=layers[0], decoder_layers=layers[1],
        encoder_sparse_step=steps[0], decoder_sparse_step=steps[1], num_experts=experts, encoder_attention_heads=heads,
        router_bias=bias, normalize_router_prob_before_dropping=before, moe_eval_capacity_token_fraction=fraction,
    )  # fmt: skip
    source, target = batch_of(words, seed=seed)
    with reading(folder / "hf") as stored:
        found = Transformer.from_tensors(stored.config, stored.tensors)(source, target)
    torch.testing.assert_close(found, logits_of(theirs, source, target), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_model_of_ours_computes_the_same_there(transformers, vocabulary, tmp_path):
    model = toy_model(vocabulary, **nllb_moe())
    write_huggingface(tmp_path / "hf", model)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", use_fast=False, src_lang="__en__")
    source = pad([words(toy_sentence(seed))["input_ids"] for seed in range(5)])
    target = torch.tensor([[words.convert_tokens_to_ids("__de__"), 5, 9, 11]] * 5)
    ours = Transformer.from_tensors(model.config, model.tensors)
    torch.testing.assert_close(ours(source, target), logits_of(theirs, source, target), atol=1e-4, rtol=0)
