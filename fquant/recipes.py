"""Rules and plans as plain dicts, lists and strings: for YAML or JSON files, and back."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fquant.op_rules import OpRule
from fquant.plan import Plan

_KIND = "kind"


def rules_to_dicts(rules: Sequence[OpRule]) -> list[dict[str, Any]]:
    """Returns a list of rules as plain data; fields at their defaults are left out.

    Example:
        >>> rules_to_dicts([fquant.OpRule("head", weight=fquant.QuantSpec(num_bits=4))])[0]["path"]
        'head'
    """
    return [to_dict(rule) for rule in rules]


def rules_from_dicts(data: Iterable[Mapping[str, Any]], *classes: type) -> list[OpRule]:
    """Returns the rules of `rules_to_dicts`, equal to those it was given.

    Args:
        data: what a JSON or YAML file holds.
        *classes: specs or observers of your own that the rules use; fquant's are known.

    Raises:
        ValueError: data names a class that is not known.
    """
    return [from_dict(item, *classes) for item in data]


def to_dict(value: Any) -> Any:
    """Returns a plan, rule, spec or observer as plain data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {_KIND: type(value).__name__}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if item != field.default:
                named[field.name] = to_dict(item)
        return named
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return value


def from_dict(data: Any, *classes: type) -> Any:
    """Returns the plan, rule, spec or observer of `to_dict`; lists become tuples.

    Raises:
        ValueError: data names a class that is not known.
    """
    if isinstance(data, Mapping):
        kind = data.get(_KIND)
        cls = {c.__name__: c for c in (*_known(), *classes)}.get(str(kind))
        if cls is None:
            raise ValueError(f"from_dict: {_KIND} must be the name of a known class, got {kind!r}.")
        return cls(**{k: from_dict(v, *classes) for k, v in data.items() if k != _KIND})
    if isinstance(data, list | tuple):
        return tuple(from_dict(item, *classes) for item in data)
    return data


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Returns a plan as plain data; `plan_from_dict` gives an equal plan back."""
    return to_dict(plan)


def plan_from_dict(data: Mapping[str, Any], *classes: type) -> Plan:
    """Returns the plan of `plan_to_dict`; arguments and errors as `rules_from_dicts`."""
    return from_dict(data, *classes)


def _known() -> list[type]:
    import fquant

    public = [getattr(fquant, name) for name in fquant.__all__]
    return [c for c in public if isinstance(c, type) and dataclasses.is_dataclass(c)]
