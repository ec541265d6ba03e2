"""`Op`: what an interpreter must know of an operation: its name and where its operands are."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

Arguments = tuple[Sequence[Any], Mapping[str, Any]]


class Layout(NamedTuple):
    """Which axes of an operand are its channels.

    Attributes:
        axis: the channel axis; None if there is none.
        groups: the operand's first axis is taken apart into (groups, rest) before `axis` counts.
    """

    axis: int | tuple[int, ...] | None
    groups: int = 1


Axis = int | None | Callable[[Arguments], Layout]


@dataclass(frozen=True)
class Slot:
    """One operand of an operation.

    Attributes:
        role: its name in `site.role`.
        kind: "inputs" or "weight", the field of a rule that decides about it.
        position: which positional argument it is; -1 for operands of composites, which have none.
        keyword: its name when it is passed by name.
        axis: its channel axis, or a function of the call that finds its `Layout`.
    """

    role: str
    kind: str
    position: int
    keyword: str | None = None
    axis: Axis = None

    def layout(self, call: Arguments) -> Layout:
        """Returns which axes of the operand are its channels in this call."""
        return self.axis(call) if callable(self.axis) else Layout(self.axis)

    def read(self, call: Arguments) -> Any:
        """Returns the operand; None if it was not passed."""
        args, kwargs = call
        return args[self.position] if self.position < len(args) else kwargs.get(self.keyword or "")

    def write(self, call: tuple[list[Any], dict[str, Any]], value: Any) -> None:
        """Puts another operand in a call."""
        args, kwargs = call
        if self.position < len(args):
            args[self.position] = value
        else:
            kwargs[self.keyword or ""] = value


@dataclass(frozen=True)
class Op:
    """An operation as rules see it.

    Attributes:
        name: what sites and rules call it.
        slots: its operands.
        opt_in: whether only rules that name it apply to it.
        same_shape: whether it counts only between tensors of one shape (a residual, not a mask).
        both_tensors: whether it counts only between two tensors.
        functional: for a form that writes its first operand, the form that does not.
    """

    name: str
    slots: tuple[Slot, ...]
    opt_in: bool = False
    same_shape: bool = False
    both_tensors: bool = False
    functional: Callable[..., Any] | None = None


def op_of(
    function: Callable[..., Any],
    name: str,
    inputs: Sequence[int | str],
    weight: int | str | None,
    axis: Axis,
    opt_in: bool = False,
) -> Op:
    """Returns the Op of a function whose operands are given by position or name.

    Raises:
        ValueError: an operand is named that the function's signature does not have.
    """
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        names = []
    slots = []
    for i, operand in enumerate(inputs):
        role = "input" if len(inputs) == 1 else f"input{i}"
        slots.append(Slot(role, "inputs", *_place(name, operand, names), axis=-1))
    if weight is not None:
        slots.append(Slot("weight", "weight", *_place(name, weight, names), axis=axis))
    return Op(name, tuple(slots), opt_in=opt_in)


def _place(op: str, operand: int | str, names: list[str]) -> tuple[int, str | None]:
    if isinstance(operand, str):
        if operand not in names:
            raise ValueError(
                f"op {op!r}: operands must be arguments of it, {names}, got {operand!r}."
            )
        return names.index(operand), operand
    return operand, names[operand] if operand < len(names) else None


def floats_of(x: Any) -> Tensor | None:
    """Returns the floating-point tensor of an operand: itself, its features, or None."""
    values = getattr(x, "features", x)
    return values if isinstance(values, Tensor) and values.is_floating_point() else None
