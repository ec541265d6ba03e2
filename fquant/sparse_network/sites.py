"""What is quantized when a set of layers runs in int8: rules, and scales that must be equal."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fquant.op_rules import OpRule, Quantizer
from fquant.sparse_network.layer import Layer, convolutions, sources, with_inputs
from fquant.spec import QuantSpec

ACTIVATION = QuantSpec()
WEIGHT = QuantSpec(narrow_range=True)


def quantized_values(layers: Sequence[Layer], int8: Collection[str]) -> frozenset[str]:
    """Returns the values (convolutions and "input") that lie on an int8 grid.

    Those that a layer of `int8` reads or adds: each value has one quantizer, where it is made, and a
    layer in floating point that reads it too sees the same numbers.

    Raises:
        ValueError: int8 names a layer that is no convolution.

    Example:
        >>> channels = {"a": (4, 8), "b": (8, 8), "c": (8, 2)}
        >>> layers = [Layer(name, "subm", c) for name, c in channels.items()]
        >>> sorted(quantized_values(layers, {"b"}))
        ['a']
    """
    unknown = sorted(set(int8) - convolutions(layers))
    if unknown:
        raise ValueError(f"quantized_values: int8 must name convolutions of layers, got {unknown}.")
    carried = sources(layers)
    return frozenset(
        source for names in _reads(layers, int8) for name in names for source in carried[name]
    )


def int8_rules(
    layers: Sequence[Layer],
    int8: Collection[str],
    weight: Quantizer | None = None,
    activation: Quantizer | None = None,
) -> list[OpRule]:
    """Returns the rules of `fquant.make_plan` for a SparseNetwork whose layers in `int8` are quantized.

    Args:
        layers: the network.
        int8: names of convolutions.
        weight: how their weights are; None for 8 bits per output channel, narrow range, by maximum.
        activation: how values are; None for 8 bits per tensor, by maximum. Give it to choose another
            observer.

    Raises:
        ValueError: int8 names a layer that is no convolution.
    """
    values = quantized_values(layers, int8)
    if not values:
        return []
    return [
        OpRule(
            _any_of(int8), ops=("sparse_conv",), weight=weight or Quantizer(WEIGHT, per="channel")
        ),
        OpRule(_any_of(values), ops=("site",), output=activation or Quantizer(ACTIVATION)),
    ]


def weight_scale_name(layer: str) -> str:
    """The name of a weight's scale in the plan of a SparseNetwork."""
    return f"{layer}/sparse_conv#0.weight"


def value_scale_name(value: str) -> str:
    """The name of a value's scale in the plan of a SparseNetwork."""
    return f"{value}/value#0.output"


def tie_scales(
    layers: Sequence[Layer], int8: Collection[str], scales: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns scales in which values that an int8 layer reads side by side share the largest one.

    int8 features have one scale for all channels, so what is concatenated must agree. Chains of such
    joins share one scale too.

    Args:
        layers: the network.
        int8: names of convolutions.
        scales: `fquant.finalize` of the plan that `int8_rules` led to.

    Raises:
        ValueError: scales lack a value's.
    """
    tied = dict(scales)
    for group in tied_values(layers, int8):
        names = [value_scale_name(value) for value in group]
        missing = [name for name in names if name not in scales]
        if missing:
            raise ValueError(f"tie_scales: scales must have every joined value, lacks {missing}.")
        largest = torch.stack([scales[name] for name in names]).amax(dim=0)
        tied.update(dict.fromkeys(names, largest))
    return tied


def integer_joins(layers: Sequence[Layer], int8: Collection[str]) -> frozenset[str]:
    """Returns the layers whose inputs all share one scale, so that integers can be joined."""
    carried = sources(layers)
    groups = tied_values(layers, int8)
    return frozenset(
        layer.name
        for layer in with_inputs(layers)
        if any(g.issuperset(s for name in layer.inputs for s in carried[name]) for g in groups)
    )


def _reads(layers: Sequence[Layer], int8: Collection[str]) -> Iterator[tuple[str, ...]]:
    for layer in with_inputs(layers):
        if layer.name in int8:
            yield layer.inputs
            if layer.residual:
                yield (layer.residual,)


def tied_values(layers: Sequence[Layer], int8: Collection[str]) -> list[set[str]]:
    """Returns the groups of values that must share a scale."""
    carried = sources(layers)
    groups: list[set[str]] = []
    for names in _reads(layers, int8):
        together = {source for name in names for source in carried[name]}
        if len(together) > 1:
            joined = [g for g in groups if g & together]
            groups = [g for g in groups if not g & together]
            groups.append(together.union(*joined))
    return groups


def _any_of(names: Collection[str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names))
