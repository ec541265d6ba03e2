"""Sparse networks as lists of layers: training, PTQ, QAT and int8 by functions over the list.

    layers = (Layer("stem", "subm", (4, 16)), Layer("head", "subm", (16, 3), 1, relu=False))
    maps   = make_maps(layers, x)                         once per scene, outside compile
    model  = SparseNetwork(layers)                        a module with batch norm, for training
    params = fold_network(layers, params)                 of SparseNetwork(layers, batch_norm=False)
    plan   = make_plan(model, int8_rules(layers, int8), (x, maps))
    scales = tie_scales(layers, int8, finalize(plan, calibrate_model(...)))
    y      = fake_quant(model, plan)(params, scales, x, maps)
    y      = int8_network(layers, int8)(to_int8(layers, int8, params, scales), x, maps)

`list_layers` makes the list from a model of `fquant.sparse.nn` modules. `int8` is the set of layers
that run on integers: `convolutions(layers) - first_and_last(layers)`, or what `choose_int8` makes
of a table of measured times.
"""

from fquant.sparse_network.batch_norm import fold_network
from fquant.sparse_network.capacity import level_counts, pad_network
from fquant.sparse_network.choice import (
    Choice,
    LayerTime,
    choose_int8,
    describe_choices,
    measured_times,
)
from fquant.sparse_network.from_module import Listed, list_layers
from fquant.sparse_network.int8 import Deployed, int8_network, to_int8
from fquant.sparse_network.layer import Layer, check_layers, convolutions, first_and_last
from fquant.sparse_network.maps import MapCache, cached_maps, make_maps
from fquant.sparse_network.module import SparseNetwork
from fquant.sparse_network.sites import int8_rules, quantized_values, tie_scales

__all__ = [
    "Choice",
    "Deployed",
    "Layer",
    "LayerTime",
    "Listed",
    "MapCache",
    "SparseNetwork",
    "cached_maps",
    "check_layers",
    "choose_int8",
    "convolutions",
    "describe_choices",
    "first_and_last",
    "fold_network",
    "int8_network",
    "int8_rules",
    "level_counts",
    "list_layers",
    "make_maps",
    "measured_times",
    "pad_network",
    "quantized_values",
    "tie_scales",
    "to_int8",
]
