"""From ranges to scales: the largest magnitude of each group, and the step that reaches it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fquant.binades import exponent_of, power_of_two
from fquant.checks import (
    compute_dtype,
    divide,
    require_floating,
    require_int,
    require_not_negative,
    values_readable,
)
from fquant.formats import Format, require_format
from fquant.granularity import groups
from fquant.presets import E4M3
from fquant.spec import INT8, QuantSpec

# E8M0, a scale of 8 exponent bits, holds 2^-127 to 2^127 and NaN (OCP MX v1.0, section 5.4.1).
SCALE_BITS = 8

BOUNDS = {"q_max": 0.0, "edge": 0.5, "full": 1.0}


def compute_amax(
    x: Tensor,
    axis: int | Sequence[int] | None = None,
    block: int | Sequence[int] | None = None,
) -> Tensor:
    """Returns the largest absolute value of x, per group; no gradient flows through it.

    Args:
        x: any shape; an empty group has amax 0; NaN gives NaN.
        axis: the axis or axes that are KEPT (`torch.amax(dim=)` names those removed); None for one
            value per tensor.
        block: how many neighbours along a kept axis share a value, one number or one per kept
            axis; None for 1. `axis=(0, 1), block=(1, 32)`: groups of 32 along axis 1.

    Returns:
        amax in units of x: 0-d for `axis=None`, otherwise of x's rank with size 1 where reduced, so
        that it broadcasts against x (blocks: see `fquant.granularity`).

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: an axis is out of range or named twice; a block does not divide its axis.

    Example:
        >>> compute_amax(torch.tensor([[1.0, -3.0], [0.5, 2.0]]), axis=0)
        tensor([[3.],
                [2.]])
        >>> compute_amax(torch.tensor([1.0, -3.0, 0.5, 2.0]), axis=0, block=2)
        tensor([3., 2.])
    """
    require_floating("compute_amax", "x", x)
    x = x.detach()
    if axis is None:
        if block is not None:
            raise ValueError(f"compute_amax: block must be None without an axis, got {block}.")
        return _larger(*torch.aminmax(x)) if x.numel() > 0 else x.new_zeros(())
    parts = groups("compute_amax", x, axis, block)
    if x.numel() == 0:
        return x.new_zeros(parts.shape)
    if not parts.reduced:
        return x.abs()
    # Without |x|, memory of x's size: 1e7 values by rows take 6 ms for 38. In half types, where torch's
    # reductions are slower, two of them would cost more.
    if x.element_size() < 4:
        amax = parts.x.abs().amax(dim=parts.reduced)
    else:
        amax = _larger(parts.x.amin(dim=parts.reduced), parts.x.amax(dim=parts.reduced))
    return amax.reshape(parts.shape)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    """The larger magnitude; NaN if either is."""
    return torch.maximum(a.abs(), b.abs())


def compute_scale(
    amax: Tensor, spec: Format = INT8, bound: str = "q_max", scale_bits: int = SCALE_BITS
) -> Tensor:
    """Returns the step of a symmetric grid that reaches amax: `amax / q_max`, by `spec.scale_rule`.

    amax = 0, and any amax whose step would be denormal, gives scale 1: an all-zero group becomes
    exact zeros. float32, or float64 for a float64 amax; the shape of amax.

    Args:
        amax: largest magnitude per group, not negative; NaN gives a NaN step.
        spec: the grid.
        bound: what amax maps to on an integer grid: "q_max"; "edge", `q_max + 1/2`, the end of the
            last integer's cell; or "full", `q_max + 1`. The last two clip up to a step.
        scale_bits: exponent bits of the scale under the power-of-two rules, 2 to 8.

    Raises:
        TypeError: amax is not a floating-point tensor, or spec not a Format.
        ValueError: scale_bits out of range; amax is negative (checked in eager code); an unknown bound,
            or one other than "q_max" for a grid that is not of integers.

    Example:
        >>> compute_scale(torch.tensor([127.0, 0.0]))
        tensor([1., 1.])
    """
    require_floating("compute_scale", "amax", amax)
    require_not_negative("compute_scale", "amax", amax)
    require_format("compute_scale", spec)
    require_int("compute_scale", "scale_bits", scale_bits, 2, SCALE_BITS)
    if bound not in BOUNDS or (bound != "q_max" and not isinstance(spec, QuantSpec)):
        raise ValueError(
            f"compute_scale: bound must be one of {list(BOUNDS)}, and 'q_max' for a grid that is not "
            f"of integers, got {bound!r}."
        )
    wide = amax.to(compute_dtype(amax))
    step = _step(wide, spec.q_max + BOUNDS[bound], spec.scale_rule, scale_bits)
    return _usable(step, spec.scale_rule)


def compute_scale_zero_point(
    minimum: Tensor, maximum: Tensor, spec: QuantSpec = INT8
) -> tuple[Tensor, Tensor]:
    """Returns (scale, zero_point) of an asymmetric grid over [minimum, maximum].

        scale = (max(maximum, 0) - min(minimum, 0)) / (q_max - q_min)
        zero_point = saturate(round_half_even(q_min - min(minimum, 0) / scale))

    The range is widened to hold 0, so that 0.0 is on the grid exactly. An empty range gives scale 1, a
    NaN end a NaN scale.

    Returns:
        scale float32 (float64 for float64), zero_point of dtype int32, both of the shape of minimum.

    Raises:
        TypeError: an end is not a floating-point tensor, or spec not a QuantSpec.
        ValueError: shapes differ, or minimum > maximum (checked in eager code).

    Example:
        >>> compute_scale_zero_point(torch.tensor(-1.0), torch.tensor(1.55))
        (tensor(0.0100), tensor(-28, dtype=torch.int32))

    References:
        ONNX operator DynamicQuantizeLinear.
    """
    require_floating("compute_scale_zero_point", "minimum", minimum)
    require_floating("compute_scale_zero_point", "maximum", maximum)
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"compute_scale_zero_point: spec must be a QuantSpec, got {spec!r}.")
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
    zero_point = (spec.q_min - low / scale).nan_to_num(0.0).round()
    zero_point = zero_point.clamp(spec.q_min, spec.q_max)
    return scale, zero_point.to(torch.int32)


def two_level_scales(amax: Tensor, q_max: float = 6.0) -> tuple[Tensor, Tensor]:
    """Returns (block scales on the E4M3 grid, tensor scale): NVFP4's two levels.

        tensor_scale = max(amax) / (448 q_max),   block_scale = e4m3(amax / q_max / tensor_scale)

    Args:
        amax: per block, not negative. None at all give tensor scale 1; a NaN makes it NaN.
        q_max: largest value of the element format, 6 for E2M1.

    Returns:
        block_scale of amax's shape, values of E4M3 (not below its smallest, 2^-9, so that no block
        that holds something vanishes), tensor_scale 0-d; float32 (float64 for float64).

    Raises:
        TypeError: amax is not a floating-point tensor.
        ValueError: q_max is not positive; amax is negative (checked in eager code).

    Example:
        >>> block, tensor = two_level_scales(torch.tensor([1.0, 2688.0]))
        >>> block.tolist(), tensor.item()
        ([0.171875, 448.0], 1.0)

    References:
        NVIDIA, "Pretraining large language models with NVFP4", 2025, arXiv 2509.25149, appendix.
    """
    require_floating("two_level_scales", "amax", amax)
    require_not_negative("two_level_scales", "amax", amax)
    if not q_max > 0:
        raise ValueError(f"two_level_scales: q_max must be positive, got {q_max}.")
    amax = amax.detach().to(compute_dtype(amax))
    if amax.numel() == 0:
        return amax.clone(), amax.new_ones(())
    tensor_scale = divide(amax.max(), E4M3.q_max * q_max)
    tensor_scale = torch.where(
        tensor_scale < torch.finfo(amax.dtype).tiny, torch.ones_like(tensor_scale), tensor_scale
    )
    blocks = E4M3.snap(divide(amax, q_max) / tensor_scale)
    smallest = 2.0 ** (E4M3.lowest_exponent - E4M3.man)
    return torch.where(amax > 0, blocks.clamp(min=smallest), 1.0), tensor_scale


def _step(amax: Tensor, q_max: float, rule: str, scale_bits: int = SCALE_BITS) -> Tensor:
    """Returns the step for each amax, before zeros and denormals are replaced by 1.

    The rules with rounded scales carry no derivative. Under the power-of-two rules, an amax that is
    not finite, or beyond what `scale_bits` exponent bits hold, gives a NaN step, which makes its whole
    group NaN (OCP MX); one below gives the lowest power.
    """
    if rule == "real":
        return divide(amax, q_max)
    amax = amax.detach()
    if rule == "bfloat16":
        return divide(amax.to(torch.bfloat16).to(amax.dtype), q_max)
    if rule == "two_level":
        block_scale, tensor_scale = two_level_scales(amax, q_max)
        return block_scale * tensor_scale
    limit = 2 ** (scale_bits - 1) - 1
    exponent = exponent_of(amax) - exponent_of(torch.full_like(amax, q_max))
    if rule == "power_of_two":
        # 2^k q_max >= amax for the smallest such k, which is this one or the next.
        exponent = exponent + (_power_of_two(exponent, amax.dtype) * q_max < amax).int()
    step = _power_of_two(exponent.clamp(-limit, limit), amax.dtype)
    step = torch.where(amax > 0, step, 0.0)
    return torch.where(amax.isfinite() & (exponent <= limit), step, torch.nan)


def _usable(scale: Tensor, rule: str = "real") -> Tensor:
    # Powers of two stay exact down to 2^-127, the lowest that E8M0 holds.
    tiny = 2.0**-127 if rule.startswith("power_of_two") else torch.finfo(scale.dtype).tiny
    return torch.where(scale < tiny, 1.0, scale)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """`2^exponent` for -127 to 127; 2^-127 is subnormal in float32."""
    normal = power_of_two(exponent.clamp(-126, 127), dtype)
    return torch.where(exponent <= -127, 2.0**-127, normal)
