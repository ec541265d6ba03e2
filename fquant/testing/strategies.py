"""Hypothesis strategies for tensors, grids and sparse tensors (`pip install fquant[testing]`)."""

import math
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fquant.scales import compute_amax, compute_scale
from fquant.sparse import SparseTensor
from fquant.spec import QuantSpec

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def specs(symmetric_grids_only: bool = False) -> st.SearchStrategy[QuantSpec]:
    """Grids of 2 to 16 bits: signed, narrow and unsigned; or only the odd-symmetric ones."""
    bits = st.integers(2, 16)
    narrow = st.builds(QuantSpec, bits, narrow_range=st.just(True))
    if symmetric_grids_only:
        return narrow
    return narrow | st.builds(QuantSpec, bits, unsigned=st.booleans())


def shapes(min_dims: int = 0, max_side: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of up to 4 axes, with empty ones."""
    return hnp.array_shapes(min_dims=min_dims, max_dims=4, min_side=0, max_side=max_side)


@st.composite
def float_tensors(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
    limit: float = 1e4,
    non_negative: bool = False,
) -> Tensor:
    """Finite tensors within `[-limit, limit]`, tiny values and zeros of both signs included."""
    dims = draw(shapes() if shape is None else shape)
    values = st.floats(0.0 if non_negative else -limit, limit, width=32)
    array = draw(hnp.arrays(np.float32, dims, elements=values))
    return torch.from_numpy(array).to(draw(st.sampled_from(dtypes)))


class QuantCase(NamedTuple):
    """A tensor with a grid that it fits: max |x| is on the grid's edge or inside."""

    x: Tensor
    scale: Tensor
    spec: QuantSpec


@st.composite
def quant_cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
    symmetric_grids_only: bool = False,
) -> QuantCase:
    """A tensor, a grid, and the scale that calibration of this very tensor gives."""
    spec = draw(specs(symmetric_grids_only))
    x = draw(float_tensors(dtypes=dtypes, non_negative=spec.unsigned))
    axis = draw(st.none() | st.integers(0, x.ndim - 1)) if x.ndim else None
    amax = compute_amax(x, axis)
    return QuantCase(x, compute_scale(amax, spec), spec)


@st.composite
def sparse_tensors(
    draw: st.DrawFn,
    max_cells: int = 40,
    max_side: int = 6,
    dtype: torch.dtype = torch.float64,
    num_axes: st.SearchStrategy[int] | None = None,
) -> SparseTensor:
    """Sparse tensors of 1 to 4 axes, 0 to `max_cells` rows in arbitrary order, small integers inside.

    Integer features make sums exact, so convolutions compare with `torch.equal`.
    """
    axes = draw(st.integers(1, 4) if num_axes is None else num_axes)
    shape = tuple(draw(st.lists(st.integers(1, max_side), min_size=axes, max_size=axes)))
    batch_size = draw(st.integers(1, 2))
    cells = batch_size * math.prod(shape)
    keys = draw(st.lists(st.integers(0, cells - 1), unique=True, max_size=min(cells, max_cells)))
    coords = np.stack(
        np.unravel_index(np.array(keys, dtype=np.int64), (batch_size, *shape)), axis=1
    )
    channels = draw(st.integers(1, 4))
    features = draw(hnp.arrays(np.int8, (len(keys), channels), elements=st.integers(-9, 9)))
    coords_dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return SparseTensor.create(
        torch.from_numpy(features).to(dtype),
        torch.from_numpy(coords.reshape(len(keys), 1 + axes)).to(coords_dtype),
        shape,
        batch_size,
    )


class ConvGeometry(NamedTuple):
    """Kernel size, stride, padding and dilation, one int per axis each, that fit a grid."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


@st.composite
def conv_geometries(draw: st.DrawFn, spatial_shape: tuple[int, ...]) -> ConvGeometry:
    """Geometries whose output grid on `spatial_shape` is not empty."""
    kernel, stride, padding, dilation = [], [], [], []
    for size in spatial_shape:
        p = draw(st.integers(0, 2))
        k = draw(st.integers(1, min(3, size + 2 * p)))
        widest = (size + 2 * p - 1) // (k - 1) if k > 1 else 2
        kernel.append(k)
        stride.append(draw(st.integers(1, 3)))
        padding.append(p)
        dilation.append(draw(st.integers(1, max(1, min(2, widest)))))
    return ConvGeometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
