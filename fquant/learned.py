"""Learned ranges: LSQ, LSQ+ and PACT, as functions of tensors that any optimizer can train."""

import math

import torch
from torch import Tensor

from fquant.checks import (
    as_broadcastable,
    compute_dtype,
    divide,
    require_floating,
    require_positive,
    values_readable,
)
from fquant.granularity import spread
from fquant.records import lifts_to_features
from fquant.spec import INT8, QuantSpec
from fquant.straight_through import straight_through


@lifts_to_features
def fake_quantize_lsq(
    x: Tensor,
    scale: Tensor | float,
    offset: Tensor | float = 0.0,
    spec: QuantSpec = INT8,
    *,
    gradient_scale: float | None = None,
) -> Tensor:
    """Returns `fake_quantize(x - offset, scale) + offset` with LSQ's derivatives of the step.

        y = round(clip((x - offset) / scale, q_min, q_max)) * scale + offset

    With respect to x: 1 inside the range, 0 outside. To scale: `round(v) - v` inside, where
    `v = (x - offset) / scale`, and `q_min` or `q_max` outside, times gradient_scale. To offset (LSQ+): 0
    inside and 1 outside, times gradient_scale. Both ends count as inside.

    Args:
        x: floating point, any shape.
        scale: the step, positive; a number or a tensor that meets x (`fquant.granularity`).
        offset: the real value that the integer 0 stands for; 0 is LSQ, trained it is LSQ+.
        spec: the grid; half-even rounding.
        gradient_scale: None for LSQ's `1 / sqrt(n q_max)` with n elements of x per scale; 1.0 for the
            plain derivative.

    Raises:
        TypeError: x is not a floating-point tensor, scale or offset not a number or tensor, spec not a
            QuantSpec.
        ValueError: scale or offset does not meet x or is on another device; another rounding; scale is
            not positive (checked in eager code).

    Example:
        >>> scale = torch.tensor(0.5)
        >>> x = torch.tensor([0.6, 100.0])
        >>> def loss(scale):
        ...     return fake_quantize_lsq(x, scale, gradient_scale=1.0).sum()
        >>> torch.func.grad(loss)(scale)           # round(1.2) - 1.2, and q_max = 127
        tensor(126.8000)

    References:
        Esser et al. 2020, arXiv 1902.08153, equations 1 to 3; Bhalgat et al. 2020, arXiv 2004.09576.
    """
    function = "fake_quantize_lsq"
    require_floating(function, "x", x)
    _require_integers(function, spec)
    if spec.rounding != "half_even":
        raise ValueError(f"{function}: spec must round half to even, got {spec.rounding!r}.")
    dtype = compute_dtype(x)
    step = as_broadcastable(function, "scale", scale, x, dtype)
    require_positive(function, "scale", step)
    shift = as_broadcastable(function, "offset", offset, x, dtype)
    if gradient_scale is None:
        per_scale = max(x.numel(), 1) / max(step.numel(), 1)
        gradient_scale = 1 / math.sqrt(per_scale * spec.q_max)
    wide = x.to(dtype)
    fixed, still = spread(step.detach(), x.shape), spread(shift.detach(), x.shape)
    v = (wide.detach() - still) / fixed
    levels = spec.snap(v)
    inside = (v >= spec.q_min) & (v <= spec.q_max)
    # The first derivatives of the docstring, exactly; the second ones are zero.
    slope = torch.where(inside, levels - v, levels)
    surrogate = (
        torch.where(inside, wide, torch.zeros_like(wide))
        + slope * spread(_difference(step * gradient_scale), x.shape)
        + (~inside).to(dtype) * spread(_difference(shift * gradient_scale), x.shape)
    )
    return straight_through(levels * fixed + still, surrogate).to(x.dtype)


def lsq_scale(x: Tensor, spec: QuantSpec = INT8) -> Tensor:
    """Returns LSQ's initial step, `2 mean|x| / sqrt(q_max)`, per tensor; all zeros give 1.

    Example:
        >>> lsq_scale(torch.tensor([1.0, -1.0]), QuantSpec(3))
        tensor(1.1547)

    References:
        Esser et al. 2020, arXiv 1902.08153, section 2.1.
    """
    require_floating("lsq_scale", "x", x)
    _require_integers("lsq_scale", spec)
    wide = x.detach().to(compute_dtype(x))
    mean = wide.abs().mean() if x.numel() else wide.new_zeros(())
    scale = divide(2 * mean, math.sqrt(spec.q_max))
    return torch.where(scale > 0, scale, 1.0)


def lsq_plus_scale(x: Tensor, spec: QuantSpec = INT8) -> Tensor:
    """Returns LSQ+'s initial step for weights, `max(|m - 3 s|, |m + 3 s|) / 2^(b-1)`.

    m and s are the mean and the standard deviation of x; all zeros give 1.

    References:
        Bhalgat et al. 2020, arXiv 2004.09576, section 3.2.
    """
    require_floating("lsq_plus_scale", "x", x)
    _require_integers("lsq_plus_scale", spec)
    wide = x.detach().to(compute_dtype(x))
    if x.numel() == 0:
        return wide.new_ones(())
    mean, deviation = wide.mean(), wide.std(correction=0)
    reach = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
    scale = divide(reach, 2.0 ** (spec.num_bits - 1))
    return torch.where(scale > 0, scale, 1.0)


def learned_clip(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Returns x clipped to [low, high], with gradients for the ends that include the edges.

    With respect to x: 1 strictly inside. To low: 1 where `x <= low`; to high: 1 where `x >= high`.

    Args:
        x: floating point, any shape.
        low: a number or a tensor that broadcasts to x; per channel too.
        high: likewise, not below low.

    Raises:
        TypeError: x is not a floating-point tensor, an end not a number or tensor.
        ValueError: an end does not broadcast or is on another device; high is below low (checked in
            eager code).

    Example:
        >>> x = torch.tensor([-3.0, 0.5, 2.0, 7.0])
        >>> torch.func.grad(lambda high: learned_clip(x, 0.0, high).sum())(torch.tensor(2.0))
        tensor(2.)

    References:
        pytorch-quantization, `nn/functional.py`, ClipFunction; PACT, arXiv 1805.06085.
    """
    require_floating("learned_clip", "x", x)
    bottom = spread(as_broadcastable("learned_clip", "low", low, x, x.dtype), x.shape)
    top = spread(as_broadcastable("learned_clip", "high", high, x, x.dtype), x.shape)
    if values_readable(bottom, top) and bool((bottom > top).any()):
        raise ValueError(
            f"learned_clip: high must not be below low, got {top.min().item()} and "
            f"{bottom.max().item()}."
        )
    return torch.where(x <= bottom, bottom, torch.where(x >= top, top, x))


@lifts_to_features
def fake_quantize_pact(x: Tensor, alpha: Tensor | float, num_bits: int = 8) -> Tensor:
    """Returns x clipped to [0, alpha] and rounded to `2^b - 1` steps of `alpha / (2^b - 1)`.

    The derivatives are those of `learned_clip`: with respect to x, 1 strictly inside (0, alpha); to
    alpha, 1 where `x >= alpha`.

    Args:
        x: floating point, any shape.
        alpha: the learned end, positive; broadcasts to x.
        num_bits: 2 to 16.

    Raises:
        TypeError, ValueError: as in `learned_clip`; num_bits out of range; alpha is not positive
            (checked in eager code).

    Example:
        >>> fake_quantize_pact(torch.tensor([-1.0, 0.6, 9.0]), 3.0, 2)
        tensor([0., 1., 3.])

    References:
        Choi et al. 2018, arXiv 1805.06085.
    """
    require_floating("fake_quantize_pact", "x", x)
    spec = QuantSpec(num_bits, unsigned=True)
    dtype = compute_dtype(x)
    end = as_broadcastable("fake_quantize_pact", "alpha", alpha, x, dtype)
    require_positive("fake_quantize_pact", "alpha", end)
    wide = x.to(dtype)
    clipped = learned_clip(wide, 0.0, end)
    step = spread(divide(end.detach(), spec.q_max), x.shape)
    grid = spec.snap(wide.detach() / step) * step
    return straight_through(grid, clipped).to(x.dtype)


def _require_integers(function: str, spec: object) -> None:
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"{function}: spec must be a QuantSpec, got {spec!r}.")


def _difference(x: Tensor) -> Tensor:
    """Zero, with the derivative of x."""
    return x - x.detach()
