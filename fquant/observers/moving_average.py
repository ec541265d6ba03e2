"""The exponential moving average of each batch's largest absolute value."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fquant.checks import require_floating
from fquant.observers.base import require_same_shape, require_seen, require_state
from fquant.scales import compute_amax


class MovingAverageState(NamedTuple):
    """What `MovingAverageObserver` remembers: `amax = momentum^(batches - 1) * first + rest`.

    The first batch, which starts the average, is kept apart from the weighted sum of the others;
    that is what makes two states mergeable.

    Attributes:
        first: amax of the first batch; 0-d zero before any.
        rest: `sum_i momentum^(batches - i) (1 - momentum) amax_i` over batches i = 2, 3, ...
        batches: how many batches were seen, int64, 0-d.
    """

    first: Tensor
    rest: Tensor
    batches: Tensor


@dataclass(frozen=True)
class MovingAverageObserver:
    """Averages max |x| over batches, recent ones most, as torch.ao's MovingAverageMinMaxObserver.

        average = amax of the first batch, then momentum * average + (1 - momentum) * amax

    `merge(a, b)` is the average over a's batches followed by b's: associative up to float rounding,
    and not commutative, because an average that forgets depends on order. An empty batch is not
    counted.

    Attributes:
        momentum: weight of the past, in [0, 1).
        axis: the axis or axes that keep an amax of their own; None for one per tensor.

    Example:
        >>> observer = MovingAverageObserver(momentum=0.75)
        >>> state = observer.init()
        >>> for value in (1.0, 1.0, 5.0):
        ...     state = observer.update(state, torch.tensor([value]))
        >>> observer.amax(state)
        tensor(2.)
    """

    momentum: float = 0.99
    axis: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.momentum, int | float) or not 0.0 <= self.momentum < 1.0:
            raise ValueError(
                f"MovingAverageObserver: momentum must be in [0, 1), got {self.momentum}."
            )

    def init(self) -> MovingAverageState:
        zero = torch.zeros(())
        return MovingAverageState(zero, zero, torch.zeros((), dtype=torch.int64))

    def update(self, state: MovingAverageState, x: Tensor) -> MovingAverageState:
        require_state("MovingAverageObserver.update", state, MovingAverageState)
        require_floating("MovingAverageObserver.update", "x", x)
        if x.numel() == 0:
            return state
        amax = compute_amax(x, self.axis)
        one = MovingAverageState(amax, torch.zeros_like(amax), torch.ones_like(state.batches))
        return self.merge(state, one)

    def merge(self, a: MovingAverageState, b: MovingAverageState) -> MovingAverageState:
        require_state("MovingAverageObserver.merge", a, MovingAverageState)
        require_state("MovingAverageObserver.merge", b, MovingAverageState)
        require_same_shape("MovingAverageObserver.merge", a.first, b.first)
        # b's first batch is an ordinary one when a has seen any; an empty side changes nothing.
        past = self._power(b.batches)
        b_sum = self._power(b.batches - 1) * (1.0 - self.momentum) * b.first + b.rest
        joined = torch.where(b.batches == 0, a.rest, past * a.rest + b_sum)
        return MovingAverageState(
            torch.where(a.batches == 0, b.first, a.first),
            torch.where(a.batches == 0, b.rest, joined),
            a.batches + b.batches,
        )

    def amax(self, state: MovingAverageState) -> Tensor:
        require_state("MovingAverageObserver.amax", state, MovingAverageState)
        require_seen("MovingAverageObserver.amax", state.batches)
        return self._power(state.batches - 1) * state.first + state.rest

    def _power(self, exponent: Tensor) -> Tensor:
        return torch.pow(self.momentum, exponent.clamp(min=0).float())
