"""`mtmoe prune` from a model folder to a smaller one: budgets, sizes, the search, recovery, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from reference.models import DIRECTIONS, toy_model, toy_sentence, toy_translation, write_toy_vocabulary
from reference.routing import table_for

from mtmoe.checkpoint.folder import read_folder, write_folder
from mtmoe.checkpoint.pruning import BESIDE, BESIDE_EACH, bytes_of_model, experts_of
from mtmoe.cli import main
from mtmoe.commands.prune import parse_balance, parse_keep, parse_size, ranges
from mtmoe.data.mmap_dataset import write_dataset
from mtmoe.experiments import pruning
from mtmoe.inference import Translator
from mtmoe.inference.vocabulary import EOS, Vocabulary
from mtmoe.moe import MoEConfig

EXPERTS = MoEConfig(d_model=16, d_ffn=24, num_experts=8, top_k=2)


@pytest.fixture
def data(tmp_path):
    folder = write_toy_vocabulary(tmp_path / "data")
    (folder / "data.json").write_text(json.dumps({"format": 1, "pairs": {}}))
    vocabulary = Vocabulary.load(folder / "dict.txt", folder / "spm.model", ("de", "en", "mk"))
    for name in ("text", "bin"):
        (folder / name).mkdir()
    for pair in ("de-en", "en-mk"):
        sources = [toy_sentence(seed) for seed in range(6)]
        for language, lines in zip(pair.split("-"), (sources, map(toy_translation, sources)), strict=True):
            lines = list(lines)
            (folder / "text" / f"valid.{pair}.{language}").write_text("".join(f"{line}\n" for line in lines))
            segments = [[*vocabulary.encode(line), EOS] for line in lines]
            ids = np.array([token for segment in segments for token in segment])
            sizes = np.array([len(segment) for segment in segments], dtype=np.int32)
            write_dataset(folder / "bin" / f"train.{pair}.{language}", ids, sizes, np.dtype(np.uint16))
    return folder


@pytest.fixture
def model(data, tmp_path):
    stored = toy_model(data, moe=True, encoder_moe=EXPERTS, decoder_moe=EXPERTS)
    write_folder(tmp_path / "model", stored)
    table_for(stored.config, DIRECTIONS).save(tmp_path / "any.json")
    return tmp_path / "model"


@pytest.fixture
def prune(model, data, tmp_path, capsys):
    """Run the command into ``out``; gives status and both outputs."""

    def run(*words, source=data, output=True):
        place = ["-o", str(tmp_path / "out")] if output else []
        status = main(["prune", str(model), str(source), *place, *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_keep_a_share_for_two_languages(prune, model, tmp_path):
    status, out, _ = prune("--keep", "50%", "--languages", "de,en", "--report", tmp_path / "report.json")
    assert status == 0
    assert "8 of 16 experts stay (50.0 %)" in out
    pruned, full = read_folder(tmp_path / "out"), read_folder(model)
    assert set(experts_of(pruned.config).values()) == {4}
    assert pruned.history[-1].items() >= {"operation": "pruned", "kept": 8, "of": 16, "metric": "importance",
                                          "scope": "language", "sources": ["de", "en"]}.items()  # fmt: skip
    assert pruned.languages.directions == ("de-en", "en-de")
    report = json.loads((tmp_path / "report.json").read_text())
    for layer in report["layers"]:
        name = f"{layer['side']}.layers.{layer['layer']}.moe.experts.w_in"
        assert torch.equal(pruned.tensors[name], full.tensors[name][layer["kept"]])
    translator = Translator.load(tmp_path / "out")
    assert len(translator.translate(["kalo lerina"], "de", "en", beam=1)) == 1
    # Pruned once more, from a file of routing of its own.
    again = ["prune", str(tmp_path / "out"), str(tmp_path / "data"), "--keep", "encoder=2,decoder=75%"]
    assert main([*again, "-o", str(tmp_path / "again")]) == 0
    assert experts_of(read_folder(tmp_path / "again").config) == {("encoder", 1): 2, ("decoder", 1): 3}


def test_keep_all_is_the_same_model(prune, model, tmp_path):
    assert prune("--keep", "100%")[0] == 0
    pruned, full = read_folder(tmp_path / "out"), read_folder(model)
    assert (pruned.config, pruned.languages) == (full.config, full.languages)
    assert all(torch.equal(pruned.tensors[name], tensor) for name, tensor in full.tensors.items())


def test_dry_run_writes_nothing(prune, tmp_path):
    status, out, _ = prune("--keep", "6", "--balance", "1:2", "--dry-run", output=False)
    assert status == 0
    assert "| encoder 1 |       8 |    2 |" in out
    assert "| decoder 1 |       8 |    4 |" in out
    assert "dry run" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["drop", "merge"])
def test_largest_that_fits(prune, model, tmp_path, method):
    limit = bytes_of_model(read_folder(model)) - 20_000
    assert prune("--max-size", limit, "--method", method, "--metric", "random")[0] == 0
    pruned = read_folder(tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    one = 4 * (16 + 2 * 16 * 24 + 24 + 16)
    beside = BESIDE + BESIDE_EACH * len(pruned.tensors)
    assert limit - one - beside < size <= limit
    assert 4 < sum(experts_of(pruned.config).values()) < 16


def test_search_finds_the_fewest_that_hold(prune, tmp_path, monkeypatch):
    """A stub scorer: each lost expert costs 0.25 points, in mk-en twice as much."""

    def stub(model, test_sets, **options):
        lost = 16 - sum(experts_of(model.config).values())
        return {one.direction: 0.25 * lost * (1 + (one.direction == "mk-en")) for one in test_sets}

    monkeypatch.setattr(pruning, "translate_sets", stub)
    monkeypatch.setattr(pruning, "chrf_of", lambda lost, test_sets: {name: 50 - lost[name] for name in lost})
    status, out, err = prune("--max-loss", "1.6")
    assert status == 0
    # Over four directions an expert costs 0.3125 in the mean: five may go, as trying all numbers would find.
    assert sum(experts_of(read_folder(tmp_path / "out").config).values()) == 11
    assert "all 16 experts: chrF++ 50.00 over 4 directions, 24 segments" in err
    assert "11 experts: chrF++ 48.44, lost 1.56 in the mean and 2.50 in mk-en: holds" in err
    assert "10 experts: chrF++ 48.12, lost 1.88 in the mean and 3.00 in mk-en: too much" in err
    assert "falls by 1.56 in the mean, by 2.50 at most (mk-en)" in out


def test_search_with_the_model_itself(prune, tmp_path):
    status, _, err = prune("--max-loss", "100", "--directions", "en-de", "--beam", "1")
    assert status == 0
    assert "over 1 directions, 6 segments" in err
    assert sum(experts_of(read_folder(tmp_path / "out").config).values()) == 4


def test_recovery_changes_the_weights_of_the_smaller_model(prune, model, tmp_path):
    assert prune("--keep", "50%")[0] == 0
    before = read_folder(tmp_path / "out")
    assert prune("--keep", "50%", "--recover", "2")[0] == 0
    after = read_folder(tmp_path / "out")
    assert after.config == before.config
    name = "decoder.layers.1.moe.experts.w_in"
    assert after.tensors[name].shape == before.tensors[name].shape
    assert not torch.equal(after.tensors[name], before.tensors[name])
    assert [entry["operation"] for entry in after.history] == ["pruned", "recovered"]


def test_refusals(prune, model, data, tmp_path):
    table = tmp_path / "any.json"
    for words, message in (
        (["--keep", "10%"], "keep=2 of 16 experts is too few"),
        (["--keep", "17"], "keep=17 experts, but there are only 16"),
        (["--keep", "0.2"], "--keep 0.2 must be a share, as 20%, or a number"),
        (["--keep", "120%"], "must be above 0 % and at most 100 %"),
        (["--keep", "encoder=50%"], "the budget says nothing of the decoder"),
        (["--keep", "50%", "--languages", "de,fr"], "the routing has no language fr; it has: de, en, mk"),
        (["--keep", "50%", "--languages", "de,qqq"], "language 'qqq' is unknown"),
        (["--keep", "50%", "--languages", "de,mk", "--scope", "pair"], "there is none among de, mk"),
        (["--keep", "50%", "--languages", "de", "--directions", "de-en"], "either --languages or --directions"),
        (["--keep", "50%", "--metric", "best"], "metric='best' is unknown; choose one of: top1"),
        (["--keep", "50%", "--balance", "3"], "--balance 3 must be two whole numbers"),
        (["--max-size", "1kB"], "max_size=1,000 bytes is too small"),
        (["--max-size", "lots"], "--max-size lots must be a size"),
        (["--max-loss", "-1"], "--max-loss -1.0 must be 0 or more"),
        (["--max-loss", "1", "--languages", "de,mk"], "no valid text between de, mk and de, mk"),
        (["--keep", "50%", "--data", data], "the second argument is prepared data already"),
    ):
        status, _, err = prune(*words)
        assert (status, message in err) == (1, True), (words, err)
    for words, message in (
        (["--keep", "50%"], "was counted on another model"),
        (["--max-loss", "1"], "--max-loss needs text: give --data"),
        (["--keep", "50%", "--recover", "1"], "--recover needs text"),
    ):
        assert message in prune(*words, source=table)[2]
    assert "name the folder to write with -o" in prune("--keep", "50%", output=False)[2]
    assert "nowhere does not exist" in prune("--keep", "50%", source=tmp_path / "nowhere")[2]
    assert not (tmp_path / "out").exists()


def test_a_dense_model_has_nothing_to_prune(data, tmp_path, capsys):
    write_folder(tmp_path / "dense", toy_model(data))
    assert main(["prune", str(tmp_path / "dense"), str(data), "--keep", "50%", "--dry-run"]) == 1
    assert "the model is dense" in capsys.readouterr().err


def test_routing_of_another_shape(prune, model, data, tmp_path):
    other = toy_model(data, moe=True)
    table = table_for(other.config, DIRECTIONS)
    object.__setattr__(table, "model", None)  # a file that does not know its model
    table.save(tmp_path / "other.json")
    _, _, err = prune("--keep", "50%", source=tmp_path / "other.json")
    assert "the routing is of a model with other MoE layers" in err


def test_words_of_options():
    experts = {("encoder", 1): 10, ("decoder", 1): 30}
    assert parse_keep("20%", experts) == 8
    assert parse_keep("7", experts) == 7
    assert parse_keep("encoder=30%, decoder=4", experts) == {"encoder": 3, "decoder": 4}
    for wrong in ("encoder=30%,encoder=4", "middle=3", "x%", "0%"):
        with pytest.raises(ValueError, match="--keep"):
            parse_keep(wrong, experts)
    sizes = ("500MB", "1.5 GiB", "12", "3k", "7B")
    assert [parse_size(text) for text in sizes] == [500_000_000, 3 * 2**29, 12, 3000, 7]
    assert parse_balance("3:1") == (3, 1)
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
    assert ranges(()) == ""
