"""Records: frozen dataclasses that torch sees as trees of tensors.

Tensor fields are leaves; fields made by `static()` are hashable context that `tree_map`, `vmap`,
`torch.compile` and `torch.export` carry along unchanged. A field that is None is no leaf at all,
because `vmap` refuses None leaves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


def static(**options: Any) -> Any:
    """Marks a field of a `record` as static: an int, str, bool, dtype, tuple, or a QuantSpec."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static,))
def record(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and registers it as a pytree node (see the module).

    Contexts hold only primitives (what torch 2.11's Dynamo can guard on), and survive JSON, which
    is how `torch.export.save` writes them.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # T is a dataclass by now
    leaves = tuple(f.name for f in fields if "static" not in f.metadata)
    context = tuple(f.name for f in fields if "static" in f.metadata)

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        present = tuple(name for name in leaves if getattr(value, name) is not None)
        constants = tuple(to_constant(getattr(value, name)) for name in context)
        return [getattr(value, name) for name in present], (present, constants)

    def flatten_with_keys(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        children, (present, constants) = flatten(value)
        keys = [pytree.GetAttrKey(name) for name in present]
        return list(zip(keys, children, strict=True)), (present, constants)

    def unflatten(children: Any, fixed: tuple[Any, ...]) -> Any:
        present, constants = fixed
        values = dict.fromkeys(leaves)
        values.update(zip(present, children, strict=True))
        for name, constant in zip(context, constants, strict=True):
            values[name] = from_constant(constant)
        return cls(**values)

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"fquant.{cls.__name__}",
        to_dumpable_context=to_json,
        from_dumpable_context=from_json,
        flatten_with_keys_fn=flatten_with_keys,
    )
    # torch.load and torch.export.load rebuild only classes named safe, others by pickle at large.
    torch.serialization.add_safe_globals([cls])
    return cls


_CONSTANTS: dict[str, type] = {}


def constant(cls: type[T]) -> type[T]:
    """Lets a frozen dataclass of primitives be a static field of a record.

    In a context it is a tuple of its name and its fields, which is what torch 2.11's Dynamo can guard
    on and what JSON can hold.
    """
    _CONSTANTS[cls.__name__] = cls
    torch.serialization.add_safe_globals([cls])
    return cls


def to_constant(value: Any) -> Any:
    """Returns a `constant` as a tuple of its name and its fields, anything else as it is."""
    name = type(value).__name__
    if name not in _CONSTANTS:
        return value
    return (name, *(getattr(value, f.name) for f in dataclasses.fields(value)))


def from_constant(value: Any) -> Any:
    """Returns what `to_constant` was given."""
    if isinstance(value, tuple) and value and value[0] in _CONSTANTS:
        return _CONSTANTS[value[0]](*value[1:])
    return value


def to_json(value: Any) -> Any:
    """Returns a context as lists, dicts and primitives; `from_json` gives it back."""
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return {"dtype": str(value).removeprefix("torch.")} if isinstance(value, torch.dtype) else value


def from_json(value: Any) -> Any:
    """Returns the context that `to_json` was given."""
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if isinstance(value, dict):
        return getattr(torch, value["dtype"])
    return value


def split_floating(tree: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """Returns the floating-point leaves of a tree, and the function that puts them back.

    `torch.func.grad` differentiates with respect to floating-point tensors only, and a record of
    int8 weights has others: differentiate with respect to the list.

    Example:
        >>> weight = fquant.quantize(torch.tensor([0.5, -1.0]), scale=torch.tensor(0.25))
        >>> floats, rebuild = split_floating({"weight": weight})
        >>> torch.func.grad(lambda f: fquant.dequantize(rebuild(f)["weight"]).sum())(floats)
        [tensor(-2.)]
    """
    leaves, structure = pytree.tree_flatten(tree)
    chosen = [i for i, v in enumerate(leaves) if isinstance(v, Tensor) and v.is_floating_point()]

    def rebuild(floating: list[Tensor]) -> Any:
        replaced = list(leaves)
        for i, leaf in zip(chosen, floating, strict=True):
            replaced[i] = leaf
        return pytree.tree_unflatten(replaced, structure)

    return [leaves[i] for i in chosen], rebuild
