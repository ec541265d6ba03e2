"""The op `fquant::abs_histogram`: argument checks, fake impl, registration."""

import torch
from torch import Tensor

from fquant_kernels import native
from fquant_kernels.abs_histogram import cpu, reference
from fquant_kernels.checks import require_tensor
from fquant_kernels.library import define_inference_op
from fquant_kernels.registry import offer

_NAME = "fquant::abs_histogram"
MAX_BINS = 2**24  # float32 counts no further


def check_args(x: Tensor, bins_per_unit: Tensor, num_bins: int) -> None:
    """Checks dtypes, shapes, devices and num_bins; reads no values."""
    if not x.is_floating_point():
        raise TypeError(f"{_NAME}: x must be floating point, got {x.dtype}.")
    require_tensor(_NAME, "x", x, x.dtype, ("R", "N"), x)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    require_tensor(_NAME, "bins_per_unit", bins_per_unit, dtype, (x.shape[0],), x)
    if not 1 <= num_bins <= MAX_BINS:
        raise ValueError(f"{_NAME}: num_bins must be from 1 to {MAX_BINS}, got {num_bins}.")


def fake(x: Tensor, bins_per_unit: Tensor, num_bins: int) -> Tensor:
    """Returns an empty result."""
    return x.new_empty((x.shape[0], num_bins), dtype=torch.int64)


_op = define_inference_op(
    "abs_histogram(Tensor x, Tensor bins_per_unit, int num_bins) -> Tensor",
    check_args,
    reference.abs_histogram,
    fake,
    instead="Detach x: counts have no derivative.",
)
offer(_op, "cpu", "cpp", check_args, cpu.abs_histogram, native.why_unavailable)


def abs_histogram(x: Tensor, bins_per_unit: Tensor, num_bins: int) -> Tensor:
    """Returns how many values of each row are in each bin.

    Bin i of row r counts the values with `i <= |x bins_per_unit[r]| < i + 1`, the product rounded
    once. What is in none of the bins, NaN and infinities among it, is not counted.

    Args:
        x: `(R, N)` floating point; half types are widened to float32.
        bins_per_unit: `(R,)` float32, or float64 for a float64 x. A power of two, so that its product
            with x is normal or 0, makes all bins exact.
        num_bins: from 1 to 2^24.

    Returns:
        `(R, num_bins)` int64.

    Example:
        >>> abs_histogram(torch.tensor([[0.1, -1.0, 3.9, 4.0]]), torch.tensor([1.0]), 4).tolist()
        [[1, 1, 0, 1]]
    """
    result: Tensor = _op(x, bins_per_unit, num_bins)
    return result
