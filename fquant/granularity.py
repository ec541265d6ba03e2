"""Granularity: which elements share a scale, and how a scale meets its tensor.

One rule: a scale has the rank of its tensor, and each of its axes has size 1 (shared by all), n (one
per index) or a divisor of n (one per block of neighbours). Per tensor, channel, token, group and
two-dimensional block are all instances of it; ordinary broadcasting is too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Groups(NamedTuple):
    """A tensor reshaped so that each group is what its `reduced` axes hold.

    Attributes:
        x: the tensor, blocked axes split in two.
        reduced: the axes to reduce; all others together are the groups.
        shape: the rank-preserving shape of one value per group.
    """

    x: Tensor
    reduced: list[int]
    shape: list[int]


def kept_axes(function: str, x: Tensor, axis: int | Sequence[int]) -> list[int]:
    """Returns the axes named, counted from 0; raises ValueError if one is not there or named twice."""
    require_granularity(function, axis, None)
    axes = [axis] if isinstance(axis, int) else list(axis)
    kept = [a % x.ndim for a in axes if -x.ndim <= a < x.ndim]
    if len(kept) != len(axes) or len(set(kept)) != len(axes):
        raise ValueError(
            f"{function}: axis must name different axes of a tensor of {x.ndim} axes, got {axis}."
        )
    return kept


def require_granularity(owner: str, axis: object, block: object) -> None:
    """Raises unless axis and block are ints, tuples of ints or None, and every block is at least 1."""
    for name, value in (("axis", axis), ("block", block)):
        several: Any = value if isinstance(value, Sequence) else () if value is None else (value,)
        if not all(isinstance(v, int) for v in several):
            raise TypeError(
                f"{owner}: {name} must be an int, a tuple of ints or None, got {value!r}."
            )
        if name == "block" and any(v < 1 for v in several):
            raise ValueError(f"{owner}: block must be at least 1, got {value!r}.")


def groups(
    function: str,
    x: Tensor,
    axis: int | Sequence[int],
    block: int | Sequence[int] | None = None,
) -> Groups:
    """Returns x arranged by the elements that share a scale.

    Args:
        function: the caller, for messages.
        x: any shape.
        axis: the axis or axes that are kept.
        block: how many neighbours along each kept axis share a scale: one number for all, or one
            per kept axis; None means 1.

    Raises:
        ValueError: an axis is not there, or a block does not divide its axis.
    """
    kept = kept_axes(function, x, axis)
    require_granularity(function, axis, block)
    sizes = [block or 1] * len(kept) if block is None or isinstance(block, int) else list(block)
    if len(sizes) != len(kept):
        raise ValueError(
            f"{function}: block must have one size per kept axis, {len(kept)}, got {block}."
        )
    block_of = dict(zip(kept, sizes, strict=True))
    split: list[int] = []
    reduced: list[int] = []
    shape: list[int] = []
    for a, n in enumerate(x.shape):
        size = block_of.get(a, n)
        if a in block_of and n % size:
            raise ValueError(
                f"{function}: block must divide axis {a} of size {n}, got blocks of {size}."
            )
        if a not in block_of:
            reduced.append(len(split))
            split.append(n)
            shape.append(1)
        elif size == 1:
            split.append(n)
            shape.append(n)
        else:
            split += [n // size, size]
            reduced.append(len(split) - 1)
            shape.append(n // size)
    return Groups(x.reshape(split), reduced, shape)


def spread(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns scale in a shape that broadcasts to `shape`: blocks are repeated, the rest is as it was.

    Example:
        >>> spread(torch.tensor([[1.0, 2.0]]), (3, 4))
        tensor([[1., 1., 2., 2.]])
    """
    if scale.ndim < len(shape):
        return scale
    for a, (have, want) in enumerate(zip(scale.shape, shape, strict=True)):
        if have not in (1, want):
            pieces = scale.unsqueeze(a + 1)
            repeats = [-1] * pieces.ndim
            repeats[a + 1] = want // have
            rest = list(scale.shape)
            rest[a] = want
            scale = pieces.expand(repeats).reshape(rest)
    return scale


def meets(have: Sequence[int], want: Sequence[int]) -> bool:
    """Whether a scale of shape `have` fits a tensor of shape `want` by the rule above.

    Example:
        >>> meets((2, 1), (4, 5)), meets((3, 1), (4, 5)), meets((5,), (4, 5)), meets((2,), (4, 4))
        (True, False, True, False)
    """
    leading = len(want) - len(have)
    if leading < 0:
        return False
    return all(
        h in (1, w) or (leading == 0 and h > 0 and w % h == 0)
        for h, w in zip(have, want[leading:], strict=True)
    )
