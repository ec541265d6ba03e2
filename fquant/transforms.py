"""A model under a plan, as functions of tensors: observe its sites, or fake-quantize them.

    stats  = init_stats(plan)
    y, stats = observe(model, plan)(params, stats, *args)      one batch; calibrate_model folds many
    qstate = finalize(plan, stats)                             {quantizer: scale}
    y = fake_quant(model, plan)(params, qstate, *args)         differentiable in params and qstate

Both take `params`, a dict with every parameter of the model by name, and any of its buffers; what a
model does to its buffers happens to copies. They run under grad, vmap, jvp, `torch.compile` in one
graph, and export. The model that they are made from is read once, and never written.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fquant.calibration import at_site, require_sites, require_stats
from fquant.interception.nesting import outside_transforms, transform_level
from fquant.interception.operation import floats_of
from fquant.interception.ops import DEFAULT_OPS, Ops
from fquant.op_rules import Quantizer
from fquant.plan import Plan, require_plan
from fquant.planned_model import FakeQuantizing, Params, Planned, PlannedModel, grouped
from fquant.progress import progress_bar
from fquant.qstate import State


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
    require_plan("observe", plan)
    program = PlannedModel(model, plan, train, ops)

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
    require_plan("fake_quant", plan)
    program = PlannedModel(model, plan, train, ops)

    def fake_quantized(params: Params, qstate: State, *args: Any, **kwargs: Any) -> Any:
        require_sites("fake_quant", "qstate", qstate, program.calibrated)
        interpreter = FakeQuantizing(program, qstate)
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
        TypeError, ValueError: as `observe`; what the model raises has a note that names the batch.

    Example:
        >>> images, labels = torch.randn(32, 4), torch.zeros(32)
        >>> dataset = torch.utils.data.TensorDataset(images, labels)
        >>> loader = torch.utils.data.DataLoader(dataset, batch_size=8)
        >>> model = torch.nn.Linear(4, 2)
        >>> plan = fquant.make_plan(model, fquant.w8a8(), (images[:1],))
        >>> batches = (image for image, label in loader)     # what the model takes
        >>> stats = calibrate_model(model, plan, model.state_dict(), batches, progress=False)
        >>> torch.equal(stats["linear#0.input"].amax, images.abs().amax())
        True
    """
    watched = observe(model, plan, train=False, ops=ops)
    states: Any = init_stats(plan) if stats is None else stats
    for i, batch in enumerate(progress_bar(batches, "calibrate", progress)):
        args: tuple[Any, ...] = batch if isinstance(batch, tuple) else (batch,)
        try:
            with torch.no_grad():
                if isinstance(batch, dict):
                    states = watched(params, states, **batch)[1]
                else:
                    states = watched(params, states, *args)[1]
        except Exception as error:
            error.add_note(
                f"calibrate_model: batch {i} is a {_described(batch)}. A tuple holds positional "
                "arguments, a dict keyword ones, anything else is one argument. Of a loader of "
                "images and labels, give the images: (batch[0] for batch in loader)."
            )
            raise
    return dict(states)


def _described(batch: Any) -> str:
    if isinstance(batch, torch.Tensor):
        return f"tensor of shape {tuple(batch.shape)}"
    size = f" of {len(batch)}" if isinstance(batch, list | tuple | dict) else ""
    return type(batch).__name__ + size


class _Observe(Planned):
    def __init__(self, program: PlannedModel, stats: State) -> None:
        super().__init__(program)
        self.stats = dict(stats)
        self.level = transform_level()

    def operand(self, name: str, action: Quantizer, x: Any) -> Any:
        values = floats_of(x)
        if not action.dynamic and values is not None:
            if transform_level() != self.level:
                axis = getattr(action.observer, "axis", None)
                values = at_site(name, outside_transforms, values, self.level, axis)
            values = grouped(values, action.groups)
            self.stats[name] = at_site(name, action.observer.update, self.stats[name], values)
        return x
