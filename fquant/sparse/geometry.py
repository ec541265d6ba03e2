"""`Geometry`: how a convolution's outputs lie to its inputs, apart from any cells."""

from collections.abc import Sequence
from dataclasses import dataclass, field

Sizes = int | Sequence[int]
FourSizes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
_INVERSE = "inverse "


@dataclass(frozen=True)
class Geometry:
    """The sizes of a convolution or pooling, one int per axis each.

    Attributes:
        kind: "subm", "conv" or "transposed".
        kernel_size: taps per axis.
        stride: input cells per output cell (of "transposed", output cells per input cell).
        padding: cells of zeros before and after each axis (of "transposed", cells cut off).
        dilation: cells between taps.
        output_padding: cells added after each axis; of "transposed" only.
        name: all of it in a short string, "conv k3 s2 p1"; sizes that are the usual ones are left out.
    """

    kind: str
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...] = ()
    name: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        # Once and for all: Dynamo takes sizes for dynamic numbers, of which it makes no strings.
        object.__setattr__(self, "name", self._name())

    @property
    def sizes(self) -> FourSizes:
        """Kernel size, stride, padding and dilation."""
        return self.kernel_size, self.stride, self.padding, self.dilation

    @classmethod
    def of_name(cls, name: str, axes: int) -> "Geometry":
        """Returns the geometry of `axes` axes that has a name.

        Example:
            >>> Geometry.of_name("conv k3 s2 p1,0", 2).padding
            (1, 0)
        """
        kind, *parts = name.split()
        given = {part[0]: tuple(map(int, part[1:].split(","))) for part in parts}
        sizes = {letter: size * axes if len(size) == 1 else size for letter, size in given.items()}
        kernel, dilation = sizes["k"], sizes.get("d", (1,) * axes)
        stride, padding = sizes.get("s", (1,) * axes), sizes.get("p", (0,) * axes)
        if kind == "subm":
            padding = tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True))
        extra = sizes.get("o", (0,) * axes if kind == "transposed" else ())
        return cls(kind, kernel, stride, padding, dilation, extra)

    def _name(self) -> str:
        parts = [self.kind, f"k{_short(self.kernel_size)}"]
        named = [("s", self.stride, 1), ("p", self.padding, 0), ("d", self.dilation, 1)]
        if self.kind == "subm":  # stride and padding follow from the rest
            named = named[2:]
        parts += [f"{letter}{_short(v)}" for letter, v, usual in named if set(v) != {usual}]
        if any(self.output_padding):
            parts.append(f"o{_short(self.output_padding)}")
        return " ".join(parts)


def inverse_name(name: str) -> str:
    """Returns the name of the geometry that reads where another writes; its own inverse."""
    return name[len(_INVERSE) :] if name.startswith(_INVERSE) else _INVERSE + name


def per_axis(
    function: str, argument: str, value: Sizes, axes: int, smallest: int
) -> tuple[int, ...]:
    """Returns one int per axis of an argument that may be one for all.

    Raises:
        ValueError: there are not as many, or one is too small.
    """
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or any(not isinstance(v, int) or v < smallest for v in values):
        raise ValueError(
            f"{function}: {argument} must be an int or {axes} ints of at least {smallest}, "
            f"got {value!r}."
        )
    return values


def _short(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else ",".join(map(str, values))
