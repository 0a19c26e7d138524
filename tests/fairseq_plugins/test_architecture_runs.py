"""fairseq-train with each family of MoE options, and fairseq's other commands on what it trained."""

import json
import math
import shlex

import pytest

MOE = shlex.split("--arch mtmoe_transformer_tiny --moe-freq 1 --num-experts 4")
OPTIONS = {
    "switch": "--top-k 1 --normalize-weights none --capacity-factor 1.25 --eval-capacity-factor 2 --jitter 0.01 "
    "--init-scale 0.1 --moe-dropout 0.4",
    "gshard": "--second-expert-policy random --normalize-weights before_drop --capacity-factor 1 --batch-prioritized",
    "sampling": "--second-expert-policy sampling --eval-capacity-token-fraction 1 --router-z-loss-weight 0.001",
    "masking": "--eom 0.2 --fom 0.1 --masking-scale inverted --second-expert-policy threshold",
    "gating dropout": "--gating-dropout 0.5 --gating-dropout-ranks 2",
    "one side": "--encoder-moe-freq 0 --activation-fn gelu",
    "recomputed": "--cmr --cmr-gate-drop 0.2 --checkpoint-activations --autocast bfloat16",
}


def records(output: str, kind: str) -> list[dict]:
    marker = f"| {kind} | {{"
    return [json.loads("{" + line.split(marker)[1]) for line in output.splitlines() if marker in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_each_family_of_options_trains(fairseq, toy_data, tmp_path, name):
    options = shlex.split(OPTIONS[name])
    words = fairseq.train_command(toy_data, tmp_path, *MOE, *options, "--max-update", 12, "--no-save")
    output = fairseq.run(words).stdout
    inner = records(output, "train_inner")
    assert [int(record["num_updates"]) for record in inner] == list(range(1, 13))
    assert all(math.isfinite(float(record["loss"])) for record in inner)
    last = inner[-1]
    layers = 1 if name == "one side" else 2
    assert layers * 0.9 < float(last["load_balance_loss"]) <= layers * 4
    assert float(last["decoder.0_entropy_gating"]) <= math.log(4) + 1e-3
    assert ("encoder.0_entropy_gating" in last) == (layers == 2)
    assert ("cmr_loss" in last) == ("--cmr" in options)
    if "--capacity-factor" in options:
        assert max(float(record["overflow"]) for record in inner) > 0
    assert len(records(output, "valid")) >= 1


@pytest.fixture(scope="module")
def trained(fairseq, toy_data, tmp_path_factory):
    """A MoE run of 30 updates, and its twin that was stopped after 14 and went on."""
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    options = [*MOE, *shlex.split("--cmr --eom 0.1 --gating-dropout 0.2 --second-expert-policy sampling --dropout 0.2")]
    output = fairseq.run(fairseq.train_command(toy_data, whole, *options, "--max-update", 30)).stdout
    fairseq.run(fairseq.train_command(toy_data, broken, *options, "--max-update", 14))
    resumed = fairseq.run(fairseq.train_command(toy_data, broken, *options, "--max-update", 30)).stdout
    return whole, output, resumed


@pytest.mark.slow
def test_a_resumed_moe_run_has_the_losses_of_an_unbroken_one(fairseq, trained):
    _, output, resumed = trained
    expected = fairseq.losses(output)
    actual = fairseq.losses(resumed)
    assert sorted(actual) == list(range(15, 31))
    assert actual == {update: expected[update] for update in actual}


@pytest.mark.slow
def test_generate_interactive_and_validate_take_a_moe_checkpoint(fairseq, toy_data, trained):
    checkpoint = trained[0] / "checkpoint_last.pt"
    plugins = ["--user-dir", fairseq.root / "fairseq_plugins", "--task", "mtmoe_translation"]
    common = [toy_data, *plugins, "--path", checkpoint]
    direction = ["--source-lang", "en", "--target-lang", "de", "--beam", 2, "--max-len-b", 20, "--cpu"]
    generated = fairseq.run(fairseq.command("fairseq-generate", *common, *direction, "--gen-subset", "test")).stdout
    assert sum(line.startswith("H-") for line in generated.splitlines()) == 6
    text = "▁w1 ▁w2 ▁w3\n▁w4\n"
    answered = fairseq.run(fairseq.command("fairseq-interactive", *common, *direction), input=text).stdout
    assert sum(line.startswith("H-") for line in answered.splitlines()) == 2
    validated = fairseq.run(
        fairseq.command("fairseq-validate", *common, "--valid-subset", "valid", "--max-tokens", 500, "--cpu",
                        "--criterion", "mtmoe_label_smoothed_cross_entropy")
    )  # fmt: skip
    assert "loss" in validated.stdout + validated.stderr
