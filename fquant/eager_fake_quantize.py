"""Fake quantization in eager reverse mode: the values of the one definition, a shorter backward.

Composed of plain operations it keeps several tensors of x's size for the backward pass and reads them
again; here it is x alone. Only for eager autograd: under `torch.compile` and `torch.func` an
`autograd.Function` is what gives silently zero gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fquant.checks import values_readable

# Temporary tensors of this many elements stay in the cache and cost no new memory.
PART = 2**17


def applies_to(x: Tensor, scale: Tensor) -> bool:
    """Whether this is eager code without transforms, in which only x may need a gradient."""
    if not values_readable(x, scale) or torch._C._are_functorch_transforms_active():
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and not scale.requires_grad


def fake_quantize_eager(
    x: Tensor, grid_of: Callable[[Tensor], Tensor], low: Tensor, high: Tensor
) -> Tensor:
    """Returns `grid_of(x)` with derivative 1 where `low <= x <= high` and 0 elsewhere."""
    return _Eager.apply(x, grid_of, low, high)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, grid_of: Callable[[Tensor], Tensor], low: Tensor, high: Tensor
    ) -> Tensor:
        # Adding 0 turns a negative zero positive, as in `straight_through`.
        if low.ndim == 0:
            return _in_parts(lambda part: grid_of(part).add_(0.0), x)
        return grid_of(x).add_(0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, low, high = inputs
        ctx.save_for_backward(x, low, high)
        ctx.save_for_forward(x, low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, low, high = ctx.saved_tensors

        def masked(x: Tensor, gradient: Tensor) -> Tensor:
            return torch.where((x >= low) & (x <= high), gradient, 0.0)

        # With a graph of the backward to keep, it must be one differentiable operation.
        if low.ndim == 0 and not torch.is_grad_enabled():
            return _in_parts(masked, x, gradient), None, None, None
        return masked(x, gradient), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        x, low, high = ctx.saved_tensors
        return torch.where((x >= low) & (x <= high), tangent, torch.zeros_like(tangent))


def _in_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """An elementwise function of tensors of one shape, a part of the flattened ones at a time."""
    first = tensors[0]
    if first.numel() <= PART or not all(t.is_contiguous() for t in tensors):
        return function(*tensors)
    result = torch.empty_like(first)
    flat = result.view(-1)
    for parts in zip(flat.split(PART), *(t.view(-1).split(PART) for t in tensors), strict=True):
        parts[0].copy_(function(*parts[1:]))
    return result
