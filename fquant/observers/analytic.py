"""Analytic clipping for integers (ACIQ, OCTAV): where clipping and rounding noise balance.

minimise over alpha   E[(|x| - alpha)^2 1{|x| > alpha}] + alpha^2 / (3 * 4^bits)
"""

import math

from torch import Tensor

from fquant.checks import require_int
from fquant.formats import Format
from fquant.observers.bins import Histogram, middles_in_bins, require_histogram
from fquant.spec import INT8, QuantSpec

DISTRIBUTIONS = ("gauss", "laplace")


def aciq_multiplier(num_bits: int, distribution: str = "gauss") -> float:
    """Returns the best clipping value in units of the data's spread.

    Of the standard deviation for "gauss", of the mean absolute value for "laplace"; both of mean 0.
    Data of one sign (after a ReLU) on an unsigned grid: take one bit more.

    Args:
        num_bits: 0 to 17, the signed grid's width.
        distribution: "gauss" or "laplace".

    Raises:
        ValueError: another distribution, or num_bits out of range.

    Example:
        >>> round(aciq_multiplier(4), 4), round(aciq_multiplier(4, "laplace"), 4)
        (2.5591, 5.0286)

    References:
        Banner, Nahshan, Hoffer, Soudry 2019, arXiv 1810.05723, section 3.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"aciq_multiplier: distribution must be one of {list(DISTRIBUTIONS)}, "
            f"got {distribution!r}."
        )
    require_int("aciq_multiplier", "num_bits", num_bits, 0, 17)
    rounding = 1 / (3 * 4.0**num_bits)

    def slope(alpha: float) -> float:
        """Half the derivative of the error with respect to alpha; grows with alpha."""
        if distribution == "laplace":
            return rounding * alpha - math.exp(-alpha)
        density = math.sqrt(2 / math.pi) * math.exp(-(alpha**2) / 2)
        return rounding * alpha - (density - alpha * math.erfc(alpha / math.sqrt(2)))

    low, high = 0.0, 40.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return high


def gaussian_std_from_range(minimum: float, maximum: float, num_values: int) -> float:
    """Returns ACIQ's estimate of the standard deviation of Gaussian data from its range alone.

        (maximum - minimum) * 0.175 * (1 + sqrt(pi ln 4)) / sqrt(2 ln num_values)

    Raises:
        ValueError: fewer than 2 values, or maximum below minimum.

    References:
        The code that accompanies arXiv 1810.05723.
    """
    if num_values < 2:
        raise ValueError(
            f"gaussian_std_from_range: num_values must be at least 2, got {num_values}."
        )
    if not minimum <= maximum:
        raise ValueError(
            f"gaussian_std_from_range: maximum must not be below minimum, got {minimum} and {maximum}."
        )
    constant = 0.5 * 0.35 * (1 + math.sqrt(math.pi * math.log(4)))
    return (maximum - minimum) * constant / math.sqrt(2 * math.log(num_values))


def aciq_amax(histogram: Histogram, spec: Format = INT8, distribution: str = "gauss") -> Tensor:
    """Returns the analytically best clipping value for zero-mean Gaussian or Laplace data.

    `aciq_multiplier(bits, distribution)` times the standard deviation ("gauss") or the mean absolute
    value ("laplace") of the histogram; an unsigned grid has one bit more.

    Raises:
        ValueError: another distribution; a grid that is not of integers.
    """
    require_histogram("aciq_amax", histogram)
    bits = _integer_bits("aciq_amax", spec)
    counts, middles = histogram.counts.double(), middles_in_bins(histogram)
    total = counts.sum(-1).clamp(min=1.0)
    if distribution == "gauss":
        spread = ((middles**2 + 1 / 12) * counts).sum(-1).div(total).sqrt()
    else:
        spread = (middles * counts).sum(-1) / total
    return (aciq_multiplier(bits, distribution) * spread * histogram.width).to(
        histogram.width.dtype
    )


def octav_amax(histogram: Histogram, spec: Format = INT8, *, iterations: int = 40) -> Tensor:
    """Returns OCTAV's fixed point: Newton's method on clipping plus rounding error.

        s <- E[|x| 1{|x| > s}] / (4^-b / 3 P(|x| <= s) + P(|x| > s))

    from `s = E|x|`; values are uniform within their bin, the one that holds s is split. An unsigned
    grid has one bit more.

    Raises:
        ValueError: a grid that is not of integers.

    References:
        Sakr et al. 2022, arXiv 2206.06501, equation 6.
    """
    require_histogram("octav_amax", histogram)
    require_int("octav_amax", "iterations", iterations, 1, None)
    noise = 4.0 ** -_integer_bits("octav_amax", spec) / 3
    counts, middles = histogram.counts.double(), middles_in_bins(histogram)
    left = middles - 0.5
    total = counts.sum(-1).clamp(min=1.0)
    s = ((middles * counts).sum(-1) / total).unsqueeze(-1)
    for _ in range(iterations):
        cut = s.clamp(left, left + 1)  # where the clipped part of each bin begins
        share = left + 1 - cut
        beyond = (counts * share).sum(-1)
        excess = (counts * share * (left + 1 + cut) / 2).sum(-1)
        inside = total - beyond
        s = (excess / (noise * inside + beyond)).unsqueeze(-1)
    return (s.squeeze(-1) * histogram.width).to(histogram.width.dtype)


def _integer_bits(function: str, spec: Format) -> int:
    if not isinstance(spec, QuantSpec):
        raise ValueError(f"{function}: spec must be a QuantSpec, got {spec}.")
    return spec.num_bits + spec.unsigned
