"""Powers of two, exactly: read from and written to the exponent bits.

`exp2`, `pow` and `ldexp` are a unit in the last place off in some vectorized and compiled forms.
"""

import torch
from torch import Tensor


def binade(x: Tensor) -> Tensor:
    """Returns `2^floor(log2 |x|)` of float32 or float64; 0 for 0 and subnormals, NaN gives infinity.

    Example:
        >>> binade(torch.tensor([1.0, -6.5, 0.3]))
        tensor([1.0000, 4.0000, 0.2500])
    """
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def exponent_of(x: Tensor) -> Tensor:
    """Returns `floor(log2 |x|)` as int32, for normal float32 or float64; lower for 0, higher for NaN.

    Example:
        >>> exponent_of(torch.tensor([1.0, -6.5, 0.3]))
        tensor([ 0,  2, -2], dtype=torch.int32)
    """
    if x.dtype == torch.float64:
        return ((x.view(torch.int64) >> 52) & 0x7FF).to(torch.int32) - 1023
    return ((x.view(torch.int32) >> 23) & 0xFF) - 127


def power_of_two(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns `2^exponent` for integers that give normal numbers of float32 or float64.

    Example:
        >>> power_of_two(torch.tensor([3, -1]))
        tensor([8.0000, 0.5000])
    """
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
