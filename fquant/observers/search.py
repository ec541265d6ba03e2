"""Read-outs by search: the range of least divergence, or of least error, among the bins' edges."""

import torch
from torch import Tensor

from fquant.checks import require_int
from fquant.formats import Format, require_format
from fquant.observers.bins import Histogram, per_group, require_histogram
from fquant.spec import INT8


def entropy_amax(
    histogram: Histogram, spec: Format = INT8, *, stride: int = 1, start_bin: int = 128
) -> Tensor:
    """Returns the edge i at which clipping and coarsening the histogram diverge least from it.

    For each candidate i from start_bin on, the first i bins are the reference, with all counts
    beyond added to the last; the same bins spread over `2^(b-1)` coarse ones (`2^b` unsigned), each
    coarse count shared equally by its bins that are not empty, are the approximation. Of equal
    divergences the last wins, among candidates up to the last bin that is not empty. Bin 0 counts
    as bin 1 does, against a spike of zeros. Mass is balanced by construction: counts are int64.

    Args:
        histogram: of |x|.
        spec: the grid, of which the number of values that are not negative is used.
        stride: bins from one candidate to the next.
        start_bin: the first candidate.

    Raises:
        ValueError: start_bin or stride out of range.

    References:
        Migacz 2017, "8-bit inference with TensorRT"; pytorch-quantization, `calib/histogram.py`.
    """
    require_histogram("entropy_amax", histogram)
    require_format("entropy_amax", spec)
    require_search("entropy_amax", start_bin, stride)
    coarse = 1 << (spec.num_bits - 1 + int(getattr(spec, "unsigned", False)))
    bins = histogram.counts.shape[-1]
    candidates = torch.arange(min(start_bin, bins), bins + 1, stride)

    def index(counts: Tensor) -> Tensor:
        counts = torch.cat([counts[1:2], counts[1:]]).double()
        parts = [_divergences(counts, some, coarse) for some in candidates.split(256)]
        filled = torch.where(counts > 0, torch.arange(1, bins + 1), 0).amax()
        empty = candidates > filled.clamp(min=start_bin)  # nothing lies in a candidate's last bin
        return candidates[_last_argmin(torch.where(empty, torch.inf, torch.cat(parts)))]

    return per_group(histogram, lambda counts, width: index(counts) * width)


def mse_amax(
    histogram: Histogram,
    spec: Format = INT8,
    *,
    stride: int = 1,
    start_bin: int = 1,
    clip_weight: float = 1.0,
) -> Tensor:
    """Returns the bin edge that, as amax, gives the least squared error of quantization.

    The error is integrated exactly for values uniform within each bin, for any grid: integers of any
    width, floating point, a codebook; rounding to nearest. It is symmetric in the sign of x.

    Args:
        histogram: of |x|.
        spec: the grid.
        stride: bins from one candidate to the next.
        start_bin: the first candidate.
        clip_weight: how much the error of values beyond amax counts; 1 for the plain error.

    Raises:
        ValueError: start_bin or stride out of range.

    References:
        Uniform density in a bin: torch.ao's HistogramObserver ("L2").
    """
    require_histogram("mse_amax", histogram)
    require_format("mse_amax", spec)
    require_search("mse_amax", start_bin, stride)
    if not clip_weight >= 0:
        raise ValueError(f"mse_amax: clip_weight must not be negative, got {clip_weight}.")
    levels = spec.levels().to(histogram.counts.device)
    between = (levels[1:] + levels[:-1]) / 2
    starts = torch.cat([between.new_zeros(1), between])
    # Integral of (u - nearest(u))^2 from 0 to each cell's start.
    ends = torch.cat([between, between.new_zeros(1)])
    cells = ((ends - levels) ** 3 - (starts - levels) ** 3) / 3
    before = torch.cat([cells.new_zeros(1), cells[:-1].cumsum(0)])
    q_max = levels[-1]
    bins = histogram.counts.shape[-1]
    candidates = torch.arange(min(start_bin, bins), bins + 1, stride)
    edges = torch.arange(bins + 1, dtype=torch.float64)

    def errors(density: Tensor, some: Tensor) -> Tensor:
        step = some.double().unsqueeze(1) / q_max
        u = edges / step
        cell = torch.bucketize(u, between)
        value = levels[cell]
        integral = before[cell] + ((u - value) ** 3 - (starts[cell] - value) ** 3) / 3
        error = integral.diff(dim=1) * step**3
        clipped = edges[:-1] >= some.unsqueeze(1)
        return (torch.where(clipped, clip_weight, 1.0) * error * density).sum(1)

    def best(counts: Tensor, width: Tensor) -> Tensor:
        parts = [errors(counts.double(), some) for some in candidates.split(256)]
        return candidates[torch.cat(parts).argmin()] * width

    return per_group(histogram, best)


def sqnr_amax(
    histogram: Histogram,
    spec: Format = INT8,
    *,
    stride: int = 1,
    start_bin: int = 1,
    clip_weight: float = 3.0,
) -> Tensor:
    """Returns the amax of highest signal to noise ratio, where clipping counts `clip_weight` times.

    With a weight of 1 it is `mse_amax`: the signal's power does not depend on amax.

    References:
        AIMET, `SqnrEncodingAnalyzer`, whose gamma is 3.
    """
    return mse_amax(histogram, spec, stride=stride, start_bin=start_bin, clip_weight=clip_weight)


def require_search(owner: str, start_bin: int | None, stride: int) -> None:
    """Raises ValueError unless the first candidate and the stride are usable."""
    require_int(owner, "stride", stride, 1, None)
    if start_bin is not None:
        require_int(owner, "start_bin", start_bin, 1, None)


def _divergences(counts: Tensor, candidates: Tensor, coarse: int) -> Tensor:
    """KL divergence of each candidate's reference from its approximation; infinite where undefined."""
    bins = torch.arange(len(counts))
    inside = bins < candidates.unsqueeze(1)
    filled = inside & (counts > 0)
    cell = (bins * coarse // candidates.unsqueeze(1)).clamp(max=coarse - 1)
    zeros = counts.new_zeros(len(candidates), coarse)
    kept = torch.where(filled, counts, 0.0)
    sums = zeros.scatter_add(1, cell, kept)
    sizes = zeros.scatter_add(1, cell, filled.double())
    shared = torch.where(filled, (sums / sizes.clamp(min=1.0)).gather(1, cell), 0.0)
    last = bins == candidates.unsqueeze(1) - 1
    beyond = torch.where(inside, 0.0, counts).sum(1, keepdim=True)
    reference = torch.where(inside, counts, 0.0) + torch.where(last, beyond, 0.0)
    p = reference / reference.sum(1, keepdim=True).clamp(min=1.0)
    q = shared / shared.sum(1, keepdim=True).clamp(min=1.0)
    terms = torch.where(p > 0, p * (p / q).log(), 0.0)
    return terms.nan_to_num(torch.inf, torch.inf).sum(1)


def _last_argmin(values: Tensor) -> Tensor:
    return len(values) - 1 - values.flip(0).argmin()
