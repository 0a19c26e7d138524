"""Training states with experts, cut into places by plain slicing: what sharded checkpoints are compared with."""

from collections import OrderedDict

import torch

from mtmoe.checkpoint.sharded import SavePlan, commit, describe, split_state, write_experts, write_shared

LAYERS = {"encoder.layers.1.moe": 0, "decoder.layers.0.moe": 1}
EXPERT_NAMES = ("experts.w_in", "experts.b_in", "experts.w_out", "experts.b_out")


def whole_state(experts=(4, 8), *, d_model=3, d_ffn=2, dtype=torch.float32, optimizer="mtmoe_adamw", updates=7, seed=0):
    """The state of one process with all experts, in fairseq's layout; tied embeddings, a gate, moments.

    Args:
        experts: of the encoder's and of the decoder's MoE layer.
        optimizer: "mtmoe_adamw" (steps as tensors, a list of the updates that moments are of), "adam" (fairseq's: a
            number), "sgd" or "" for none.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    embedding = draw(5, d_model)
    model = OrderedDict({"encoder.embed_tokens.weight": embedding})
    for prefix, side in LAYERS.items():
        shapes = [(d_ffn, d_model), (d_ffn,), (d_model, d_ffn), (d_model,)]
        for name, shape in zip(EXPERT_NAMES, shapes, strict=True):
            model[f"{prefix}.{name}"] = draw(experts[side], *shape)
        model[f"{prefix}.gate.weight"] = draw(experts[side], d_model)  # replicated: it scores all experts
    model["decoder.embed_tokens.weight"] = embedding
    model["decoder.version"] = torch.tensor([3.0])
    parameters = [name for name in model if name not in ("decoder.embed_tokens.weight", "decoder.version")]
    moments = {}
    for index, name in enumerate(parameters if optimizer else ()):
        like = model[name].shape
        values = {key: draw(*like, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
        if optimizer == "mtmoe_adamw":
            moments[index] = {"step": torch.tensor(float(updates)), **values}
            if "experts." in name:
                moments[index]["touched"] = torch.randint(0, updates + 1, like[:1], generator=generator).tolist()
        elif optimizer == "adam":
            moments[index] = {"step": updates, **values}
        else:
            moments[index] = {"momentum_buffer": values["exp_avg"], "other": None}
    state = {
        "args": None,
        "cfg": {"model": {"_name": "toy", "lr": [0.1]}, "task": {}},
        "model": model,
        "optimizer_history": [{"num_updates": updates}],
        "extra_state": {
            "train_iterator": {"epoch": 2, "progress": {"consecutive_skipped": 0}},
            "best": 1.5,
            "seen": {3: torch.arange(4)},
        },
    }
    if optimizer:
        groups = [{"lr": 0.1, "betas": (0.9, 0.98), "params": list(range(len(parameters)))}]
        state["last_optimizer_state"] = {"state": moments, "param_groups": groups}
    return state


def state_of_place(state, place, places):
    """What a process of an expert-parallel group has of `state`."""
    model = OrderedDict(state["model"])
    names = [name for name in model if name not in ("decoder.embed_tokens.weight", "decoder.version")]

    def mine(value, experts):
        return value[place * experts // places : (place + 1) * experts // places]

    for name in model:
        if "experts." in name:
            model[name] = mine(model[name], len(model[name])).clone()
    cut = {**state, "model": model}
    if "last_optimizer_state" in state:
        moments = {index: dict(values) for index, values in state["last_optimizer_state"]["state"].items()}
        for index, values in moments.items():
            if "experts." in names[index]:
                experts = len(state["model"][names[index]])
                for key, value in values.items():
                    if isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim()):
                        values[key] = mine(value, experts)
        cut["last_optimizer_state"] = {**state["last_optimizer_state"], "state": moments}
    return cut


def assert_same(actual, expected, path="state"):
    """Equal to the bit, nested containers, types of numbers and order of keys included."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor), path
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), path
        raw = [each.contiguous().reshape(-1).view(torch.uint8) for each in (actual, expected)]
        assert torch.equal(*raw), path
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), path
        for key in expected:
            assert_same(actual[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert type(actual) is type(expected), path
        assert len(actual) == len(expected), path
        for number, (mine, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same(mine, other, f"{path}/{number}")
    else:
        assert type(actual) is type(expected), path
        assert actual == expected, path


def save_all(directory, state, places, *, attempt="first"):
    """Save as `places` processes would, one after the other."""
    plan = SavePlan(directory=directory, attempt=attempt, world_size=places, expert_parallel_size=places)
    for place in reversed(range(places)):
        split = split_state(state_of_place(state, place, places))
        write_experts(plan, place, split.experts)
    write_shared(plan, split.shared)
    commit(plan, describe(split.shared))
    return directory
