"""Analytic clipping for integers (ACIQ): where clipping and rounding noise balance.

minimise over alpha   E[(|x| - alpha)^2 1{|x| > alpha}] + alpha^2 / (3 * 4^bits)
"""

import math

DISTRIBUTIONS = ("gauss", "laplace")


def aciq_multiplier(num_bits: int, distribution: str = "gauss") -> float:
    """Returns the best clipping value in units of the data's spread.

    Of the standard deviation for "gauss", of the mean absolute value for "laplace"; both of mean 0.
    Data of one sign (after a ReLU) on an unsigned grid: take one bit more.

    Args:
        num_bits: 1 to 16, the signed grid's width.
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
    if not 0 <= num_bits <= 17:
        raise ValueError(f"aciq_multiplier: num_bits must be from 0 to 17, got {num_bits}.")
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
        ValueError: fewer than 2 values.

    References:
        The code that accompanies arXiv 1810.05723.
    """
    if num_values < 2:
        raise ValueError(
            f"gaussian_std_from_range: num_values must be at least 2, got {num_values}."
        )
    constant = 0.5 * 0.35 * (1 + math.sqrt(math.pi * math.log(4)))
    return (maximum - minimum) * constant / math.sqrt(2 * math.log(num_values))
