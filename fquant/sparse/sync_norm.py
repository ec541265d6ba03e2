"""Batch normalization over the cells of all processes: statistics joined by one all-reduce."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fquant.interception.stack import opaque
from fquant.sparse.norm import batch_norm, check_norm_args, followed, normalized
from fquant.sparse.tensor import SparseTensor


@opaque
def sync_batch_norm(
    x: SparseTensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: Any = None,
) -> tuple[SparseTensor, Tensor, Tensor]:
    """Returns (y, running_mean, running_var) of `batch_norm` over the cells of every process.

    In training count, sums and sums of squares are added over the processes in float64, forward; so are
    their derivatives, backward. So each process gets the part of its cells of what one process would
    get from all, in values and, for the sum of all losses, in gradients. A process without cells takes
    part. Where there is a cell or none in all, the variance is unknown: the statistics stay as they are.
    Otherwise it is `batch_norm`, and nothing is exchanged.

    Right under autograd and `torch.func.grad`, also nested; `torch.compile(torch.func.grad(...))` and
    forward mode raise.

    Args:
        x: float features `(N, C)` of this process; N may be 0.
        running_mean: `(C,)`, the same on every process, as the next three are.
        running_var: `(C,)`.
        weight: `(C,)`, gamma; None for ones.
        bias: `(C,)`, beta; None for zeros.
        training: whether to use and to follow the statistics of the cells.
        momentum: how far the running statistics follow.
        eps: added to the variance.
        group: a process group of torch.distributed; None for the default one.

    Raises:
        RuntimeError: training without a process group.
        TypeError, ValueError: as `batch_norm`, but for a single cell.

    References:
        torch.nn.SyncBatchNorm, which exchanges means and counts and runs on CUDA only.
    """
    if not training:
        return batch_norm(x, running_mean, running_var, weight, bias, momentum=momentum, eps=eps)
    features = check_norm_args("sync_batch_norm", x, running_mean, running_var, weight, bias)
    if group is None and not dist.is_initialized():
        raise RuntimeError(
            "sync_batch_norm: group must be a process group where torch.distributed is not "
            "initialized, got None. One process has batch_norm."
        )
    exact = features.double()
    count = exact.new_full((1,), features.shape[0])
    parts = torch.cat([exact.sum(dim=0), exact.square().sum(dim=0), count])
    total, squares, all_cells = _SumOverRanks.apply(parts, group).split(
        [features.shape[1], features.shape[1], 1]
    )
    mean = total / all_cells.clamp(min=1)
    var = (squares / all_cells.clamp(min=1) - mean.square()).clamp(min=0)
    y = normalized(exact - mean, var, weight, bias, eps)
    known = all_cells > 1
    unbiased = var.detach() * all_cells / (all_cells - 1).clamp(min=1)
    return (
        x.with_features(y.to(features.dtype)),
        torch.where(known, followed(running_mean, mean.detach(), momentum), running_mean),
        torch.where(known, followed(running_var, unbiased, momentum), running_var),
    )


class _SumOverRanks(torch.autograd.Function):
    """The sum over processes; its derivative is the sum of theirs.

    torch's own differentiable collectives lack setup_context, which torch.func.grad asks for.
    """

    @staticmethod
    def forward(values: Tensor, group: Any) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(gradient, ctx.group), None
