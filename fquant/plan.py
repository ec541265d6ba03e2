"""`Plan`: where a model's operations are and what rules do with them, as data."""

from dataclasses import dataclass, replace

from fquant.formats import grid_name
from fquant.observers import Observer
from fquant.op_rules import OpRule, Quantizer, skip


@dataclass(frozen=True)
class Operand:
    """One tensor of a site.

    Attributes:
        role: "input", "input0", "weight", "output", ...; its quantizer is `site.role`.
        shape: its shape in the example; for a list of tensors, that of the first.
        parameter: the parameter it is, by name; None for activations and computed weights.
        quantizer: how it is quantized, axes filled in; None to leave it in floating point.
    """

    role: str
    shape: tuple[int, ...]
    parameter: str | None = None
    quantizer: Quantizer | None = None


@dataclass(frozen=True)
class Site:
    """One operation at one place in a model.

    Attributes:
        name: `path/op#k`: the k-th such operation in the forward of the module at path.
        op: the operation.
        path: the module whose forward runs it.
        module: the class of that module.
        operands: its tensors, in the operation's order, and last the output if that is quantized.
        rule: which rule decided, counted from 0; None if no rule matched.
    """

    name: str
    op: str
    path: str
    module: str
    operands: tuple[Operand, ...]
    rule: int | None


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found: pure data; two plans are equal if everything in them is.

    Attributes:
        sites: every operation that rules could reach, in the order of first execution.
        rules: the rules, in order.
        method: which method of the model was followed.
    """

    sites: tuple[Site, ...]
    rules: tuple[OpRule, ...]
    method: str = "forward"

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Every quantizer by name, `site.role`."""
        return {
            f"{site.name}.{operand.role}": operand.quantizer
            for site in self.sites
            for operand in site.operands
            if operand.quantizer is not None
        }

    @property
    def observers(self) -> dict[str, Observer]:
        """The observer of every quantizer that is calibrated, by name; for `calibrate`'s like."""
        return {n: q.observer for n, q in self.quantizers.items() if not q.dynamic}

    @property
    def unquantized(self) -> tuple[Site, ...]:
        """The sites that stay in floating point."""
        return tuple(s for s in self.sites if all(o.quantizer is None for o in s.operands))

    def diff(self, other: "Plan") -> str:
        """Returns the lines in which another plan's table differs, `-` here and `+` there."""
        mine, theirs = (dict(p._rows()) for p in (self, other))
        lines = []
        for name in dict.fromkeys([*mine, *theirs]):
            if mine.get(name) != theirs.get(name):
                lines += [f"- {name}  {mine[name]}"] if name in mine else []
                lines += [f"+ {name}  {theirs[name]}"] if name in theirs else []
        return "\n".join(lines)

    def merge(self, other: "Plan") -> "Plan":
        """Returns the plan with the sites of another one of the same rules, for another branch.

        Raises:
            ValueError: rules or methods differ, or a site that both have does.
        """
        if (self.rules, self.method) != (other.rules, other.method):
            raise ValueError("Plan.merge: other must be made with the same rules and method.")
        mine = {site.name: site for site in self.sites}
        for site in other.sites:
            same = replace(site, operands=()) == replace(mine.get(site.name, site), operands=())
            if not same or quantizers_of(site) != quantizers_of(mine.get(site.name, site)):
                raise ValueError(
                    f"Plan.merge: site {site.name!r} must be the same in both plans, "
                    f"got {mine[site.name]} and {site}."
                )
        new = tuple(site for site in other.sites if site.name not in mine)
        return replace(self, sites=self.sites + new)

    def _rows(self) -> list[tuple[str, str]]:
        rows = []
        for site in self.sites:
            parts = [f"{o.role} {'x'.join(map(str, o.shape))} {_grid(o)}" for o in site.operands]
            rule = "-" if site.rule is None else str(site.rule)
            rows.append((site.name, f"{site.module}  [{rule}]  " + "; ".join(parts)))
        return rows

    def __str__(self) -> str:
        rows = [("site", "module  [rule]  operands"), *self._rows()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {rest}" for name, rest in rows)


def require_plan(function: str, plan: object) -> None:
    """Raises TypeError unless plan is a Plan."""
    if not isinstance(plan, Plan):
        raise TypeError(
            f"{function}: plan must be a Plan, from make_plan(model, rules, args), "
            f"got {type(plan).__name__}."
        )


def skip_first_and_last(plan: Plan) -> list[OpRule]:
    """Returns rules that leave the first and the last layer with a weight in floating point.

    Those are the modules in which a plan's first and last operation with a weight run, in the order of
    execution; where one layer runs twice, by its first run.

    Raises:
        ValueError: no site of the plan has a weight.

    Example:
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
        >>> everything = fquant.make_plan(model, fquant.w8a8(), (torch.ones(1, 2),))
        >>> rules = [*skip_first_and_last(everything), *fquant.w8a8()]
        >>> plan = fquant.make_plan(model, rules, (torch.ones(1, 2),))
        >>> [site.name for site in plan.unquantized]
        ['0/linear#0', '3/linear#0']
    """
    paths = [
        site.path for site in plan.sites if any(o.role.startswith("weight") for o in site.operands)
    ]
    if not paths:
        raise ValueError(
            f"skip_first_and_last: plan must have a site with a weight, got {len(plan.sites)} without."
        )
    return skip(*dict.fromkeys([paths[0], paths[-1]]))


def quantizers_of(site: Site) -> list[tuple[str, Quantizer | None]]:
    """Returns (role, quantizer) of every operand."""
    return [(operand.role, operand.quantizer) for operand in site.operands]


def _grid(operand: Operand) -> str:
    q = operand.quantizer
    if q is None:
        return "float"
    axis = "" if q.spec.axis is None else f" axis {q.spec.axis}"
    return f"{grid_name(q.spec)}{axis}{' dynamic' if q.dynamic else ''}"
