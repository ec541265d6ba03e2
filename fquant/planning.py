"""`make_plan`: one run of a model on tensors without data, in which rules meet operations."""

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from fquant.calibration import at_site
from fquant.granularity import groups
from fquant.interception.interpreter import SITE, Interpreter
from fquant.interception.operation import Arguments, Layout, Op, Slot, floats_of
from fquant.interception.ops import DEFAULT_OPS, Ops
from fquant.interception.shadow import shadow_of
from fquant.op_rules import OpRule
from fquant.plan import Operand, Plan, Site, quantizers_of
from fquant.rules import UnusedRuleWarning

_VALUE_READ = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)
# Products of two activations by default; where an operand is a parameter itself, it is the weight.
_PRODUCTS = ("matmul", "bmm", "mm", "addmm", "baddbmm", "einsum")


def make_plan(
    model: nn.Module,
    rules: Sequence[OpRule],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ops: Ops = DEFAULT_OPS,
    method: str = "forward",
    fake: bool = True,
) -> Plan:
    """Returns what the rules do to a model, found by running it once on tensors without data.

    Args:
        model: any module; not written.
        rules: in order of precedence. Each that decided nothing is reported by an UnusedRuleWarning.
        args: example arguments, of which shapes and dtypes count; any pytree of tensors.
        kwargs: example keyword arguments.
        ops: which functions are operations (`register_op`, `replace_forward`).
        method: the method to follow, and to run in the transforms.
        fake: run on tensors without data; False computes for real, for models whose control flow
            looks at values; the plan then has the branches that it takes (see `Plan.merge`).

    Raises:
        TypeError: rules are not a list of OpRules.
        ValueError: a rule names an operation that the table does not have; a block does not divide its
            axis; the model reads values of tensors and fake is True, or an argument is a view of a
            torch.sparse tensor; a module has a forward set on the instance.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> print(make_plan(model, fquant.w8a8(), (torch.ones(2, 4),)))
        site        module  [rule]  operands
        0/linear#0  Linear  [0]  input 2x4 int8; weight 3x4 int8 axis 0
    """
    _require_rules(rules)
    shadow = shadow_of(model, ops.forwards, train=False, method=method)
    state = {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}
    inputs = (state, args, dict(kwargs or {}))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if fake:
            mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
            # One for one, since modules compare their arguments by `is`.
            detached: dict[int, Tensor] = {}

            def without_data(t: Tensor) -> Tensor:
                return mode.from_tensor(t if t.is_leaf else detached.setdefault(id(t), t.detach()))

            try:
                inputs = pytree.tree_map_only(Tensor, without_data, inputs)
                with mode:
                    planner = _run(shadow, inputs, ops, rules)
            except _VALUE_READ as error:
                raise ValueError(
                    f"make_plan: {type(model).__name__} must not read values of tensors to be planned "
                    "without data; fake=False runs it on the example for real."
                ) from error
            except fake_tensor.UnsupportedFakeTensorException as error:
                raise ValueError(
                    "make_plan: arguments must be tensors that torch can follow without data, got a "
                    f"view of a sparse one or the like ({error}). clone() it."
                ) from error
        else:
            planner = _run(shadow, pytree.tree_map_only(Tensor, torch.clone, inputs), ops, rules)
    known = ops.names | planner.seen
    unknown = sorted({op for rule in rules for op in rule.ops} - known)
    if unknown:
        like = {n for op in unknown for n in difflib.get_close_matches(op.lower(), known)}
        hint = f" Names like it: {', '.join(sorted(like))}." if like else ""
        raise ValueError(
            f"make_plan: rules must name operations of ops, {sorted(known)}, got {unknown}.{hint}"
        )
    for i, rule in enumerate(rules):
        if i not in planner.used:
            why = planner.why_unused(rule)
            warnings.warn(f"rules[{i}] decided no site: {why}.", UnusedRuleWarning, stacklevel=2)
    for site in planner.sites.values():
        _require_groups(site)
    return Plan(tuple(planner.sites.values()), tuple(rules), method)


def opted(rules: Sequence[OpRule]) -> frozenset[str]:
    """Returns the operations that rules name; of those that are opt-in, only these are sites."""
    return frozenset(name for rule in rules for name in rule.ops)


def _require_rules(rules: object) -> None:
    wrong = (
        [r for r in rules if not isinstance(r, OpRule)]
        if isinstance(rules, list | tuple)
        else [rules]
    )
    if wrong:
        raise TypeError(
            f"make_plan: rules must be a list of OpRules, such as w8a8() returns, got {wrong[0]!r}."
        )


def _require_groups(site: Site) -> None:
    """Raises ValueError unless axes are there and blocks divide them, where a rule gave either."""
    for operand in site.operands:
        q = operand.quantizer
        if q is None or q.groups != 1 or q.spec.axis is None:
            continue
        if q.per == "axis" or q.spec.block is not None:
            x = torch.empty(operand.shape, device="meta")
            at_site(
                f"{site.name}.{operand.role}", groups, "make_plan", x, q.spec.axis, q.spec.block
            )


def _run(shadow: nn.Module, inputs: Any, ops: Ops, rules: Sequence[OpRule]) -> "_Planner":
    state, args, kwargs = inputs
    planner = _Planner(ops, rules, {id(tensor): name for name, tensor in state.items()})
    planner.run(functional_call, shadow, state, args, kwargs)
    return planner


class _Planner(Interpreter):
    """Writes down every site and what the first matching rule makes of it."""

    def __init__(self, ops: Ops, rules: Sequence[OpRule], names: Mapping[int, str]) -> None:
        super().__init__(ops, opted(rules))
        self.rules = rules
        self.names = names
        self.sites: dict[str, Site] = {}
        self.used: set[int] = set()
        self.seen: set[str] = set()
        self.places: dict[tuple[str, str], tuple[list[type], bool]] = {}  # by path and operation
        self.met: tuple[Site, OpRule | None] | None = None  # whose result is not there yet

    def call(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        operands = [(slot.role, slot.read((args, kwargs))) for slot in op.slots]
        before = [(role, x, x._version) for role, x in operands if _has_version(x)]
        y = None
        try:
            y = super().call(op, func, args, kwargs)
        finally:  # a model may catch what its operation raises
            site = self._finish(op, y)
        if op.functional is None and site is not None:
            quantized = {role for role, quantizer in quantizers_of(site) if quantizer is not None}
            for role, x, version in before:
                if x._version != version and role in quantized:
                    raise ValueError(
                        f"site {site.name!r}: a quantized operation must not write its {role} in place, "
                        "because what it writes to is the rounded copy. Leave it in floating point by a "
                        "rule."
                    )
        return y

    def mark(self, mark: str, x: Any) -> Any:
        y = super().mark(mark, x)
        self._finish(SITE, y)
        return y

    def operands_at(self, name: str, op: Op, call: Arguments) -> Mapping[str, Any]:
        site, rule = self._begin(name, op)
        operands = [self._operand(op, slot, slot.read(call), call, rule) for slot in op.slots]
        kept = tuple(o for o in operands if o is not None)
        self.met = replace(site, operands=kept), rule
        return {}

    def _finish(self, op: Op, y: Any) -> Site | None:
        """Writes down the site that was met, now that its result is known."""
        if self.met is None:
            return None
        (site, rule), self.met = self.met, None
        choice = None if rule is None else rule.quantizer("output")
        values = floats_of(y)
        if choice is not None and values is not None:
            output = choice.at(_output_layout(op), values.ndim)
            operand = Operand("output", tuple(map(int, values.shape)), None, output)
            site = replace(site, operands=(*site.operands, operand))
        if site.operands:
            self._add(site)
        return site

    def operand_of_composite(self, name: str, op: Op, role: str, x: Any) -> Any:
        site, rule = self._begin(name, op)
        site = self.sites.get(site.name, site)
        slot = next(slot for slot in op.slots if slot.role == role)
        operand = self._operand(op, slot, x, ((), {}), rule)
        if operand is not None and role not in [o.role for o in site.operands]:
            self.sites[site.name] = replace(site, operands=(*site.operands, operand))
        return x

    def _begin(self, name: str, op: Op) -> tuple[Site, OpRule | None]:
        self.seen.add(op.name)
        frame = self.frames[-1]
        classes = [f.cls for f in self.frames if f.cls is not None]
        self.places.setdefault((frame.path, op.name), (classes, op.opt_in))
        for i, rule in enumerate(self.rules):
            if rule.matches(frame.path, classes, op.name, op.opt_in):
                self.used.add(i)
                name = name if rule.share else f"{name}@{frame.call}"
                return Site(name, op.name, frame.path, self._module(), (), i), rule
        return Site(name, op.name, frame.path, self._module(), (), None), None

    def why_unused(self, rule: OpRule) -> str:
        """Returns why a rule decided nothing."""
        places = [(path, *rest, op) for (path, op), rest in self.places.items()]
        if any(rule.matches(path, classes, op, opt_in) for path, classes, opt_in, op in places):
            return "rules before it took what it matches"
        paths = dict.fromkeys(path for path, *_ in places)
        if not any(re.fullmatch(rule.path, path) for path in paths):
            more = f" and {len(paths) - 10} more" if len(paths) > 10 else ""
            at = f"{list(paths)[:10]}{more}"
            return f"no operation is at a path that matches {rule.path!r}, but at {at}"
        if rule.types and not any(
            replace(rule, path=".*", ops=(op,)).matches(path, classes, op, opt_in)
            for path, classes, opt_in, op in places
        ):
            return f"no operation is in a module of types {rule.types}"
        return (
            f"no operation meets path {rule.path!r}, types {rule.types} and ops {rule.ops} at once"
        )

    def _module(self) -> str:
        cls = self.frames[-1].cls
        return "" if cls is None else cls.__name__

    def _operand(
        self, op: Op, slot: Slot, x: Any, call: Arguments, rule: OpRule | None
    ) -> Operand | None:
        if isinstance(x, list | tuple):
            x = x[0] if x else None
        values = floats_of(x)
        if values is None:
            return None
        name = self.names.get(id(x))
        weight = slot.kind == "weight" or (name is not None and op.name in _PRODUCTS)
        choice = None if rule is None else rule.quantizer("weight" if weight else "inputs")
        quantizer = None if choice is None else choice.at(slot.layout(call), values.ndim)
        return Operand(slot.role, tuple(map(int, values.shape)), name, quantizer)

    def _add(self, site: Site) -> None:
        known = self.sites.get(site.name, site)
        if quantizers_of(known) != quantizers_of(site):
            raise ValueError(
                f"site {site.name!r}: calls of one module must not differ in what is quantized, "
                f"got {quantizers_of(known)} and {quantizers_of(site)}. "
                "OpRule(share=False) tells them apart."
            )
        self.sites.setdefault(site.name, site)


def _has_version(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_inference()


def _output_layout(op: Op) -> Layout:
    """The output's channels are taken to be where the first input's are; else on the last axis."""
    axes = [slot.axis for slot in op.slots if slot.kind == "inputs" and isinstance(slot.axis, int)]
    return Layout(axes[0] if axes else -1)
