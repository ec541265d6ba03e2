"""The epilogue of the int8 kernels, worked out from a pattern at lowering time.

    scale[c] = s_x * (s_w[c] * gamma / sqrt(var + eps)) / s_y,   bias[c] / s_y,   s_r / s_y

float32, in this order; without a Q node there is no s_y, and the result is float32. Zero points z, less
128 for uint8, are in the bias, which is then worked out in float64 and rounded once:

    bias[c] = (b[c] - s_x * s_w[c] * z_x * sum(w[c]) - s_r * z_r) / s_y + z_y
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from fquant.graph.editor import Editor
from fquant.graph.fold import norm_as_affine
from fquant.graph.pattern import Integers, NotLowered, Pattern, aten, shift_of, shifted_zero
from fquant.graph.qdq_ops import Quantization, quantization_of, state_name


class Epilogue(NamedTuple):
    """The arguments of a kernel after its sums, nodes for tensors.

    Attributes:
        arguments: scale, bias, residual, residual_scale, relu, out_dtype.
        clamp: (low, high) of integers or floats that is left to do after the kernel; None for none.
    """

    arguments: tuple[object, ...]
    clamp: tuple[float | None, float | None] | None


def epilogue_of(
    editor: Editor,
    pattern: Pattern,
    x: Quantization,
    weight: Integers,
    bias: Node | None,
    zero: int = 0,
) -> Epilogue:
    """Returns the epilogue of a convolution or product of x and weight.

    Args:
        editor: the program.
        pattern: the layer.
        x: its integer input.
        weight: its weight, output channels first.
        bias: its bias, if any.
        zero: the integer of x that means 0.0, if the kernel leaves it in the sums.

    Raises:
        NotLowered: the bias is computed at run time.
    """
    if not editor.constant(bias):
        raise NotLowered("its bias is computed at run time")
    in_step = editor.value(x.scale).float().reshape(())
    weight_step = weight.scale.expand(weight.q.shape[0])
    offset: Tensor | None = editor.value(bias)
    if zero != 0:
        sums = weight.q.flatten(1).sum(1, dtype=torch.float64)
        offset = _plus(offset, -zero * (in_step * weight_step) * sums)
    if pattern.norm is not None:
        weight_step, offset = _with_norm(editor, pattern.norm, weight_step, offset)
    step = in_step * weight_step
    residual = residual_scale = None
    if pattern.residual is not None:
        added = quantization_of(pattern.residual)
        residual, residual_scale = added.input, editor.value(added.scale).float().reshape(())
        if (middle := shifted_zero(editor, added)) != 0:
            offset = _plus(offset, -middle * residual_scale.double())
    out_step, out_zero, out_dtype = None, 0, torch.float32
    if pattern.quantize is not None:
        result = quantization_of(pattern.quantize)
        out_step, out_zero = (
            editor.value(result.scale).float().reshape(()),
            shifted_zero(editor, result),
        )
        out_dtype = result.format.dtype
        step = step / out_step
        offset = None if offset is None else offset / out_step
        residual_scale = None if residual_scale is None else residual_scale / out_step
        offset = offset if out_zero == 0 else _plus(offset, torch.tensor(float(out_zero)).double())
    if offset is not None:
        offset = offset.float().expand(weight.q.shape[0])
    site = state_name(x.name.rpartition(".")[0])

    def state(name: str, value: Tensor | None) -> Node | None:
        return None if value is None else editor.add_state(f"lowered.{site}.{name}", value)

    low, high = pattern.activation or (-math.inf, math.inf)
    relu = low == 0.0 and out_zero == 0
    arguments = (
        state("scale", step),
        state("bias", offset),
        residual,
        state("residual_scale", residual_scale),
        relu,
        out_dtype,
    )
    if out_step is None:
        return Epilogue(arguments, _bounds_left(low, high, relu, -math.inf, math.inf))
    assert pattern.quantize is not None
    spec: Any = quantization_of(pattern.quantize).format
    zero_point = out_zero + shift_of(spec)
    # Rounding is monotonic, so clamping integers to rounded bounds is rounding what was clamped.
    low = max(spec.q_min, float((low / out_step).round()) + zero_point)
    high = min(spec.q_max, float((high / out_step).round()) + zero_point)
    limits = torch.iinfo(out_dtype)
    return Epilogue(arguments, _bounds_left(low, high, relu, limits.min, limits.max))


def _plus(offset: Tensor | None, more: Tensor) -> Tensor:
    return more.double() if offset is None else offset.double() + more.double()


def clamped(editor: Editor, node: Node, epilogue: Epilogue, before: Node) -> Node:
    """Returns the kernel's result with the rest of the activation or grid applied."""
    if epilogue.clamp is None:
        return node
    return editor.call(aten.clamp.default, node, *epilogue.clamp, before=before)


def _bounds_left(
    low: float, high: float, relu: bool, smallest: float, largest: float
) -> tuple[float | None, float | None] | None:
    """Bounds that the kernel does not see to: it knows ReLU and the range of the type it returns."""
    lower = None if low <= smallest or (relu and low == 0.0) else low
    upper = None if high >= largest else high
    if lower is None and upper is None:
        return None
    if smallest == -math.inf:
        return lower, upper
    return (None if lower is None else int(lower)), (None if upper is None else int(upper))


def _with_norm(
    editor: Editor, norm: Node, step: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The step and offset with a batch norm folded in, in the offset's precision, float32 or float64."""
    factor, shift = norm_as_affine(editor, norm, offset)
    wide = offset is not None and offset.dtype == torch.float64
    return step * factor.float(), shift if wide else shift.float()
