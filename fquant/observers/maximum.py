"""The largest absolute value ever seen."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fquant.observers.base import require_same_shape, require_seen, require_state
from fquant.scales import compute_amax


class MaxState(NamedTuple):
    """What `MaxObserver` remembers.

    Attributes:
        amax: running maximum of |x|; 0-d zero at first, then of `compute_amax`'s shape.
        num_values: how many values were seen, int64, 0-d.
    """

    amax: Tensor
    num_values: Tensor


@dataclass(frozen=True)
class MaxObserver:
    """Remembers max |x| per group: the "max" calibration. Merging is exact and commutative.

    An empty tensor changes nothing. NaN is kept: a NaN seen is a NaN amax.

    Attributes:
        axis: the axis or axes that keep an amax of their own; None for one per tensor.
        block: how many neighbours along a kept axis share one (`fquant.compute_amax`); None for 1.

    Example:
        >>> observer = MaxObserver()
        >>> state = observer.update(observer.init(), torch.tensor([1.0, -3.0]))
        >>> observer.amax(observer.merge(state, observer.init()))
        tensor(3.)
    """

    axis: int | tuple[int, ...] | None = None
    block: int | tuple[int, ...] | None = None

    def init(self) -> MaxState:
        return MaxState(torch.zeros(()), torch.zeros((), dtype=torch.int64))

    def update(self, state: MaxState, x: Tensor) -> MaxState:
        require_state("MaxObserver.update", state, MaxState)
        amax = compute_amax(x, self.axis, self.block)
        require_same_shape("MaxObserver.update", state.amax, amax)
        return MaxState(torch.maximum(state.amax, amax), state.num_values + x.numel())

    def merge(self, a: MaxState, b: MaxState) -> MaxState:
        require_state("MaxObserver.merge", a, MaxState)
        require_state("MaxObserver.merge", b, MaxState)
        require_same_shape("MaxObserver.merge", a.amax, b.amax)
        return MaxState(torch.maximum(a.amax, b.amax), a.num_values + b.num_values)

    def amax(self, state: MaxState) -> Tensor:
        require_state("MaxObserver.amax", state, MaxState)
        require_seen("MaxObserver.amax", state.num_values)
        return state.amax
