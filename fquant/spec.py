"""`QuantSpec`: the static half of a quantizer, everything about it that is not a tensor."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is put on an integer grid.

    Attributes:
        num_bits: width of the integers, 2 to 16.
        unsigned: `[0, 2^b - 1]` in place of the signed range.
        narrow_range: signed only: `[-(2^(b-1) - 1), 2^(b-1) - 1]`, so that the grid is odd-symmetric;
            otherwise the lowest code `-2^(b-1)` is used as well, as ONNX and TensorRT do.
        axis: the axis or axes that keep a scale of their own; None for one scale per tensor.

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

    def __post_init__(self) -> None:
        integer = isinstance(self.num_bits, int) and not isinstance(self.num_bits, bool)
        if not integer or not 2 <= self.num_bits <= 16:
            raise ValueError(
                f"QuantSpec: num_bits must be an integer from 2 to 16, got {self.num_bits!r}."
            )
        if self.unsigned and self.narrow_range:
            raise ValueError(
                "QuantSpec: narrow_range must be False for an unsigned grid, which has no lowest "
                "code to leave out, got unsigned=True and narrow_range=True."
            )
        if isinstance(self.axis, list):
            raise TypeError(f"QuantSpec: axis must be an int, a tuple or None, got {self.axis!r}.")

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
