"""Quantization by scale and zero point: ONNX's and TensorRT's arithmetic.

    q = saturate(round_half_even(x / scale) + zero_point),     x ~= (q - zero_point) * scale

`scale` is the step. Everything above tensor level uses these functions; `fquant.amax_quant` has
the amax forms. The two differ by one step on rare values next to a tie, because one divides by
`amax / q_max` where the other multiplies by `q_max / amax`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fquant.checks import (
    as_broadcastable,
    compute_dtype,
    divide,
    require_floating,
    values_readable,
)
from fquant.records import QTensor, lifts_to_features
from fquant.spec import QuantSpec
from fquant.straight_through import straight_through

INT8 = QuantSpec()


def compute_amax(x: Tensor, axis: int | Sequence[int] | None = None) -> Tensor:
    """Returns the largest absolute value of x, per group; no gradient flows through it.

    Args:
        x: any shape; an empty group has amax 0; NaN gives NaN.
        axis: the axis or axes that are KEPT (`torch.amax(dim=)` names those removed); None for one
            value per tensor.

    Returns:
        amax in units of x: 0-d for `axis=None`, otherwise of x's rank with size 1 where reduced, so
        that it broadcasts against x.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: an axis is out of range or named twice.

    Example:
        >>> compute_amax(torch.tensor([[1.0, -3.0], [0.5, 2.0]]), axis=0)
        tensor([[3.],
                [2.]])
    """
    require_floating("compute_amax", "x", x)
    magnitude = x.detach().abs()
    if axis is None:
        return magnitude.amax() if x.numel() > 0 else x.new_zeros(())
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    kept = {a % x.ndim for a in axes if -x.ndim <= a < x.ndim}
    if len(kept) != len(axes):
        raise ValueError(
            f"compute_amax: axis must name different axes of a tensor of {x.ndim} axes, got {axis}."
        )
    reduced = [a for a in range(x.ndim) if a not in kept]
    if not reduced:
        return magnitude
    if x.numel() == 0:
        return x.new_zeros([x.shape[a] if a in kept else 1 for a in range(x.ndim)])
    return magnitude.amax(dim=reduced, keepdim=True)


def compute_scale(amax: Tensor, spec: QuantSpec = INT8) -> Tensor:
    """Returns the step of a symmetric grid that reaches amax: `amax / q_max`.

    amax = 0, and any amax whose step would be denormal, gives scale 1: an all-zero group becomes
    exact zeros. float32, or float64 for a float64 amax; the shape of amax.

    Raises:
        TypeError: amax is not a floating-point tensor.
        ValueError: amax is negative (checked in eager code).

    Example:
        >>> compute_scale(torch.tensor([127.0, 0.0]))
        tensor([1., 1.])
    """
    require_floating("compute_scale", "amax", amax)
    if values_readable(amax) and bool((amax < 0).any()):
        raise ValueError(f"compute_scale: amax must not be negative, got {amax.min().item()}.")
    return _usable(divide(amax.to(compute_dtype(amax)), spec.q_max))


def compute_scale_zero_point(
    minimum: Tensor, maximum: Tensor, spec: QuantSpec = INT8
) -> tuple[Tensor, Tensor]:
    """Returns (scale, zero_point) of an asymmetric grid over [minimum, maximum].

        scale = (max(maximum, 0) - min(minimum, 0)) / (q_max - q_min)
        zero_point = saturate(round_half_even(q_min - min(minimum, 0) / scale))

    The range is widened to hold 0, so that 0.0 is on the grid exactly. An empty range gives scale 1.

    Returns:
        scale float32 (float64 for float64), zero_point of dtype int32, both of the shape of minimum.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ, or minimum > maximum (checked in eager code).

    Example:
        >>> compute_scale_zero_point(torch.tensor(-1.0), torch.tensor(1.55))
        (tensor(0.0100), tensor(-28, dtype=torch.int32))

    References:
        ONNX operator DynamicQuantizeLinear.
    """
    require_floating("compute_scale_zero_point", "minimum", minimum)
    require_floating("compute_scale_zero_point", "maximum", maximum)
    if minimum.shape != maximum.shape:
        raise ValueError(
            "compute_scale_zero_point: maximum must have the shape of minimum, "
            f"{tuple(minimum.shape)}, got {tuple(maximum.shape)}."
        )
    if values_readable(minimum, maximum) and bool((minimum > maximum).any()):
        raise ValueError(
            "compute_scale_zero_point: minimum must not be above maximum, "
            f"got {minimum.tolist()} and {maximum.tolist()}."
        )
    low = minimum.to(compute_dtype(minimum)).clamp(max=0.0)
    high = maximum.to(compute_dtype(minimum)).clamp(min=0.0)
    scale = _usable(divide(high - low, spec.q_max - spec.q_min))
    zero_point = (spec.q_min - low / scale).round().clamp(spec.q_min, spec.q_max)
    return scale, zero_point.to(torch.int32)


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)


@lifts_to_features
def quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    spec: QuantSpec = INT8,
) -> QTensor:
    """Returns x on the integer grid: `q = saturate(round_half_even(x / scale) + zero_point)`.

    Infinities saturate; NaN becomes the zero point. Values in half types are divided in float32.

    Args:
        x: float16, bfloat16, float32 or float64, any shape; or a record with `features`, which
            comes back with its features quantized.
        scale: the step, positive; a number or a tensor that broadcasts to x.
        zero_point: the integer that stands for 0.0, on the grid; broadcasts to x. None means 0.
        spec: the grid.

    Returns:
        QTensor with `q` of dtype `spec.dtype` and x's shape.

    Raises:
        TypeError: x is not a floating-point tensor, scale or zero_point not a number or tensor.
        ValueError: scale or zero_point does not broadcast to x, or is on another device; scale is
            not positive, or zero_point not on the grid (checked in eager code).

    Example:
        >>> quantize(torch.tensor([0.5, 1.5, 2.5, 300.0]), scale=1.0).q      # ties to even
        tensor([  0,   2,   2, 127], dtype=torch.int8)

    References:
        ONNX operator QuantizeLinear, opset 21.
    """
    step, offset = _scale_and_zero_point("quantize", x, scale, zero_point, spec)
    levels = _levels(x.to(step.dtype), step, offset, spec)
    empty = 0.0 if offset is None else offset
    q = torch.where(levels.isnan(), empty, levels).to(spec.dtype)
    return QTensor(
        q, step, None if offset is None else offset.to(torch.int32), spec=spec, dtype=x.dtype
    )


@lifts_to_features
def dequantize(x: QTensor) -> Tensor:
    """Returns the real values of a QTensor, `(q - zero_point) * scale`, in its dtype.

    Example:
        >>> dequantize(quantize(torch.tensor([0.3, -0.2]), scale=0.125))
        tensor([ 0.2500, -0.2500])
    """
    if not isinstance(x, QTensor):
        raise TypeError(f"dequantize: x must be a QTensor, got {type(x).__name__}.")
    levels = x.q.to(x.scale.dtype)
    return _values(levels, x.scale, x.zero_point).to(x.dtype)


@lifts_to_features
def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    spec: QuantSpec = INT8,
) -> Tensor:
    """Returns `dequantize(quantize(x, ...))` bit for bit, with a straight-through derivative.

    The derivative is that of clipping x to `[(q_min - zero_point) scale, (q_max - zero_point) scale]`,
    both ends included: 1 inside and 0 outside with respect to x, and `q_min - zero_point` or
    `q_max - zero_point` with respect to scale where x is clipped. NaN stays NaN.

    Arguments, errors and source are those of `quantize`; the result has x's shape and dtype.

    Example:
        >>> x = torch.tensor([0.3, 20.0])
        >>> fake_quantize(x, scale=0.125)
        tensor([ 0.2500, 15.8750])
        >>> torch.func.grad(lambda x: fake_quantize(x, scale=0.125).sum())(x)
        tensor([1., 0.])
    """
    step, offset = _scale_and_zero_point("fake_quantize", x, scale, zero_point, spec)
    wide = x.to(step.dtype)
    grid = _values(_levels(wide.detach(), step.detach(), offset, spec), step.detach(), offset)
    shift = 0.0 if offset is None else offset
    clipped = wide.clamp((spec.q_min - shift) * step, (spec.q_max - shift) * step)
    return straight_through(grid, clipped).to(x.dtype)


def _levels(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """The integers, in x's float dtype; this rounding is the definition that all forms share."""
    levels = (x / scale).round()
    if zero_point is not None:
        levels = levels + zero_point
    return levels.clamp(spec.q_min, spec.q_max)


def _values(levels: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return (levels if zero_point is None else levels - zero_point) * scale


def _scale_and_zero_point(
    function: str,
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None,
    spec: QuantSpec,
) -> tuple[Tensor, Tensor | None]:
    """Returns scale and zero point as floats of the dtype the arithmetic is done in."""
    require_floating(function, "x", x)
    step = as_broadcastable(function, "scale", scale, x, compute_dtype(x))
    if values_readable(step) and bool((step <= 0).any()):
        raise ValueError(f"{function}: scale must be positive, got {step.min().item()}.")
    if zero_point is None:
        return step, None
    offset = as_broadcastable(function, "zero_point", zero_point, x, compute_dtype(x))
    off_grid = (offset < spec.q_min) | (offset > spec.q_max) | (offset != offset.round())
    if values_readable(offset) and bool(off_grid.any()):
        raise ValueError(
            f"{function}: zero_point must be an integer from {spec.q_min} to {spec.q_max}, "
            f"got {offset[off_grid].flatten()[0].item()}."
        )
    return step, offset.detach()
