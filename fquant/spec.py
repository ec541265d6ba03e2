"""`QuantSpec`: the static half of a quantizer, everything about it that is not a tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fquant.checks import require_int
from fquant.granularity import require_granularity
from fquant.pytree import constant
from fquant.rounding import require_rounding, round_to_integer
from fquant.scale_rules import require_scale_rule


@constant
@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is put on an integer grid.

    Attributes:
        num_bits: width of the integers, 2 to 16.
        unsigned: `[0, 2^b - 1]` in place of the signed range.
        narrow_range: signed only: `[-(2^(b-1) - 1), 2^(b-1) - 1]`, so that the grid is odd-symmetric;
            otherwise the lowest code `-2^(b-1)` is used as well, as ONNX and TensorRT do.
        axis: the axis or axes that keep a scale of their own; None for one scale per tensor.
        block: how many neighbours along a kept axis share a scale, one number or one per kept axis;
            None for 1.
        rounding: one of `fquant.rounding.ROUNDINGS`.
        scale_rule: how `compute_scale` turns amax into the step (`fquant.scale_rules`).

    Example:
        >>> QuantSpec(num_bits=4).q_min, QuantSpec(num_bits=4).q_max
        (-8, 7)
        >>> QuantSpec(num_bits=8, unsigned=True).dtype
        torch.uint8
    """

    num_bits: int = 8
    unsigned: bool = False
    narrow_range: bool = False
    axis: int | tuple[int, ...] | None = None
    block: int | tuple[int, ...] | None = None
    rounding: str = "half_even"
    scale_rule: str = "real"

    def __post_init__(self) -> None:
        require_int("QuantSpec", "num_bits", self.num_bits, 2, 16)
        if self.unsigned and self.narrow_range:
            raise ValueError(
                "QuantSpec: narrow_range must be False for an unsigned grid, which has no lowest "
                "code to leave out, got unsigned=True and narrow_range=True."
            )
        if isinstance(self.axis, list):
            raise TypeError(f"QuantSpec: axis must be an int, a tuple or None, got {self.axis!r}.")
        require_granularity("QuantSpec", self.axis, self.block)
        require_rounding("QuantSpec", self.rounding)
        require_scale_rule("QuantSpec", self.scale_rule)

    @property
    def q_max(self) -> int:
        """The highest integer of the grid."""
        return 2 ** (self.num_bits - (not self.unsigned)) - 1

    @property
    def q_min(self) -> int:
        """The lowest integer of the grid."""
        if self.unsigned:
            return 0
        return -self.q_max - (not self.narrow_range)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest torch integer dtype with full operator support that holds the grid."""
        for dtype in (torch.int8, torch.uint8, torch.int16):
            info = torch.iinfo(dtype)
            if info.min <= self.q_min and self.q_max <= info.max:
                return dtype
        return torch.int32

    def snap(
        self, x: Tensor, noise: Tensor | None = None, zero_point: Tensor | None = None
    ) -> Tensor:
        """Returns the integers for x, in units of the step, as floats; NaN stays NaN."""
        levels = round_to_integer(x, self.rounding, noise)
        if zero_point is not None:
            levels = levels + zero_point
        return levels.clamp(self.q_min, self.q_max)

    def encode(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Returns the integers in `dtype`; NaN becomes the zero point."""
        empty = 0.0 if zero_point is None else zero_point
        return torch.where(values.isnan(), empty, values).to(self.dtype)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the integers as floats."""
        return codes.to(dtype)

    def levels(self) -> Tensor:
        """Returns the integers that are not negative, ascending, float64."""
        return torch.arange(self.q_max + 1, dtype=torch.float64)


INT8 = QuantSpec()
