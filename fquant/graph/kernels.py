"""The lowerings that come with fquant, one function per kernel: from a pattern to integer nodes."""

import math
from typing import Any

import torch
from torch.fx import Node

from fquant.graph import int8_ops, qdq_ops
from fquant.graph.card import OUTPUT_SCALE
from fquant.graph.editor import Editor
from fquant.graph.epilogue import clamped, epilogue_of
from fquant.graph.pattern import (
    Lowering,
    NotLowered,
    Pattern,
    aten,
    integer_input,
    integer_weight,
    shift_of,
    shifted_zero,
)
from fquant.graph.qdq_ops import is_dequantize, quantization_of, state_name
from fquant.graph.tidy import per_axis
from fquant.packing import pack
from fquant.records import QTensor
from fquant.spec import QuantSpec
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
    quantized, weight = integer_input(editor, x, shifted=True), integer_weight(editor, w)
    _require_countable(weight.q.shape[1])
    zero = shifted_zero(editor, quantized)
    epilogue = epilogue_of(editor, pattern, quantized, weight, bias, zero)
    stored = editor.add_state(f"integers.{w.name}", weight.q)
    arguments = (quantized.input, zero, stored, list(weight.q.shape), "", *epilogue.arguments)
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
    quantized, weight = integer_input(editor, x, shifted=True), integer_weight(editor, w)
    if groups == 1:
        _require_countable(weight.q[0].numel())
    zero = shifted_zero(editor, quantized)
    epilogue = epilogue_of(editor, pattern, quantized, weight, bias, zero if groups == 1 else 0)
    last = weight.q.movedim(1, -1)
    stored = editor.add_state(f"integers.{w.name}", last)
    geometry = [per_axis(value, axes) for value in (stride, padding, dilation)]
    arguments = (quantized.input, zero, stored, list(last.shape), "", *epilogue.arguments)
    y = editor.call(int8_ops.conv_int8, *arguments, *geometry, groups, before=pattern.last)
    return clamped(editor, y, epilogue, pattern.last)


def build_sparse_conv(editor: Editor, pattern: Pattern) -> Node:
    """`fquant::sparse_conv` (by any kernel map) -> `fquant::sparse_conv_int8`."""
    x, w, neighbors, bias = _arguments(pattern.anchor, None, None, None, None)
    quantized, weight = integer_input(editor, x), integer_weight(editor, w)
    _require_countable(weight.q[0].numel())
    epilogue = epilogue_of(editor, pattern, quantized, weight, bias)
    stored = editor.add_state(f"integers.{w.name}", weight.q)
    arguments = (quantized.input, stored, neighbors, *epilogue.arguments)
    y = editor.call(ops.sparse_conv_int8.default, *arguments, before=pattern.last)
    if (
        pattern.quantize is not None
    ):  # for `card_of_program`; "custom" is what torch writes to files
        step = editor.value(quantization_of(pattern.quantize).scale).float().item()
        y.meta["custom"] = {OUTPUT_SCALE: step}
    return clamped(editor, y, epilogue, pattern.last)


def build_conv_transpose(editor: Editor, pattern: Pattern) -> Node:
    """`aten.conv_transpose1d`, ... -> `fquant::conv_transpose_int8`."""
    axes = len(pattern.anchor.meta["val"].shape) - 2
    ones, zeros = [1] * axes, [0] * axes
    x, w, bias, stride, padding, extra, groups, dilation = _arguments(
        pattern.anchor, None, None, None, ones, zeros, zeros, 1, ones
    )
    quantized, weight = (
        integer_input(editor, x, shifted=True),
        integer_weight(editor, w, axis=1, groups=groups),
    )
    # (groups * Cin, Cout, *kernel) as (groups * Cout, Cin, *kernel)
    by_group = weight.q.unflatten(0, (groups, -1))
    weight = weight._replace(q=by_group.transpose(1, 2).flatten(0, 1))
    if groups == 1:
        _require_countable(weight.q[0].numel())
    zero = shifted_zero(editor, quantized)
    epilogue = epilogue_of(editor, pattern, quantized, weight, bias, zero if groups == 1 else 0)
    last = weight.q.movedim(1, -1)
    stored = editor.add_state(f"integers.{w.name}", last)
    geometry = [per_axis(value, axes) for value in (stride, padding, dilation, extra)]
    arguments = (quantized.input, zero, stored, list(last.shape), "", *epilogue.arguments)
    y = editor.call(
        int8_ops.conv_transpose_int8, *arguments, *geometry, groups, before=pattern.last
    )
    return clamped(editor, y, epilogue, pattern.last)


def build_matmul(editor: Editor, pattern: Pattern) -> Node:
    """`aten.matmul` by a constant matrix -> `fquant::linear_int8`."""
    x, w = _arguments(pattern.anchor, None, None)
    if len(w.meta["val"].shape) != 2 or not editor.constant(w):
        raise NotLowered("a product of two activations has no int8 kernel")
    quantized, weight = integer_input(editor, x, shifted=True), integer_weight(editor, w, axis=1)
    weight = weight._replace(q=weight.q.T)
    _require_countable(weight.q.shape[1])
    zero = shifted_zero(editor, quantized)
    epilogue = epilogue_of(editor, pattern, quantized, weight, None, zero)
    stored = editor.add_state(f"integers.{w.name}", weight.q)
    arguments = (quantized.input, zero, stored, list(weight.q.shape), "", *epilogue.arguments)
    y = editor.call(int8_ops.linear_int8, *arguments, before=pattern.last)
    return clamped(editor, y, epilogue, pattern.last)


def build_add(editor: Editor, pattern: Pattern) -> Node:
    """`aten.add` of two int8 tensors of one shape -> `fquant::add_int8`, the same arithmetic."""
    a, b = _arguments(pattern.anchor, None, None)
    first, second = (integer_input(editor, x, shifted=True) for x in (a, b))
    if pattern.quantize is None:
        raise NotLowered("its result is used in floating point")
    if pattern.activation not in (None, (0.0, math.inf)):
        raise NotLowered("it is followed by a clamp other than ReLU")
    operands = [part for x in (first, second) for part in (x.input, x.scale, x.zero_point)]
    grid = pattern.quantize.args[1:4]
    relu = bool(pattern.activation)
    return editor.call(int8_ops.add_int8, *operands, relu, *grid, before=pattern.last)


def build_dynamic_linear(editor: Editor, pattern: Pattern) -> Node:
    """`aten.linear` of rows whose scale is computed at run time -> `fquant::linear_int8` in real units.

    y = (acc * s_w[c] - z * s_w[c] * sum(w[c])) * s_x + bias[c]
    """
    x, w, bias = _arguments(pattern.anchor, None, None, None)
    if not is_dequantize(x):
        raise NotLowered("its input is not quantized")
    quantized, weight = quantization_of(x), integer_weight(editor, w)
    spec, shape = quantized.format, quantized.scale.meta["val"].shape
    if not isinstance(spec, QuantSpec) or spec.num_bits > 8 or spec.rounding != "half_even":
        raise NotLowered(f"{quantized.name}: {spec} is no integer grid of at most 8 bits")
    if editor.constant(quantized.scale):
        raise NotLowered(f"{quantized.name} has a scale that is known")
    if x.meta.get("keep") or x.meta["val"].dtype != torch.float32:
        raise NotLowered(f"{quantized.name} is an edge that is kept, or not of float32")
    if len(shape) > 0 and shape[-1] != 1:
        raise NotLowered(f"{quantized.name} has several scales per row")
    _require_countable(weight.q.shape[1])
    name = state_name(quantized.name.rpartition(".")[0])
    steps = weight.scale.expand(weight.q.shape[0])
    scale = editor.add_state(f"lowered.{name}.scale", steps)
    stored = editor.add_state(f"integers.{w.name}", weight.q)
    last = pattern.last
    epilogue = (scale, None, None, None, False, torch.float32)
    arguments = (quantized.input, 0, stored, list(weight.q.shape), "", *epilogue)
    y = editor.call(int8_ops.linear_int8, *arguments, before=last)
    shift = shift_of(spec)
    if quantized.zero_point is not None or shift:
        sums = editor.add_state(
            f"lowered.{name}.sums", steps * weight.q.sum(1, dtype=torch.float32)
        )
        zero: Any = -shift
        if quantized.zero_point is not None:
            zero = editor.call(aten.sub.Tensor, quantized.zero_point, shift, before=last)
        y = editor.call(
            aten.sub.Tensor, y, editor.call(aten.mul.Tensor, sums, zero, before=last), before=last
        )
    y = editor.call(aten.mul.Tensor, y, quantized.scale, before=last)
    if bias is not None:
        y = editor.call(aten.add.Tensor, y, bias, before=last)
    if pattern.quantize is None:
        return y
    return editor.call(qdq_ops.quantize, y, *pattern.quantize.args[1:], before=last)


def build_weight_only(editor: Editor, pattern: Pattern) -> Node:
    """A float layer with a quantized constant weight: the weight is stored as integers.

    Codes of up to 4 bits share bytes. The product is in floating point: torch's own weight-only
    products in float32 took 3.5 to 37 times as long as float ones (AVX2, 1 and 32 rows).
    """
    node = pattern.anchor
    found = [i for i, a in enumerate(node.args) if is_dequantize(a) and editor.constant(a)]
    if len(found) != 1:
        raise NotLowered("it has no quantized constant weight")
    (position,) = found
    dq: Any = node.args[position]
    w = quantization_of(dq)
    if w.zero_point is not None or not isinstance(w.format, QuantSpec) or dq.meta.get("keep"):
        raise NotLowered(f"{w.name} has no integers to store, or is an edge that is kept")
    q, text, dtype = editor.value(w.input), dq.args[3], dq.args[4]
    if w.format.num_bits <= 4:
        packed = pack(QTensor(q, editor.value(w.scale), spec=w.format))
        stored = editor.add_state(f"packed.{dq.name}", packed.packed)
        arguments = (stored, packed.length, w.scale, text, dtype)
        weight = editor.call(int8_ops.dequantize_packed, *arguments, before=node)
    else:
        stored = editor.add_state(f"integers.{dq.name}", q)
        weight = editor.call(qdq_ops.dequantize, stored, *dq.args[1:], before=node)
    args = list(node.args)
    args[position] = weight
    y = editor.call(node.target, *args, before=node)
    if pattern.quantize is None:
        return y
    return editor.call(qdq_ops.quantize, y, *pattern.quantize.args[1:], before=node)


_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
_WEIGHTED = (aten.linear.default, aten.matmul.default, aten.embedding.default)

DEFAULT_TABLE = (
    Lowering("linear_int8", (aten.linear.default,), build_linear, shifted=True),
    Lowering("linear_int8", (aten.matmul.default,), build_matmul, shifted=True),
    Lowering("conv_int8", _CONVS, build_conv, shifted=True),
    Lowering("conv_transpose_int8", _TRANSPOSED, build_conv_transpose, shifted=True),
    Lowering("sparse_conv_int8", (ops.sparse_conv.default,), build_sparse_conv),
    Lowering("add_int8", (aten.add.Tensor,), build_add, absorbs=("activation",), shifted=True),
    Lowering(
        "dynamic_int8", (aten.linear.default,), build_dynamic_linear, absorbs=(), shifted=True
    ),
    Lowering("weight_only", (*_WEIGHTED, *_CONVS, *_TRANSPOSED), build_weight_only, absorbs=()),
)
