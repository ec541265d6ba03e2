"""Which layers run in int8: a choice by measured times, printed with its reasons."""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fquant.sparse_network.layer import Layer, convolutions, first_and_last
from fquant.sparse_network.module import weight_shape
from fquant_kernels import native

TABLE = Path(__file__).with_name("layer_times.json")


@dataclass(frozen=True)
class LayerTime:
    """How long one convolution takes, measured.

    Attributes:
        taps: of its kernel.
        channels: of input and output.
        int8: nanoseconds per output row, residual, ReLU and rounding included.
        float32: the same of the float32 kernel.
    """

    taps: int
    channels: tuple[int, int]
    int8: float
    float32: float


@dataclass(frozen=True)
class Choice:
    """What was chosen for one layer.

    Attributes:
        layer: its name.
        int8: whether it runs on integers.
        reason: why, for a person.
    """

    layer: str
    int8: bool
    reason: str


def measured_times(
    isa: str | None = None, path: Path = TABLE
) -> tuple[dict[str, Any], list[LayerTime]]:
    """Returns (machine, times): what one instruction set was measured on, and its times there.

    Args:
        isa: one of `fquant_kernels.native.ISAS`; None for the one that the kernels use here.
        path: a table that `python -m benches layer_choice --write FILE` wrote on another machine; the
            one that ships with the project where left out.

    Raises:
        ValueError: the table has no such instruction set, or `FQUANT_CPU_ISA` names none.
        RuntimeError: isa is None, and there are no compiled kernels, or none for `FQUANT_CPU_ISA` here.

    Example:
        >>> machine, times = measured_times("avx2")
        >>> machine["isa"], min(t.taps for t in times)
        ('avx2', 1)
    """
    tables = json.loads(path.read_text())
    wanted = native.chosen_isa() if isa is None else isa
    if wanted not in tables:
        raise ValueError(
            f"measured_times: isa must be one of {', '.join(tables)}, as {path.name} has, "
            f"got {wanted!r}."
        )
    table = tables[wanted]
    times = [LayerTime(taps, (cin, cout), *rest) for taps, cin, cout, *rest in table["times"]]
    return table["machine"], times


def choose_int8(
    layers: Sequence[Layer],
    times: Iterable[LayerTime],
    *,
    axes: int = 3,
    in_float: Collection[str] | None = None,
    in_int8: Collection[str] = (),
) -> tuple[Choice, ...]:
    """Returns a choice for every convolution; `{c.layer for c in choices if c.int8}` are the int8 ones.

    A layer runs in int8 if the nearest measured one (by the logarithms of taps and channels) was faster
    so.

    Args:
        layers: the network.
        times: `measured_times()[1]`, or your own.
        axes: spatial axes.
        in_float: layers that stay in floating point whatever was measured; None for `first_and_last`.
        in_int8: layers that run in int8 whatever was measured; goes before `in_float`.

    Raises:
        ValueError: times are empty, or a name is no convolution of the network.

    Example:
        >>> channels = {"a": (4, 16), "b": (16, 16), "c": (16, 3)}
        >>> layers = [Layer(name, "subm", c) for name, c in channels.items()]
        >>> slow, fast = LayerTime(27, (4, 16), 90.0, 70.0), LayerTime(27, (16, 16), 60.0, 150.0)
        >>> print(describe_choices(choose_int8(layers, [slow, fast])))
        a  float32  first or last
        b  int8     60 ns a row, float32 150 (27 taps, 16 to 16)
        c  float32  first or last
    """
    table = list(times)
    if not table:
        raise ValueError("choose_int8: times must have an entry.")
    known = convolutions(layers)
    ends = first_and_last(layers)
    kept = ends & known if in_float is None else frozenset(in_float)
    unknown = sorted((kept | set(in_int8)) - known)
    if unknown:
        raise ValueError(f"choose_int8: names must be convolutions of layers, got {unknown}.")
    choices = []
    for layer in layers:
        if not layer.is_convolution:
            continue
        nearest = min(table, key=lambda time, layer=layer: _distance(time, layer, axes))  # type: ignore[misc]
        reason = (
            f"{nearest.int8:.0f} ns a row, float32 {nearest.float32:.0f} "
            f"({nearest.taps} taps, {nearest.channels[0]} to {nearest.channels[1]})"
        )
        faster = nearest.int8 < nearest.float32
        if layer.name in in_int8:
            choices.append(Choice(layer.name, True, "as told"))
        elif layer.name in kept:
            why = "first or last" if layer.name in ends else "as told"
            choices.append(Choice(layer.name, False, why))
        else:
            choices.append(Choice(layer.name, faster, reason))
    return tuple(choices)


def describe_choices(choices: Sequence[Choice]) -> str:
    """Returns a table of choices, one line a layer."""
    width = max((len(c.layer) for c in choices), default=0)
    return "\n".join(
        f"{c.layer:<{width}}  {'int8' if c.int8 else 'float32':<7}  {c.reason}" for c in choices
    )


def _distance(time: LayerTime, layer: Layer, axes: int) -> float:
    shape = weight_shape(layer, axes)
    wanted = (math.prod(shape[1:-1]), *layer.channels)
    return math.dist(
        [math.log2(n) for n in wanted], [math.log2(n) for n in (time.taps, *time.channels)]
    )
