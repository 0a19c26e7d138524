"""Every method of the comparison is a configuration of `mtmoe train`, trains, and leaves a model that is read back."""

import json
import math
import sys

import pytest
import torch

from mtmoe.checkpoint.fairseq import read_fairseq_checkpoint, transformer_config, untie
from mtmoe.inference import Transformer
from mtmoe.training.preset import build_command, load_config

PRESET = """
data: {data}
output: {output}
arch: mtmoe_transformer_tiny
options:
  encoder-layers: 2
  decoder-layers: 2
  encoder-embed-dim: 16
  encoder-ffn-embed-dim: 32
  encoder-attention-heads: 2
  decoder-attention-heads: 2
  moe-freq: 2
  num-experts: 8
  dropout: 0.1
  label-smoothing: 0.1
  lr: 0.003
  lr-scheduler: polynomial_decay
  total-num-update: 100
  max-tokens: 256
  max-update: 7
  log-interval: 1
  valid-limit: 3
  seed: 3
  cpu: true
  no-epoch-checkpoints: true
"""
MOEC = (
    "gate=moec top-k=1 normalize-weights=none expert-clusters=2 cluster-variance-loss-weight=0.01 "
    "cluster-variance-scale=sum cluster-expert-dropout=0.5 cluster-expert-dropout-interval=3 capacity-factor=2"
)
METHODS = {
    "dense": "moe-freq=0",
    "dense, wide": "moe-freq=0 encoder-ffn-embed-dim=256 decoder-ffn-embed-dim=256",
    "MoE": "",
    "MoE, overall dropout": "dropout=0.3",
    "gating dropout": "gating-dropout=0.3 gating-dropout-ranks=4",
    "gate-expert dropout": "gating-dropout=0.2 gating-dropout-mode=gate_expert",
    "EOM": "eom=0.2",
    "FOM": "fom=0.2",
    "CMR": "cmr=true cmr-budget=0.6 cmr-gate-drop=0.2",
    "EOM and CMR": "eom=0.2 cmr=true cmr-gate-drop=0.2",
    "MoEC": MOEC,
    "SMILE": "gate=bilevel expert-nodes=2 normalize-weights=none",
    "SMILE, top-1": "gate=bilevel expert-nodes=2 top-k=1 normalize-weights=none",
    "cluster variance": "expert-clusters=4 cluster-variance-loss-weight=10",
    "cluster variance, type 2": "expert-clusters=4 cluster-variance-type=2 cluster-variance-loss-weight=10",
    "cluster dropout": "expert-clusters=4 cluster-expert-dropout=0.5 cluster-expert-dropout-interval=2",
    "Switch expert dropout": "moe-dropout=0.4 top-k=1 normalize-weights=none",
    "token dropout": "source-token-dropout=0.2 target-token-dropout=0.1",
    "token dropout by passes": "source-token-dropout=0.2 target-token-dropout=0.1 token-dropout-passes=1 "
    "virtual-epoch-size=60",
    "temperature 1": "sampling-temperature=1",
    "temperature 1.5": "sampling-temperature=1.5",
    "temperature 5": "sampling-temperature=5",
}
SAME_AS = {"temperature 1": "MoE"}  # the default
STOPPED = ("MoEC", "token dropout by passes")
"""Methods that keep something between updates: their runs are also stopped after 4 updates, and gone on with."""

# All runs in one process: loading torch and fairseq takes longer than a run.
PROGRAM = """
import json, sys, traceback
from fairseq_cli.train import cli_main
for name, words in json.load(sys.stdin):
    sys.stdout.flush(), print(f"\\n=== {name}", flush=True)
    sys.argv = words
    try:
        cli_main()
    except Exception:
        traceback.print_exc(file=sys.stdout)
"""


@pytest.fixture(scope="module")
def runs(fairseq, toy_data, tmp_path_factory):
    """Name of a run -> its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("methods")

    def command(method, place, *more):
        (folder / place).mkdir(exist_ok=True)
        preset = folder / place / "preset.yaml"
        preset.write_text(PRESET.format(data=toy_data, output=folder / place))
        return build_command(load_config(preset, [*METHODS[method].split(), *more]))[1:]

    # The name of a checkpoint's folder, then its command.
    commands = [(name, ["fairseq-train", *command(name, name)]) for name in METHODS]
    for method in STOPPED:
        for name, updates in (("stopped", 4), ("resumed", 7)):
            words = command(method, f"{method}, broken", f"max-update={updates}")
            commands.append((f"{method}, {name}", ["fairseq-train", *words]))
    done = fairseq.run([sys.executable, "-c", PROGRAM], input=json.dumps(commands), timeout=280)
    printed = dict(part.split("\n", 1) for part in done.stdout.split("\n=== ")[1:])
    return {name: (folder / name, printed[name]) for name, _ in commands}


def records(output, kind):
    marker = f"| {kind} | {{"
    return [json.loads("{" + line.split(marker)[1]) for line in output.splitlines() if marker in line]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_a_configuration(runs, method):
    folder, output = runs[method]
    inner = records(output, "train_inner")
    assert [int(record["num_updates"]) for record in inner] == list(range(1, 8)), output[-3000:]
    assert all(math.isfinite(float(record["loss"])) for record in inner)
    assert math.isfinite(float(records(output, "valid")[-1]["valid_loss"]))
    last, options = inner[-1], METHODS[method]
    balances = {name for name in last if name.endswith("balance_loss")}
    if method.startswith("dense"):
        assert not balances
    elif method.startswith("SMILE"):
        assert balances == {"node_balance_loss", "inner_balance_loss"}
    else:
        assert balances == {"load_balance_loss"}
    assert ("cmr_loss" in last) == ("cmr=true" in options)
    assert ("cluster_variance_loss" in last) == ("expert-clusters" in options)

    checkpoint = read_fairseq_checkpoint(folder / "checkpoints" / "checkpoint_last.pt")
    config = transformer_config(checkpoint)
    model = Transformer.from_tensors(config, untie(checkpoint, config))
    logits = model(torch.tensor([[5, 6, 7, 2]]), torch.tensor([[4, 5, 6]]))
    assert torch.isfinite(logits).all()


@pytest.mark.slow
def test_no_method_trains_as_another_does(fairseq, runs):
    losses = {name: tuple(fairseq.losses(runs[name][1]).values()) for name in METHODS}
    for name, other in SAME_AS.items():
        assert losses.pop(name) == losses[other]
    assert len(set(losses.values())) == len(losses)


@pytest.mark.slow
@pytest.mark.parametrize("method", STOPPED)
def test_a_resumed_run_equals_an_unbroken_one(fairseq, runs, method):
    """MoEC redraws its survivors after 3 and 6 updates, passes change with each epoch of 3; the stop is after 4."""
    expected = fairseq.losses(runs[method][1])
    stopped, resumed = (fairseq.losses(runs[f"{method}, {name}"][1]) for name in ("stopped", "resumed"))
    assert (sorted(stopped), sorted(resumed)) == ([1, 2, 3, 4], [5, 6, 7])
    assert stopped | resumed == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("source-token-dropout=1", "--source-token-dropout 1.0 must be at least 0 and below 1"),
        ("target-token-dropout=0.1 token-dropout-passes=-1", "--token-dropout-passes -1.0 must not be negative"),
    ],
)
def test_wrong_rates_of_token_dropout_are_named(fairseq, toy_data, tmp_path, options, message):
    preset = tmp_path / "preset.yaml"
    preset.write_text(PRESET.format(data=toy_data, output=tmp_path / "run"))
    assert message in fairseq.run(build_command(load_config(preset, options.split())), check=False).stderr
