"""Trainings with less memory: sharded state, weights in bf16, experts' state on the host; what they keep, measured."""

import json
import shlex
import shutil
import sys

import pytest
import torch

import fairseq_plugins  # noqa: F401 - lets torch read fairseq's checkpoints
from mtmoe.checkpoint.fairseq import read_fairseq_checkpoint, transformer_config, untie
from mtmoe.inference import Transformer

MODEL = shlex.split(
    "--arch mtmoe_transformer_tiny --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 32 "
    "--decoder-ffn-embed-dim 32 --moe-freq 1 --num-experts 8 --max-tokens 64 --required-batch-size-multiple 1 "
    "--weight-decay 0.01 --disable-validation --dropout 0.1 --no-epoch-checkpoints"
)

# All runs in one process, or in one of each rank: loading torch and fairseq takes longer than a run. After each it
# prints the bytes of all weights, gradients and states: of experts, and of all others.
PROGRAM = """
import json, os, sys, traceback
from fairseq_cli.train import cli_main  # first: it sets the log up
from fairseq.trainer import Trainer

trainers, start = [], Trainer.__init__
def remember(self, *args, **kwargs):
    trainers.append(self)
    start(self, *args, **kwargs)
Trainer.__init__ = remember

def measured(trainer):
    optimizer = trainer.optimizer.optimizer
    found = {}
    for name, parameter in trainer.get_model().named_parameters():
        found_here = found.setdefault("experts" if ".experts." in name else "others", dict.fromkeys(KINDS, 0))
        state = optimizer.state.get(parameter, {})
        tensors = [value for key, value in state.items() if hasattr(value, "nbytes") and key != "step"]
        where = "host" if optimizer._on_host(parameter) else "optimiser"
        for key, number in (("parameters", parameter.numel()), ("weights", parameter.nbytes),
                            ("gradients", parameter.grad.nbytes), (where, sum(value.nbytes for value in tensors))):
            found_here[key] += number
    return found
KINDS = ("parameters", "weights", "gradients", "optimiser", "host")

rank = os.environ.get("RANK", "0")
for name, words in json.load(open(sys.argv[1])):
    if rank == "0":
        sys.stdout.flush(), print(f"\\n=== {name}", flush=True)
    sys.argv = words
    try:
        cli_main()
        # In one piece: another process may write between a line and its end.
        sys.stdout.write(f"measured|{name}|{rank}|{json.dumps(measured(trainers[-1]))}\\n")
        sys.stdout.flush()
    except Exception:
        traceback.print_exc(file=sys.stdout)
        if "RANK" in os.environ:
            raise  # the other processes would wait
"""


@pytest.fixture(scope="module")
def train(fairseq, toy_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    (folder / "program.py").write_text(PROGRAM)

    def run(commands, processes=1):
        """Name -> (folder of checkpoints, output) of `(name, folder, options)`."""
        listed = []
        for name, place, options in commands:
            words = fairseq.train_command(toy_data, folder / place, *MODEL, *shlex.split(options))
            listed.append((name, [str(word) for word in words]))
        (folder / "commands.json").write_text(json.dumps(listed))
        start = fairseq.torchrun(processes) if processes > 1 else [sys.executable]
        words = [*start, folder / "program.py", folder / "commands.json"]
        done = fairseq.run([str(word) for word in words], timeout=280)
        parts = dict(part.split("\n", 1) for part in done.stdout.split("\n=== ")[1:])
        for line in done.stdout.splitlines():
            if line.startswith("measured|"):  # by any process, at any time
                _, name, rank, sizes = line.split("|")
                parts[name, int(rank)] = json.loads(sizes)
        found = {name: (folder / place / "checkpoint_last.pt", parts[name]) for name, place, _ in commands}
        run.measured |= {key: sizes for key, sizes in parts.items() if isinstance(key, tuple)}
        return found

    run.folder, run.measured = folder, {}
    return run


@pytest.fixture(scope="module")
def alone(train):
    plain, narrow = "--max-update 40 --autocast bfloat16", "--max-update 40 --bf16"
    return train(
        [
            ("fp32", "fp32", plain),
            ("bf16", "bf16", narrow),
            ("bf16, stopped", "broken", narrow.replace("40", "13")),
            ("bf16, resumed", "broken", narrow),
            ("fp32, offloaded", "fp32-offloaded", f"{plain} --offload-expert-state"),
            ("bf16, offloaded", "bf16-offloaded", f"{narrow} --offload-expert-state"),
            ("bf16, offloaded, resumed", "broken", f"{narrow.replace('40', '44')} --offload-expert-state"),
            ("bf16, all experts", "bf16-dense", f"{narrow} --expert-updates dense"),
            ("fp32, no dropout", "fp32-plain", f"{plain} --dropout 0"),
            ("bf16, no dropout", "bf16-plain", f"{narrow} --dropout 0"),
            ("refused", "refused", f"{plain} --offload-expert-state --expert-updates dense"),
        ]
    )


@pytest.fixture(scope="module")
def together(train):
    options = "--max-update 8 --expert-updates dense"
    return train(
        [
            ("whole", "whole", options),
            ("sharded", "sharded", f"{options} --zero-sharding os"),
            ("sharded, stopped", "stopped", f"{options.replace('8', '3')} --zero-sharding os"),
            ("sharded, resumed", "stopped", f"{options} --zero-sharding os"),
            ("all savers", "savers", "--max-update 8 --zero-sharding os --bf16 --offload-expert-state"),
            ("bf16", "two-bf16", "--max-update 8 --bf16"),
        ],
        processes=2,
    )


def bytes_a_parameter(measured):
    return {
        part: tuple(size / sizes["parameters"] for kind, size in sizes.items() if kind != "parameters")
        for part, sizes in measured.items()
    }


def assert_same_checkpoint(one, other):
    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    for name, value in first["model"].items():
        assert torch.equal(second["model"][name], value), name
    states = [each["last_optimizer_state"]["state"] for each in (first, second)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert state.keys() == states[1][number].keys()
        for name, value in state.items():
            found = states[1][number][name]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, (number, name)


@pytest.mark.slow
def test_weights_in_bf16_learn_as_those_in_fp32(fairseq, alone):
    # Without dropout, whose masks are others where activations are of another type.
    runs = [fairseq.losses(alone[f"{name}, no dropout"][1]) for name in ("fp32", "bf16")]
    curves = [[float(line.split()[0]) for line in run.values()] for run in runs]
    assert [len(curve) for curve in curves] == [40, 40]
    assert curves[0][0] - min(curves[0]) > 0.5  # it learns something
    assert max(abs(one - other) for one, other in zip(*curves, strict=True)) < 0.05


@pytest.mark.slow
def test_a_resumed_run_in_bf16_equals_an_unbroken_one(fairseq, alone):
    expected = fairseq.losses(alone["bf16"][1])
    first, second = (fairseq.losses(alone[f"bf16, {name}"][1]) for name in ("stopped", "resumed"))
    assert first | second == expected
    assert min(second) == 14
    assert "skipped" not in alone["bf16"][1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_offloading_changes_no_bit(fairseq, alone, dtype):
    assert fairseq.losses(alone[f"{dtype}, offloaded"][1]) == fairseq.losses(alone[dtype][1])
    assert_same_checkpoint(alone[dtype][0], alone[f"{dtype}, offloaded"][0])


@pytest.mark.slow
def test_a_run_may_turn_to_offloading_and_dense_updates_to_bf16(fairseq, alone):
    assert sorted(fairseq.losses(alone["bf16, offloaded, resumed"][1])) == [41, 42, 43, 44]
    dense, exact = (fairseq.losses(alone[name][1])[40].split()[0] for name in ("bf16, all experts", "bf16"))
    assert float(dense) == pytest.approx(float(exact), abs=0.02)
    assert "--offload-expert-state moves only experts with tokens; it does not go with --expert-updates dense" in (
        alone["refused"][1]
    )


@pytest.mark.slow
def test_the_portable_model_gets_the_master_copies(alone):
    path = alone["bf16"][0]
    checkpoint = read_fairseq_checkpoint(path)
    config = transformer_config(checkpoint)
    tensors = untie(checkpoint, config)
    states = torch.load(path, weights_only=True)["last_optimizer_state"]["state"]
    assert len(tensors) == len(states)
    for value, number in zip(tensors.values(), sorted(states), strict=True):  # both in the order of the model
        assert torch.equal(value, states[number]["master"])
    assert not all(torch.equal(value, value.bfloat16().float()) for value in tensors.values())
    # The weights and their master copies are the same bytes of the file.
    plain = alone["fp32"][0].stat().st_size
    assert path.stat().st_size < 1.1 * plain
    logits = Transformer.from_tensors(config, tensors)(torch.tensor([[5, 6, 7, 2]]), torch.tensor([[4, 5, 6]]))
    assert torch.isfinite(logits).all()


# Bytes a parameter of weights, gradients, optimiser, and optimiser on the host; docs/how-to/train.md has this table.
KEPT = {
    "fp32": {"experts": (4, 4, 8, 0), "others": (4, 4, 8, 0)},
    "bf16": {"experts": (2, 2, 12, 0), "others": (2, 2, 12, 0)},
    "fp32, offloaded": {"experts": (4, 4, 0, 12), "others": (4, 4, 8, 0)},
    "bf16, offloaded": {"experts": (2, 2, 0, 12), "others": (2, 2, 12, 0)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_bytes_of_a_training_are_those_of_the_manual(train, alone, name):
    assert bytes_a_parameter(train.measured[name, 0]) == KEPT[name]


@pytest.mark.slow
def test_two_processes_share_the_state_and_train_as_without(fairseq, train, together):
    assert fairseq.losses(together["sharded"][1]) == fairseq.losses(together["whole"][1])
    assert_same_checkpoint(together["whole"][0], together["sharded"][0])
    assert_same_checkpoint(together["whole"][0], together["sharded, resumed"][0])
    whole = sum(part["optimiser"] for part in train.measured["whole", 0].values())
    parts = [sum(part["optimiser"] for part in train.measured["sharded", rank].values()) for rank in (0, 1)]
    assert sum(parts) == whole
    assert parts == pytest.approx([whole / 2] * 2, rel=0.05)


@pytest.mark.slow
def test_all_savers_together_train_as_bf16_alone(fairseq, train, together):
    assert fairseq.losses(together["all savers"][1]) == fairseq.losses(together["bf16"][1])
    assert_same_checkpoint(together["bf16"][0], together["all savers"][0])
    for rank in (0, 1):
        found = bytes_a_parameter(train.measured["all savers", rank])
        assert found["experts"] == (2, 2, 0, 12)
        assert found["others"] == pytest.approx((2, 2, 6, 0), rel=0.1)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_one(fairseq, train, together):
    for name in ("one", "one-sharded"):
        (train.folder / name).mkdir()
        shutil.copy(together["sharded"][0], train.folder / name)
    options = "--max-update 12 --expert-updates dense"
    done = train([("one", "one", options), ("one, sharded", "one-sharded", f"{options} --zero-sharding os")])
    losses = [fairseq.losses(done[name][1]) for name in done]
    assert sorted(losses[0]) == [9, 10, 11, 12]
    assert losses[0] == losses[1]
    assert_same_checkpoint(done["one"][0], done["one, sharded"][0])
