"""Reading amax out of a histogram of |x|: pure functions, which never change what was collected.

percentile_amax     the value that a percentage of the data does not exceed
entropy_amax        least Kullback-Leibler divergence (TensorRT's search)
mse_amax            least squared error of quantization (also called L2)
sqnr_amax           the same with clipping weighted more (AIMET's search)
aciq_amax           closed form for Gaussian and Laplace data
octav_amax          Newton's fixed point on the data
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fquant.formats import Format
from fquant.observers.analytic import aciq_multiplier
from fquant.spec import INT8, QuantSpec


class Histogram(NamedTuple):
    """Counts of |x| in bins of one width from 0 up.

    Attributes:
        counts: int64, (*groups, bins).
        width: of a bin, in units of x, (*groups).
    """

    counts: Tensor
    width: Tensor


METHODS = ("percentile", "entropy", "mse", "l2", "sqnr", "aciq_gauss", "aciq_laplace", "octav")


def require_method(owner: str, options: Any) -> None:
    """Raises ValueError unless an observer's method, percentile, start_bin and stride are usable."""
    if options.method not in METHODS:
        raise ValueError(f"{owner}: method must be one of {list(METHODS)}, got {options.method!r}.")
    _require_percentile(owner, options.percentile)
    _require_search(owner, options.start_bin, options.stride)


def read_amax(histogram: Histogram, options: Any) -> Tensor:
    """Returns what the method named in an observer's options makes of a histogram."""
    method, spec = options.method, options.spec
    if method == "percentile":
        return percentile_amax(histogram, options.percentile)
    if method == "entropy":
        start = 128 if options.start_bin is None else options.start_bin
        return entropy_amax(histogram, spec, stride=options.stride, start_bin=start)
    if method in ("mse", "l2", "sqnr"):
        start = 1 if options.start_bin is None else options.start_bin
        search = sqnr_amax if method == "sqnr" else mse_amax
        return search(histogram, spec, stride=options.stride, start_bin=start)
    if method == "octav":
        return octav_amax(histogram, spec)
    return aciq_amax(histogram, spec, method.removeprefix("aciq_"))


def percentile_amax(histogram: Histogram, percentile: float = 99.99) -> Tensor:
    """Returns the lower edge of the first bin up to which at least `percentile` % of the values lie.

    The bins' shares are summed up in float64, as pytorch-quantization does: its rounding decides where
    the share is the percentile exactly.

    Raises:
        ValueError: percentile is outside [0, 100].

    Example:
        >>> percentile_amax(Histogram(torch.tensor([5, 3, 1, 1]), torch.tensor(0.5)), 90.0)
        tensor(1.)

    References:
        pytorch-quantization, `calib/histogram.py`.
    """
    _require_percentile("percentile_amax", percentile)
    counts = histogram.counts.double()
    share = (counts / counts.sum(-1, keepdim=True).clamp(min=1.0)).cumsum(-1)
    index = (share < percentile / 100).sum(-1).clamp(max=histogram.counts.shape[-1] - 1)
    return histogram.width * index.to(histogram.width.dtype)


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
    _require_search("entropy_amax", start_bin, stride)
    coarse = 1 << (spec.num_bits - 1 + int(getattr(spec, "unsigned", False)))
    bins = histogram.counts.shape[-1]
    candidates = torch.arange(min(start_bin, bins), bins + 1, stride)

    def index(counts: Tensor) -> Tensor:
        counts = torch.cat([counts[1:2], counts[1:]]).double()
        parts = [_divergences(counts, some, coarse) for some in candidates.split(256)]
        filled = torch.where(counts > 0, torch.arange(1, bins + 1), 0).amax()
        empty = candidates > filled.clamp(min=start_bin)  # nothing lies in a candidate's last bin
        return candidates[_last_argmin(torch.where(empty, torch.inf, torch.cat(parts)))]

    return _per_group(histogram, lambda counts, width: index(counts) * width)


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
    _require_search("mse_amax", start_bin, stride)
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

    return _per_group(histogram, best)


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


def aciq_amax(histogram: Histogram, spec: Format = INT8, distribution: str = "gauss") -> Tensor:
    """Returns the analytically best clipping value for zero-mean Gaussian or Laplace data.

    `aciq_multiplier(bits, distribution)` times the standard deviation ("gauss") or the mean absolute
    value ("laplace") of the histogram; an unsigned grid has one bit more.

    Raises:
        ValueError: another distribution; a grid that is not of integers.
    """
    bits = _integer_bits("aciq_amax", spec)
    counts, middles = histogram.counts.double(), _middles(histogram)
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
    noise = 4.0 ** -_integer_bits("octav_amax", spec) / 3
    counts, middles = histogram.counts.double(), _middles(histogram)
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


def _per_group(histogram: Histogram, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The function of (counts, width) for each group, in the shape and dtype of width."""
    counts = histogram.counts.reshape(-1, histogram.counts.shape[-1])
    widths = histogram.width.reshape(-1)
    amax = [function(counts[i], widths[i]) for i in range(len(counts))]
    if not amax:
        return histogram.width
    return torch.stack(amax).reshape(histogram.width.shape).to(histogram.width.dtype)


def _middles(histogram: Histogram) -> Tensor:
    """The middle of each bin, in bins."""
    bins = histogram.counts.shape[-1]
    return torch.arange(bins, dtype=torch.float64, device=histogram.counts.device) + 0.5


def _integer_bits(function: str, spec: Format) -> int:
    if not isinstance(spec, QuantSpec):
        raise ValueError(f"{function}: spec must be a QuantSpec, got {spec}.")
    return spec.num_bits + spec.unsigned


def _require_percentile(owner: str, percentile: float) -> None:
    if not 0 <= percentile <= 100:
        raise ValueError(f"{owner}: percentile must be in [0, 100], got {percentile}.")


def _require_search(owner: str, start_bin: int | None, stride: int) -> None:
    if stride < 1:
        raise ValueError(f"{owner}: stride must be at least 1, got {stride}.")
    if start_bin is not None and start_bin < 1:
        raise ValueError(f"{owner}: start_bin must be at least 1, got {start_bin}.")
