"""Scale rules: how amax becomes a step, by name. Every rule works for every format.

real                amax / q_max
bfloat16            bfloat16(amax) / q_max         adaptive block floating point
power_of_two        2^ceil(log2(amax / q_max))     nothing is clipped
power_of_two_floor  2^(floor(log2 amax) - floor(log2 q_max))   OCP MX; clips up to a binade
two_level           e4m3(amax / q_max / t) * t,  t = max amax / (448 q_max)     NVFP4
"""

import torch
from torch import Tensor

from fquant.binades import exponent_of, power_of_two
from fquant.checks import divide

RULES = ("real", "bfloat16", "power_of_two", "power_of_two_floor", "two_level")

# E8M0, a scale of 8 exponent bits, holds 2^-127 to 2^127 and NaN (OCP MX v1.0, section 5.4.1).
SCALE_BITS = 8


def require_scale_rule(owner: str, rule: str) -> None:
    """Raises ValueError, listing the rules, unless `rule` is one of them."""
    if rule not in RULES:
        raise ValueError(f"{owner}: scale_rule must be one of {list(RULES)}, got {rule!r}.")


def step_of(amax: Tensor, q_max: float, rule: str, scale_bits: int = SCALE_BITS) -> Tensor:
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


def two_level_scales(amax: Tensor, q_max: float = 6.0) -> tuple[Tensor, Tensor]:
    """Returns (block scales on the E4M3 grid, tensor scale): NVFP4's two levels.

        tensor_scale = max(amax) / (448 q_max),   block_scale = e4m3(amax / q_max / tensor_scale)

    Args:
        amax: per block, not negative.
        q_max: largest value of the element format, 6 for E2M1.

    Returns:
        block_scale of amax's shape, values of E4M3 (not below its smallest, 2^-9, so that no block
        that holds something vanishes), tensor_scale 0-d; float32 (float64 for float64).

    Example:
        >>> block, tensor = two_level_scales(torch.tensor([1.0, 2688.0]))
        >>> block.tolist(), tensor.item()
        ([0.171875, 448.0], 1.0)

    References:
        NVIDIA, "Pretraining large language models with NVFP4", 2025, arXiv 2509.25149, appendix.
    """
    from fquant.formats import E4M3  # formats import this module for its list of rules

    amax = amax.detach()
    tensor_scale = divide(amax.max(), E4M3.q_max * q_max)
    tensor_scale = torch.where(
        tensor_scale < torch.finfo(amax.dtype).tiny, torch.ones_like(tensor_scale), tensor_scale
    )
    blocks = E4M3.snap(divide(amax, q_max) / tensor_scale)
    smallest = 2.0 ** (E4M3.lowest_exponent - E4M3.man)
    return torch.where(amax > 0, blocks.clamp(min=smallest), 1.0), tensor_scale


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """`2^exponent` for -127 to 127; 2^-127 is subnormal in float32."""
    normal = power_of_two(exponent.clamp(-126, 127), dtype)
    return torch.where(exponent <= -127, 2.0**-127, normal)
