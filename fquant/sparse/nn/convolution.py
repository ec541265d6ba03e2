"""Convolutions as modules: weight `(Cout, *kernel_size, Cin)` and bias, as spconv stores them."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from fquant.sparse.conv import sparse_conv, sparse_conv_transpose, sparse_inverse_conv, subm_conv
from fquant.sparse.geometry import Geometry, Sizes, per_axis
from fquant.sparse.nn.containers import SparseModule
from fquant.sparse.nn.maps import find_inverse_map, find_map, moved, step_name
from fquant.sparse.tensor import SparseTensor


class SparseConvolution(SparseModule):
    """What the convolutions share: `weight`, `(Cout, *kernel_size, Cin)`, and `bias`, `(Cout,)`.

    Both start uniform in +-1/sqrt(fan_in), as torch's convolutions do.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps per axis.
        bias: whether there is a bias.
        indice_key: a name for the kernel map, shared by layers that give the same; None to share by
            geometry and cells alone.
        device: where the parameters are.
        dtype: what they are.

    Raises:
        ValueError: a size is out of range.
    """

    axes: ClassVar[int]
    geometry: Geometry | None = None  # of an inverse convolution, that of what it undoes

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        bias: bool = True,
        indice_key: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = per_axis(self._name, "kernel_size", kernel_size, self.axes, 1)
        self.indice_key = indice_key
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (out_channels, *self.kernel_size, in_channels)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self.reset_parameters()

    @property
    def _name(self) -> str:
        return type(self).__name__

    def reset_parameters(self) -> None:
        """Draws weight and bias anew."""
        bound = 1 / math.sqrt(max(1, math.prod(self.kernel_size) * self.in_channels))
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """What print shows."""
        geometry = self.geometry
        shown = f"kernel_size={self.kernel_size}" if geometry is None else geometry.name
        key = "" if self.indice_key is None else f", indice_key={self.indice_key!r}"
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_channels}, {self.out_channels}, {shown}{bias}{key}"


class _WithGeometry(SparseConvolution):
    """A convolution that says how its outputs lie to its inputs."""

    geometry: Geometry
    _convolve: ClassVar[Callable[..., SparseTensor]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        indice_key: str | None = None,
        **factory: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias, indice_key, **factory)
        if groups != 1:
            raise ValueError(f"{self._name}: groups must be 1, got {groups}.")
        name, axes = self._name, self.axes
        self.geometry = self._geometry(
            per_axis(name, "stride", stride, axes, 1),
            per_axis(name, "padding", padding, axes, 0),
            per_axis(name, "dilation", dilation, axes, 1),
        )

    def _geometry(self, *sizes: tuple[int, ...]) -> Geometry:
        """Of stride, padding and dilation; each kind of convolution has its own."""
        raise NotImplementedError

    def forward(self, x: SparseTensor) -> SparseTensor:
        key, kernel_map = find_map(self._name, x, self.geometry, self.indice_key)
        y = self._convolve(x, self.weight, self.bias, kernel_map=kernel_map)
        cells = x.cells
        if self.geometry.kind != "subm":
            cells = (*cells, step_name(self.geometry, self.indice_key))
        return moved(x, y, {key: kernel_map}, cells)


class SubMConv(_WithGeometry):
    """Submanifold convolution: the output has the cells of the input. See `fquant.sparse.subm_conv`.

    Args as `SparseConvolution`, and:
        stride: must be 1.
        padding: without effect, for it follows from kernel_size and dilation; there for other
            libraries' code.
        dilation: cells between taps.
        groups: must be 1.
    """

    _convolve = staticmethod(subm_conv)

    def _geometry(self, *sizes: tuple[int, ...]) -> Geometry:
        kernel, (step, _, spacing) = self.kernel_size, sizes
        if set(step) != {1} or any(k % 2 == 0 for k in kernel):
            raise ValueError(
                f"{self._name}: kernel_size must be odd and stride 1, got {kernel} and {step}."
            )
        border = tuple(k // 2 * d for k, d in zip(kernel, spacing, strict=True))
        return Geometry("subm", kernel, step, border, spacing)


class SparseConv(_WithGeometry):
    """Convolution at every cell that reads an active one. See `fquant.sparse.sparse_conv`.

    Args as `SparseConvolution`, and:
        stride: input cells per output cell.
        padding: cells of zeros around the grid.
        dilation: cells between taps.
        groups: must be 1.
    """

    _convolve = staticmethod(sparse_conv)

    def _geometry(self, *sizes: tuple[int, ...]) -> Geometry:
        return Geometry("conv", self.kernel_size, *sizes)


class SparseConvTranspose(_WithGeometry):
    """Transposed convolution, which makes new cells. See `fquant.sparse.sparse_conv_transpose`.

    Args as `SparseConvolution`, and:
        stride: output cells per input cell.
        padding: output cells cut off around the grid.
        dilation: output cells between taps.
        groups: must be 1.
        output_padding: output cells added after each axis.
    """

    _convolve = staticmethod(sparse_conv_transpose)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        indice_key: str | None = None,
        output_padding: Sizes = 0,
        **factory: Any,
    ) -> None:
        channels = (in_channels, out_channels)
        sizes = (kernel_size, stride, padding, dilation)
        super().__init__(*channels, *sizes, groups, bias, indice_key, **factory)
        extra = per_axis(self._name, "output_padding", output_padding, self.axes, 0)
        self.geometry = replace(self.geometry, output_padding=extra)

    def _geometry(self, *sizes: tuple[int, ...]) -> Geometry:
        return Geometry("transposed", self.kernel_size, *sizes)


class SparseInverseConv(SparseConvolution):
    """Transposed convolution back to the cells a convolution or pool started from.

    See `fquant.sparse.sparse_inverse_conv`. The input is at the cells that the layer with the same
    `indice_key` made.

    Args as `SparseConvolution`; indice_key has no default.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        indice_key: str,
        bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias, indice_key, **factory)

    def forward(self, x: SparseTensor) -> SparseTensor:
        assert self.indice_key is not None  # by __init__
        key, kernel_map = find_inverse_map(self._name, x, self.indice_key)
        y = sparse_inverse_conv(x, self.weight, self.bias, kernel_map=kernel_map, transposed=True)
        return moved(x, y, {key: kernel_map}, x.cells[:-1])
