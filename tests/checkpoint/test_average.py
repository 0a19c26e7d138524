"""Averages: of the numbers, of what matches, and of a run's last checkpoints."""

from dataclasses import replace

import pytest
import torch
from reference.fairseq_file import fairseq_state
from reference.models import toy_model

from mtmoe.checkpoint.average import average, last_checkpoints
from mtmoe.checkpoint.folder import read_folder, write_folder
from mtmoe.checkpoint.stored import LanguageSet
from mtmoe.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_rounded_once(vocabulary, tmp_path, dtype):
    models = {str(seed): toy_model(vocabulary, seed=seed, moe=True) for seed in range(3)}
    models = {
        name: replace(model, tensors={key: tensor.to(dtype) for key, tensor in model.tensors.items()})
        for name, model in models.items()
    }
    weight = "encoder.layers.0.fc1.weight"
    before = {name: model.tensors[weight].clone() for name, model in models.items()}
    write_folder(tmp_path / "model", average(models))
    found = read_folder(tmp_path / "model")
    for name, tensor in found.tensors.items():
        expected = torch.stack([model.tensors[name].double() for model in models.values()]).mean(0)
        assert torch.equal(tensor, expected.to(dtype))
    assert all(torch.equal(model.tensors[weight], before[name]) for name, model in models.items())
    assert found.history[-1]["operation"] == "averaged"
    assert found.history[-1]["models"] == ["0", "1", "2"]


def test_fp64_weights_stay_as_they_are(vocabulary):
    models = {str(seed): toy_model(vocabulary, seed=seed) for seed in range(2)}
    models = {
        name: replace(model, tensors={key: tensor.double() for key, tensor in model.tensors.items()})
        for name, model in models.items()
    }
    name = "encoder.layers.0.fc1.weight"
    before = models["0"].tensors[name].clone()
    first, second = (average(models).tensors[name] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(models["0"].tensors[name], before)


def test_a_model_with_itself_is_itself(model):
    same = average({"a": model, "b": model, "c": model})
    assert all(torch.equal(same.tensors[name], tensor) for name, tensor in model.tensors.items())


def test_models_that_do_not_match(vocabulary, tmp_path):
    model = toy_model(vocabulary, moe=True)
    for other, text in (
        (toy_model(vocabulary, moe=True, encoder_heads=4), "encoder_heads is 2 and 4"),
        (toy_model(vocabulary), "encoder_moe_freq is 2 and 0; .*encoder_moe is an object and None"),
        (
            toy_model(vocabulary, moe=True, encoder_moe=replace(model.config.encoder_moe, num_experts=3)),
            "encoder_moe.num_experts is 4 and 3",
        ),
        (
            replace(model, languages=LanguageSet(("de", "en"), ("de-en",), "tgt")),
            "languages is .*'mk'.* and .*; encoder_langtok is 'src' and 'tgt'",
        ),
        (replace(model, dictionary=vocabulary / "languages.json"), "dict.txt is not the same file"),
        (
            replace(model, tensors={name: tensor.half() for name, tensor in model.tensors.items()}),
            "embed_tokens.weight is torch.float32 and torch.float16",
        ),
    ):
        with pytest.raises(CheckpointError, match=f"one and two are no models of one training: .*{text}"):
            average({"one": model, "two": other})
    with pytest.raises(CheckpointError, match="needs two models or more, not 1"):
        average({"one": model})


def test_the_last_checkpoints_of_a_run(vocabulary, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, updates in (
        ("checkpoint_1_100", 100), ("checkpoint_1_1000", 1000), ("checkpoint2", 900), ("checkpoint_last", 1000),
        ("checkpoint_best", 50), ("checkpoint_good", 60),
    ):  # fmt: skip
        state = fairseq_state(toy_model(vocabulary))
        state["optimizer_history"][-1]["num_updates"] = updates
        torch.save(state, folder / f"{name}.pt")
    for run in (tmp_path, folder):
        assert [path.name for path in last_checkpoints(run, 2)] == ["checkpoint2.pt", "checkpoint_1_1000.pt"]
    with pytest.raises(CheckpointError, match=r"has 3 checkpoints of different updates, not 4: checkpoint_1_100\.pt"):
        last_checkpoints(tmp_path, 4)
    with pytest.raises(CheckpointError, match="not 2: none"):
        last_checkpoints(vocabulary, 2)
