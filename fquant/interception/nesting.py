"""Values that a model computes inside `torch.func` transforms of its own, seen from outside of them.

A tensor that leaves a `vmap` or `grad` by another way than its result stays wrapped for ever, and fails
later, far from its cause. What an observer remembers must leave.
"""

from typing import Any

import torch
from torch import Tensor

_functorch = torch._C._functorch


def transform_level() -> int:
    """Returns how many `torch.func` transforms are running around this line; 0 in compiled code."""
    if torch.compiler.is_compiling():
        return 0
    return _functorch.maybe_current_level() or 0


def outside_transforms(x: Tensor, level: int, axis: Any) -> Tensor:
    """Returns the values of x without the transforms above a level; vmapped ones get a leading axis.

    Args:
        x: detached from those transforms.
        level: `transform_level()` outside of them.
        axis: the axes that will be kept; None or negative ones still count from the end.

    Raises:
        ValueError: x is vmapped and an axis counts from the front.
    """
    while _functorch.is_functorch_wrapped_tensor(x) and _functorch.maybe_get_level(x) > level:
        inner = _functorch.get_unwrapped(x)
        if _functorch.is_batchedtensor(x):
            axes = () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
            if any(a >= 0 for a in axes):
                raise ValueError(
                    "observe: axis must be None or negative inside a vmap of the model's own, "
                    f"got {axis}."
                )
            inner = inner.movedim(_functorch.maybe_get_bdim(x), 0)
        x = inner
    return x.detach()
