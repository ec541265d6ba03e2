"""The straight-through estimator, in the one form that every torch transform gets right."""

from torch import Tensor


def straight_through(grid: Tensor, clipped: Tensor) -> Tensor:
    """Returns the values of `grid` with the derivatives of `clipped`.

    `stop(grid) + (clipped - stop(clipped))`: the bracket is exactly 0, so the values are those of
    `grid` to the last bit (a negative zero becomes +0). Plain tensor operations: an
    `autograd.Function` here gives silently zero gradients under `torch.compile(torch.func.grad(f))`
    on torch 2.11 to 2.13.

    Args:
        grid: the rounded values.
        clipped: the same shape; the input clipped to the range of the grid, finite or NaN.

    Example:
        >>> x = torch.tensor([0.4, 1.6, 9.0], requires_grad=True)
        >>> y = straight_through(x.round().clamp(-2, 2), x.clamp(-2, 2))
        >>> y.sum().backward(); y.tolist(), x.grad.tolist()
        ([0.0, 2.0, 2.0], [1.0, 1.0, 0.0])

    References:
        Bengio, Leonard, Courville 2013, arXiv 1308.3432.
    """
    return grid.detach() + (clipped - clipped.detach())
