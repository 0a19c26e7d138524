"""The folder: what comes back, what an error names, and that nothing good is lost."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.models import as_version_1, seal, toy_config, toy_model, toy_tensors
from safetensors import safe_open
from safetensors.torch import save_file

from mtmoe.checkpoint import StoredModel, TransformerConfig, locate_model, open_model
from mtmoe.checkpoint.folder import FILES, identity, read_folder, write_folder
from mtmoe.checkpoint.tensors import rows_of
from mtmoe.errors import CheckpointError
from mtmoe.moe.config import LATER_FIELDS


def test_comes_back_to_the_bit(model, tmp_path):
    folder = tmp_path / "deep" / "model"
    write_folder(folder, model)
    found = read_folder(folder)
    assert found.config == model.config
    assert found.languages == model.languages
    assert found.tensors.keys() == model.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in model.tensors.items())
    assert found.dictionary.read_bytes() == model.dictionary.read_bytes()
    assert found.sentencepiece.read_bytes() == model.sentencepiece.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert (found.history, found.data, found.figures) == (model.history, model.data, model.figures)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_is_as_readable_as_other_files(vocabulary, tmp_path):
    before = os.umask(0o027)
    try:
        write_folder(tmp_path / "model", toy_model(vocabulary))
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o640}


def test_keeps_bfloat16(vocabulary, tmp_path):
    model = toy_model(vocabulary)
    half = {name: tensor.bfloat16() for name, tensor in model.tensors.items()}
    write_folder(
        tmp_path / "model", StoredModel(model.config, half, model.dictionary, model.sentencepiece, model.languages)
    )
    assert all(tensor.dtype == torch.bfloat16 for tensor in read_folder(tmp_path / "model").tensors.values())


def test_replaces_an_older_folder(vocabulary, tmp_path):
    write_folder(tmp_path / "model", toy_model(vocabulary, seed=1))
    newer = toy_model(vocabulary, seed=2)
    write_folder(tmp_path / "model", newer)
    name = "encoder.layers.0.fc1.weight"
    assert torch.equal(read_folder(tmp_path / "model").tensors[name], newer.tensors[name])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("failing", ["copyfile", "rename"])
def test_a_failed_write_leaves_the_old_folder(vocabulary, tmp_path, monkeypatch, failing):
    old = toy_model(vocabulary, seed=1)
    write_folder(tmp_path / "model", old)

    def full(*_):
        raise OSError(28, "No space left on device")

    if failing == "copyfile":
        monkeypatch.setattr(shutil, "copyfile", full)
    else:
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: full() if str(a).endswith(".new") else replace(a, b))
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "model", toy_model(vocabulary, seed=2))
    monkeypatch.undo()
    name = "encoder.layers.0.fc1.weight"
    assert torch.equal(read_folder(tmp_path / "model").tensors[name], old.tensors[name])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_leaves_other_things_alone(vocabulary, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(CheckpointError, match="exists and is no model folder; it is left as it is"):
            write_folder(tmp_path / name, toy_model(vocabulary))
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", toy_model(vocabulary))


def test_weights_that_do_not_fit_are_not_written(vocabulary, tmp_path):
    model = toy_model(vocabulary)
    tensors = {name: tensor for name, tensor in model.tensors.items() if name != "encoder.layer_norm.weight"}
    broken = StoredModel(model.config, tensors, model.dictionary, model.sentencepiece, model.languages)
    with pytest.raises(CheckpointError, match=r"lacks encoder\.layer_norm\.weight"):
        write_folder(tmp_path / "model", broken)
    assert not (tmp_path / "model").exists()


@pytest.fixture
def folder(vocabulary, tmp_path):
    write_folder(tmp_path / "model", toy_model(vocabulary, moe=True))
    return tmp_path / "model"


@pytest.mark.parametrize("name", [name for name in FILES if name != "README.md"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_missing_file(folder, name, version):
    if version == 1:
        as_version_1(folder)
    (folder / name).unlink(missing_ok=True)
    if version == 1 and name == "checksums.json":
        read_folder(folder)
        return
    with pytest.raises(CheckpointError, match=f"it lacks.* {name}|{name} is missing, and checksums.json lists it"):
        read_folder(folder)


def test_the_card_may_change(folder):
    (folder / "README.md").write_text("mine")
    read_folder(folder)
    (folder / "README.md").unlink()
    read_folder(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda config: config.update(version=3), r"config\.json: version 3 is unknown, .* versions 1 to 2\. Upd"),
        (lambda config: config.update(version=True), "version True is unknown"),
        (lambda config: config.update(history=["pruned"]), "history must be a list of objects with an operation"),
        (lambda config: config.update(figures=[]), "figures must be an object"),
        (lambda config: config.update(format="x"), "format must be 'mtmoe'"),
        (lambda config: config.pop("model"), "config.json lacks model"),
        (lambda config: config.update(model=3), "model must be an object"),
        (lambda config: config["model"].pop("d_model"), "model lacks d_model"),
        (lambda config: config["model"].update(depth=3), "model has unknown depth"),
        (lambda config: config["model"].update(d_model="16"), r"model\.d_model must be of type int, not '16'"),
        (lambda config: config["model"].update(d_model=True), r"model\.d_model must be of type int, not True"),
        (lambda config: config["model"].update(encoder_heads=3), "encoder_heads=3 must divide d_model=16"),
        (lambda config: config["model"].update(encoder_moe=None), "encoder_moe must be given exactly when"),
        (lambda config: config["model"]["encoder_moe"].pop("eom"), r"model\.encoder_moe lacks eom"),
        (lambda config: config["model"]["encoder_moe"].update(top_k=0), "top_k=0 must be between 1 and num_experts=4"),
        (lambda config: config["model"].update(encoder_layers=10**9), "encoder_layers=1000000000 must be at most"),
        (lambda config: config["model"].update(vocabulary_size=9), r"embed_tokens\.weight has shape .* says \(9, 16\)"),
    ],
)
def test_a_wrong_configuration(folder, change, text):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: its SHA-256|it has .* bytes, checksums"):
        read_folder(folder)
    seal(folder)
    with pytest.raises(CheckpointError, match=text):
        read_folder(folder)


@pytest.mark.parametrize("model", ["moe", "moec"])
def test_fields_of_later_versions_may_lack(model, vocabulary, tmp_path):
    write_folder(tmp_path / "model", toy_model(vocabulary, **{model: True}))
    expected = read_folder(tmp_path / "model").config
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    for side in ("encoder_moe", "decoder_moe"):
        for name in LATER_FIELDS:
            del config["model"][side][name]
    path.write_text(json.dumps(config))
    seal(tmp_path / "model")
    if model == "moe":  # as it was before there were such fields
        assert read_folder(tmp_path / "model").config == expected
    else:  # one that is not as by default cannot be guessed: the weights tell
        with pytest.raises(CheckpointError, match=r"gate\.weight has shape \(4, 5\), the configuration says \(4, 32\)"):
            read_folder(tmp_path / "model")


ONE_LANGUAGE = '{"languages": ["de"], "directions": [], "encoder_langtok": "src"'


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "languages.json is not valid JSON"),
        ("[]", "languages.json"),
        ('{"languages": ["de"]}', "lacks 'directions'"),
        ('{"languages": "de", "directions": [], "encoder_langtok": "src"}', "languages must be a list of strings"),
        (
            '{"languages": ["de"], "directions": ["de-en"], "encoder_langtok": "src"}',
            "direction 'de-en' must join two of: de",
        ),
        ('{"languages": ["de"], "directions": [], "encoder_langtok": "both"}', "encoder_langtok='both' must be one of"),
        (ONE_LANGUAGE + ', "tags": {"en": "x"}}', "tags names en"),
        (ONE_LANGUAGE + ', "tags": {"de": 1}}', "tags must be an object of strings"),
        (ONE_LANGUAGE + ', "decoder_start": "x"}', "decoder_start='x' must be one of: tag, eos_tag"),
        ('{"languages": [], "directions": [], "encoder_langtok": "src"}', "needs at least one language"),
    ],
)
def test_wrong_languages(folder, content, text):
    (folder / "languages.json").write_text(content)
    seal(folder)
    with pytest.raises(CheckpointError, match=text):
        read_folder(folder)


def test_version_1_is_read_as_before(model, tmp_path):
    write_folder(tmp_path / "model", model)
    as_version_1(tmp_path / "model")
    found = read_folder(tmp_path / "model")
    assert (found.config, found.languages) == (model.config, model.languages)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in model.tensors.items())
    write_folder(tmp_path / "model", found)  # over the very files that are mapped
    newer = read_folder(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["version"] == 2
    assert all(torch.equal(newer.tensors[name], tensor) for name, tensor in model.tensors.items())


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part_bytes=st.integers(1, 40_000))
def test_parts_of_any_size_hold_the_same(vocabulary, tmp_path_factory, part_bytes):
    model = toy_model(vocabulary, moe=True)
    folder = tmp_path_factory.mktemp("parts") / "model"
    write_folder(folder, model, part_bytes=part_bytes)
    parts = sorted(folder.glob("model*.safetensors"))
    found = read_folder(folder)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in model.tensors.items())
    for path in parts:
        with safe_open(path, "pt") as file:
            sizes = [found.tensors[name].nbytes for name in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= part_bytes or len(sizes) == 1
    assert sum(tensor.nbytes for tensor in model.tensors.values()) <= part_bytes * len(parts) or part_bytes < 10_000
    if len(parts) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == model.tensors.keys()
        assert [path.name for path in parts] == sorted(set(index["weight_map"].values()))
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.tensors.values())


def test_rows_of_a_weight(folder, vocabulary):
    tensors = read_folder(folder).tensors
    name = "encoder.layers.1.moe.experts.w_in"
    expected = toy_model(vocabulary, moe=True).tensors[name]
    assert torch.equal(rows_of(tensors, name, 1, 3), expected[1:3])
    assert torch.equal(rows_of({name: expected}, name, 1, 3), expected[1:3])


def test_an_identity_is_of_what_decides_translations(vocabulary, tmp_path):
    model = toy_model(vocabulary, moe=True)
    told = replace(model, data={"licence": "CC0"}, figures={"mean_chrf++": 1.0, "directions": {}}).after("converted")
    deaf = replace(model, config=replace(model.config, max_source_positions=8))
    other = toy_model(vocabulary, seed=2, moe=True)
    for name, each in (("a", model), ("b", told), ("c", other), ("d", deaf)):
        write_folder(tmp_path / name, each)
    assert identity(tmp_path / "a") == identity(tmp_path / "b")
    assert len({identity(tmp_path / name) for name in "acd"}) == 3
    as_version_1(tmp_path / "a")
    assert identity(tmp_path / "a") is None


def test_history_grows_and_figures_go(vocabulary, tmp_path):
    model = replace(toy_model(vocabulary), data={"licence": "CC0"}, figures={"mean_chrf++": 1.0, "directions": {}})
    write_folder(tmp_path / "model", model.after("pruned", keep=0.2).after("quantised"))
    found = read_folder(tmp_path / "model")
    assert [entry["operation"] for entry in found.history] == ["pruned", "quantised"]
    assert found.history[0]["keep"] == 0.2
    assert (found.data, found.figures) == ({"licence": "CC0"}, {})


def test_weights_of_another_shape(folder):
    tensors = toy_tensors(toy_config())
    save_file(tensors, folder / "model.safetensors")
    seal(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors lacks .*moe.* and has unknown .*fc1"):
        read_folder(folder)


def test_a_config_survives_json(model):
    assert TransformerConfig.from_json(json.loads(json.dumps(model.config.to_json()))) == model.config


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"d_model": 0}, "d_model=0 must be at least 1"),
        ({"activation": "selu"}, "activation='selu' must be one of: relu, gelu"),
        ({"share_decoder_input_output_embed": False}, "share_all_embeddings shares the output too"),
        ({"decoder_heads": 5}, "decoder_heads=5 must divide d_model=16"),
        ({"decoder_moe_freq": 2}, "decoder_moe must be given exactly when decoder_moe_freq makes"),
        ({"moe": True, "encoder_moe_freq": 3}, "encoder_moe must be given exactly when"),
        ({"moe": True, "d_model": 32}, r"encoder_moe\.d_model=16 must be d_model=32"),
    ],
)
def test_a_config_out_of_range(changes, text):
    with pytest.raises(ValueError, match=text):
        toy_config(**changes)


def test_what_a_path_means(vocabulary, tmp_path):
    with pytest.raises(CheckpointError, match="nothing does not exist; give a model folder"):
        locate_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is neither a model folder"):
        open_model(tmp_path)
    write_folder(tmp_path / "model", toy_model(vocabulary))
    assert locate_model(tmp_path / "model") == tmp_path / "model"
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "checkpoint_last.pt").touch()
    assert locate_model(tmp_path / "run").name == "checkpoint_last.pt"
    (checkpoints / "checkpoint_best.pt").touch()
    assert locate_model(tmp_path / "run").name == "checkpoint_best.pt"
    assert locate_model(checkpoints / "checkpoint_last.pt").name == "checkpoint_last.pt"
