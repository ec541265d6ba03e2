"""What a format is, and `FloatFormat`: floating-point grids of any width.

A format describes values in units of the step; the scale is apart, as for integers:
`x ~= value * scale`. With scale 1 it is a plain cast.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fquant.binades import binade, exponent_of, power_of_two
from fquant.checks import require_int
from fquant.granularity import require_granularity
from fquant.pytree import constant
from fquant.rounding import require_rounding, round_to_integer
from fquant.scale_rules import require_scale_rule

FINITE_RULES = ("ieee", "fn", "fnuz", "all")


class Format(Protocol):
    """What `quantize`, `dequantize` and `fake_quantize` need of a grid.

    A newcomer adds a kind of grid as one class with these members, in one file.
    """

    @property
    def axis(self) -> int | tuple[int, ...] | None:
        """The axis or axes that keep a scale of their own."""

    @property
    def block(self) -> int | tuple[int, ...] | None:
        """How many neighbours along a kept axis share a scale."""

    @property
    def rounding(self) -> str:
        """How values are rounded, by name."""

    @property
    def scale_rule(self) -> str:
        """How `compute_scale` turns amax into the step, by name."""

    @property
    def num_bits(self) -> int:
        """Bits of a code."""

    @property
    def q_max(self) -> float:
        """The largest value, in units of the step."""

    @property
    def q_min(self) -> float:
        """The lowest value."""

    @property
    def dtype(self) -> torch.dtype:
        """The integer dtype that holds the codes."""

    def snap(
        self, x: Tensor, noise: Tensor | None = None, zero_point: Tensor | None = None
    ) -> Tensor:
        """Returns the grid values for x, both in units of the step; NaN stays, infinity saturates."""

    def encode(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Returns the codes of grid values, of dtype `dtype`."""

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the grid values of codes, in a float dtype."""

    def levels(self) -> Tensor:
        """Returns the values that are not negative, ascending, float64."""


def require_format(function: str, spec: object) -> None:
    """Raises TypeError unless spec is a grid."""
    if not hasattr(spec, "snap") or not hasattr(spec, "levels"):
        raise TypeError(
            f"{function}: spec must be a QuantSpec, FloatFormat or other Format, got {spec!r}."
        )


@constant
@dataclass(frozen=True)
class FloatFormat:
    """A floating-point grid: sign, `exp` exponent bits, `man` mantissa bits.

    A code with exponent field E and mantissa field M stands for `2^(E - bias) (1 + M / 2^man)`, or,
    for E = 0, `2^(1 - bias) M / 2^man` (subnormals). Rounding is to the nearest value and saturates:
    nothing overflows to infinity. Values beyond the largest become the largest. Half to even means an
    even mantissa; without mantissa bits, half way between powers of two goes up.

    Attributes:
        exp: exponent bits, 1 to 8.
        man: mantissa bits, 0 to 10; `exp + man` at most 15.
        bias: exponent bias; None for `2^(exp - 1) - 1`.
        finite: which codes are not numbers. "ieee": the highest exponent field is infinities and
            NaN. "fn": only mantissa all ones there is NaN. "fnuz": only the code of -0 is NaN. "all":
            every code is a number, and `encode` turns NaN to 0.
        subnormals: whether E = 0 holds subnormals; if not, it holds 0 only.
        max: largest value used; None for the largest there is.
        rounding: one of `fquant.rounding.ROUNDINGS`.
        axis: the axis or axes that keep a scale of their own; None for one scale per tensor.
        block: how many neighbours along a kept axis share a scale; None for 1.
        scale_rule: how `compute_scale` turns amax into the scale (`fquant.scale_rules`).

    Raises:
        ValueError: a field is out of range; the message names it.

    Example:
        >>> E4M3 = FloatFormat(4, 3, finite="fn")
        >>> E4M3.q_max
        448.0
        >>> fquant.fake_quantize(torch.tensor([0.3, 17.0]), 1.0, spec=E4M3)
        tensor([ 0.3125, 16.0000])

    References:
        Open Compute Project, OFP8 v1.0 and Microscaling Formats v1.0; Micikevicius et al. 2022,
        arXiv 2209.05433. "all" is QPyTorch's convention.
    """

    exp: int
    man: int
    bias: int | None = None
    finite: str = "ieee"
    subnormals: bool = True
    max: float | None = None
    rounding: str = "half_even"
    axis: int | tuple[int, ...] | None = None
    block: int | tuple[int, ...] | None = None
    scale_rule: str = "real"

    def __post_init__(self) -> None:
        require_int("FloatFormat", "exp", self.exp, 1, 8)
        require_int("FloatFormat", "man", self.man, 0, min(10, 15 - self.exp))
        if self.bias is not None and not isinstance(self.bias, int):
            raise TypeError(f"FloatFormat: bias must be an int or None, got {self.bias!r}.")
        require_granularity("FloatFormat", self.axis, self.block)
        if self.finite not in FINITE_RULES:
            raise ValueError(
                f"FloatFormat: finite must be one of {list(FINITE_RULES)}, got {self.finite!r}."
            )
        require_rounding("FloatFormat", self.rounding)
        require_scale_rule("FloatFormat", self.scale_rule)
        if self.highest_exponent < self.lowest_exponent or not -127 < self.lowest_exponent < 128:
            raise ValueError(
                f"FloatFormat: bias must leave normal numbers within float32's range, "
                f"got {self.bias!r} with exp={self.exp}, finite={self.finite!r}."
            )
        if self.highest_exponent > 127:
            raise ValueError(
                "FloatFormat: bias must keep the largest value within float32's range, "
                f"got {self.bias!r} with exp={self.exp}, finite={self.finite!r}."
            )
        if self.max is not None and not self._has(self.max):
            raise ValueError(f"FloatFormat: max must be a value of the format, got {self.max}.")

    @property
    def exponent_bias(self) -> int:
        """`bias`, or the default."""
        return 2 ** (self.exp - 1) - 1 if self.bias is None else self.bias

    @property
    def lowest_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.exponent_bias

    @property
    def highest_exponent(self) -> int:
        """Exponent of the largest number."""
        top = 2**self.exp - 1 - self.exponent_bias
        lost = self.finite == "ieee" or (self.finite == "fn" and self.man == 0)
        return top - lost

    @property
    def q_max(self) -> float:
        """The largest value."""
        return self._largest if self.max is None else self.max

    @property
    def q_min(self) -> float:
        """The lowest value."""
        return -self.q_max

    @property
    def num_bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exp + self.man

    @property
    def dtype(self) -> torch.dtype:
        """uint8 for codes of up to 8 bits, otherwise int32."""
        return torch.uint8 if self.num_bits <= 8 else torch.int32

    @property
    def smallest(self) -> float:
        """The smallest positive value."""
        return 2.0 ** (self.lowest_exponent - (self.man if self.subnormals else 0))

    def snap(
        self, x: Tensor, noise: Tensor | None = None, zero_point: Tensor | None = None
    ) -> Tensor:
        """Returns the grid values for x, both in units of the step; see `Format`."""
        bounded = x.clamp(self.q_min, self.q_max)
        gap = binade(bounded).clamp(min=2.0**self.lowest_exponent) * 2.0**-self.man
        if not self.subnormals:
            normal = bounded.abs() >= 2.0**self.lowest_exponent
            gap = torch.where(normal, gap, 2.0**self.lowest_exponent)
        # In range for every rounding: within a binade the ends of the range are integers, too.
        return round_to_integer(bounded / gap, self.rounding, noise) * gap

    def encode(self, values: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Returns the codes of grid values: sign, exponent and mantissa fields, NaN as in `finite`."""
        wide = values.detach().to(torch.float64)
        magnitude = wide.abs().nan_to_num(0.0)
        power = binade(magnitude).clamp(min=2.0**self.lowest_exponent)
        exponent = exponent_of(power)
        mantissa = (magnitude / power * 2.0**self.man).to(torch.int32)  # with the leading one
        subnormal = mantissa < 2**self.man
        field = torch.where(subnormal, 0, exponent + self.exponent_bias)
        codes = (field << self.man) + torch.where(subnormal, mantissa, mantissa - 2**self.man)
        sign = torch.signbit(wide)
        if self.finite == "fnuz":  # has no -0
            sign = sign & (magnitude > 0)
        codes = codes + (sign.to(torch.int32) << (self.exp + self.man))
        return torch.where(wide.isnan(), self._nan_code, codes).to(self.dtype)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the values of codes; infinities and NaN as in `finite`."""
        bits = codes.to(torch.int32)
        negative = (bits >> (self.exp + self.man)) & 1
        field = (bits >> self.man) & (2**self.exp - 1)
        mantissa = bits & (2**self.man - 1)
        subnormal = field == 0
        fraction = torch.where(
            subnormal, mantissa if self.subnormals else 0, mantissa + 2**self.man
        )
        exponent = torch.where(subnormal, 1, field) - self.exponent_bias - self.man
        values = fraction.to(torch.float64) * power_of_two(exponent, torch.float64)
        if self.finite == "ieee":
            special = torch.where(mantissa == 0, torch.inf, torch.nan)
            values = torch.where(field == 2**self.exp - 1, special, values)
        elif self.finite == "fn":
            ones = (field == 2**self.exp - 1) & (mantissa == 2**self.man - 1)
            values = torch.where(ones, torch.nan, values)
        values = torch.where(negative == 1, -values, values)
        if self.finite == "fnuz":
            values = torch.where(bits == self._nan_code, torch.nan, values)
        return values.to(dtype)

    def levels(self) -> Tensor:
        """Returns the values that are not negative, ascending, float64."""
        levels = self._all_levels()
        return levels[levels <= self.q_max]

    def _all_levels(self) -> Tensor:
        codes = torch.arange(2 ** (self.exp + self.man), dtype=torch.int32)
        values = self.decode(codes, torch.float64)
        return values[values.isfinite()].unique()

    @property
    def _largest(self) -> float:
        lost = 2 if self.finite == "fn" and self.man > 0 else 1
        return 2.0**self.highest_exponent * (2.0 - lost * 2.0**-self.man)

    def _has(self, value: float) -> bool:
        """Whether a positive number is a value; without tensors, for formats are made under any mode."""
        if not self.smallest <= value <= self._largest:
            return False
        exponent = max(math.frexp(value)[1] - 1, self.lowest_exponent)
        return (value * 2.0 ** (self.man - exponent)).is_integer()

    @property
    def _nan_code(self) -> int:
        if self.finite == "all":
            return 0
        if self.finite == "fnuz":
            return 2 ** (self.exp + self.man)
        ones = 2 ** (self.exp + self.man) - 1
        quiet = ones - (2 ** (self.man - 1) - 1) if self.man else ones
        return quiet if self.finite == "ieee" else ones


def grid_name(spec: Format) -> str:
    """Returns what tables call a grid: "int8", "uint4", "e4m3fn", "Codebook of 4 bits"."""
    if isinstance(spec, FloatFormat):
        return f"e{spec.exp}m{spec.man}{spec.finite if spec.finite in ('fn', 'fnuz') else ''}"
    unsigned = getattr(spec, "unsigned", None)
    if unsigned is None:
        return f"{type(spec).__name__} of {spec.num_bits} bits"
    return f"{'u' if unsigned else ''}int{spec.num_bits}"
