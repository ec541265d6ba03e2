"""The CPU path of histograms, compiled: parallel over rows and parts of rows."""

import torch
from torch import Tensor

from fquant_kernels import native


def abs_histogram(x: Tensor, bins_per_unit: Tensor, num_bins: int) -> Tensor:
    """Returns the counts of `reference.abs_histogram`, on any thread count."""
    x = x.to(bins_per_unit.dtype).contiguous()
    bins_per_unit = bins_per_unit.contiguous()
    counts = torch.empty((x.shape[0], num_bins), dtype=torch.int64)
    status = native.library().fquant_abs_histogram(
        x.dtype == torch.float64,
        x.data_ptr(),
        *x.shape,
        bins_per_unit.data_ptr(),
        num_bins,
        counts.data_ptr(),
        native.num_threads(),
    )
    native.raise_for(status, "fquant::abs_histogram")
    return counts
