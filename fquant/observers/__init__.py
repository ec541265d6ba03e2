"""Observers: what is remembered of the tensors that pass a site, as pure functions on a state.

An observer is a frozen description with four functions. A newcomer adds one as one file:

    init()           -> state        the state that has seen nothing
    update(state, x) -> state        after one more tensor
    merge(a, b)      -> state        after what a saw, then what b saw
    amax(state)      -> tensor       the range to quantize with; asking changes nothing

States are NamedTuples of tensors. `init()` is the identity of `merge`, and
`merge(update(init(), x), update(init(), y)) = update(update(init(), x), y)`, so calibration can be
split over processes.
"""

from fquant.observers.analytic import (
    aciq_amax,
    aciq_multiplier,
    gaussian_std_from_range,
    octav_amax,
)
from fquant.observers.base import NonFiniteWarning, Observer
from fquant.observers.bins import Histogram
from fquant.observers.fixed_width import FixedWidthHistogramObserver, FixedWidthState
from fquant.observers.histogram import HistogramObserver, HistogramState
from fquant.observers.maximum import MaxObserver, MaxState
from fquant.observers.min_max import MinMaxObserver, MinMaxState
from fquant.observers.moving_average import MovingAverageObserver, MovingAverageState
from fquant.observers.readout import percentile_amax
from fquant.observers.search import entropy_amax, mse_amax, sqnr_amax

__all__ = [
    "FixedWidthHistogramObserver",
    "FixedWidthState",
    "Histogram",
    "HistogramObserver",
    "HistogramState",
    "MaxObserver",
    "MaxState",
    "MinMaxObserver",
    "MinMaxState",
    "MovingAverageObserver",
    "MovingAverageState",
    "NonFiniteWarning",
    "Observer",
    "aciq_amax",
    "aciq_multiplier",
    "entropy_amax",
    "gaussian_std_from_range",
    "mse_amax",
    "octav_amax",
    "percentile_amax",
    "sqnr_amax",
]
