"""The definition of histograms of |x|, for any device."""

import torch
from torch import Tensor

# Values counted at a time, whose temporary tensors stay in the cache: fastest of 2^14 to 2^20.
PART = 2**16


def abs_histogram(x: Tensor, bins_per_unit: Tensor, num_bins: int) -> Tensor:
    """Returns how many values of each row are in each bin; see `op.abs_histogram`."""
    rows = torch.arange(len(x), device=x.device).unsqueeze(1)
    counts = torch.zeros(len(x) * (num_bins + 1), dtype=torch.int64, device=x.device)
    for part in x.split(max(PART, 4 * len(counts)) // max(len(x), 1), dim=1):
        position = (part.to(bins_per_unit.dtype) * bins_per_unit.unsqueeze(1)).abs()
        # What is in no bin, NaN too, goes to one more, which is dropped.
        bins = torch.where(position < num_bins, position, num_bins).long()
        counts += (rows * (num_bins + 1) + bins).flatten().bincount(minlength=len(counts))
    return counts.reshape(len(x), num_bins + 1)[:, :num_bins].contiguous()
