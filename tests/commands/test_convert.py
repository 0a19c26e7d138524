"""`mtmoe convert`: from a checkpoint to a folder that translates the same."""

import json
from dataclasses import replace

import pytest
import torch
from reference.fairseq_file import fairseq_state
from reference.models import DIRECTIONS, toy_model, toy_sentence, write_toy_vocabulary

from mtmoe.checkpoint import open_model
from mtmoe.checkpoint.folder import FILES, write_folder
from mtmoe.cli import main
from mtmoe.inference import Translator
from mtmoe.moe import MoEConfig

DATA = {"recipe": "toy", "licence": "CC0", "attribution": "us all", "pairs": {"de-en": {"train": 12, "valid": 1}}}


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a run, with one checkpoint of a random model."""
    data = write_toy_vocabulary(tmp_path / "run" / "data")
    (tmp_path / "run" / "checkpoints").mkdir()
    torch.save(fairseq_state(toy_model(data, moe=True)), tmp_path / "run" / "checkpoints" / "checkpoint_best.pt")
    return tmp_path / "run"


@pytest.mark.parametrize("given_as", ["run", "checkpoint"])
def test_the_folder_translates_as_the_checkpoint(run_folder, tmp_path, capsys, given_as):
    checkpoint = run_folder / "checkpoints" / "checkpoint_best.pt"
    path = run_folder if given_as == "run" else checkpoint
    assert main(["convert", str(path), "--output", str(tmp_path / "model")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'model'}: ")
    assert "parameters, languages de, en, mk" in captured.out
    assert captured.err == (f"mtmoe convert: using {checkpoint}\n" if given_as == "run" else "")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == sorted(FILES)
    texts = [toy_sentence(seed) for seed in range(6)]
    found = Translator.load(tmp_path / "model")
    assert found.directions == DIRECTIONS
    assert found.translate(texts, "en", "de") == Translator.load(checkpoint).translate(texts, "en", "de")
    assert found.model.config.encoder_moe is not None


def convert(*words, code=0):
    assert main(["convert", *map(str, words)]) == code


@pytest.fixture
def folder(run_folder, tmp_path):
    (run_folder / "data" / "data.json").write_text(json.dumps(DATA))
    convert(run_folder, "--output", tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_to_a_checkpoint_and_back(folder, run_folder, tmp_path):
    convert(folder, "--to", "fairseq", "--output", tmp_path / "start.pt")
    convert(tmp_path / "start.pt", "--output", tmp_path / "back")  # the vocabulary is that of the folder
    first, back, direct = (open_model(path) for path in (folder, tmp_path / "back", tmp_path / "start.pt"))
    assert back.config == first.config == direct.config
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in first.tensors.items())
    assert back.languages == first.languages


def test_dtypes(folder, tmp_path, capsys):
    convert(folder, "--dtype", "bf16", "--output", tmp_path / "half")
    first, half = open_model(folder), open_model(tmp_path / "half")
    assert all(torch.equal(half.tensors[name], tensor.bfloat16()) for name, tensor in first.tensors.items())
    assert half.history[-1] | {"mtmoe": ""} == {"operation": "cast", "to": "bf16", "from": "fp32", "mtmoe": ""}
    convert(tmp_path / "half", "--dtype", "fp32", "--output", tmp_path / "half")  # over what is read
    again = open_model(tmp_path / "half")
    assert all(torch.equal(again.tensors[name], tensor.bfloat16().float()) for name, tensor in first.tensors.items())
    convert(folder, "--dtype", "fp32", "--output", tmp_path / "same")
    assert len(open_model(tmp_path / "same").history) == len(first.history)  # nothing was done
    large = dict(first.tensors) | {"encoder.layer_norm.bias": torch.full((16,), 1e6)}
    write_folder(tmp_path / "large", replace(first, tensors=large))
    capsys.readouterr()
    convert(tmp_path / "large", "--dtype", "fp16", "--output", tmp_path / "narrow", code=1)
    assert "encoder.layer_norm.bias has numbers up to 1e+06" in capsys.readouterr().err
    assert not (tmp_path / "narrow").exists()


def test_figures_and_data_come_into_the_card(folder, tmp_path, capsys):
    figures = {"chrf++": 48.25, "bleu": 31.0, "sentences": 77, "test_set": "f00d"}
    report = {"directions": {"en-de": figures | {"seconds": 3}}}
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    convert(folder, "--evaluation", tmp_path / "evaluation.json", "--output", folder)
    card = (folder / "README.md").read_text()
    for part in ("| en-de | 77 | 48.2 | 31.0 |", "Licence: CC0", "Attribution: us all", "1. converted: source fairseq"):
        assert part in card
    found = open_model(folder)
    assert found.figures == {"mean_chrf++": 48.25, "mean_bleu": 31.0, "directions": {"en-de": figures}}
    assert found.data["train_pairs"] == {"de-en": 12}
    (tmp_path / "evaluation.json").write_text("{}")
    convert(folder, "--evaluation", tmp_path / "evaluation.json", "--output", folder, code=1)
    assert "is no evaluation; give the evaluation.json" in capsys.readouterr().err


def test_to_hugging_face_and_back(run_folder, tmp_path, capsys):
    experts = MoEConfig(d_model=16, d_ffn=32, num_experts=4, eom=0.2)
    model = toy_model(run_folder / "data", encoder_moe=experts, encoder_moe_freq=2)
    write_folder(tmp_path / "model", model)
    convert(tmp_path / "model", "--to", "huggingface", "--output", tmp_path / "hf")
    assert "generate(decoder_start_token_id=ID_OF_THE_TAG)" in capsys.readouterr().err
    convert(tmp_path / "hf", "--output", tmp_path / "back")
    back = open_model(tmp_path / "back")
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in model.tensors.items())
    assert main(["translate", "--model", str(tmp_path / "hf"), "--from", "en", "--to", "de", "a"]) == 1
    assert "this is a Hugging Face model; turn it into a model folder first: mtmoe convert" in capsys.readouterr().err


def test_a_damaged_folder_is_not_converted(folder, tmp_path, capsys):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 4
    (folder / "model.safetensors").write_bytes(content)
    convert(folder, "--output", tmp_path / "again", code=1)
    assert "model.safetensors is damaged: its SHA-256" in capsys.readouterr().err


def test_mistakes(run_folder, tmp_path, capsys):
    assert main(["convert", str(tmp_path / "no.pt"), "--output", str(tmp_path / "model")]) == 1
    assert "no.pt does not exist" in capsys.readouterr().err
    arguments = ["convert", str(run_folder), "--output", str(run_folder / "data")]
    assert main(arguments) == 1
    assert "exists and is no model folder; it is left as it is" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "model"), "--data", str(tmp_path)]) == 1
    assert "needs its prepared data" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert main(["convert", str(run_folder), "--to", "fairseq", "--output", str(tmp_path / "x")]) == 1
    assert "a fairseq checkpoint is a file that ends with .pt" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2)])
def test_usage(arguments, code):
    with pytest.raises(SystemExit) as exit_:
        main(["convert", *arguments])
    assert exit_.value.code == code
