"""The smallest and the largest value ever seen."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fquant.checks import require_floating
from fquant.granularity import groups
from fquant.observers.base import require_same_shape, require_seen, require_state


class MinMaxState(NamedTuple):
    """What `MinMaxObserver` remembers.

    Attributes:
        minimum: running minimum; 0-d infinity at first, then of rank-preserving shape.
        maximum: running maximum; 0-d minus infinity at first.
        num_values: how many values were seen, int64, 0-d.
    """

    minimum: Tensor
    maximum: Tensor
    num_values: Tensor


@dataclass(frozen=True)
class MinMaxObserver:
    """Remembers min x and max x per group, for asymmetric grids. Merging is exact and commutative.

    An empty tensor changes nothing. NaN is kept: a NaN seen makes both ends NaN.

    Attributes:
        axis: the axis or axes that keep a range of their own; None for one per tensor.

    Example:
        >>> observer = MinMaxObserver()
        >>> state = observer.update(observer.init(), torch.tensor([1.0, -3.0, 2.0]))
        >>> observer.range(state), observer.amax(state)
        ((tensor(-3.), tensor(2.)), tensor(3.))
    """

    axis: int | tuple[int, ...] | None = None

    def init(self) -> MinMaxState:
        infinity = torch.full((), torch.inf)
        return MinMaxState(infinity, -infinity, torch.zeros((), dtype=torch.int64))

    def update(self, state: MinMaxState, x: Tensor) -> MinMaxState:
        require_state("MinMaxObserver.update", state, MinMaxState)
        require_floating("MinMaxObserver.update", "x", x)
        one = MinMaxState(*self._extremes(x.detach()), torch.full_like(state.num_values, x.numel()))
        return self.merge(state, one)

    def merge(self, a: MinMaxState, b: MinMaxState) -> MinMaxState:
        require_state("MinMaxObserver.merge", a, MinMaxState)
        require_state("MinMaxObserver.merge", b, MinMaxState)
        require_same_shape("MinMaxObserver.merge", a.minimum, b.minimum)
        return MinMaxState(
            torch.minimum(a.minimum, b.minimum),
            torch.maximum(a.maximum, b.maximum),
            a.num_values + b.num_values,
        )

    def range(self, state: MinMaxState) -> tuple[Tensor, Tensor]:
        """Returns (minimum, maximum), as `compute_scale_zero_point` takes them."""
        require_state("MinMaxObserver.range", state, MinMaxState)
        require_seen("MinMaxObserver.range", state.num_values)
        return state.minimum, state.maximum

    def amax(self, state: MinMaxState) -> Tensor:
        require_state("MinMaxObserver.amax", state, MinMaxState)
        require_seen("MinMaxObserver.amax", state.num_values)
        return torch.maximum(state.minimum.abs(), state.maximum.abs())

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.axis is None:
            empty = x.new_full((), torch.inf)
            return (x.amin(), x.amax()) if x.numel() else (empty, -empty)
        parts = groups("MinMaxObserver.update", x, self.axis)
        if x.numel() == 0:
            empty = x.new_full(parts.shape, torch.inf)
            return empty, -empty
        if not parts.reduced:
            return x, x
        low, high = parts.x.amin(dim=parts.reduced), parts.x.amax(dim=parts.reduced)
        return low.reshape(parts.shape), high.reshape(parts.shape)
