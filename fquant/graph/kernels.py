"""The lowerings that come with fquant, one function per kernel: from a pattern to integer nodes."""

from typing import Any

import torch
from torch.fx import Node

from fquant.graph import int8_ops
from fquant.graph.editor import Editor
from fquant.graph.epilogue import clamped, epilogue_of
from fquant.graph.pattern import (
    Lowering,
    NotLowered,
    Pattern,
    aten,
    integer_input,
    integer_weight,
)
from fquant_kernels.conv_int8.op import MAX_PRODUCTS

ops = torch.ops.fquant


def _arguments(node: Node, *defaults: Any) -> list[Any]:
    """The positional arguments of a node, filled up by defaults."""
    if node.kwargs:
        raise NotLowered(f"it has keyword arguments {sorted(node.kwargs)}")
    return [*node.args, *defaults[len(node.args) :]]


def _require_countable(products: int) -> None:
    if products > MAX_PRODUCTS:
        raise NotLowered(f"{products} products per sum may overflow int32")


def build_linear(editor: Editor, pattern: Pattern) -> Node:
    """`aten.linear` -> `fquant::linear_int8`."""
    x, w, bias = _arguments(pattern.anchor, None, None, None)
    quantized, weight = integer_input(editor, x), integer_weight(editor, w)
    _require_countable(weight.q.shape[1])
    epilogue = epilogue_of(editor, pattern, quantized, weight, bias)
    stored = editor.add_state(f"integers.{w.name}", weight.q)
    arguments = (quantized.input, stored, list(weight.q.shape), "", *epilogue.arguments)
    y = editor.call(int8_ops.linear_int8, *arguments, before=pattern.last)
    return clamped(editor, y, epilogue, pattern.last)


def build_conv(editor: Editor, pattern: Pattern) -> Node:
    """`aten.conv1d`, `conv2d`, `conv3d` -> `fquant::conv_int8`, weights (Cout, *kernel, Cin)."""
    axes = len(pattern.anchor.args[1].meta["val"].shape) - 2  # type: ignore[union-attr]
    ones, zeros = [1] * axes, [0] * axes
    x, w, bias, stride, padding, dilation, groups = _arguments(
        pattern.anchor, None, None, None, ones, zeros, ones, 1
    )
    if isinstance(padding, str):
        raise NotLowered(f"padding is {padding!r}, not numbers")
    quantized, weight = integer_input(editor, x), integer_weight(editor, w)
    if groups == 1:
        _require_countable(weight.q[0].numel())
    epilogue = epilogue_of(editor, pattern, quantized, weight, bias)
    last = weight.q.movedim(1, -1)
    stored = editor.add_state(f"integers.{w.name}", last)
    geometry = [_per_axis(value, axes) for value in (stride, padding, dilation)]
    arguments = (quantized.input, stored, list(last.shape), "", *epilogue.arguments)
    y = editor.call(int8_ops.conv_int8, *arguments, *geometry, groups, before=pattern.last)
    return clamped(editor, y, epilogue, pattern.last)


def _per_axis(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def build_sparse_conv(editor: Editor, pattern: Pattern) -> Node:
    """`fquant::sparse_conv` (submanifold, strided, transposed, inverse) -> `fquant::sparse_conv_int8`."""
    x, w, neighbors, bias = _arguments(pattern.anchor, None, None, None, None)
    quantized, weight = integer_input(editor, x), integer_weight(editor, w)
    _require_countable(weight.q[0].numel())
    epilogue = epilogue_of(editor, pattern, quantized, weight, bias)
    stored = editor.add_state(f"integers.{w.name}", weight.q)
    arguments = (quantized.input, stored, neighbors, *epilogue.arguments)
    y = editor.call(ops.sparse_conv_int8.default, *arguments, before=pattern.last)
    return clamped(editor, y, epilogue, pattern.last)


DEFAULT_TABLE = (
    Lowering("linear_int8", (aten.linear.default,), build_linear),
    Lowering(
        "conv_int8", (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), build_conv
    ),
    Lowering("sparse_conv_int8", (ops.sparse_conv.default,), build_sparse_conv),
)
