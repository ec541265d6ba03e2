"""The four functions every observer has, and the checks they share."""

import warnings
from typing import Any, Protocol

from torch import Tensor

from fquant.checks import values_readable


class NonFiniteWarning(UserWarning):
    """NaN or infinities were seen; they were counted and left out of the histogram."""


class Observer(Protocol):
    """A frozen description of what to remember; see `fquant.observers`."""

    def init(self) -> Any:
        """Returns the state that has seen nothing."""

    def update(self, state: Any, x: Tensor) -> Any:
        """Returns the state after one more tensor."""

    def merge(self, a: Any, b: Any) -> Any:
        """Returns the state after all that a saw, then all that b saw."""

    def amax(self, state: Any) -> Tensor:
        """Returns the range to quantize with, shaped to broadcast against the observed tensors."""


def require_state(function: str, state: object, kind: type) -> None:
    """Raises TypeError unless a state is of the kind that this observer makes."""
    if not isinstance(state, kind):
        raise TypeError(f"{function}: state must be a {kind.__name__}, got {type(state).__name__}.")


def require_same_shape(function: str, before: Tensor, now: Tensor) -> None:
    """Raises ValueError unless the two amax have one shape; a 0-d one has seen nothing yet."""
    if before.ndim > 0 and now.ndim > 0 and before.shape != now.shape:
        raise ValueError(
            f"{function}: amax must keep its shape from tensor to tensor, {tuple(before.shape)}, "
            f"got {tuple(now.shape)}."
        )


def require_seen(function: str, count: Tensor) -> None:
    """Raises ValueError if nothing was observed; not checked where values cannot be read."""
    if values_readable(count) and bool((count == 0).any()):
        raise ValueError(
            f"{function}: state must have seen at least one value, got an empty one. "
            "No batch reached it: calibrate with at least one (an iterator runs out)."
        )


def report_nonfinite(num_nonfinite: Tensor, seen: Tensor) -> None:
    """Warns of values left out of a histogram; silent where values cannot be read."""
    if values_readable(num_nonfinite) and bool((num_nonfinite > 0).any()):
        warnings.warn(
            f"{int(num_nonfinite.sum())} NaN or infinite values were left out of "
            f"{int(seen.sum())} others.",
            NonFiniteWarning,
            stacklevel=4,
        )
