"""The epilogue of the int8 kernels, worked out from a pattern at lowering time.

    scale[c] = s_x * s_w[c] (* gamma / sqrt(var + eps)) / s_y,   bias[c] / s_y,   s_r / s_y

float32, in this order; without a Q node there is no s_y, and the result is float32.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from fquant.graph.editor import Editor
from fquant.graph.fold import norm_as_affine
from fquant.graph.pattern import Integers, NotLowered, Pattern, aten
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
    editor: Editor, pattern: Pattern, x: Quantization, weight: Integers, bias: Node | None
) -> Epilogue:
    """Returns the epilogue of a convolution or product of x and weight.

    Args:
        editor: the program.
        pattern: the layer.
        x: its integer input.
        weight: its weight, output channels first.
        bias: its bias, if any.

    Raises:
        NotLowered: the bias is computed at run time.
    """
    if not editor.constant(bias):
        raise NotLowered("its bias is computed at run time")
    step = editor.value(x.scale).float().reshape(()) * weight.scale
    step = step.expand(weight.q.shape[0])
    offset: Tensor | None = editor.value(bias)
    if pattern.norm is not None:
        step, offset = _with_norm(editor, pattern.norm, step, offset)
    residual = residual_scale = None
    if pattern.residual is not None:
        added = quantization_of(pattern.residual)
        residual, residual_scale = added.input, editor.value(added.scale).float().reshape(())
    out_step = None
    if pattern.quantize is not None:
        out_step = editor.value(quantization_of(pattern.quantize).scale).float().reshape(())
        step = step / out_step
        offset = None if offset is None else offset / out_step
        residual_scale = None if residual_scale is None else residual_scale / out_step
    site = state_name(x.name.rpartition(".")[0])

    def state(name: str, value: Tensor | None) -> Node | None:
        return None if value is None else editor.add_state(f"lowered.{site}.{name}", value)

    low, high = pattern.activation or (-math.inf, math.inf)
    arguments = (
        state("scale", step),
        state("bias", None if offset is None else offset.float()),
        residual,
        state("residual_scale", residual_scale),
        low == 0.0,
        torch.float32 if out_step is None else torch.int8,
    )
    return Epilogue(arguments, _clamp_left(pattern, low, high, out_step))


def clamped(editor: Editor, node: Node, epilogue: Epilogue, before: Node) -> Node:
    """Returns the kernel's result with the rest of the activation or grid applied."""
    if epilogue.clamp is None:
        return node
    return editor.call(aten.clamp.default, node, *epilogue.clamp, before=before)


def _clamp_left(
    pattern: Pattern, low: float, high: float, out_step: Tensor | None
) -> tuple[float | None, float | None] | None:
    """Bounds that the kernel does not see to: it knows ReLU and the int8 range only.

    Rounding is monotonic, so clamping integers to rounded bounds is rounding what was clamped.
    """
    smallest, largest = -math.inf, math.inf
    if pattern.quantize is not None and out_step is not None:
        spec = quantization_of(pattern.quantize).format
        smallest, largest = -128.0, 127.0
        low = max(spec.q_min, float((low / out_step).round()))
        high = min(spec.q_max, float((high / out_step).round()))
    lower = None if low <= smallest or (low == 0.0 and _is_relu(pattern)) else low
    upper = None if high >= largest else high
    if lower is None and upper is None:
        return None
    if pattern.quantize is not None:
        return (None if lower is None else int(lower)), (None if upper is None else int(upper))
    return lower, upper


def _is_relu(pattern: Pattern) -> bool:
    return pattern.activation is not None and pattern.activation[0] == 0.0


def _with_norm(
    editor: Editor, norm: Node, step: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The step and offset with a batch norm folded in; worked out in float64, rounded once."""
    factor, shift = norm_as_affine(editor, norm, offset)
    return step * factor.float(), shift.float()
