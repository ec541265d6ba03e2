"""The interpreters running in this thread, and the marks that functions and models may set."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fquant.interception.operation import Axis, Op, op_of

Function = TypeVar("Function", bound=Callable[..., Any])


class _Running(threading.local):
    def __init__(self) -> None:
        self.interpreters: list[Any] = []


RUNNING = _Running()


def current() -> Any:
    """Returns the innermost interpreter of this thread, or None."""
    return RUNNING.interpreters[-1] if RUNNING.interpreters else None


def capturing() -> bool:
    """Whether an interpreter of this thread captures a graph in which each layer is one node."""
    return any(i is not None and i.captures for i in RUNNING.interpreters)


def site(name: str, x: Any) -> Any:
    """Marks a value inside a model as a site of operation "site": rules may quantize its output.

    Outside of fquant's transforms it returns x. Anything may be marked that has floats: a tensor, or a
    record with `features`.

    Args:
        name: the site becomes `path/name#k`, with the path of the module whose forward is running.
        x: the value; what comes back is to be used in its place.

    Example:
        >>> class Residual(torch.nn.Module):
        ...     def forward(self, x):
        ...         return fquant.site("residual", x) + x.relu()
        >>> rules = [fquant.OpRule(ops=("site",), output=fquant.QuantSpec())]
        >>> fquant.make_plan(Residual(), rules, (torch.ones(2),)).sites[0].name
        'residual#0'
    """
    interpreter = current()
    return x if interpreter is None else unseen(interpreter.mark, name, x)


def quantizable(
    inputs: Sequence[int | str] = (0,),
    weight: int | str | None = None,
    axis: Axis = 0,
    name: str | None = None,
) -> Callable[[Function], Function]:
    """Makes a Python function one operation, whose operands rules can quantize.

    For functions that torch does not see as one: composites, functions of records. Functions that it
    does see (torch's own, `torch.ops`) are added to a table by `register_op` instead. Operations inside
    the function are not seen on their own.

    Args:
        inputs: which arguments are activations, by position or name.
        weight: which one is a weight.
        axis: the weight's axis of output channels.
        name: the operation's name in sites and rules; the function's own unless given.

    Example:
        >>> @fquant.quantizable(inputs=("x",), weight="w")
        ... def scaled(x, w):
        ...     return x * w
        >>> class Model(torch.nn.Module):
        ...     def forward(self, x):
        ...         return scaled(x, torch.ones(2))
        >>> fquant.make_plan(Model(), fquant.w8a8(), (torch.ones(2),)).sites[0].name
        'scaled#0'
    """

    def decorate(function: Function) -> Function:
        op = op_of(function, name or function.__name__, inputs, weight, axis)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            interpreter = current()
            if interpreter is None:
                return function(*args, **kwargs)
            return unseen(interpreter.call, op, function, args, kwargs)

        call.quantizable = op  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def opaque(function: Function) -> Function:
    """Makes a function one whose operations are no sites: rules for sums or `cat` are not about them."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if current() is None:
            return function(*args, **kwargs)
        return unseen(functools.partial(function, **kwargs), *args)

    return call  # type: ignore[return-value]  # takes and returns what function does


def operands_of(op: Op) -> Any:
    """Returns a function `(role, x) -> x` for the operands of one composite site.

    For operations that are written out as many, such as an LSTM over time: one site, whose operands are
    handed over where they occur. It returns x outside of transforms.
    """
    interpreter = current()
    if interpreter is None:
        return _unchanged
    operand = interpreter.open(op)

    def replaced(role: str, x: Any) -> Any:
        return unseen(operand, role, x)

    return replaced


def _unchanged(role: str, x: Any) -> Any:
    return x


def unseen(function: Callable[..., Any], *args: Any) -> Any:
    """Runs a function whose operations are no business of the interpreter's, though it is entered."""
    RUNNING.interpreters.append(None)
    try:
        return function(*args)
    finally:
        RUNNING.interpreters.pop()
