"""Quantization by scale and zero point: ONNX's and TensorRT's arithmetic.

    q = saturate(round_half_even(x / scale) + zero_point),     x ~= (q - zero_point) * scale

The grid may be any `Format`: integers (`QuantSpec`), floating point (`FloatFormat`), a list of values
(`Codebook`); one with codes has `x ~= decode(q) * scale`.

`scale` is the step. Everything above tensor level uses these functions; `fquant.amax_quant` has
the amax forms. The two differ by one step on rare values next to a tie, because one divides by
`amax / q_max` where the other multiplies by `q_max / amax`.
"""

import torch
from torch import Tensor

from fquant import eager_fake_quantize
from fquant.checks import (
    as_broadcastable,
    compute_dtype,
    require_floating,
    require_positive,
    values_readable,
)
from fquant.formats import Format, require_format
from fquant.granularity import spread
from fquant.packing import PackedTensor, unpack
from fquant.records import QTensor, lifts_to_features
from fquant.rounding import uniform_noise
from fquant.spec import INT8, QuantSpec
from fquant.straight_through import clipped_straight_through


@lifts_to_features
def quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    spec: Format = INT8,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> QTensor:
    """Returns x on the grid: `q = saturate(round_half_even(x / scale) + zero_point)`.

    Infinities saturate; NaN becomes the zero point, or the format's NaN. Values in half types are
    divided in float32. The rounding is `spec.rounding`.

    Args:
        x: float16, bfloat16, float32 or float64, any shape; or a record with `features`, which
            comes back with its features quantized.
        scale: the step, positive; a number or a tensor that meets x (`fquant.granularity`: each axis
            of size 1, n, or a divisor of n for blocks).
        zero_point: the integer that stands for 0.0, on the grid; likewise. None means 0, and is the
            only choice for a grid that is not of integers.
        spec: the grid.
        noise: for stochastic rounding: uniform on [0, 1), of x's shape or one that broadcasts to it.
        generator: for stochastic rounding, in place of noise; eager code only.

    Returns:
        QTensor with `q` of dtype `spec.dtype` and x's shape.

    Raises:
        TypeError: x is not a floating-point tensor, scale or zero_point not a number or tensor, spec
            not a Format.
        ValueError: scale or zero_point does not meet x, or is on another device; a zero_point for a
            grid that is not of integers; noise or a generator without stochastic rounding, or that
            without them; scale is not positive, or zero_point not on the grid (checked in eager
            code).

    Example:
        >>> quantize(torch.tensor([0.5, 1.5, 2.5, 300.0]), scale=1.0).q      # ties to even
        tensor([  0,   2,   2, 127], dtype=torch.int8)

    References:
        ONNX operator QuantizeLinear, opset 21.
    """
    step, offset = _scale_and_zero_point("quantize", x, scale, zero_point, spec)
    wide = x.to(step.dtype)
    noise = uniform_noise("quantize", wide, spec.rounding, noise, generator)
    levels = _levels(wide, step, offset, spec, noise)
    empty = None if offset is None else spread(offset, x.shape)
    return QTensor(
        spec.encode(levels, empty),
        step,
        None if offset is None else offset.to(torch.int32),
        spec=spec,
        dtype=x.dtype,
    )


@lifts_to_features
def dequantize(x: QTensor | PackedTensor) -> Tensor:
    """Returns the real values of a QTensor or PackedTensor, `(q - zero_point) * scale`, in its dtype.

    `decode(q) * scale` for a grid with codes.

    Example:
        >>> dequantize(quantize(torch.tensor([0.3, -0.2]), scale=0.125))
        tensor([ 0.2500, -0.2500])
    """
    if isinstance(x, PackedTensor):
        x = unpack(x)
    if not isinstance(x, QTensor):
        raise TypeError(f"dequantize: x must be a QTensor, got {type(x).__name__}.")
    levels = x.spec.decode(x.q, x.scale.dtype)
    return _values(levels, x.scale, x.zero_point).to(x.dtype)


@lifts_to_features
def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    spec: Format = INT8,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
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
    noise = uniform_noise("fake_quantize", wide, spec.rounding, noise, generator)
    fixed = step.detach()
    shift = 0.0 if offset is None else offset
    low, high = (spec.q_min - shift) * step, (spec.q_max - shift) * step
    low, high = spread(low, x.shape), spread(high, x.shape)

    def grid_of(wide: Tensor) -> Tensor:
        return _values(_levels(wide, fixed, offset, spec, noise), fixed, offset)

    if noise is None and eager_fake_quantize.applies_to(x, step):
        return eager_fake_quantize.fake_quantize_eager(wide, grid_of, low, high).to(x.dtype)
    return clipped_straight_through(wide, grid_of(wide.detach()), low, high).to(x.dtype)


def _levels(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: Format,
    noise: Tensor | None = None,
) -> Tensor:
    """The grid values in units of the step; this rounding is the definition that all forms share."""
    offset = None if zero_point is None else spread(zero_point, x.shape)
    return spec.snap(x / spread(scale, x.shape), noise, offset)


def _values(levels: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    if zero_point is not None:
        levels = levels - spread(zero_point, levels.shape)
    return levels * spread(scale, levels.shape)


def _scale_and_zero_point(
    function: str,
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None,
    spec: Format,
) -> tuple[Tensor, Tensor | None]:
    """Returns scale and zero point as floats of the dtype the arithmetic is done in."""
    require_floating(function, "x", x)
    require_format(function, spec)
    step = as_broadcastable(function, "scale", scale, x, compute_dtype(x))
    require_positive(function, "scale", step)
    if zero_point is None:
        return step, None
    if not isinstance(spec, QuantSpec):
        raise ValueError(
            f"{function}: zero_point must be None for a grid that is not of integers, "
            f"got {zero_point}."
        )
    offset = as_broadcastable(function, "zero_point", zero_point, x, compute_dtype(x))
    off_grid = (offset < spec.q_min) | (offset > spec.q_max) | (offset != offset.round())
    if values_readable(offset) and bool(off_grid.any()):
        raise ValueError(
            f"{function}: zero_point must be an integer from {spec.q_min} to {spec.q_max}, "
            f"got {offset[off_grid].flatten()[0].item()}."
        )
    return step, offset.detach()
