"""Reading amax out of a histogram of |x|, by the method's name.

Every method is a pure function, which never changes what was collected:

percentile_amax     the value that a percentage of the data does not exceed
entropy_amax        least Kullback-Leibler divergence (TensorRT's search)
mse_amax            least squared error of quantization (also called L2)
sqnr_amax           the same with clipping weighted more (AIMET's search)
aciq_amax           closed form for Gaussian and Laplace data
octav_amax          Newton's fixed point on the data
"""

from typing import Any

from torch import Tensor

from fquant.formats import require_format
from fquant.observers.analytic import aciq_amax, octav_amax
from fquant.observers.bins import Histogram, require_histogram
from fquant.observers.search import entropy_amax, mse_amax, require_search, sqnr_amax
from fquant.spec import QuantSpec

METHODS = ("percentile", "entropy", "mse", "l2", "sqnr", "aciq_gauss", "aciq_laplace", "octav")


def require_method(owner: str, options: Any) -> None:
    """Raises ValueError unless an observer's method, percentile, start_bin and stride are usable."""
    if options.method not in METHODS:
        hint = " The maximum is MaxObserver's." if options.method == "max" else ""
        raise ValueError(
            f"{owner}: method must be one of {list(METHODS)}, got {options.method!r}.{hint}"
        )
    if options.method.startswith(("aciq", "octav")) and not isinstance(options.spec, QuantSpec):
        raise ValueError(
            f"{owner}: spec must be a QuantSpec for {options.method!r}, got {options.spec}."
        )
    require_format(owner, options.spec)
    _require_percentile(owner, options.percentile)
    require_search(owner, options.start_bin, options.stride)


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
    require_histogram("percentile_amax", histogram)
    _require_percentile("percentile_amax", percentile)
    counts = histogram.counts.double()
    share = (counts / counts.sum(-1, keepdim=True).clamp(min=1.0)).cumsum(-1)
    index = (share < percentile / 100).sum(-1).clamp(max=histogram.counts.shape[-1] - 1)
    return histogram.width * index.to(histogram.width.dtype)


def _require_percentile(owner: str, percentile: float) -> None:
    if not isinstance(percentile, int | float):
        raise TypeError(f"{owner}: percentile must be a number, got {percentile!r}.")
    if not 0 <= percentile <= 100:
        raise ValueError(f"{owner}: percentile must be in [0, 100], got {percentile}.")
