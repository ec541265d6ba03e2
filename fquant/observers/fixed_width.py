"""Histograms of |x| with a fixed width of bins: pytorch-quantization's HistogramCalibrator."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fquant.checks import compute_dtype, require_floating, require_int
from fquant.formats import Format
from fquant.observers.base import report_nonfinite, require_seen, require_state
from fquant.observers.bins import Histogram
from fquant.observers.readout import read_amax, require_method
from fquant.spec import INT8


class FixedWidthState(NamedTuple):
    """What `FixedWidthHistogramObserver` remembers.

    Attributes:
        width: of a bin, 0-d; 0 before a value other than zero was seen, unless the observer says.
        counts: int64; as many bins as the largest value needs.
        num_nonfinite: NaN and infinities, which are in no bin, int64, 0-d.
    """

    width: Tensor
    counts: Tensor
    num_nonfinite: Tensor


@dataclass(frozen=True)
class FixedWidthHistogramObserver:
    """Counts |x| in bins of the width that the first batch sets: its amax / num_bins.

    Larger values append bins. That reads values, so it is for eager code, per tensor; elsewhere, and
    for calibration over several processes, take `HistogramObserver`. Merging is exact for states of
    one width, so give `width` when states are to be merged.

    Attributes:
        num_bins: bins of the first batch, when width is None.
        width: of a bin, positive; None to let the first batch decide.
        skip_zeros: leave exact zeros out of the counts.
        method, spec, percentile, start_bin, stride: as in `HistogramObserver`.

    Example:
        >>> observer = FixedWidthHistogramObserver(width=0.5, percentile=100)
        >>> state = observer.update(observer.init(), torch.tensor([0.7, -2.0]))
        >>> state.counts.tolist(), observer.amax(state)
        ([0, 1, 0, 0, 1], tensor(2.))

    References:
        pytorch-quantization, `calib/histogram.py`, of which the counts are int64 here.
    """

    num_bins: int = 2048
    width: float | None = None
    skip_zeros: bool = False
    method: str = "percentile"
    spec: Format = INT8
    percentile: float = 99.99
    start_bin: int | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        require_int("FixedWidthHistogramObserver", "num_bins", self.num_bins, 2, None)
        if self.width is not None and not self.width > 0:
            raise ValueError(
                f"FixedWidthHistogramObserver: width must be positive, got {self.width}."
            )
        require_method("FixedWidthHistogramObserver", self)

    def init(self) -> FixedWidthState:
        width = torch.tensor(self.width or 0.0)
        zero = torch.zeros((), dtype=torch.int64)
        return FixedWidthState(width, torch.zeros(1, dtype=torch.int64), zero)

    def update(self, state: FixedWidthState, x: Tensor) -> FixedWidthState:
        require_state("FixedWidthHistogramObserver.update", state, FixedWidthState)
        require_floating("FixedWidthHistogramObserver.update", "x", x)
        magnitude = x.detach().to(compute_dtype(x)).abs().flatten()
        finite = magnitude[magnitude.isfinite()]
        num_nonfinite = state.num_nonfinite + (magnitude.numel() - finite.numel())
        if self.skip_zeros:
            finite = finite[finite > 0]
        if finite.numel() == 0:
            return state._replace(num_nonfinite=num_nonfinite)
        width = state.width
        if width == 0:
            width = (finite.amax() / self.num_bins).float()
        if width == 0:
            bins = torch.zeros_like(finite, dtype=torch.int64)
        else:
            bins = (finite / width).long()
            if state.width == 0:  # the largest value of the first batch is in the last bin
                bins = bins.clamp(max=self.num_bins - 1)
        return FixedWidthState(width, _add(state.counts, bins.bincount()), num_nonfinite)

    def merge(self, a: FixedWidthState, b: FixedWidthState) -> FixedWidthState:
        require_state("FixedWidthHistogramObserver.merge", a, FixedWidthState)
        require_state("FixedWidthHistogramObserver.merge", b, FixedWidthState)
        if a.width > 0 and b.width > 0 and a.width != b.width:
            raise ValueError(
                "FixedWidthHistogramObserver.merge: states must have one width of bins, "
                f"{a.width.item()}, got {b.width.item()}."
            )
        return FixedWidthState(
            torch.maximum(a.width, b.width),
            _add(a.counts, b.counts),
            a.num_nonfinite + b.num_nonfinite,
        )

    def histogram(self, state: FixedWidthState) -> Histogram:
        """Returns the counts and the width of a bin, to be read out; warns of values left out.

        Raises:
            ValueError: nothing was seen.
        """
        require_state("FixedWidthHistogramObserver.histogram", state, FixedWidthState)
        seen = state.counts.sum()
        require_seen("FixedWidthHistogramObserver.histogram", seen)
        report_nonfinite(state.num_nonfinite, seen)
        return Histogram(state.counts, state.width)

    def amax(self, state: FixedWidthState) -> Tensor:
        return read_amax(self.histogram(state), self)


def _add(a: Tensor, b: Tensor) -> Tensor:
    bins = max(len(a), len(b))
    return torch.nn.functional.pad(a, (0, bins - len(a))) + torch.nn.functional.pad(
        b, (0, bins - len(b))
    )
