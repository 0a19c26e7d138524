"""Tables of routing that could have been."""

import numpy as np

from mtmoe.routing_table import LayerRouting, RoutingTable


def make_table(rows, seed=0, *, experts=(4, 3), cmr=True, model="m", layers=None):
    """A table with 7 to 40 tokens a row.

    `layers` is (side, number, experts) of each layer; by default one of each side with `experts`.
    """
    rng = np.random.default_rng(seed)
    made = []
    for side, number, count in layers or (("encoder", 0, experts[0]), ("decoder", 1, experts[1])):
        tokens = rng.integers(7, 40, len(rows))
        first = np.stack([np.bincount(rng.integers(0, count, size), minlength=count) for size in tokens])
        second = np.stack([np.bincount(rng.integers(0, count, size), minlength=count) for size in tokens])
        confidence = first * rng.uniform(0.5, 1, first.shape)
        gate = tokens * rng.uniform(0, 1, len(rows)) if cmr else None
        probability = confidence + rng.uniform(0, 1, first.shape)
        made.append(LayerRouting(side, number, tokens, first, second, confidence, second * 0.3, probability, gate))
    return RoutingTable(tuple(rows), tuple(range(1, len(rows) + 1)), tuple(made), model)


def table_for(config, rows, seed=0):
    """A table of a model of this shape."""
    layers = [
        (side, layer, config.moe_of(side, layer).num_experts)
        for side in ("encoder", "decoder")
        for layer in config.moe_layers(side)
    ]
    return make_table(rows, seed, layers=layers, cmr=False)
