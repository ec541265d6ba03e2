"""`Layer`: one line of a sparse network, and what can be said of a list of them without data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

Sizes = int | tuple[int, ...]

CONVOLUTIONS = ("subm", "conv", "inverse")
OPS = (*CONVOLUTIONS, "max_pool", "global_avg_pool", "linear")
NETWORK_INPUT = "input"


@dataclass(frozen=True)
class Layer:
    """One layer: what it reads, what it computes, and the name of its result.

    A convolution computes `relu(batch_norm(conv(concatenated inputs)) + residual)`.

    Attributes:
        name: of the layer and of the value it makes; no dots.
        op: "subm", "conv", "inverse" (of the convolution that `undoes` names, at that one's inputs),
            "max_pool", "global_avg_pool" (over the active cells of each sample) or "linear".
        channels: of its inputs together and of its output; (0, 0) for pools.
        kernel_size: taps per axis.
        stride: input cells per output cell, of "conv" and "max_pool".
        padding: cells of zeros around the grid, of "conv" and "max_pool".
        dilation: cells between taps, of "subm", "conv" and "max_pool".
        inputs: the values it reads, concatenated by channels; empty for the layer before.
            "input" is the network's input.
        residual: the value that is added before the ReLU; empty for none.
        relu: whether negative results become 0; convolutions only.
        undoes: for "inverse", the name of the convolution.
    """

    name: str
    op: str
    channels: tuple[int, int] = (0, 0)
    kernel_size: Sizes = 3
    stride: Sizes = 1
    padding: Sizes = 0
    dilation: Sizes = 1
    inputs: tuple[str, ...] = ()
    residual: str = ""
    relu: bool = True
    undoes: str = ""

    @property
    def is_convolution(self) -> bool:
        """Whether it has a kernel of weights."""
        return self.op in CONVOLUTIONS


def with_inputs(layers: Sequence[Layer]) -> Iterator[Layer]:
    """Yields the layers, each with the values that it reads named."""
    before = NETWORK_INPUT
    for layer in layers:
        yield layer if layer.inputs else replace(layer, inputs=(before,))
        before = layer.name


def check_layers(layers: Sequence[Layer]) -> None:
    """Raises ValueError unless the list is a network; the message names the layer.

    Example:
        >>> check_layers([Layer("a", "subm", (4, 8)), Layer("b", "subm", (4, 8))])
        Traceback (most recent call last):
        ValueError: check_layers: layer 'b': channels must begin with the 8 of ('a',), got (4, 8).
    """
    width: dict[str, int] = {}
    for layer in with_inputs(layers):
        _require(layer, layer.op in OPS, f"op must be one of {OPS}, got {layer.op!r}")
        _require(
            layer,
            layer.name not in width and layer.name != NETWORK_INPUT and "." not in layer.name,
            f"name must be new and without dots, got {layer.name!r}",
        )
        if not width:
            width[NETWORK_INPUT] = layer.channels[0]
        reads = [*layer.inputs, *([layer.residual] if layer.residual else [])]
        unknown = [name for name in reads if name not in width]
        _require(layer, not unknown, f"inputs must be earlier layers, got {unknown}")
        total = sum(width[name] for name in layer.inputs)
        has_weight = layer.is_convolution or layer.op == "linear"
        _require(
            layer,
            not has_weight or layer.channels[0] == total,
            f"channels must begin with the {total} of {layer.inputs}, got {layer.channels}",
        )
        width[layer.name] = layer.channels[1] if has_weight else total
        if layer.residual:
            added = width[layer.residual]
            _require(
                layer,
                layer.is_convolution and added == layer.channels[1],
                f"residual must go to a convolution and have its {layer.channels[1]} channels, "
                f"got {layer.op!r} and {added}",
            )
        strided = {other.name for other in layers if other.op == "conv"}
        _require(
            layer,
            (layer.undoes in strided) if layer.op == "inverse" else not layer.undoes,
            f"undoes must name a 'conv' layer, for 'inverse' only, got {layer.undoes!r}",
        )


def _require(layer: Layer, condition: bool, requirement: str) -> None:
    if not condition:
        raise ValueError(f"check_layers: layer {layer.name!r}: {requirement}.")


def convolutions(layers: Sequence[Layer]) -> frozenset[str]:
    """Returns the names of the convolutions, which are what int8 can run."""
    return frozenset(layer.name for layer in layers if layer.is_convolution)


def first_and_last(layers: Sequence[Layer]) -> frozenset[str]:
    """Returns the names of the layers with weights that see the input, or whose result is the output.

    They are what is usually left in floating point: the first reads raw measurements, and the last
    has nothing behind it that would make up for its rounding.

    Example:
        >>> channels = {"a": (4, 8), "b": (8, 8), "c": (8, 2)}
        >>> layers = [Layer(name, "subm", c) for name, c in channels.items()]
        >>> sorted(first_and_last(layers))
        ['a', 'c']
    """
    weighted = [x for x in with_inputs(layers) if x.is_convolution or x.op == "linear"]
    first = {layer.name for layer in weighted if NETWORK_INPUT in layer.inputs}
    return frozenset(first | {weighted[-1].name})


def sources(layers: Sequence[Layer]) -> dict[str, tuple[str, ...]]:
    """Returns, for each value, the convolutions (or the input) whose results it carries.

    A pool picks among what it reads, and so its values lie on the same grid of numbers.
    """
    found: dict[str, tuple[str, ...]] = {NETWORK_INPUT: (NETWORK_INPUT,)}
    for layer in with_inputs(layers):
        if layer.op == "max_pool":
            found[layer.name] = tuple(s for name in layer.inputs for s in found[name])
        else:
            found[layer.name] = (layer.name,)
    return found
