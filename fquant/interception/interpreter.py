"""`Interpreter`: names every operation `path/op#k` and hands its operands to a subclass."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fquant.interception.operation import Arguments, Op, floats_of
from fquant.interception.ops import Ops
from fquant.interception.stack import RUNNING

SITE = Op("site", ())
NO_ARGUMENTS: Arguments = ((), {})


class Frame(NamedTuple):
    """A module whose forward is running: its path, class, which call it is, and its counters."""

    path: str
    cls: type | None
    call: int
    counts: dict[str, int]


class Interpreter(TorchFunctionMode):
    """Sees every operation of a model while it is entered, in eager code and under Dynamo.

    A subclass says what a site does to its operands (`operands_at`, `operand`). Only the innermost
    interpreter of a thread acts, so that one inside another never sees the other's arithmetic.

    Attributes:
        captures: whether functions of records are to leave one node each in a graph (`capturing`).
    """

    captures = False

    def __init__(
        self, ops: Ops, opted: Collection[str], distinct: Collection[str] = frozenset()
    ) -> None:
        super().__init__()
        self.table = ops.table
        self.opted = opted
        self.distinct = distinct
        self.frames: list[Frame] = [Frame("", None, 0, {})]
        self.calls: dict[str, int] = {}

    def run(self, function: Any, *args: Any) -> Any:
        """Returns function(*args), with this interpreter as the innermost one."""
        RUNNING.interpreters.append(self)
        try:
            with self:
                return function(*args)
        finally:
            RUNNING.interpreters.pop()

    def enter(self, path: str, cls: type) -> None:
        """A module's forward begins."""
        call = self.calls.get(path, 0)
        self.calls[path] = call + 1
        self.frames.append(Frame(path, cls, call, {}))

    def leave(self) -> None:
        """A module's forward ends."""
        self.frames.pop()

    def next_name(self, op: str) -> str:
        """Returns the name of this call.

        It counts within one call of the module, so that a module called twice keeps one quantizer,
        unless a rule tells the calls apart.
        """
        frame = self.frames[-1]
        count = frame.counts.get(op, 0)
        frame.counts[op] = count + 1
        name = f"{frame.path}/{op}#{count}" if frame.path else f"{op}#{count}"
        return f"{name}@{frame.call}" if name in self.distinct else name

    def operands_at(self, name: str, op: Op, call: Arguments) -> Mapping[str, Any]:
        """Returns what to do with the operands of a site, by role; those absent stay as they are."""
        raise NotImplementedError

    def operand(self, name: str, action: Any, x: Any) -> Any:
        """Returns what takes the place of an operand, for one of `operands_at`'s actions."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if RUNNING.interpreters[-1] is not self:
            return func(*args, **kwargs)
        op = self.table.get(func)
        if op is None:
            if func is Tensor.unflatten:  # its super() call stops Dynamo inside a mode
                return torch.unflatten(*args, **kwargs)
            return func(*args, **kwargs)
        return self.call(op, func, args, kwargs)

    def call(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs one operation with its operands replaced."""
        if (op.opt_in and op.name not in self.opted) or not _is_site(op, args, kwargs):
            return func(*args, **kwargs)
        if op.name == "einsum" and len(args) == 2 and isinstance(args[1], list | tuple):
            args = (args[0], *args[1])
        name = self.next_name(op.name)
        actions = self.operands_at(name, op, (args, kwargs))
        if not actions:
            return func(*args, **kwargs)
        if kwargs.get("out") is not None:
            raise ValueError(f"site {name!r}: a quantized operation must not write to out=.")
        positional, named = list(args), dict(kwargs)
        target = args[0] if op.functional is not None else None
        if target is not None:  # autograd keeps what the quantizer saw, which is overwritten below
            positional[0] = target.clone()
        for slot in op.slots:
            action = actions.get(slot.role)
            if action is not None:
                x = slot.read((positional, named))
                slot.write((positional, named), self._replaced(f"{name}.{slot.role}", action, x))
        y = (op.functional or func)(*positional, **named)
        if "output" in actions and floats_of(y) is not None:
            y = self.operand(f"{name}.output", actions["output"], y)
        return y if target is None else target.copy_(y)

    def mark(self, mark: str, x: Any) -> Any:
        """A value that user code marked (`fquant.site`)."""
        if floats_of(x) is None:
            return x
        name = self.next_name(mark)
        action = self.operands_at(name, SITE, ((x,), {})).get("output")
        return x if action is None else self.operand(f"{name}.output", action, x)

    def open(self, op: Op) -> Any:
        """A composite operation begins; returns what takes its operands, by role."""
        name = self.next_name(op.name)

        def operand(role: str, x: Any) -> Any:
            return self.operand_of_composite(name, op, role, x)

        return operand

    def operand_of_composite(self, name: str, op: Op, role: str, x: Any) -> Any:
        """Returns what takes the place of one operand of a composite."""
        action = self.operands_at(name, op, NO_ARGUMENTS).get(role)
        return x if action is None else self.operand(f"{name}.{role}", action, x)

    def _replaced(self, name: str, action: Any, x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [self._replaced(name, action, item) for item in x]
        return x if floats_of(x) is None else self.operand(name, action, x)


def _is_site(op: Op, args: Any, kwargs: Any) -> bool:
    if not op.both_tensors:
        return True
    operands = [slot.read((args, kwargs)) for slot in op.slots]
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in operands):
        return False
    return not op.same_shape or operands[0].shape == operands[1].shape


def _skip_frame() -> None:
    """Keeps Dynamo from compiling the mode's frames by themselves, where a graph breaks in a model.

    It fails then on `float(tensor)`. Inlining into a full graph is not affected.
    """
    try:
        from torch._dynamo.eval_frame import skip_code
    except (
        ImportError
    ):  # a private name: without it graph breaks inside a mode stay as torch has them
        return
    for method in (Interpreter.__torch_function__, Interpreter.call):
        skip_code(method.__code__)


_skip_frame()
