"""Dense integer layers as ops: kernel maps of whole grids, and pools."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fquant as fq
from fquant.graph import dense_maps, int8_ops
from fquant.sparse import SparseTensor

GEOMETRIES = list(itertools.product([1, 2], [0, 1], [1, 2]))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_dense_kernel_maps_are_those_of_the_grid(axes):
    sizes = [4, 5, 3][:axes]
    cells = SparseTensor.from_dense(torch.ones(2, 1, *sizes))
    for stride, padding, dilation in GEOMETRIES:
        geometry = [[v] * axes for v in (2, stride, padding, dilation)]
        dense_map = dense_maps.dense_neighbors(2, sizes, *geometry, torch.device("cpu"))
        kernel_map = fq.sparse.conv_map(cells, 2, stride, padding, dilation)
        if dense_map.shape == kernel_map.neighbors.shape:  # no window of padding alone
            assert torch.equal(dense_map, kernel_map.neighbors)
        extra = [stride - 1] * axes
        up = dense_maps.transposed_neighbors(2, sizes, *geometry, extra, torch.device("cpu"))
        sparse_up = fq.sparse.transposed_conv_map(cells, 2, stride, padding, dilation, extra)
        if up.shape == sparse_up.neighbors.shape:
            assert torch.equal(up, sparse_up.neighbors)


@given(st.data())
@settings(max_examples=30)
def test_integer_pools_are_torchs(data):
    axes = data.draw(st.integers(1, 3))
    kernel, stride, dilation = (data.draw(st.integers(1, 3)) for _ in range(3))
    padding = data.draw(st.integers(0, kernel // 2))
    size = dilation * (kernel - 1) + 1 + data.draw(st.integers(0, 4))
    x = torch.randint(-128, 128, (2, 3, *[size] * axes), dtype=torch.int8)
    geometry = [[v] * axes for v in (kernel, stride, padding, dilation)]
    y = int8_ops.max_pool_int8(x, *geometry)
    pool = getattr(nn.functional, f"max_pool{axes}d")
    assert torch.equal(y.float(), pool(x.float(), kernel, stride, padding, dilation))


@pytest.mark.parametrize("zero", [0, -3])
def test_wide_groups_are_summed_exactly(zero):
    """Sums beyond 2^28, whose parts float32 cannot hold."""
    x = torch.randint(100, 128, (2, 65536, 3), dtype=torch.int8)
    weight = torch.randint(100, 128, (4, 1, 32768), dtype=torch.int8)
    sums = [
        ((x[:, part].long() - zero).transpose(1, 2) @ weight[rows, 0].long().T).transpose(1, 2)
        for part, rows in ((slice(32768), slice(2)), (slice(32768, None), slice(2, None)))
    ]
    expected = torch.cat(sums, dim=1)
    assert (expected > 2**28).all()
    epilogue = (torch.ones(4), None, None, None, False, torch.float32)
    geometry = ([1], [0], [1], 2)
    y = int8_ops.conv_int8(x, zero, weight, [4, 1, 32768], "", *epilogue, *geometry)
    assert torch.equal(y, expected.float())
