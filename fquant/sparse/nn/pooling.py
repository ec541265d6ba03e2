"""Pools as modules."""

from typing import ClassVar

from torch import Tensor

from fquant.sparse.geometry import Geometry, Sizes, per_axis
from fquant.sparse.kernel_map import KernelMap
from fquant.sparse.nn.containers import SparseModule
from fquant.sparse.nn.maps import find_map, moved, step_name
from fquant.sparse.pool import avg_pool, global_avg_pool, global_max_pool, max_pool
from fquant.sparse.tensor import SparseTensor


class SparsePool(SparseModule):
    """What the pools share: a geometry and a key.

    Args:
        kernel_size: cells per axis of a window.
        stride: cells from window to window; None for kernel_size.
        padding: cells around the grid that windows may reach into.
        dilation: cells between the cells of a window.
        indice_key: a name for the kernel map, with which an inverse convolution undoes the pool.

    Raises:
        ValueError: a size is out of range.
    """

    axes: ClassVar[int]

    def __init__(
        self,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        indice_key: str | None = None,
    ) -> None:
        super().__init__()
        step = kernel_size if stride is None else stride
        given = (
            ("kernel_size", kernel_size, 1),
            ("stride", step, 1),
            ("padding", padding, 0),
            ("dilation", dilation, 1),
        )
        name = type(self).__name__
        sizes = (per_axis(name, argument, v, self.axes, least) for argument, v, least in given)
        self.geometry = Geometry("conv", *sizes)
        self.indice_key = indice_key

    def forward(self, x: SparseTensor) -> SparseTensor:
        key, kernel_map = find_map(type(self).__name__, x, self.geometry, self.indice_key)
        cells = (*x.cells, step_name(self.geometry, self.indice_key))
        return moved(x, self._pooled(x, kernel_map), {key: kernel_map}, cells)

    def _pooled(self, x: SparseTensor, kernel_map: KernelMap) -> SparseTensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What print shows."""
        return self.geometry.name


class SparseMaxPool(SparsePool):
    """The largest value of each window's active cells. See `fquant.sparse.max_pool`.

    Args as `SparsePool`.
    """

    def _pooled(self, x: SparseTensor, kernel_map: KernelMap) -> SparseTensor:
        return max_pool(x, self.geometry.kernel_size, kernel_map=kernel_map)


class SparseAvgPool(SparsePool):
    """The mean of each window. See `fquant.sparse.avg_pool`.

    Args as `SparsePool`, and:
        count_absent: whether absent cells count as zeros, as torch has it on the densified tensor;
            False for the mean over active cells, as spconv has it.
    """

    def __init__(
        self,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        indice_key: str | None = None,
        count_absent: bool = True,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, indice_key)
        self.count_absent = count_absent

    def _pooled(self, x: SparseTensor, kernel_map: KernelMap) -> SparseTensor:
        window = self.geometry.kernel_size
        return avg_pool(x, window, count_absent=self.count_absent, kernel_map=kernel_map)


class SparseGlobalMaxPool(SparseModule):
    """Returns the largest feature of each sample, `(batch_size, C)`: `fquant.sparse.global_max_pool`."""

    def forward(self, x: SparseTensor) -> Tensor:
        return global_max_pool(x)


class SparseGlobalAvgPool(SparseModule):
    """Returns the mean feature of each sample, `(batch_size, C)`: `fquant.sparse.global_avg_pool`.

    Args:
        count_absent: whether absent cells count as zeros.
    """

    def __init__(self, count_absent: bool = True) -> None:
        super().__init__()
        self.count_absent = count_absent

    def forward(self, x: SparseTensor) -> Tensor:
        return global_avg_pool(x, count_absent=self.count_absent)
