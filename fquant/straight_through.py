"""The straight-through estimator: rounded values, the derivative of what was rounded."""

from typing import Any

import torch
from torch import Tensor

from fquant.checks import require_floating


def straight_through(grid: Tensor, clipped: Tensor) -> Tensor:
    """Returns the values of `grid` with the derivative of `clipped`.

    Clip first: `clipped - clipped.detach()` is exactly zero for finite values, so that `grid` comes
    out bit for bit (a negative zero becomes +0). Plain tensor operations: an
    `autograd.Function` here gives silently zero gradients under `torch.compile(torch.func.grad(f))`
    on torch 2.11 to 2.13.

    Args:
        grid: the rounded values.
        clipped: the same shape; the input clipped to the range of the grid, finite or NaN.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ.

    Example:
        >>> x = torch.tensor([0.4, 1.6, 9.0], requires_grad=True)
        >>> y = straight_through(x.round().clamp(-2, 2), x.clamp(-2, 2))
        >>> y.sum().backward(); y.tolist(), x.grad.tolist()
        ([0.0, 2.0, 2.0], [1.0, 1.0, 0.0])

    References:
        Bengio, Leonard, Courville 2013, arXiv 1308.3432.
    """
    require_floating("straight_through", "grid", grid)
    require_floating("straight_through", "clipped", clipped)
    if grid.shape != clipped.shape:
        raise ValueError(
            f"straight_through: clipped must have the shape of grid, {tuple(grid.shape)}, "
            f"got {tuple(clipped.shape)}."
        )
    return grid.detach() + (clipped - clipped.detach())


def clipped_straight_through(x: Tensor, grid: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns `straight_through(grid, x.clamp(low, high))`, of which compiled code keeps less.

    The derivative is 1 with respect to x where `low <= x <= high`, both ends included, and 1 with
    respect to the end where x is beyond it.
    """
    still, bottom, top = x.detach(), low.detach(), high.detach()
    # Zeros, with the derivatives of the ends.
    ends = torch.where(still > top, high - top, torch.where(still < bottom, low - bottom, 0.0))
    return _clipped(x, grid.detach(), bottom, top) + ends


class Clipped(torch.autograd.Function):
    """The values of `grid` with the derivative of x clipped, by x alone; keeps x and the ends."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, grid: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return grid + 0.0  # a negative zero becomes +0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, low, high = inputs
        ctx.save_for_backward(x, low, high)
        ctx.save_for_forward(x, low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, low, high = ctx.saved_tensors
        return where_inside(x, low, high, gradient), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        x, low, high = ctx.saved_tensors
        return where_inside(x, low, high, tangent)


# Dynamo drops the backward of an autograd.Function under torch.func.grad, unless it is kept from
# looking inside (torch 2.11 to 2.13).
@torch.compiler.allow_in_graph
def _clipped(x: Tensor, grid: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return Clipped.apply(x, grid, low, high)


def where_inside(x: Tensor, low: Tensor, high: Tensor, value: Tensor) -> Tensor:
    """Returns value where `low <= x <= high`, and 0 elsewhere and where x is NaN."""
    if not torch.compiler.is_compiling():
        return torch.where((x >= low) & (x <= high), value, 0.0)
    # Compiled graphs keep the cheapest of what their backward pass can start from: here one byte per
    # value in place of two booleans, which Inductor stores one at a time on AVX2 (27 ms for 10^7, three
    # times the rest of the forward pass).
    side = torch.where(x < low, 1.0, torch.where(x <= high, 0.0, 2.0)).to(torch.uint8).float()
    return torch.where(side == 1, 0.0, torch.where(side == 2, 0.0, value))
