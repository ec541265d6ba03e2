"""Histograms of |x| on a power-of-two range grid."""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fquant.binades import exponent_of, power_of_two
from fquant.checks import compute_dtype, require_floating, values_readable
from fquant.formats import Format
from fquant.granularity import groups
from fquant.observers.base import require_same_shape, require_seen
from fquant.observers.readout import Histogram, read_amax, require_method
from fquant.spec import INT8

# Ranges reach from 2^-100, below which everything counts as zero, up to what the dtype holds.
LOWEST_EXPONENT = -100


class NonFiniteWarning(UserWarning):
    """NaN or infinities were seen; they were counted and left out of the histogram."""


class HistogramState(NamedTuple):
    """What `HistogramObserver` remembers; per channel, every field has a rank-preserving shape.

    Attributes:
        exponent: the range is `[0, 2^exponent)`, int32.
        counts: values per bin, int64, one axis more than exponent; bin i is
            `[i, i + 1) 2^exponent / num_bins`.
        num_zeros: zeros left out of counts by `skip_zeros`, int64.
        num_nonfinite: NaN and infinities, which are in no bin, int64.
    """

    exponent: Tensor
    counts: Tensor
    num_zeros: Tensor
    num_nonfinite: Tensor


@dataclass(frozen=True)
class HistogramObserver:
    """Counts |x| in bins whose range is a power of two.

    When a larger value comes, the range doubles until it fits and neighbouring bins are added up.
    That is exact: the counts are those of all values binned at once. So merging is exact, associative
    and commutative, the shape never changes, and it compiles and vmaps. The width of a bin is
    `2^(e - log2 num_bins)` where `2^(e-1) <= max |x| < 2^e`.

    An empty tensor changes nothing.

    Attributes:
        axis: the axis or axes that keep a histogram of their own; None for one per tensor.
        num_bins: a power of two.
        skip_zeros: leave exact zeros (of a ReLU, of padding) out of the counts.
        method: what `amax` reads out: one of `fquant.observers.readout.METHODS`. `histogram(state)`
            gives the histogram to read in any other way; a state is the same for all of them.
        spec: the grid that "entropy", "mse", "sqnr" and the analytic methods read out for.
        percentile: for "percentile", in [0, 100].
        start_bin: for "entropy" and "mse", the first candidate; None for 128 and 1.
        stride: for "entropy" and "mse", bins from one candidate to the next.

    Raises:
        ValueError: an attribute is out of range, or the method is unknown (the message lists them).

    Example:
        >>> observer = HistogramObserver(percentile=50)
        >>> state = observer.update(observer.init(), torch.tensor([1.0, -2.0, 3.0, 100.0]))
        >>> state = observer.update(state, torch.tensor([1000.0]))
        >>> observer.amax(state), int(state.exponent)
        (tensor(3.), 10)
    """

    axis: int | tuple[int, ...] | None = None
    num_bins: int = 2048
    skip_zeros: bool = False
    method: str = "percentile"
    spec: Format = INT8
    percentile: float = 99.99
    start_bin: int | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        if self.num_bins < 2 or self.num_bins & (self.num_bins - 1):
            raise ValueError(
                f"HistogramObserver: num_bins must be a power of two, got {self.num_bins}."
            )
        require_method("HistogramObserver", self)

    def init(self) -> HistogramState:
        zero = torch.zeros((), dtype=torch.int64)
        exponent = torch.full((), LOWEST_EXPONENT, dtype=torch.int32)
        return HistogramState(exponent, torch.zeros(self.num_bins, dtype=torch.int64), zero, zero)

    def update(self, state: HistogramState, x: Tensor) -> HistogramState:
        require_floating("HistogramObserver.update", "x", x)
        return self.merge(state, self._count(x.detach()), "update")

    def merge(
        self, a: HistogramState, b: HistogramState, function: str = "merge"
    ) -> HistogramState:
        require_same_shape(f"HistogramObserver.{function}", a.exponent, b.exponent)
        exponent = torch.maximum(a.exponent, b.exponent)
        return HistogramState(
            exponent,
            _widened(a, exponent) + _widened(b, exponent),
            a.num_zeros + b.num_zeros,
            a.num_nonfinite + b.num_nonfinite,
        )

    def histogram(self, state: HistogramState) -> Histogram:
        """Returns the counts and the width of a bin, to be read out; warns of values left out.

        Raises:
            ValueError: a group has seen no finite value.
        """
        seen = state.counts.sum(-1) + state.num_zeros
        require_seen("HistogramObserver.histogram", seen)
        if values_readable(state.num_nonfinite) and bool((state.num_nonfinite > 0).any()):
            warnings.warn(
                f"{int(state.num_nonfinite.sum())} NaN or infinite values were left out of "
                f"{int(seen.sum())} others.",
                NonFiniteWarning,
                stacklevel=3,
            )
        width = power_of_two(state.exponent - (self.num_bins.bit_length() - 1))
        return Histogram(state.counts, torch.where(state.exponent > LOWEST_EXPONENT, width, 0.0))

    def amax(self, state: HistogramState) -> Tensor:
        return read_amax(self.histogram(state), self)

    def _count(self, x: Tensor) -> HistogramState:
        if self.axis is None:
            rows, shape = x.reshape(1, -1), []
        else:
            parts = groups("HistogramObserver.update", x, self.axis)
            kept = [a for a in range(parts.x.ndim) if a not in parts.reduced]
            rows, shape = parts.x.permute(*kept, *parts.reduced), parts.shape
        if x.numel() == 0:
            exponent = torch.full(shape, LOWEST_EXPONENT, dtype=torch.int32, device=x.device)
            zero = torch.zeros(shape, dtype=torch.int64, device=x.device)
            empty = torch.zeros(*shape, self.num_bins, dtype=torch.int64, device=x.device)
            return HistogramState(exponent, empty, zero, zero)
        magnitude = rows.reshape(math.prod(shape), -1).to(compute_dtype(x)).abs()
        top = magnitude.amax(dim=1)
        num_nonfinite = torch.zeros(top.shape, dtype=torch.int64, device=x.device)
        if not values_readable(top) or not bool(top.isfinite().all()):
            finite = magnitude.isfinite()
            num_nonfinite = (~finite).sum(dim=1)
            magnitude = torch.where(finite, magnitude, 0.0)
            top = magnitude.amax(dim=1)
        exponent = (exponent_of(top) + 1).clamp(min=LOWEST_EXPONENT)
        shift = self.num_bins.bit_length() - 1
        per_unit = power_of_two(shift - exponent, magnitude.dtype)
        bins = (magnitude * per_unit.unsqueeze(1)).int()
        counts = _count_rows(bins, self.num_bins)
        left_out = num_nonfinite
        num_zeros = torch.zeros_like(num_nonfinite)
        if self.skip_zeros:
            num_zeros = (magnitude == 0).sum(dim=1) - num_nonfinite
            left_out = left_out + num_zeros
        counts = torch.cat([counts[:, :1] - left_out.unsqueeze(1), counts[:, 1:]], dim=1)
        return HistogramState(
            exponent.reshape(shape),
            counts.reshape(*shape, self.num_bins),
            num_zeros.reshape(shape),
            num_nonfinite.reshape(shape),
        )


def _count_rows(bins: Tensor, num_bins: int) -> Tensor:
    """Counts of 0 to num_bins - 1 in each row, int64."""
    if values_readable(bins):  # five times as fast, but its output shape cannot be traced
        offset = torch.arange(len(bins), dtype=bins.dtype, device=bins.device) * num_bins
        flat = bins if len(bins) == 1 else bins + offset.unsqueeze(1)
        return flat.reshape(-1).bincount(minlength=len(bins) * num_bins).reshape(-1, num_bins)
    ones = torch.ones((), dtype=torch.int64, device=bins.device).expand(bins.shape)
    zeros = torch.zeros(len(bins), num_bins, dtype=torch.int64, device=bins.device)
    return zeros.scatter_add(1, bins.long(), ones)


def _widened(state: HistogramState, exponent: Tensor) -> Tensor:
    """The counts on the wider range: bin i goes to bin `i >> (exponent - state.exponent)`."""
    counts = state.counts
    if values_readable(exponent) and torch.equal(exponent, state.exponent):
        return counts
    shift = (exponent - state.exponent).clamp(max=31).unsqueeze(-1)
    target = torch.arange(counts.shape[-1], device=counts.device) >> shift
    shape = torch.broadcast_shapes(counts.shape, target.shape)
    return torch.zeros_like(counts.expand(shape)).scatter_add(
        -1, target.expand(shape), counts.expand(shape)
    )
