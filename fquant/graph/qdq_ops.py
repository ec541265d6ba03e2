"""The two nodes of a Q/DQ graph, as ops: `fquant::quantize` and `fquant::dequantize`.

    q = fquant::quantize(x, scale, zero_point, format, name)              integers, or codes
    y = fquant::dequantize(q, scale, zero_point, format, dtype, name)     of x's dtype, on the grid

All seven arguments are positional in every graph that `export_qdq` makes:

    x           floating point, any shape
    scale       the step, a tensor that meets x by the rule of `fquant.granularity`: each axis has size
                1, n, or a divisor of n (blocks); 0-d for one step per tensor. `granularity_of` names it
    zero_point  an integer tensor likewise, or None for 0
    format      the grid, `format_to_text(spec)`: a JSON list; `format_of(node)` gives the `Format` back
    dtype       of y
    name        the quantizer of the plan, `site.role`

Their definitions are `fquant.quantize` and `fquant.dequantize`. `torch.export` keeps them as nodes;
`torch.compile` sees through them. torch's own `quantized_decomposed` ops are not used because they
compute `round(x * (1 / scale))`, which is another integer next to ties (`to_quantized_decomposed`).
"""

import functools
import json
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from fquant.affine import dequantize as dequantize_record
from fquant.affine import quantize as quantize_tensor
from fquant.formats import Format
from fquant.pytree import from_constant, from_json, to_constant, to_json
from fquant.records import QTensor
from fquant_kernels.library import define_composite_op


def format_to_text(spec: Format) -> str:
    """Returns a format as the text that Q/DQ nodes carry.

    Example:
        >>> format_to_text(fquant.QuantSpec(4, narrow_range=True))
        '["QuantSpec", 4, false, true, null, null, "half_even", "real"]'
    """
    return json.dumps(to_json(to_constant(spec)))


@functools.lru_cache(maxsize=1024)
def format_from_text(text: str) -> Format:
    """Returns the format that `format_to_text` wrote.

    Raises:
        ValueError: the text names no format.
    """
    spec = from_constant(from_json(json.loads(text)))
    if isinstance(spec, tuple):
        raise ValueError(f"format_from_text: text must be that of a format, got {text!r}.")
    return spec


def _quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, format: str, name: str
) -> Tensor:
    return quantize_tensor(x, scale, zero_point, format_from_text(format)).q


def _dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    step = scale.to(torch.float64 if dtype == torch.float64 else torch.float32)
    spec = format_from_text(format)
    return dequantize_record(QTensor(q, step, zero_point, spec=spec, dtype=dtype))


quantize = define_composite_op(
    "quantize(Tensor x, Tensor scale, Tensor? zero_point, str format, str name) -> Tensor",
    _quantize,
    instead="Train with fquant.fake_quant; its graph is for deployment.",
)
dequantize = define_composite_op(
    "dequantize(Tensor q, Tensor scale, Tensor? zero_point, str format, ScalarType dtype, str name) "
    "-> Tensor",
    _dequantize,
)


class Quantization(NamedTuple):
    """What a Q or DQ node says, under the names of its arguments.

    Attributes:
        input: the node of x or q.
        scale: the node of the step.
        zero_point: its node, or None.
        format: the grid.
        name: the quantizer of the plan.
    """

    input: Node
    scale: Node
    zero_point: Node | None
    format: Format
    name: str


def is_quantize(node: Any) -> bool:
    """Whether a node is `fquant::quantize`."""
    return isinstance(node, Node) and node.target is quantize


def is_dequantize(node: Any) -> bool:
    """Whether a node is `fquant::dequantize`."""
    return isinstance(node, Node) and node.target is dequantize


def quantization_of(node: Node) -> Quantization:
    """Returns the arguments of a Q or DQ node."""
    x, scale, zero_point, text, *rest = node.args
    return Quantization(x, scale, zero_point, format_from_text(text), rest[-1])  # type: ignore[arg-type]


def state_name(quantizer: str) -> str:
    """Returns the name of a quantizer as a part of a name in a program's state.

    Example:
        >>> state_name("blocks.0/conv2d#0.weight")
        'blocks_0_conv2d_0_weight'
    """
    return re.sub(r"\W", "_", quantizer)


def granularity_of(scale: Any, shape: Any) -> str:
    """Returns "tensor", "axis k", or "blocks of b along axis k" for a scale's shape and its tensor's.

    Example:
        >>> granularity_of(torch.Size([4, 1]), torch.Size([4, 9]))
        'axis 0'
        >>> granularity_of(torch.Size([4, 3]), torch.Size([4, 9]))
        'axis 0, blocks of 3 along axis 1'
    """
    have = [1] * (len(shape) - len(scale)) + list(scale)
    parts = []
    for axis, (groups, size) in enumerate(zip(have, shape, strict=True)):
        if groups == 1:
            continue
        parts.append(
            f"axis {axis}" if groups == size else f"blocks of {size // groups} along axis {axis}"
        )
    return ", ".join(parts) or "tensor"
