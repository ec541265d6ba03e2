"""A histogram of |x|, as the read-outs take it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Histogram(NamedTuple):
    """Counts of |x| in bins of one width from 0 up.

    Attributes:
        counts: int64, (*groups, bins).
        width: of a bin, in units of x, (*groups).
    """

    counts: Tensor
    width: Tensor


def require_histogram(function: str, histogram: object) -> None:
    """Raises unless this is a histogram: integer counts of one bin or more, a width for each group."""
    if not isinstance(histogram, Histogram):
        raise TypeError(
            f"{function}: histogram must be a Histogram, got {type(histogram).__name__}."
        )
    counts, width = histogram
    if counts.is_floating_point() or counts.is_complex():
        raise TypeError(f"{function}: counts must be integers, got {counts.dtype}.")
    if counts.ndim == 0 or counts.shape[-1] == 0 or counts.shape[:-1] != width.shape:
        raise ValueError(
            f"{function}: counts must have the shape of width, {tuple(width.shape)}, and an axis of "
            f"one bin or more, got {tuple(counts.shape)}."
        )


def middles_in_bins(histogram: Histogram) -> Tensor:
    """Returns the middle of each bin, in bins, float64."""
    bins = histogram.counts.shape[-1]
    return torch.arange(bins, dtype=torch.float64, device=histogram.counts.device) + 0.5


def per_group(histogram: Histogram, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Returns the function of (counts, width) for each group, in the shape and dtype of width."""
    counts = histogram.counts.reshape(-1, histogram.counts.shape[-1])
    widths = histogram.width.reshape(-1)
    amax = [function(counts[i], widths[i]) for i in range(len(counts))]
    if not amax:
        return histogram.width
    return torch.stack(amax).reshape(histogram.width.shape).to(histogram.width.dtype)
