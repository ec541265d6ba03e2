"""Quantization by amax, with the arithmetic of NVIDIA's pytorch-quantization.

    q = clamp(round_half_even(x * (q_max / amax)), q_min, q_max)

The returned `scale` is the multiplier `q_max / amax` (128.0057 in the documented example), not the
step. `fquant.affine` has the functions by step, which everything else is built on.
"""

import torch
from torch import Tensor

from fquant.checks import (
    as_broadcastable,
    compute_dtype,
    divide,
    require_floating,
    require_not_negative,
    values_readable,
)
from fquant.presets import E4M3
from fquant.records import lifts_to_features
from fquant.straight_through import straight_through

# amax at or below the smallest fp16 denormal counts as 0 (pytorch-quantization, tensor_quant.py).
SMALLEST_AMAX = 2.0**-24


@lifts_to_features
def fake_tensor_quant(
    inputs: Tensor,
    amax: Tensor | float,
    num_bits: int = 8,
    *,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> Tensor:
    """Returns inputs rounded to the grid of `tensor_quant`: its integers divided by its scale.

    The derivative is straight-through: 1 where `|inputs| <= amax` (edges included), 0 elsewhere;
    with respect to amax, the sign of the inputs that are clipped. In units of x throughout.

    Arguments and errors are those of `tensor_quant`; the result has the inputs' shape and dtype.
    With amax = 0, finite inputs give exact zeros and others NaN; a NaN amax gives NaN.

    Example:
        >>> _ = torch.manual_seed(12345)
        >>> x = torch.rand(10)
        >>> x
        tensor([0.9817, 0.8796, 0.9921, 0.4611, 0.0832, 0.1784, 0.3674, 0.5676, 0.3376,
                0.2119])
        >>> fake_tensor_quant(x, x.abs().max())
        tensor([0.9843, 0.8828, 0.9921, 0.4609, 0.0859, 0.1797, 0.3672, 0.5703, 0.3359,
                0.2109])

    References:
        pytorch-quantization user guide, "Basic Functionalities"; arXiv 1308.3432.
    """
    wide, limit = _checked("fake_tensor_quant", inputs, amax, num_bits, unsigned)
    levels, scale = _levels(wide.detach(), limit.detach(), num_bits, unsigned, narrow_range)
    lowest = torch.zeros_like(limit) if unsigned else -limit
    return straight_through(levels / scale, wide.clamp(lowest, limit)).to(inputs.dtype)


def tensor_quant(
    inputs: Tensor,
    amax: Tensor | float,
    num_bits: int = 8,
    *,
    unsigned: bool = False,
    narrow_range: bool = True,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (integers, scale): the integer grid points of inputs, and the multiplier.

        scale = q_max / amax,     integers = clamp(round_half_even(inputs * scale), q_min, q_max)

    `q_max` is `2^(num_bits-1) - 1`, unsigned `2^num_bits - 1`; `q_min` is `-q_max`, or `-q_max - 1`
    with `narrow_range=False`, or 0 unsigned. Where amax <= 2^-24 the integers are 0 and the scale 1.
    Infinite inputs saturate, NaN stays NaN. float16 and bfloat16 are computed in float32.

    The derivative with respect to inputs is that of pytorch-quantization: 1 where `|inputs| <= amax`
    and 0 elsewhere (not multiplied by the scale); amax and scale carry none.

    Args:
        inputs: float16, bfloat16, float32 or float64, any shape.
        amax: the largest magnitude the grid reaches, in units of inputs; a number or a tensor that
            broadcasts to inputs (its shape decides between per tensor and per channel).
        num_bits: 2 to 24, width of the integers.
        unsigned: inputs are not negative, and one more bit holds the magnitude.
        narrow_range: leave out the lowest signed code, so that the grid is odd-symmetric.
        output_dtype: dtype of the integers; None for that of inputs.

    Returns:
        integers, inputs' shape; scale, amax's shape, float32 (float64 for float64 inputs).

    Raises:
        TypeError: inputs is not a floating-point tensor, amax not a number or tensor.
        ValueError: num_bits out of range, amax does not broadcast or is on another device;
            amax negative, or inputs negative with `unsigned` (both checked in eager code).

    Example:
        >>> _ = torch.manual_seed(12345)
        >>> x = torch.rand(10)
        >>> tensor_quant(x, x.abs().max())
        (tensor([126., 113., 127.,  59.,  11.,  23.,  47.,  73.,  43.,  27.]), tensor(128.0057))

    References:
        pytorch-quantization user guide, "Basic Functionalities"; arXiv 1308.3432.
    """
    wide, limit = _checked("tensor_quant", inputs, amax, num_bits, unsigned)
    if output_dtype is not None and not isinstance(output_dtype, torch.dtype):
        raise TypeError(
            f"tensor_quant: output_dtype must be a torch.dtype or None, got {output_dtype!r}."
        )
    limit = limit.detach()
    levels, scale = _levels(wide.detach(), limit, num_bits, unsigned, narrow_range)
    lowest = torch.zeros_like(limit) if unsigned else -limit
    dtype = inputs.dtype if output_dtype is None else output_dtype
    return straight_through(levels, wide.clamp(lowest, limit)).to(dtype), scale


@lifts_to_features
def fake_affine_tensor_quant(
    inputs: Tensor, min_range: Tensor | float, max_range: Tensor | float, num_bits: int = 8
) -> Tensor:
    """Returns inputs rounded to the asymmetric grid of `2^num_bits` levels over a range.

        step = (max_range - min_range) / (2^b - 1)
        zero = round_half_even(min_range / step) + 2^(b-1)
        q = clamp(round_half_even(inputs / step) - zero, -2^(b-1), 2^(b-1) - 1)
        result = (q + zero) * step

    0.0 is on the grid when the range holds it. The derivative with respect to inputs is 1 in
    `[min_range, max_range]` (edges included) and 0 outside, with respect to the ends of the range 1
    where inputs are clipped to them. An empty range (`min_range == max_range`) gives NaN.

    Args:
        inputs: floating point, any shape.
        min_range: lower end, a number or a tensor that broadcasts to inputs, in units of inputs.
        max_range: upper end, likewise.
        num_bits: 2 to 24.

    Raises:
        TypeError: inputs is not a floating-point tensor, an end not a number or tensor.
        ValueError: num_bits out of range, an end does not broadcast or is on another device;
            min_range > max_range (checked in eager code).

    Example:
        >>> fake_affine_tensor_quant(torch.tensor([-2.0, 0.0, 0.6, 9.0]), -1.0, 2.0, num_bits=2)
        tensor([-1.,  0.,  1.,  2.])

    References:
        pytorch-quantization, `tensor_quant.py`, class FakeAffineTensorQuantFunction.
    """
    function = "fake_affine_tensor_quant"
    require_floating(function, "inputs", inputs)
    _require_num_bits(function, num_bits)
    dtype = compute_dtype(inputs)
    low = as_broadcastable(function, "min_range", min_range, inputs, dtype)
    high = as_broadcastable(function, "max_range", max_range, inputs, dtype)
    if values_readable(low, high) and bool((low > high).any()):
        raise ValueError(
            f"{function}: min_range must not be above max_range, got {min_range} and {max_range}."
        )
    wide = inputs.to(dtype)
    step = divide((high - low).detach(), 2**num_bits - 1)
    q_min = -(2 ** (num_bits - 1))
    zero = (low.detach() / step).round() - q_min
    levels = ((wide.detach() / step).round() - zero).clamp(q_min, -q_min - 1)
    return straight_through((levels + zero) * step, wide.clamp(low, high)).to(inputs.dtype)


@lifts_to_features
def scaled_e4m3(inputs: Tensor, amax: Tensor | float | None = None) -> Tensor:
    """Returns inputs rounded to E4M3, scaled so that amax becomes 448.

        result = e4m3(inputs * (448 / amax)) / (448 / amax),   0 where |inputs| < 2^-24

    The derivative with respect to inputs is 1 where `|inputs| <= amax` (edges included), else 0; with
    respect to amax, the sign of the inputs that are clipped. An amax of 0 gives zeros.

    Args:
        inputs: floating point, any shape.
        amax: a number or a tensor that broadcasts to inputs; None for 448, a plain cast.

    Raises:
        TypeError: inputs is not a floating-point tensor, amax not a number or tensor.
        ValueError: amax does not broadcast or is on another device; negative (checked in eager code).

    Example:
        >>> scaled_e4m3(torch.tensor([1.8, -1.4]), 2.0)
        tensor([ 1.8571, -1.4286])

    References:
        pytorch-quantization, `tensor_quant.py`, class ScaledE4M3Function.
    """
    wide, limit = _checked("scaled_e4m3", inputs, E4M3.q_max if amax is None else amax, 8, False)
    fixed = limit.detach()
    vanishes = fixed <= SMALLEST_AMAX
    scale = divide(E4M3.q_max, torch.where(vanishes, 1.0, fixed))
    grid = E4M3.snap(wide.detach() * scale) / scale
    grid = torch.where((wide.abs() < SMALLEST_AMAX) | vanishes, 0.0, grid)
    return straight_through(grid, wide.clamp(-limit, limit)).to(inputs.dtype)


def _levels(
    inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
) -> tuple[Tensor, Tensor]:
    q_max = 2.0 ** (num_bits - 1 + unsigned) - 1.0
    q_min = 0.0 if unsigned else -q_max if narrow_range else -q_max - 1.0
    vanishes = amax <= SMALLEST_AMAX
    scale = divide(q_max, amax)
    levels = (inputs * torch.where(vanishes, 0.0, scale)).round().clamp(q_min, q_max)
    return levels, torch.where(vanishes, 1.0, scale)


def _checked(
    function: str, inputs: Tensor, amax: Tensor | float, num_bits: int, unsigned: bool
) -> tuple[Tensor, Tensor]:
    require_floating(function, "inputs", inputs)
    _require_num_bits(function, num_bits)
    dtype = compute_dtype(inputs)
    limit = as_broadcastable(function, "amax", amax, inputs, dtype)
    require_not_negative(function, "amax", limit)
    if unsigned and values_readable(inputs) and bool((inputs < 0).any()):
        raise ValueError(
            f"{function}: inputs must not be negative when unsigned=True, "
            f"got {inputs[inputs < 0].min().item()}."
        )
    return inputs.to(dtype), limit


def _require_num_bits(function: str, num_bits: int) -> None:
    integer = isinstance(num_bits, int) and not isinstance(num_bits, bool)
    if not integer or not 2 <= num_bits <= 24:
        raise ValueError(
            f"{function}: num_bits must be an integer from 2 to 24 (float32 holds no wider integer "
            f"exactly), got {num_bits!r}."
        )
