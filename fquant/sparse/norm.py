"""Batch normalization of sparse features, with its running statistics as arguments and results."""

import torch
from torch import Tensor

from fquant.checks import compute_dtype, require_same_device
from fquant.interception.stack import opaque
from fquant.records import QTensor
from fquant.sparse.tensor import SparseTensor


@opaque
def batch_norm(
    x: SparseTensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[SparseTensor, Tensor, Tensor]:
    """Returns (y, running_mean, running_var): each channel normalized over the active cells.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    In training, mean and var (biased) are those of x, and the statistics that come back are
    `(1 - momentum) * running + momentum * those of x`, with the unbiased variance. Otherwise mean and
    var are the running ones, which come back as they are. Nothing is written. Without cells,
    y has none and the statistics stay as they are.

    Args:
        x: float features `(N, C)`.
        running_mean: `(C,)`.
        running_var: `(C,)`.
        weight: `(C,)`, gamma; None for ones.
        bias: `(C,)`, beta; None for zeros.
        training: whether to use and to follow the statistics of x.
        momentum: how far the running statistics follow.
        eps: added to the variance.

    Raises:
        TypeError: x is no SparseTensor of float features.
        ValueError: an argument is not `(C,)`; x has a single cell in training; devices differ.

    Example:
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, 7.0]]]))
        >>> y, mean, var = batch_norm(x, torch.zeros(1), torch.ones(1), training=True)
        >>> y.features.T, mean, var
        (tensor([[-1.0000,  1.0000]]), tensor([0.6000]), tensor([1.1000]))

    References:
        Ioffe, Szegedy 2015, Batch Normalization, arXiv 1502.03167.
    """
    features = check_norm_args("batch_norm", x, running_mean, running_var, weight, bias)
    exact = features.to(compute_dtype(features))
    if not training or features.shape[0] == 0:
        y = normalized(exact - running_mean, running_var, weight, bias, eps)
        return x.with_features(y.to(features.dtype)), running_mean, running_var
    count = features.shape[0]
    if count == 1:
        raise ValueError("batch_norm: x must have more than one cell in training, got 1.")
    mean = exact.mean(dim=0)
    centred = exact - mean
    var = centred.square().mean(dim=0)
    y = normalized(centred, var, weight, bias, eps)
    unbiased = var.detach() * (count / (count - 1))
    return (
        x.with_features(y.to(features.dtype)),
        followed(running_mean, mean.detach(), momentum),
        followed(running_var, unbiased, momentum),
    )


def normalized(
    centred: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Returns `centred / sqrt(var + eps) * weight + bias`.

    Not by torch's own operator, whose second derivatives by features and weight are wrong under
    `torch.func.hessian` (torch 2.13) and which has no vmap rule in inference.
    """
    y = centred * torch.rsqrt(var + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def followed(running: Tensor, seen: Tensor, momentum: float) -> Tensor:
    """Returns running statistics a step on."""
    return (1 - momentum) * running + momentum * seen.to(running.dtype)


def check_norm_args(
    function: str,
    x: SparseTensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Returns the features of x after checking all; reads no values."""
    if not isinstance(x, SparseTensor) or isinstance(x.features, QTensor):
        got = type(x.features if isinstance(x, SparseTensor) else x).__name__
        raise TypeError(f"{function}: x must be a SparseTensor of float features, got {got}.")
    shape = (x.features.shape[1],)
    named = {"running_mean": running_mean, "running_var": running_var}
    for name, value in (named | {"weight": weight, "bias": bias}).items():
        if value is None:
            continue
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{function}: {name} must have shape {shape}, got {tuple(value.shape)}."
            )
        require_same_device(function, name, value, x.features)
    return x.features
