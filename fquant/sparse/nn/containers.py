"""Containers and small modules over sparse tensors."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fquant.checks import require_same_device
from fquant.sparse.combine import add_features, join_features, sparse_add
from fquant.sparse.nn.maps import find_union_maps, moved
from fquant.sparse.sync_norm import sync_batch_norm
from fquant.sparse.tensor import SparseTensor


class SparseModule(nn.Module):
    """A module that takes a SparseTensor; `SparseSequential` hands it the record, not the features."""

    takes_records = True


class SparseSequential(SparseModule, nn.Sequential):
    """Runs modules one after another, over records and over features.

    A SparseModule, or what has its `takes_records`, gets the record. Any other module (`nn.ReLU`,
    `nn.BatchNorm1d`, `nn.Linear`) gets the features, `(N, C)`, and its result takes their place; once
    a module has returned a tensor, the rest get that.

    Example:
        >>> from fquant.sparse import SparseTensor, nn
        >>> x = SparseTensor.from_dense(torch.tensor([[[0.0, 5.0, -7.0]]]))
        >>> nn.SparseSequential(torch.nn.ReLU(), nn.ToDense())(x)
        tensor([[[0., 5., 0.]]])
    """

    def __init__(
        self, *modules: nn.Module | OrderedDict[str, nn.Module], **named: nn.Module
    ) -> None:
        super().__init__(*modules)  # type: ignore[arg-type]
        for name, module in named.items():
            self.add_module(name, module)

    def forward(self, x: Any) -> Any:
        for module in self:
            if isinstance(x, SparseTensor) and not getattr(module, "takes_records", False):
                x = x.map(module)
            else:
                x = module(x)
        return x


class ToDense(SparseModule):
    """Returns `(B, C, *spatial)`, contiguous, zeros where no cell is active."""

    def forward(self, x: SparseTensor) -> Tensor:
        return x.dense()


class SparseIdentity(SparseModule):
    """Returns what it is given."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return x


class SparseReLU(SparseModule):
    """Applies ReLU to the features."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.map(torch.relu)


class SparseBatchNorm(SparseModule, nn.BatchNorm1d):
    """`nn.BatchNorm1d` over the active cells; without cells its statistics stay as they are.

    In training it updates its own buffers, as torch's does; `fquant.sparse.batch_norm` returns them
    instead.
    """

    def forward(self, x: SparseTensor) -> SparseTensor:  # type: ignore[override]  # as spconv's
        if x.features.shape[0] == 0:
            return x
        features: Any = x.features  # a QTensor too, which has a device as well
        for name in ("weight", "running_mean"):
            tensor = getattr(self, name)
            if tensor is not None:
                require_same_device(type(self).__name__, name, tensor, features)
        return x.map(super().forward)


class SparseSyncBatchNorm(SparseBatchNorm):
    """`SparseBatchNorm` whose statistics in training are those of all processes.

    Without torch.distributed it is that one, as torch's is. Every process must run it, those without
    cells too. See `fquant.sparse.sync_batch_norm`.

    Args as `torch.nn.BatchNorm1d`, but for track_running_stats, which is always on, and:
        process_group: whose processes; None for the default group's.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        process_group: Any = None,
        **factory: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, **factory)
        self.process_group = process_group

    def forward(self, x: SparseTensor) -> SparseTensor:  # type: ignore[override]  # as spconv's
        alone = self.process_group is None and not torch.distributed.is_initialized()
        if alone or not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # the mean over batches
            momentum = 1.0 / float(self.num_batches_tracked)
        y, mean, var = sync_batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=True,
            momentum=momentum,
            eps=self.eps,
            group=self.process_group,
        )
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        return y


class AddTable(SparseModule):
    """Returns the sum of a list of sparse tensors at the same cells."""

    def forward(self, tensors: list[SparseTensor]) -> SparseTensor:
        return add_features(*tensors)


class JoinTable(SparseModule):
    """Returns a list of sparse tensors at the same cells, channels side by side."""

    def forward(self, tensors: list[SparseTensor]) -> SparseTensor:
        return join_features(*tensors)


class AddTableMisaligned(SparseModule):
    """Returns the sum of a list of sparse tensors over the union of their cells."""

    def forward(self, tensors: list[SparseTensor]) -> SparseTensor:
        union = find_union_maps("AddTableMisaligned", *tensors)
        y = sparse_add(*tensors, kernel_maps=tuple(union.values()))
        maps = {key: m for x in reversed(tensors) for key, m in (x.maps or {}).items()}
        return moved(y, y, {**maps, **union}, tuple(union)[:1])


class ConcatTable(SparseModule):
    """Runs every module on the same input; returns the list of results."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for i, module in enumerate(modules):
            self.add_module(str(i), module)

    def forward(self, x: Any) -> list[Any]:
        return [module(x) for module in self.children()]
