"""A model under a plan: its shadow, and the interpreters that do to its operands what the plan says."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fquant.calibration import at_site, state_types
from fquant.checks import values_readable
from fquant.interception.interpreter import Interpreter
from fquant.interception.operation import Arguments, Op, floats_of
from fquant.interception.ops import Ops
from fquant.interception.shadow import shadow_of
from fquant.op_rules import Quantizer
from fquant.plan import Plan
from fquant.planning import opted
from fquant.qstate import (
    State,
    dynamic_range,
    fake_quantize_operand,
    qstate_names,
    zero_point_of,
)

Params = Mapping[str, Tensor]


class PlannedModel:
    """What a transform needs of a model and a plan, worked out once.

    Attributes:
        ops: the table of operations.
        opted: operations that take part because a rule names them.
        distinct: modules whose calls have sites of their own.
        sites: `{site: {role: quantizer}}`.
        states: the types of the observers' states, by quantizer.
        calibrated: the keys of a qstate.
        shadow: the model's shadow; its tensors are the model's.
        parameters: names of the parameters, each once.
        buffers: by name.
        known: `{alias: name}` of every parameter and buffer.
    """

    def __init__(self, model: nn.Module, plan: Plan, train: bool | None, ops: Ops) -> None:
        self.ops = ops
        self.opted = opted(plan.rules)
        self.distinct = frozenset(s.name.split("@")[0] for s in plan.sites if "@" in s.name)
        self.sites = {
            site.name: {o.role: o.quantizer for o in site.operands if o.quantizer is not None}
            for site in plan.sites
        }
        self.states = state_types(plan.observers)
        self.calibrated = qstate_names(plan)
        self.shadow = shadow_of(model, ops.forwards, train, plan.method)
        self.parameters = tuple(name for name, _ in self.shadow.named_parameters())
        self.buffers = dict(self.shadow.named_buffers())
        aliases = [
            *self.shadow.named_parameters(remove_duplicate=False),
            *self.shadow.named_buffers(remove_duplicate=False),
        ]
        names = {id(t): n for n, t in reversed(aliases)}
        self.known = {name: names[id(t)] for name, t in aliases}
        self._threads = threading.local()

    def run(
        self, function: str, interpreter: Interpreter, params: Params, args: Any, kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Returns the model's output and its buffers after the call."""
        state = self.named_once(function, params)
        for name, buffer in self.buffers.items():
            state[name] = state.get(name, buffer).clone()
        y = interpreter.run(functional_call, self._shadow(), state, args, kwargs)
        return y, {name: state[name] for name in self.buffers}

    def named_once(self, function: str, params: Params) -> dict[str, Tensor]:
        """Returns params with each tensor under one name, checked; a state dict has all names."""
        if not isinstance(params, Mapping):
            raise TypeError(
                f"{function}: params must be a dict of tensors by name, such as model.state_dict(), "
                f"got {type(params).__name__}."
            )
        state: dict[str, Tensor] = {}
        for name, tensor in params.items():
            if name not in self.known:
                raise ValueError(
                    f"{function}: params must name tensors of the model, got {name!r}."
                )
            one = self.known[name]
            if not _same(state.setdefault(one, tensor), tensor):
                raise ValueError(
                    f"{function}: params must have one tensor for {one!r} and {name!r}, which are one "
                    f"in the model, got two. Leave out {name!r}."
                )
        for name in self.parameters:
            if name not in state:
                raise ValueError(f"{function}: params must have every parameter, lacks {name!r}.")
        return state

    def _shadow(self) -> nn.Module:
        """One shadow per thread: functional_call puts tensors into it while it runs.

        Dynamo traces under a lock, and only imagines what functional_call does.
        """
        if torch.compiler.is_compiling():
            return self.shadow
        if not hasattr(self._threads, "shadow"):
            self._threads.shadow = shadow_of(self.shadow, {})
        return self._threads.shadow


class Planned(Interpreter):
    """An interpreter that follows a plan."""

    def __init__(self, program: PlannedModel) -> None:
        super().__init__(program.ops, program.opted, program.distinct)
        self.sites = program.sites

    def operands_at(self, name: str, op: Op, call: Arguments) -> Mapping[str, Any]:
        actions = self.sites.get(name)
        if actions is None and _could_be_a_site(op, call):
            raise ValueError(
                f"site {name!r}: must be in the plan, which has {len(self.sites)} others. If that is "
                "a plan of this model, make it with arguments that reach the site, or join it to "
                "another with Plan.merge."
            )
        return {} if actions is None else actions


class FakeQuantizing(Planned):
    """Puts operands on their grids; `rounded` says how."""

    def __init__(self, program: PlannedModel, qstate: State) -> None:
        super().__init__(program)
        self.qstate = qstate

    def operand(self, name: str, action: Quantizer, x: Any) -> Any:
        try:
            return at_site(name, self._on_grid, name, x, action)
        except ValueError as error:
            if action.learn:
                error.add_note(
                    "This scale is trained: if a step took it out of the positive numbers, it needs a "
                    "lower learning rate than the weights do (fquant.Quantizer, learn)."
                )
            raise

    def _on_grid(self, name: str, x: Any, quantizer: Quantizer) -> Any:
        if hasattr(x, "features"):
            return x.with_features(self._on_grid(name, x.features, quantizer))
        y = grouped(x, quantizer.groups)
        y = self.rounded(name, y, quantizer, *self._range(name, y, quantizer))
        return y if quantizer.groups == 1 else y.reshape(x.shape)

    def _range(self, name: str, x: Tensor, q: Quantizer) -> tuple[Tensor, Tensor | None]:
        if q.dynamic:
            return dynamic_range(x, q)
        return self.qstate[name], None if q.symmetric else self.qstate[zero_point_of(name)]

    def rounded(
        self, name: str, x: Tensor, quantizer: Quantizer, scale: Tensor, zero_point: Tensor | None
    ) -> Tensor:
        """Returns x on the grid."""
        return fake_quantize_operand(x, quantizer, scale, zero_point)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one: the same object, or the same memory, as in a state dict."""
    if a is b or a.shape != b.shape:
        return a is b
    return values_readable(a, b) and (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride())


def grouped(x: Tensor, groups: int) -> Tensor:
    """Returns x with its first axis taken apart into (groups, rest)."""
    return x if groups == 1 else x.reshape(groups, -1, *x.shape[1:])


def _could_be_a_site(op: Op, call: Arguments) -> bool:
    for slot in op.slots:
        x = slot.read(call) if slot.position >= 0 else None
        x = x[0] if isinstance(x, list | tuple) and x else x
        if slot.position < 0 or floats_of(x) is not None:
            return True
    return False
