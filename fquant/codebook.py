"""`Codebook`: a grid given by the list of its values; NF4."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fquant.granularity import require_granularity
from fquant.pytree import constant
from fquant.scale_rules import require_scale_rule


@constant
@dataclass(frozen=True)
class Codebook:
    """A grid of arbitrary values; code i stands for `values[i]`. A tie goes to the lower value.

    Attributes:
        values: ascending, finite, 2 to 256, the last one positive, in units of the scale.
        axis: the axis or axes that keep a scale of their own; None for one scale per tensor.
        block: how many neighbours along a kept axis share a scale; None for 1.
        scale_rule: how `compute_scale` turns amax into the scale (`fquant.scale_rules`).
        rounding: only "nearest": there is no other rounding to a list of values.

    Raises:
        TypeError: values are not a tuple of numbers.
        ValueError: values do not ascend, are too many or too few; another rounding.

    Example:
        >>> fquant.quantize(torch.tensor([0.9, -0.3, 0.05]), 1.0, spec=Codebook((-1.0, 0.0, 1.0))).q
        tensor([2, 1, 1], dtype=torch.uint8)
    """

    values: tuple[float, ...]
    axis: int | tuple[int, ...] | None = None
    block: int | tuple[int, ...] | None = None
    scale_rule: str = "real"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if not isinstance(self.values, tuple) or not all(
            isinstance(v, int | float) for v in self.values
        ):
            raise TypeError(f"Codebook: values must be a tuple of numbers, got {self.values!r}.")
        ascending = all(a < b for a, b in zip(self.values, self.values[1:], strict=False))
        finite = all(math.isfinite(v) for v in self.values)
        if not ascending or not finite or not 2 <= len(self.values) <= 256 or self.q_max <= 0:
            raise ValueError(
                "Codebook: values must be 2 to 256 ascending finite numbers, the last one positive, "
                f"got {self.values}."
            )
        require_granularity("Codebook", self.axis, self.block)
        if self.rounding != "nearest":
            raise ValueError(f"Codebook: rounding must be 'nearest', got {self.rounding!r}.")
        require_scale_rule("Codebook", self.scale_rule)

    @property
    def q_max(self) -> float:
        """The largest value."""
        return self.values[-1]

    @property
    def q_min(self) -> float:
        """The lowest value."""
        return self.values[0]

    @property
    def num_bits(self) -> int:
        """Bits of a code."""
        return (len(self.values) - 1).bit_length()

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return torch.uint8

    def snap(
        self, x: Tensor, noise: Tensor | None = None, zero_point: Tensor | None = None
    ) -> Tensor:
        """Returns the nearest values; NaN stays NaN."""
        snapped = self.decode(self._nearest(x), x.dtype)
        return torch.where(x.isnan(), x, snapped)

    def encode(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Returns the codes of grid values; NaN gets the code nearest to 0."""
        return self._nearest(values.nan_to_num(0.0)).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the values of codes."""
        return torch.tensor(self.values, dtype=dtype, device=codes.device)[codes.long()]

    def levels(self) -> Tensor:
        """Returns the values that are not negative, ascending, float64."""
        values = torch.tensor(self.values, dtype=torch.float64)
        return values[values >= 0]

    def _nearest(self, x: Tensor) -> Tensor:
        values = torch.tensor(self.values, dtype=torch.float64)
        between = ((values[1:] + values[:-1]) / 2).to(x.device)
        return torch.bucketize(x.detach().double(), between)


# Quantiles of the normal distribution, 0 included, scaled to [-1, 1] (QLoRA, arXiv 2305.14314,
# appendix E), to float32's precision.
NF4 = Codebook(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
