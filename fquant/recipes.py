"""Rules and plans as plain dicts, lists and strings, as YAML or JSON files, and back.

    save_recipe("recipe.yaml", [*skip("head"), *w8a8()])
    rules = load_recipe("recipe.yaml")

A file says nothing that code could not: every entry is a class of fquant and its fields.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fquant.op_rules import OpRule
from fquant.plan import Plan

_KIND = "kind"


def save_recipe(path: str | Path, recipe: Sequence[OpRule] | Plan) -> None:
    """Writes a list of rules, or a plan, to a file; `load_recipe` reads an equal one.

    Args:
        path: ends in .json, .yaml or .yml.
        recipe: what to write.

    Raises:
        ValueError: the file's name ends otherwise.
        ImportError: YAML without PyYAML (`pip install 'fquant[yaml]'`).

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/recipe.json"
        >>> save_recipe(path, fquant.w4a8())
        >>> load_recipe(path) == fquant.w4a8()
        True
    """
    if _is_yaml("save_recipe", path):
        text = _yaml().safe_dump(to_dict(recipe), sort_keys=False)
    else:
        text = json.dumps(to_dict(recipe), indent=2)
    Path(path).write_text(text)


def load_recipe(path: str | Path, *classes: type) -> Any:
    """Returns the list of rules, or the plan, in a file.

    Args:
        path: ends in .json, .yaml or .yml.
        *classes: specs or observers of your own that the file names; fquant's are known.

    Raises:
        ValueError: the file's name ends otherwise; it holds neither rules nor a plan, a class that is
            not known, or a field that a class has not. The message names the file.
        ImportError: YAML without PyYAML.
    """
    in_yaml = _is_yaml("load_recipe", path)
    try:
        text = Path(path).read_text()
        if in_yaml:
            yaml = _yaml()
            try:
                data = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"not YAML ({error})") from error
        else:
            data = json.loads(text)
        recipe = from_dict(data, *classes)
    except (ValueError, TypeError) as error:
        raise ValueError(f"load_recipe: {path} must hold a recipe: {error}") from error
    if isinstance(recipe, tuple) and all(isinstance(rule, OpRule) for rule in recipe):
        return list(recipe)
    if not isinstance(recipe, Plan):
        raise ValueError(f"load_recipe: {path} must hold rules or a plan, got {type(recipe)}.")
    return recipe


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
        ValueError: data names a class that is not known, or a field that a class has not.
    """
    if isinstance(data, Mapping):
        kind = data.get(_KIND)
        cls = {c.__name__: c for c in (*_known(), *classes)}.get(str(kind))
        if cls is None:
            raise ValueError(f"from_dict: {_KIND} must be the name of a known class, got {kind!r}.")
        fields = {k: from_dict(v, *classes) for k, v in data.items() if k != _KIND}
        known = {field.name for field in dataclasses.fields(cls)}
        if not fields.keys() <= known:
            raise ValueError(
                f"from_dict: {kind} must have fields among {sorted(known)}, "
                f"got {sorted(map(str, fields.keys() - known))}."
            )
        return cls(**fields)
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


def _is_yaml(function: str, path: str | Path) -> bool:
    suffix = Path(path).suffix
    if suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"{function}: path must end in .json, .yaml or .yml, got {str(path)!r}.")
    return suffix != ".json"


def _yaml() -> ModuleType:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("Recipes in YAML need PyYAML: pip install 'fquant[yaml]'.") from error
    return yaml
