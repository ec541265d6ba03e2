"""Runs a network card: its kernel maps, and its layers in int8."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from fquant.affine import dequantize, quantize
from fquant.records import QTensor
from fquant.serialization.network_card import INPUT, CardLayer, NetworkCard
from fquant.sparse import (
    KernelMap,
    SparseTensor,
    conv_map,
    global_avg_pool,
    max_pool,
    sparse_conv_int8,
    subm_map,
    transpose_map,
    transposed_conv_map,
)
from fquant.spec import INT8


def card_maps(card: NetworkCard, x: SparseTensor) -> dict[str, KernelMap]:
    """Returns the kernel maps of a network for the cells of x, by key; build them outside compile."""
    maps: dict[str, KernelMap] = {}
    for one in card.maps:
        cells = x if one.source == INPUT else maps[one.source]
        geometry = (one.kernel_size, one.stride, one.padding, one.dilation)
        if one.op == "subm":
            maps[one.key] = subm_map(cells, one.kernel_size, one.dilation)
        elif one.op == "conv":
            maps[one.key] = conv_map(cells, *geometry)
        elif one.op == "transposed":
            maps[one.key] = transposed_conv_map(cells, *geometry, one.output_padding)
        else:
            maps[one.key] = transpose_map(maps[one.source])
    return maps


def run_card(card: NetworkCard, x: SparseTensor, maps: Mapping[str, KernelMap]) -> Any:
    """Returns the network's output for float features: of the last layer.

    Args:
        card: the network.
        x: float features.
        maps: `card_maps(card, x)`.

    Returns:
        A SparseTensor with QTensor features, or float32 ones if the last layer has no scale; a tensor
        after a global pool.
    """
    values: dict[str, Any] = {INPUT: quantize(x, card.tensors[f"{INPUT}.output_scale"])}
    for layer in card.layers:
        values[layer.name] = _run(card, layer, values, maps)
    return values[card.layers[-1].name]


def _run(
    card: NetworkCard, layer: CardLayer, values: Mapping[str, Any], maps: Mapping[str, KernelMap]
) -> Any:
    first, *others = (values[name] for name in layer.inputs)
    weight, bias, step = (
        card.tensors.get(f"{layer.name}.{part}") for part in ("weight", "bias", "output_scale")
    )
    if layer.op == "conv":
        assert weight is not None  # by _check
        channels = card.tensors[f"{layer.name}.weight_scale"]
        scale = channels.reshape(-1, *[1] * (weight.ndim - 1))
        return sparse_conv_int8(
            first,
            QTensor(weight, scale, spec=INT8),  # a default of the class stops Dynamo
            bias,
            kernel_map=maps[str(layer.map)],
            output_scale=step,
            residual=None if layer.residual is None else values[layer.residual],
            relu=layer.relu,
        )
    if layer.op == "max_pool":
        kernel_map = maps[str(layer.map)]
        return max_pool(first, kernel_map.kernel_size, kernel_map=kernel_map)
    if layer.op == "cat":
        q = torch.cat([value.features.q for value in (first, *others)], dim=1)
        return first.with_features(dataclasses.replace(first.features, q=q))
    features = first.features if isinstance(first, SparseTensor) else first
    if isinstance(features, QTensor):
        features = dequantize(features)
    if layer.op == "global_avg_pool":
        return global_avg_pool(first.with_features(features), count_absent=False)
    y = torch.nn.functional.linear(features, weight, bias)  # type: ignore[arg-type]
    y = y.relu() if layer.relu else y
    return first.with_features(y) if isinstance(first, SparseTensor) else y
