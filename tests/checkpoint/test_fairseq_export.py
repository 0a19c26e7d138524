"""A fairseq checkpoint made from a folder: exact, readable, and a start for training with fairseq itself."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.commands import command, run
from reference.fairseq_file import fairseq_options
from reference.models import DIRECTIONS, toy_model, toy_sentence, toy_translation

from mtmoe.checkpoint.fairseq import read_fairseq_checkpoint, read_model
from mtmoe.checkpoint.fairseq_export import write_fairseq_checkpoint
from mtmoe.checkpoint.folder import read_folder, write_folder
from mtmoe.errors import CheckpointError
from mtmoe.inference import Translator
from mtmoe.inference.vocabulary import Vocabulary
from mtmoe.moe import MoEConfig

ROOT = Path(__file__).parents[2]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    freq=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    heads=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    width=st.sampled_from(["own", 12]),
    pre_norm=st.booleans(),
    learned=st.booleans(),
    embeddings=st.sampled_from(["all", "decoder", "none"]),
    experts=st.integers(2, 4),
    method=st.sampled_from([{}, {"cmr": True, "cmr_d_ffn": 8}, {"eom": 0.3, "gate_bias": True}, {"dropout": 0.2}]),
)
def test_any_shape_goes_there_and_back(
    vocabulary, tmp_path_factory, layers, freq, heads, width, pre_norm, learned, embeddings, experts, method
):
    moe = [
        MoEConfig(d_model=16, d_ffn={"own": own}.get(width, 12), num_experts=experts, **method)
        if 0 < freq[side] <= layers[side]
        else None
        for side, own in enumerate((32, 24))
    ]
    model = toy_model(
        vocabulary, encoder_layers=layers[0], decoder_layers=layers[1], encoder_moe=moe[0], decoder_moe=moe[1],
        encoder_moe_freq=freq[0] if moe[0] else 0, decoder_moe_freq=freq[1] if moe[1] else 0,
        encoder_heads=heads[0], decoder_heads=heads[1], encoder_pre_norm=pre_norm, decoder_learned_positions=learned,
        share_all_embeddings=embeddings == "all", share_decoder_input_output_embed=embeddings != "none",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("export") / "start.pt"
    write_folder(path.parent / "model", model, part_bytes=9000)
    stored = read_folder(path.parent / "model")
    assert stored.config == model.config
    assert same(stored.tensors, model.tensors)
    write_fairseq_checkpoint(path, stored)
    found = read_model(path)  # its data is where the model's dictionary is
    assert found.config == model.config
    assert found.languages == model.languages
    assert same(found.tensors, model.tensors)
    assert found.dictionary.read_bytes() == model.dictionary.read_bytes()
    options = read_fairseq_checkpoint(path).model
    expected = fairseq_options(model)
    differing = {name for name in expected if options.get(name) != expected[name]}
    differing -= {"_name", "d_model", "d_ffn", "activation"}  # no options of fairseq's
    assert differing <= {"moe_ffn_embed_dim"}  # 0 there means as wide as the dense layers


def test_what_fairseq_has_not(vocabulary, tmp_path):
    path = tmp_path / "start.pt"
    model = toy_model(vocabulary, moe=True)
    other = replace(model.config.encoder_moe, num_experts=2)
    with pytest.raises(CheckpointError, match=r"once for encoder and decoder, .*: num_experts \(2 and 4\)"):
        write_fairseq_checkpoint(path, toy_model(vocabulary, moe=True, encoder_moe=other))
    other = replace(model.config.encoder_moe, d_ffn=7)
    with pytest.raises(CheckpointError, match="here they have 7 in the encoder and 24 in the decoder"):
        write_fairseq_checkpoint(path, toy_model(vocabulary, moe=True, encoder_moe=other))
    other = replace(model.config.encoder_moe, activation="silu")
    with pytest.raises(CheckpointError, match="experts have 'silu' and dense layers 'relu'"):
        write_fairseq_checkpoint(path, toy_model(vocabulary, encoder_moe=other, encoder_moe_freq=2))
    foreign = replace(model, languages=replace(model.languages, decoder_start="eos_tag"))
    with pytest.raises(CheckpointError, match="can be converted to huggingface only"):
        write_fairseq_checkpoint(path, foreign)
    assert not list(tmp_path.iterdir())


# With fairseq itself

TRAINING = (
    "--task mtmoe_translation --criterion mtmoe_label_smoothed_cross_entropy --label-smoothing 0.1 --optimizer adam "
    "--max-tokens 400 --seed 3 --cpu --num-workers 0 --disable-validation --arch mtmoe_transformer --encoder-layers 2 "
    "--decoder-layers 2 --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 32 "
    "--decoder-ffn-embed-dim 24 --moe-ffn-embed-dim 24 --encoder-attention-heads 2 --decoder-attention-heads 2 "
    "--moe-freq 2 --num-experts 4 --cmr --eom 0.2 --dropout 0.1 --log-format simple --max-source-positions 64 "
    "--max-target-positions 64"
)


def fairseq(name: str, *arguments: object) -> str:
    done = run(command(name, *arguments), timeout=280)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(vocabulary, tmp_path_factory):
    """A prepared folder of the toy language with a few pairs."""
    indexed = pytest.importorskip("fairseq.data.indexed_dataset")
    folder = tmp_path_factory.mktemp("data")
    (folder / "bin").mkdir()
    for name in ("dict.txt", "spm.model", "languages.json"):
        (folder / name).write_bytes((vocabulary / name).read_bytes())
    words = Vocabulary.load(folder / "dict.txt", folder / "spm.model", ("de", "en"))
    for split, count in (("train", 40), ("valid", 4), ("test", 4)):
        texts = [toy_sentence(seed) for seed in range(count)]
        for language, lines in (("en", texts), ("de", [toy_translation(text) for text in texts])):
            prefix = folder / "bin" / f"{split}.de-en.{language}"
            builder = indexed.MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
            for line in lines:
                builder.add_item(torch.tensor([*words.encode(line), 2]))
            builder.finalize(f"{prefix}.idx")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["finetune", "restore", "last"])
def test_training_starts_from_exactly_these_weights(vocabulary, data, tmp_path, how):
    model = toy_model(vocabulary, moe=True)
    write_folder(tmp_path / "model", model)
    start = tmp_path / ("checkpoints/checkpoint_last.pt" if how == "last" else "start.pt")
    start.parent.mkdir(exist_ok=True)
    write_fairseq_checkpoint(start, read_folder(tmp_path / "model"))
    named = {"finetune": ["--finetune-from-model", start], "restore": ["--restore-file", start], "last": []}[how]
    printed = fairseq(
        "fairseq-train", data, "--user-dir", ROOT / "fairseq_plugins", "--save-dir", tmp_path / "checkpoints",
        "--directions", "de-en,en-de", "--lr", "0.0", "--max-update", "1", *TRAINING.split(), *named,
    )  # fmt: skip
    assert f"oaded checkpoint {start}" in printed
    trained = read_model(tmp_path / "checkpoints" / "checkpoint_last.pt", data)  # one update at learning rate 0
    assert same(trained.tensors, model.tensors)
    assert trained.history[-1]["updates"] == 1
    assert trained.config == replace(
        model.config,
        encoder_moe=replace(model.config.encoder_moe, dropout=0.1),
        decoder_moe=replace(model.config.decoder_moe, dropout=0.1),
    )


@pytest.mark.slow
def test_fairseq_generate_translates_as_the_folder(vocabulary, data, tmp_path):
    model = toy_model(vocabulary, moe=True)
    write_folder(tmp_path / "model", model)
    write_fairseq_checkpoint(tmp_path / "start.pt", model)
    search = "-s en -t de --cpu --num-workers 0 --beam 1 --batch-size 1 --unkpen inf --max-len-a 2 --max-len-b 20"
    printed = fairseq(
        "fairseq-generate", data, "--user-dir", ROOT / "fairseq_plugins", "--task", "mtmoe_translation", "--path",
        tmp_path / "start.pt", "--directions", ",".join(DIRECTIONS), *search.split(),
    )  # fmt: skip
    lines = dict(line.split("\t", 2)[::2] for line in printed.splitlines() if line.startswith("H-"))
    translator = Translator.load(tmp_path / "model")
    texts = [toy_sentence(seed) for seed in range(4)]
    found = translator.translate(texts, "en", "de", beam=1)
    pieces = [lines[f"H-{number}"].split() for number in range(4)]
    assert found == [translator.vocabulary.processor.decode(line) for line in pieces]
