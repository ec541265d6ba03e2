"""The state of a plan's quantizers: `{quantizer: scale}`, and a zero point where a range is asymmetric.

    qstate = finalize(plan, stats)
    qstate["stem/conv2d#0.input"]               the step
    qstate["stem/conv2d#0.input.zero_point"]    only with Quantizer(symmetric=False)

Every entry is a floating-point tensor, so the whole dict may be differentiated; a zero point holds an
integer and its derivative is zero.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fquant.affine import fake_quantize
from fquant.calibration import at_site, require_stats, state_types
from fquant.learned import fake_quantize_lsq, learned_clip
from fquant.op_rules import Quantizer
from fquant.plan import Plan, require_plan
from fquant.scales import compute_amax, compute_scale, compute_scale_zero_point
from fquant.straight_through import straight_through

State = Mapping[str, Any]


def qstate_names(plan: Plan) -> tuple[str, ...]:
    """Returns the keys of a plan's qstate, in order; quantizers with dynamic ranges have none.

    Example:
        >>> rules = [fquant.OpRule(inputs=fquant.Quantizer(symmetric=False))]
        >>> qstate_names(fquant.make_plan(torch.nn.Linear(2, 1), rules, (torch.ones(1, 2),)))
        ('linear#0.input', 'linear#0.input.zero_point')
    """
    names: list[str] = []
    for name, quantizer in plan.quantizers.items():
        if not quantizer.dynamic:
            names += [name] if quantizer.symmetric else [name, zero_point_of(name)]
    return tuple(names)


def zero_point_of(name: str) -> str:
    """Returns the key under which qstate holds the zero point of a quantizer."""
    return f"{name}.zero_point"


def finalize(plan: Plan, stats: State) -> dict[str, Tensor]:
    """Returns the step of every quantizer, `{quantizer: scale}`: what there is to freeze or train.

    A quantizer with `symmetric=False` has a zero point beside its step (`fquant.qstate`).

    Raises:
        ValueError: a quantizer has seen nothing, or stats are of another plan; the message names it.

    Example:
        >>> rules = [fquant.OpRule(inputs=fquant.Quantizer(symmetric=False))]
        >>> model, x = torch.nn.Linear(2, 1), torch.tensor([[-1.0, 1.55]])
        >>> plan = fquant.make_plan(model, rules, (x,))
        >>> stats = fquant.calibrate_model(model, plan, dict(model.named_parameters()), [x])
        >>> finalize(plan, stats)
        {'linear#0.input': tensor(0.0100), 'linear#0.input.zero_point': tensor(-28.)}
    """
    require_plan("finalize", plan)
    require_stats("finalize", stats, state_types(plan.observers))
    qstate: dict[str, Tensor] = {}
    for name, observer in plan.observers.items():
        quantizer = plan.quantizers[name]
        if quantizer.symmetric:
            amax = at_site(name, observer.amax, stats[name])
            qstate[name] = at_site(name, compute_scale, amax, quantizer.spec)
        else:
            low, high = at_site(name, quantizer.range_of, stats[name])
            scale, zero_point = at_site(name, compute_scale_zero_point, low, high, quantizer.spec)
            qstate[name], qstate[zero_point_of(name)] = scale, zero_point.to(scale.dtype)
    return qstate


def split_qstate(plan: Plan, qstate: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns (learned, frozen): qstate taken apart by `Quantizer.learn`; `{**learned, **frozen}` is it.

    Zero points are frozen.

    Example:
        >>> learn = fquant.Quantizer(fquant.QuantSpec(), learn=True)
        >>> model = torch.nn.Linear(2, 1)
        >>> rules = [fquant.OpRule(inputs=learn, weight=fquant.QuantSpec())]
        >>> plan = fquant.make_plan(model, rules, (torch.ones(1, 2),))
        >>> scales = {name: torch.ones(()) for name in plan.quantizers}
        >>> learned, frozen = split_qstate(plan, scales)
        >>> list(learned), list(frozen)
        (['linear#0.input'], ['linear#0.weight'])
    """
    trained = {name for name, quantizer in plan.quantizers.items() if quantizer.learn}
    learned = {name: scale for name, scale in qstate.items() if name in trained}
    return learned, {name: scale for name, scale in qstate.items() if name not in trained}


def dynamic_range(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor | None]:
    """Returns (scale, zero_point) that x itself asks for; no zero point for a symmetric range."""
    spec: Any = quantizer.spec
    if quantizer.symmetric:
        return compute_scale(compute_amax(x, spec.axis, getattr(spec, "block", None)), spec), None
    low, high = quantizer.range_of(quantizer.observer.update(quantizer.observer.init(), x))
    return compute_scale_zero_point(low, high, spec)


def fake_quantize_operand(
    x: Tensor, quantizer: Quantizer, scale: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    """Returns an operand on its quantizer's grid, in the arithmetic of `fquant.fake_quantize`.

    The derivative with respect to scale is that of `quantizer.learn`: clipping, LSQ or PACT.

    Args:
        x: the operand.
        quantizer: how, with the axes filled in.
        scale: its step, from qstate or `dynamic_range`.
        zero_point: with `symmetric=False`.
    """
    spec: Any = quantizer.spec
    if quantizer.learn == "lsq":
        return fake_quantize_lsq(x, scale, spec=spec)
    if quantizer.learn == "pact":
        grid = fake_quantize(x.detach(), scale.detach(), spec=spec)
        return straight_through(grid, learned_clip(x, 0.0, scale * spec.q_max).to(x.dtype))
    return fake_quantize(x, scale, zero_point, spec)
