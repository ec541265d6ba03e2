"""A model under a plan, as functions of tensors: observe its sites, or fake-quantize them.

    stats  = init_stats(plan)
    y, stats = observe(model, plan)(params, stats, *args)      one batch; calibrate_model folds many
    qstate = finalize(plan, stats)                             {quantizer: scale}
    y = fake_quant(model, plan)(params, qstate, *args)         differentiable in params and qstate

Both take `params`, a dict with every parameter of the model by name, and any of its buffers; what a
model does to its buffers happens to copies. They run under grad, vmap, jvp, `torch.compile` in one
graph, and export. The model that they are made from is read once, and never written.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fquant.calibration import at_site, require_sites, require_stats, state_types
from fquant.interception.interpreter import Interpreter
from fquant.interception.nesting import outside_transforms, transform_level
from fquant.interception.operation import Arguments, Op, floats_of
from fquant.interception.ops import DEFAULT_OPS, Ops
from fquant.interception.shadow import shadow_of
from fquant.op_rules import Quantizer
from fquant.plan import Plan
from fquant.planning import opted
from fquant.progress import progress_bar
from fquant.qstate import (
    State,
    dynamic_range,
    fake_quantize_operand,
    qstate_names,
    zero_point_of,
)

Params = Mapping[str, Tensor]


def init_stats(plan: Plan) -> dict[str, Any]:
    """Returns the statistics that have seen nothing: `{quantizer: observer state}`."""
    return {name: observer.init() for name, observer in plan.observers.items()}


def observe(
    model: nn.Module,
    plan: Plan,
    *,
    train: bool | None = None,
    with_buffers: bool = False,
    ops: Ops = DEFAULT_OPS,
) -> Callable[..., Any]:
    """Returns `f(params, stats, *args, **kwargs) -> (output, stats)`: the model, watched.

    The output is the model's own, in floating point.

    Args:
        model: what the plan was made for.
        plan: where to look.
        train: the training flag of all modules; None for what each has now.
        with_buffers: return `(output, stats, buffers)`, buffers by name after the call; otherwise
            updates, such as batch norm's running statistics in train mode, are dropped.
        ops: the table that the plan was made with.

    Raises:
        ValueError: (when called) stats are of another plan; params lack a parameter or have unknown
            names; the model runs an operation that the plan has not seen. The message names it.
    """
    program = _Program(model, plan, train, ops)

    def observed(params: Params, stats: State, *args: Any, **kwargs: Any) -> Any:
        require_stats("observe", stats, program.states)
        interpreter = _Observe(program, stats)
        y, buffers = program.run("observe", interpreter, params, args, kwargs)
        return (y, interpreter.stats, buffers) if with_buffers else (y, interpreter.stats)

    return observed


def fake_quant(
    model: nn.Module,
    plan: Plan,
    *,
    train: bool | None = None,
    with_buffers: bool = False,
    ops: Ops = DEFAULT_OPS,
) -> Callable[..., Any]:
    """Returns `f(params, qstate, *args, **kwargs) -> output`: the model with its sites on the grid.

    Arguments are those of `observe`; with_buffers gives `(output, buffers)`. Gradients are those of
    `fquant.fake_quantize`, with respect to params and to qstate.

    Raises:
        ValueError: (when called) as `observe`; or a scale's shape does not fit its site.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> params = {"weight": torch.tensor([[1.0, 0.26]])}
        >>> plan = fquant.make_plan(model, fquant.w4a8(), (torch.ones(1, 2),))
        >>> stats = fquant.calibrate_model(model, plan, params, [torch.ones(1, 2)])
        >>> qstate = fquant.finalize(plan, stats)
        >>> sorted(qstate)
        ['linear#0.input', 'linear#0.weight']
        >>> fake_quant(model, plan)(params, qstate, torch.ones(1, 2))
        tensor([[1.2857]])
    """
    program = _Program(model, plan, train, ops)

    def fake_quantized(params: Params, qstate: State, *args: Any, **kwargs: Any) -> Any:
        require_sites("fake_quant", "qstate", qstate, program.calibrated)
        interpreter = _FakeQuantize(program, qstate)
        y, buffers = program.run("fake_quant", interpreter, params, args, kwargs)
        return (y, buffers) if with_buffers else y

    return fake_quantized


def calibrate_model(
    model: nn.Module,
    plan: Plan,
    params: Params,
    batches: Iterable[Any],
    stats: State | None = None,
    *,
    ops: Ops = DEFAULT_OPS,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Returns the statistics after all batches, from forward passes in eval mode without gradients.

    Args:
        model: what the plan was made for.
        plan: where to look.
        params: parameters, and buffers, by name.
        batches: each a tensor or record, a tuple of positional arguments, or a dict of keyword ones.
        stats: statistics to go on from; None to start afresh.
        ops: the table that the plan was made with.
        progress: whether to show a progress bar (tqdm); None to show one if tqdm is installed.

    Raises:
        ValueError: as `observe`.
    """
    watched = observe(model, plan, train=False, ops=ops)
    states: Any = init_stats(plan) if stats is None else stats
    for batch in progress_bar(batches, "calibrate", progress):
        args: tuple[Any, ...] = batch if isinstance(batch, tuple) else (batch,)
        with torch.no_grad():
            if isinstance(batch, dict):
                states = watched(params, states, **batch)[1]
            else:
                states = watched(params, states, *args)[1]
    return dict(states)


class _Program:
    """What both transforms need of a model and a plan, worked out once."""

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
        aliases = self.shadow.named_parameters(remove_duplicate=False)
        names = {id(p): n for n, p in self.shadow.named_parameters()}
        self.known = {name: names[id(p)] for name, p in aliases}
        self._threads = threading.local()

    def run(
        self, function: str, interpreter: Interpreter, params: Params, args: Any, kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Returns the model's output and its buffers after the call."""
        state = dict(params)
        given = set()
        for name in params:
            if name in self.known:
                given.add(self.known[name])
            elif name not in self.buffers:
                raise ValueError(
                    f"{function}: params must name tensors of the model, got {name!r}."
                )
        for name in self.parameters:
            if name not in given:
                raise ValueError(f"{function}: params must have every parameter, lacks {name!r}.")
        for name, buffer in self.buffers.items():
            state[name] = params.get(name, buffer).clone()
        y = interpreter.run(functional_call, self._shadow(), state, args, kwargs)
        return y, {name: state[name] for name in self.buffers}

    def _shadow(self) -> nn.Module:
        """One shadow per thread: functional_call puts tensors into it while it runs.

        Dynamo traces under a lock, and only imagines what functional_call does.
        """
        if torch.compiler.is_compiling():
            return self.shadow
        if not hasattr(self._threads, "shadow"):
            self._threads.shadow = shadow_of(self.shadow, {})
        return self._threads.shadow


class _Planned(Interpreter):
    """An interpreter that follows a plan."""

    def __init__(self, program: _Program) -> None:
        super().__init__(program.ops, program.opted, program.distinct)
        self.sites = program.sites

    def operands_at(self, name: str, op: Op, call: Arguments) -> Mapping[str, Any]:
        actions = self.sites.get(name)
        if actions is None and _could_be_a_site(op, call):
            raise ValueError(
                f"site {name!r}: must be in the plan, which has {len(self.sites)} others. Make the "
                "plan with arguments that reach it, or join it to another with Plan.merge."
            )
        return {} if actions is None else actions


class _Observe(_Planned):
    def __init__(self, program: _Program, stats: State) -> None:
        super().__init__(program)
        self.stats = dict(stats)
        self.level = transform_level()

    def operand(self, name: str, action: Quantizer, x: Any) -> Any:
        values = floats_of(x)
        if not action.dynamic and values is not None:
            if transform_level() != self.level:
                axis = getattr(action.observer, "axis", None)
                values = at_site(name, outside_transforms, values, self.level, axis)
            values = _grouped(values, action.groups)
            self.stats[name] = at_site(name, action.observer.update, self.stats[name], values)
        return x


class _FakeQuantize(_Planned):
    def __init__(self, program: _Program, qstate: State) -> None:
        super().__init__(program)
        self.qstate = qstate

    def operand(self, name: str, action: Quantizer, x: Any) -> Any:
        return at_site(name, self._on_grid, name, x, action)

    def _on_grid(self, name: str, x: Any, quantizer: Quantizer) -> Any:
        if hasattr(x, "features"):
            return x.with_features(self._on_grid(name, x.features, quantizer))
        y = _grouped(x, quantizer.groups)
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


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.reshape(groups, -1, *x.shape[1:])


def _could_be_a_site(op: Op, call: Arguments) -> bool:
    for slot in op.slots:
        x = slot.read(call) if slot.position >= 0 else None
        x = x[0] if isinstance(x, list | tuple) and x else x
        if slot.position < 0 or floats_of(x) is not None:
            return True
    return False
