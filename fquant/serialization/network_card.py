"""The network card: an int8 sparse network as a neutral file, for engines that know nothing of fquant.

The file is safetensors (`container`, format "fquant.network"). Its document lists `maps` and `layers`,
the fields of `CardMap` and `CardLayer` in JSON, in the order in which they run. Its tensors are

    <layer>.weight          int8 (Cout, *kernel, Cin), spconv's KRSC; float32 (out, in) of a linear layer
    <layer>.weight_scale    float32 (Cout,), the step of each output channel
    <layer>.bias            float32 (Cout,), in real units; may be absent
    <layer>.output_scale    float32, the step of the output; absent for float32 outputs
    input.output_scale      the step of the network's input

and `amax` in the document has the dynamic range that other engines ask for, 127 times output_scale, of
every layer that has one and of "input"; that of weights is 127 times weight_scale.

The arithmetic of a convolution is that of `fquant_kernels.sparse_conv_int8`:

    y = saturate(round_half_even(relu(acc * s_x * s_w[c] / s_y + bias[c] / s_y + residual * s_r / s_y)))
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fquant.records import QTensor
from fquant.serialization.container import damaged, read_container, write_container
from fquant.spec import INT8

FORMAT = "fquant.network"
VERSION = 1
INPUT = "input"
SCALE = ".output_scale"
MAPS = ("subm", "conv", "transposed", "inverse")
OPS = ("conv", "max_pool", "cat", "global_avg_pool", "linear")


@dataclass(frozen=True)
class CardMap:
    """A geometry: which cells meet which. Layers of one geometry share it.

    Attributes:
        key: its name.
        op: "subm", "conv", "transposed", or "inverse" of a conv or transposed map.
        source: key of the map whose output cells it reads, or "input"; of the map that is inverted.
        kernel_size, stride, padding, dilation, output_padding: one int per axis, empty where the op
            takes none.
    """

    key: str
    op: str
    source: str = INPUT
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()


@dataclass(frozen=True)
class CardLayer:
    """A layer and what feeds it.

    Attributes:
        name: of the layer and of its output.
        op: "conv", "max_pool", "cat" of inputs with one scale, "global_avg_pool" over the rows that
            are there, or "linear" in float32.
        inputs: the layers that feed it, or "input".
        map: key of its `CardMap`; of conv and max_pool.
        residual: the layer whose output a conv adds before ReLU.
        relu: whether negative sums become 0.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    map: str | None = None
    residual: str | None = None
    relu: bool = False


class NetworkCard(NamedTuple):
    """A network as data; `network_card` makes and checks it.

    Attributes:
        maps: the geometries, in an order in which they can be built.
        layers: in an order in which they can run; the last one's output is the network's.
        tensors: by name, as in the file.
    """

    maps: tuple[CardMap, ...]
    layers: tuple[CardLayer, ...]
    tensors: dict[str, Tensor]


def network_card(
    maps: Sequence[CardMap],
    layers: Sequence[CardLayer],
    weights: Mapping[str, QTensor | Tensor],
    biases: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
) -> NetworkCard:
    """Returns a network's card.

    Args:
        maps: its geometries.
        layers: its layers.
        weights: int8 weights of the convolutions, float ones of the linear layers, by layer.
        biases: by layer, in real units; for the layers that have one.
        scales: the step of the input, under "input", and of each quantized output, by layer.

    Raises:
        ValueError: a name is unknown or there twice, an op is unknown, a tensor is missing or does not
            fit; the message names the layer.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if isinstance(weight, QTensor):
            tensors[f"{name}.weight"] = weight.q
            step = weight.scale.reshape(-1).expand(weight.shape[0])
            tensors[f"{name}.weight_scale"] = step.float()
        else:
            tensors[f"{name}.weight"] = weight
    tensors.update({f"{name}.bias": bias for name, bias in biases.items()})
    for name, scale in scales.items():
        tensors[f"{name}.output_scale"] = scale.reshape(()).float()
    card = NetworkCard(tuple(maps), tuple(layers), tensors)
    _check(card)
    return card


def save_network_card(path: str | Path, card: NetworkCard) -> None:
    """Writes a card; `load_network_card` gives an equal one back.

    Raises:
        ImportError: safetensors is not installed (`pip install 'fquant[files]'`).
    """
    document = {
        "maps": [dataclasses.asdict(one) for one in card.maps],
        "layers": [dataclasses.asdict(one) for one in card.layers],
        "amax": {
            name.removesuffix(SCALE): tensor.item() * INT8.q_max
            for name, tensor in card.tensors.items()
            if name.endswith(SCALE)
        },
    }
    write_container(path, FORMAT, VERSION, document, card.tensors)


def load_network_card(path: str | Path) -> NetworkCard:
    """Returns the card in a file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, truncated, not a network card, or of a newer fquant, or the
            network in it is not whole.
    """
    document, tensors = read_container("load_network_card", path, FORMAT, VERSION)
    try:
        maps = tuple(CardMap(**_tuples(one)) for one in document["maps"])
        layers = tuple(CardLayer(**_tuples(one)) for one in document["layers"])
        card = NetworkCard(maps, layers, tensors)
        _check(card)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise damaged("load_network_card", path, str(error)) from error
    return card


def _check(card: NetworkCard) -> None:
    """Raises ValueError unless names are known where they are used and tensors are there."""
    kernels: dict[str, tuple[int, ...]] = {}
    for one in card.maps:
        _require(one.op in MAPS, f"map {one.key!r}: op must be one of {MAPS}, got {one.op!r}.")
        _require(one.key not in kernels, f"map {one.key!r}: key must be there once.")
        known = one.source in kernels or (one.source == INPUT and one.op != "inverse")
        _require(known, f"map {one.key!r}: source must be a map before it, got {one.source!r}.")
        kernels[one.key] = kernels[one.source] if one.op == "inverse" else one.kernel_size
    scales: dict[str, Tensor | None] = {INPUT: card.tensors.get(f"{INPUT}.output_scale")}
    _require(scales[INPUT] is not None, "input: a scale must be there.")
    for layer in card.layers:
        where = f"layer {layer.name!r}:"
        _require(layer.op in OPS, f"{where} op must be one of {OPS}, got {layer.op!r}.")
        _require(layer.name not in scales, f"{where} name must be there once.")
        for name in (*layer.inputs, *[layer.residual] * (layer.residual is not None)):
            _require(name in scales, f"{where} inputs must be layers before it, got {name!r}.")
        _require(len(layer.inputs) > 0, f"{where} inputs must not be empty.")
        weight = card.tensors.get(f"{layer.name}.weight")
        step = card.tensors.get(f"{layer.name}.output_scale")
        if layer.op in ("conv", "max_pool"):
            _require(layer.map in kernels, f"{where} map must be a key of maps, got {layer.map!r}.")
        if layer.op == "conv":
            scale = card.tensors.get(f"{layer.name}.weight_scale")
            right = weight is not None and weight.dtype == torch.int8 and scale is not None
            _require(right, f"{where} weight must be int8 with a scale.")
            shape = tuple(weight.shape)  # type: ignore[union-attr]
            kernel = kernels[str(layer.map)]
            _require(shape[1:-1] == kernel, f"{where} weight must have the kernel {kernel}.")
            _require(scale.shape == shape[:1], f"{where} weight_scale must be one per channel.")  # type: ignore[union-attr]
            for name in (layer.inputs[0], layer.residual):
                quantized = name is None or scales[name] is not None
                _require(quantized, f"{where} inputs must be quantized, {name!r} is not.")
        elif layer.op == "linear":
            _require(weight is not None, f"{where} weight must be there.")
        else:
            step = scales[layer.inputs[0]] if layer.op != "global_avg_pool" else None
        if layer.op == "cat":
            same = step is not None and all(
                scales[n] is not None and torch.equal(scales[n], step)  # type: ignore[arg-type]
                for n in layer.inputs
            )
            _require(same, f"{where} inputs must have one scale.")
        scales[layer.name] = step
    _require(len(card.layers) > 0, "layers must not be empty.")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"network card: {message}")


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
