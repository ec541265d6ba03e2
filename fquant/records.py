"""`QTensor`, the record of a quantized tensor, and tensor functions lifted to records."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fquant.formats import Format
from fquant.pytree import record, static
from fquant.spec import QuantSpec


@record
class QTensor:
    """Integers with the scale that gives them meaning: `x ~= (q - zero_point) * scale`.

    Attributes:
        q: integers on the grid of `spec`, or codes of a floating-point grid; of dtype `spec.dtype`.
        scale: the step, in units of x; broadcasts against `q`.
        zero_point: the integer that stands for 0.0, of a shape like scale's; None means 0.
        spec: the grid.
        dtype: dtype of the tensor that was quantized, and of `dequantize`'s result.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    spec: Format = static(default=QuantSpec())  # QuantSpec is immutable
    dtype: torch.dtype = static(default=torch.float32)

    @property
    def shape(self) -> torch.Size:
        """The shape of the integers."""
        return self.q.shape


def lifts_to_features(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function of a tensor take a record with a `features` field as well.

    The record comes back with its features replaced and every other field as it was: quantizing
    a sparse tensor never touches its coordinates.
    """

    @functools.wraps(function)
    def lifted(x: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(x, "features"):
            return dataclasses.replace(x, features=function(x.features, *args, **kwargs))
        return function(x, *args, **kwargs)

    return lifted
