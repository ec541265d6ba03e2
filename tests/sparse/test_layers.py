"""Transposed convolution, average and global pools against torch's dense operators, exactly."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

import fquant as fq
from fquant.sparse import (
    SparseTensor,
    add_features,
    avg_pool,
    global_avg_pool,
    global_max_pool,
    nn,
    sparse_conv,
    sparse_conv_int8,
    transposed_conv_map,
)
from fquant.testing import strategies
from fquant.testing.dense import read_cells

up_to_three_axes = st.integers(1, 3)


@given(st.data())
def test_transposed_conv_equals_torch(data):
    x = data.draw(strategies.sparse_tensors(num_axes=up_to_three_axes, max_side=4))
    axes = len(x.spatial_shape)
    kernel, stride, padding, dilation = (
        tuple(data.draw(st.integers(least, most)) for _ in range(axes))
        for least, most in ((1, 3), (1, 3), (0, 1), (1, 2))
    )
    extra = tuple(
        data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    sizes = zip(x.spatial_shape, kernel, stride, padding, dilation, extra, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + e + 1 > 0 for n, k, s, p, d, e in sizes))
    kernel_map = transposed_conv_map(x, kernel, stride, padding, dilation, extra)
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    weight = torch.randint(-9, 10, (3, *kernel, x.features.shape[1]), generator=g).double()
    y = sparse_conv(x, weight, kernel_map=kernel_map)
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
    dense = conv(x.to_dense(), weight.movedim(-1, 0), None, stride, padding, extra, 1, dilation)
    assert kernel_map.out_shape == tuple(dense.shape[2:])
    assert torch.equal(y.to_dense(), dense)


@given(st.data())
def test_avg_pool_equals_torch(data):
    x = data.draw(strategies.sparse_tensors(num_axes=up_to_three_axes))
    window = 2 ** data.draw(st.integers(0, 1))  # powers of two divide exactly
    assume(min(x.spatial_shape) >= window)
    stride, padding = data.draw(st.integers(1, 3)), data.draw(st.integers(0, window // 2))
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(x.spatial_shape) - 1]
    y = avg_pool(x, window, stride, padding)
    assert torch.equal(y.to_dense(), pool(x.to_dense(), window, stride, padding))
    present = x.with_features(torch.ones_like(x.features)).to_dense()
    mean = read_cells(pool(x.to_dense(), window, stride, padding), y)
    share = read_cells(pool(present, window, stride, padding), y)
    active = avg_pool(x, window, stride, padding, count_absent=False)
    assert torch.allclose(active.features, mean / share, rtol=1e-12)


@given(strategies.sparse_tensors())
def test_global_pools_equal_torch(x):
    dense = x.to_dense().flatten(2)
    cells = math.prod(x.spatial_shape)
    assert torch.equal(global_avg_pool(x), dense.sum(-1) / cells)
    for sample in range(x.batch_size):
        rows = x.features[x.coords[:, 0] == sample]
        if len(rows):
            assert torch.equal(global_max_pool(x)[sample], rows.amax(0))
            mean = global_avg_pool(x, count_absent=False)[sample]
            assert torch.allclose(mean, rows.mean(0), rtol=1e-12)
        else:
            assert not global_max_pool(x)[sample].any()
            assert not global_avg_pool(x, count_absent=False)[sample].any()


def test_int8_through_a_transposed_map():
    x = SparseTensor.from_dense(torch.tensor([[[0.0, 1.0, 0.0, 2.0]]]))
    kernel_map = transposed_conv_map(x, 3, stride=2, padding=1)
    weight = torch.tensor([1.0, -2.0, 3.0]).view(1, 3, 1)
    y = sparse_conv_int8(
        fq.quantize(x, 1.0),
        fq.quantize(weight, 1.0),
        kernel_map=kernel_map,
        output_scale=torch.tensor(1.0),
    )
    expected = sparse_conv(x, weight, kernel_map=kernel_map)
    assert torch.equal(fq.dequantize(y).features, expected.features)


X = SparseTensor.from_dense(torch.ones(1, 1, 4))


def test_sums_keep_the_maps_of_the_first():
    first, second = (nn.SubMConv1d(1, 1, 3)(X) for _ in range(2))
    assert first.maps["subm k3"] is not second.maps["subm k3"]
    assert add_features(first, second).maps["subm k3"] is first.maps["subm k3"]


def two_levels_up_at_once():
    down = [nn.SparseConv1d(1, 1, 1, indice_key=key) for key in ("first", "second")]
    return nn.SparseSequential(*down, nn.SparseInverseConv1d(1, 1, 1, indice_key="first"))(X)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: transposed_conv_map(X, 0), ValueError, "transposed_conv_map: kernel_size must be"),
        (lambda: transposed_conv_map(X, 1, 1, 2), ValueError, r"padding \(2,\) must leave a cell"),
        (lambda: avg_pool(X.features, 2), TypeError, "avg_pool: x must be a SparseTensor"),
        (lambda: avg_pool(fq.quantize(X, 1.0), 2), TypeError, "avg_pool: features must be"),
        (lambda: global_avg_pool(fq.quantize(X, 1.0)), TypeError, "global_avg_pool: features"),
        (lambda: global_max_pool(X.features), TypeError, "global_max_pool: x must be"),
        (two_levels_up_at_once, ValueError, r"made the cells of x, \('second',\), got 'first'"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
