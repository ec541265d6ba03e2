"""Registration of integer ops that have no derivative and say so.

An op without an Autograd kernel gives silent zeros under `torch.func.grad` and `jvp`
(measured on torch 2.13), so every op here gets one that raises.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("fquant", "DEF")


def _wants_derivative(value: object) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if torch.is_grad_enabled() and value.requires_grad:
        return True
    return forward_ad.unpack_dual(value).tangent is not None


def _checked(check_args: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_args(*args, **kwargs)
        return function(*args, **kwargs)

    return checked


def define_inference_op(
    schema: str,
    check_args: Callable[..., None],
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    instead: str,
) -> Callable[..., Any]:
    """Returns the op `torch.ops.fquant.<name>` made of one implementation for every device.

    Differentiating through it (reverse or forward mode, any transform) raises; `vmap` runs the
    members one by one.

    Args:
        schema: `name(arguments) -> results` in torch's schema language.
        check_args: raises on a wrong dtype, shape or device; reads no values, for it also runs on
            fake tensors.
        implementation: the definition; returns contiguous tensors that alias no input.
        fake: returns empty tensors of the right shape and dtype.
        instead: what to use where a derivative is wanted; ends the error message.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    op = getattr(torch.ops.fquant, name).default

    def refuse_derivative(*args: Any, **kwargs: Any) -> Any:
        _refuse_derivative(name, instead, *args, *kwargs.values())
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    def one_by_one(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        members = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return torch.stack(members), 0

    _LIBRARY.impl(name, _checked(check_args, implementation), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, refuse_derivative, "Autograd")
    torch.library.register_fake(op, _checked(check_args, fake), lib=_LIBRARY)
    torch.library.register_vmap(op, one_by_one, lib=_LIBRARY)
    return op


def define_composite_op(
    schema: str, definition: Callable[..., Any], instead: str | None = None
) -> Callable[..., Any]:
    """Returns the op `torch.ops.fquant.<name>`, a name for a function of plain tensor operations.

    `torch.export` keeps it as one node, which passes can match; `torch.compile` sees through it, and
    so do derivatives, unless they are refused.

    Args:
        schema: as in `define_inference_op`.
        definition: plain tensor operations; no result aliases an input.
        instead: what to use where a derivative is wanted, if the definition has none to give.
    """
    name = schema[: schema.index("(")]

    @functools.wraps(definition)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if instead is not None:
            _refuse_derivative(name, instead, *args, *kwargs.values())
        return definition(*args, **kwargs)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, checked, "CompositeImplicitAutograd")
    return getattr(torch.ops.fquant, name).default


def _refuse_derivative(name: str, instead: str, *values: object) -> None:
    if any(_wants_derivative(value) for value in values):
        raise RuntimeError(f"fquant::{name} has no derivative: it computes in integers. {instead}")


def register_backend(
    op: Any, device_type: str, check_args: Callable[..., None], implementation: Callable[..., Any]
) -> None:
    """Runs `implementation` for tensors on one device type, "cpu" or "cuda", not the reference."""
    name = op.name().removeprefix("fquant::")
    _LIBRARY.impl(name, _checked(check_args, implementation), device_type.upper())
