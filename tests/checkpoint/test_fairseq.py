"""Reading checkpoints: what fairseq writes, what is damaged, and what wants to run code."""

import os
import subprocess
import sys
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.fairseq_file import Hostile, fairseq_options, fairseq_state
from reference.models import toy_model

from mtmoe.checkpoint.fairseq import read_fairseq_checkpoint, read_model, transformer_config
from mtmoe.errors import CheckpointError
from mtmoe.moe.config import LATER_FIELDS


def save(state, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def test_reads_what_it_was_made_from(model, vocabulary, tmp_path):
    path = save(fairseq_state(model), tmp_path / "checkpoint.pt")
    found = read_model(path, vocabulary)
    assert found.config == model.config
    assert found.languages == model.languages
    assert found.tensors.keys() == model.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in model.tensors.items())
    assert (found.dictionary, found.sentencepiece) == (vocabulary / "dict.txt", vocabulary / "spm.model")


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_pre_norm": False, "decoder_pre_norm": False},
        {"encoder_learned_positions": True, "layernorm_embedding": True},
        {"share_all_embeddings": False, "share_decoder_input_output_embed": False},
        {"share_all_embeddings": False},
    ],
    ids=str,
)
def test_reads_every_shape(vocabulary, tmp_path, changes):
    model = toy_model(vocabulary, **changes)
    found = read_model(save(fairseq_state(model), tmp_path / "checkpoint.pt"), vocabulary)
    assert found.config == model.config
    assert found.tensors.keys() == model.tensors.keys()


def test_nested_options_and_moe_freq_of_both_sides(vocabulary, tmp_path):
    model = toy_model(vocabulary, moe=True)
    state = fairseq_state(model)
    flat = fairseq_options(model) | {"moe_freq": 2, "encoder_moe_freq": -1, "decoder_moe_freq": -1}
    nested = {"encoder": {}, "decoder": {}}
    for name, value in flat.items():
        side, _, rest = name.partition("_")
        if side in ("encoder", "decoder"):
            nested[side][rest] = value
        else:
            nested[name] = value
    state["cfg"]["model"] = nested
    assert read_model(save(state, tmp_path / "checkpoint.pt"), vocabulary).config == model.config


def test_experts_may_have_a_width_and_dropout_of_their_own(vocabulary, tmp_path):
    model = toy_model(vocabulary, moe=True)
    moe = replace(model.config.encoder_moe, d_ffn=model.config.encoder_d_ffn, dropout=0.1)
    model = toy_model(vocabulary, encoder_moe=moe, encoder_moe_freq=1)
    state = fairseq_state(model)
    vars(state["cfg"]["model"]).update(moe_ffn_embed_dim=0, moe_dropout=-1.0)
    assert read_model(save(state, tmp_path / "checkpoint.pt"), vocabulary).config == model.config


def test_a_checkpoint_from_before_an_option_has_its_default(vocabulary, tmp_path):
    model = toy_model(vocabulary, moe=True)
    state = fairseq_state(model)
    for name in LATER_FIELDS:
        delattr(state["cfg"]["model"], name)
    assert read_model(save(state, tmp_path / "checkpoint.pt"), vocabulary).config == model.config


def test_reads_moec(vocabulary, tmp_path):
    model = toy_model(vocabulary, moec=True)
    found = read_model(save(fairseq_state(model), tmp_path / "checkpoint.pt"), vocabulary)
    assert found.config == model.config
    assert found.tensors["encoder.layers.1.moe.gate.log_temperature"].shape == (1,)


def test_reads_the_bilevel_gate(vocabulary, tmp_path):
    model = toy_model(vocabulary, bilevel=True)
    found = read_model(save(fairseq_state(model), tmp_path / "checkpoint.pt"), vocabulary)
    assert found.config == model.config
    assert found.tensors["encoder.layers.1.moe.gate.weight"].shape == (2 + 2, 16)


def test_classes_of_configurations_are_replaced_by_stand_ins(vocabulary, tmp_path):
    from omegaconf import OmegaConf

    model = toy_model(vocabulary)
    state = fairseq_state(model)
    for name in ("model", "task"):
        part = state["cfg"][name]
        state["cfg"][name] = OmegaConf.create(vars(part) if isinstance(part, Namespace) else part)
    state["extra_state"] |= {"val_loss": np.float64(3.5), "best": np.float32(1), "count": np.int64(3)}
    path = save(state, tmp_path / "checkpoint.pt")
    assert read_model(path, vocabulary).config == model.config
    state["cfg"] = OmegaConf.create({"model": fairseq_options(model), "task": {"encoder_langtok": "src"}})
    assert read_model(save(state, path), vocabulary).config == model.config


def test_classes_of_fairseq_are_replaced_without_importing_it(vocabulary, tmp_path):
    meters = pytest.importorskip("fairseq.logging.meters")
    model = toy_model(vocabulary)
    state = fairseq_state(model)
    state["extra_state"]["meter"] = meters.AverageMeter(round=3)
    path = save(state, tmp_path / "checkpoint.pt")
    program = (
        "import sys; from pathlib import Path; from mtmoe.checkpoint.fairseq import read_fairseq_checkpoint as read;"
        f"read(Path({str(path)!r})); assert not {{'fairseq', 'omegaconf'}} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": str(root)})


def test_flat_options_of_old_checkpoints(vocabulary, tmp_path):
    model = toy_model(vocabulary)
    state = fairseq_state(model)
    task = state.pop("cfg")["task"]
    state["args"] = Namespace(**fairseq_options(model), encoder_langtok=task["encoder_langtok"], data=None)
    assert read_model(save(state, tmp_path / "checkpoint.pt"), vocabulary).config == model.config


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (eval, "eval"), (subprocess.Popen, "Popen"), (getattr, "getattr")],
    ids=["system", "eval", "popen", "getattr"],
)
def test_a_hostile_pickle_is_refused_by_name(vocabulary, tmp_path, function, name):
    trace = tmp_path / "trace"
    state = fairseq_state(toy_model(vocabulary))
    state["extra_state"]["evil"] = Hostile(function, f"touch {trace}")
    path = save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=rf"not safe to read: it asks for \S*{name}"):
        read_fairseq_checkpoint(path)
    assert not trace.exists()


def test_a_harmless_package_runs_nothing_either(vocabulary, tmp_path):
    # numpy has functions that run text; what is asked of numpy is replaced, not imported.
    from numpy.testing import rundocs, runstring

    trace = tmp_path / "trace"
    state = fairseq_state(toy_model(vocabulary))
    state["extra_state"]["evil"] = [Hostile(runstring, f"open({str(trace)!r}, 'w')", {}), Hostile(rundocs, "x.py")]
    read_fairseq_checkpoint(save(state, tmp_path / "checkpoint.pt"))
    assert not trace.exists()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_truncated_file(vocabulary, tmp_path, share):
    path = save(fairseq_state(toy_model(vocabulary)), tmp_path / "checkpoint.pt")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt (is cut short|is damaged)"):
        read_fairseq_checkpoint(path)


def test_a_pickle_cut_inside_a_sound_archive(vocabulary, tmp_path):
    path = save(fairseq_state(toy_model(vocabulary)), tmp_path / "checkpoint.pt")
    for share in (0.1, 0.5, 0.9):
        broken = tmp_path / "broken.pt"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(broken, "w") as new:
            for item in old.infolist():
                content = old.read(item)
                new.writestr(
                    item, content[: int(share * len(content))] if item.filename.endswith("data.pkl") else content
                )
        with pytest.raises(CheckpointError, match="is damaged"):
            read_fairseq_checkpoint(broken)


def test_no_file_and_no_checkpoint(vocabulary, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pt does not exist"):
        read_fairseq_checkpoint(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="no checkpoint in torch's zip format"):
        read_fairseq_checkpoint(tmp_path / "text.pt")
    for state, text in (
        ({"weights": 1}, "holds no 'model'"),
        ([1], "holds no 'model'"),
        ({"model": {}}, "holds neither 'cfg' nor 'args'"),
    ):
        with pytest.raises(CheckpointError, match=text):
            read_fairseq_checkpoint(save(state, tmp_path / "checkpoint.pt"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda options: options.pop("encoder_layers"), "lacks the model option encoder_layers"),
        (lambda options: options.pop("num_experts"), "lacks the model option num_experts"),
        (lambda options: options.update(cross_self_attention=True), "cross_self_attention=True is not supported"),
        (lambda options: options.update(activation_fn="swish"), "activation='swish' must be one of: relu, gelu"),
        (lambda options: options.update(decoder_embed_dim=8), "decoder_embed_dim=8 must equal encoder_embed_dim=16"),
        (lambda options: options.update(top_k=9), "top_k=9 must be between 1 and num_experts=4"),
        (lambda options: options.update(encoder_layers=3), "lacks encoder.layers.2.fc1.bias"),
        (lambda options: options.update(decoder_moe_freq=1), "lacks decoder.layers.0.moe.conditional"),
        (lambda options: options.update(moe_ffn_embed_dim=7), r"moe.experts.w_in has shape \(4, 24, 16\)"),
    ],
)
def test_options_that_are_missing_unsupported_or_do_not_fit(vocabulary, tmp_path, change, text):
    state = fairseq_state(toy_model(vocabulary, moe=True))
    change(vars(state["cfg"]["model"]))
    path = save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=text):
        read_model(path, vocabulary)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop("encoder.embed_tokens.weight"), "lacks encoder.embed_tokens.weight"),
        (lambda tensors: tensors.pop("encoder.layer_norm.bias"), "lacks encoder.layer_norm.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "has unknown extra"),
        (
            lambda tensors: tensors.update({"decoder.output_projection.weight": torch.zeros(64, 16)}),
            "output_projection.weight differs from encoder.embed_tokens.weight, which it should share",
        ),
        (
            lambda tensors: tensors.update({"encoder.layer_norm.bias": torch.zeros(16, dtype=torch.int64)}),
            "encoder.layer_norm.bias must hold floating-point numbers",
        ),
    ],
)
def test_weights_that_do_not_fit(vocabulary, tmp_path, change, text):
    state = fairseq_state(toy_model(vocabulary))
    change(state["model"])
    with pytest.raises(CheckpointError, match=text):
        read_model(save(state, tmp_path / "checkpoint.pt"), vocabulary)


def test_where_the_data_is_looked_for(vocabulary, tmp_path):
    model = toy_model(vocabulary)
    path = save(fairseq_state(model, data=vocabulary / "bin"), tmp_path / "run" / "checkpoints" / "checkpoint.pt")
    assert read_model(path).dictionary == vocabulary / "dict.txt"
    beside = tmp_path / "run" / "data"
    beside.mkdir()
    for name in ("dict.txt", "spm.model", "languages.json"):
        (beside / name).write_bytes((vocabulary / name).read_bytes())
    assert read_model(path).dictionary == beside / "dict.txt"
    (beside / "spm.model").unlink()
    with pytest.raises(CheckpointError, match=r"data lacks spm\.model"):
        read_model(path)
    with pytest.raises(CheckpointError, match=r"looked in .*elsewhere\. Give --data"):
        read_model(path, tmp_path / "elsewhere")


def test_a_task_without_language_tags(vocabulary, tmp_path):
    state = fairseq_state(toy_model(vocabulary))
    state["cfg"]["task"] = {"_name": "translation", "data": "bin"}
    path = save(state, tmp_path / "checkpoint.pt")
    assert transformer_config(read_fairseq_checkpoint(path)).d_model == 16
    with pytest.raises(CheckpointError, match="trained with task 'translation', which has no language tags"):
        read_model(path, vocabulary)
