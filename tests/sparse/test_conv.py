"""Float convolutions and pooling against torch's dense operators, exactly, on integers in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fquant as fq
from fquant.sparse import (
    SparseTensor,
    conv_map,
    max_pool,
    sparse_conv,
    subm_conv,
    subm_map,
    transpose_map,
)
from fquant.testing import strategies
from fquant.testing.dense import conv_dense, read_cells


def integer_weight(data, out_channels, kernel, in_channels):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    shape = (out_channels, *kernel, in_channels)
    weight = torch.randint(-9, 10, shape, generator=generator).double()
    return weight, torch.randint(-99, 100, (out_channels,), generator=generator).double()


@given(st.data())
def test_sparse_conv_equals_the_dense_convolution(data):
    x = data.draw(strategies.sparse_tensors())
    geometry = data.draw(strategies.conv_geometries(x.spatial_shape))
    weight, _ = integer_weight(data, 3, geometry.kernel_size, x.features.shape[1])
    y = sparse_conv(
        x, weight, stride=geometry.stride, padding=geometry.padding, dilation=geometry.dilation
    )
    dense = conv_dense(x.to_dense(), weight, None, *geometry[1:])
    # Without a bias the dense result is zero wherever no active cell is read.
    assert torch.equal(y.to_dense(), dense)


@given(st.data())
def test_subm_conv_equals_the_dense_convolution_at_its_cells(data):
    x = data.draw(strategies.sparse_tensors())
    axes = len(x.spatial_shape)
    kernel = tuple(data.draw(st.sampled_from([1, 3])) for _ in range(axes))
    dilation = data.draw(st.integers(1, 2))
    weight, bias = integer_weight(data, 2, kernel, x.features.shape[1])
    y = subm_conv(x, weight, bias, dilation=dilation)
    padding = [k // 2 * dilation for k in kernel]
    dense = conv_dense(x.to_dense(), weight, bias, [1] * axes, padding, [dilation] * axes)
    assert torch.equal(y.features, read_cells(dense, x))
    assert y.coords is x.coords


@given(st.data())
def test_inverse_conv_equals_the_dense_transposed_convolution(data):
    x = data.draw(strategies.sparse_tensors(num_axes=st.integers(1, 3)))
    geometry = data.draw(strategies.conv_geometries(x.spatial_shape))
    down = conv_map(x, *geometry)
    weight, bias = integer_weight(data, 2, geometry.kernel_size, 3)
    coarse = SparseTensor(
        torch.arange(len(down.out_coords) * 3).double().view(-1, 3) % 11 - 5,
        down.out_coords,
        down.out_shape,
        x.batch_size,
    )
    y = sparse_conv(coarse, weight, bias, kernel_map=transpose_map(down))
    assert y.coords is x.coords
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(x.spatial_shape) - 1]
    k, s, p, d = geometry
    exact = zip(x.spatial_shape, down.out_shape, k, s, p, d, strict=True)
    extra = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in exact]
    kernel = weight.movedim(-1, 0)  # (Cin, Cout, *kernel)
    # output_padding must be smaller than stride or dilation in torch; pad the border by hand.
    dense = conv(coarse.to_dense(), kernel, None, s, 0, 0, 1, d)
    for axis, (border, more) in enumerate(zip(p, extra, strict=True)):
        axis += 2
        size = x.spatial_shape[axis - 2]
        pad = [0, 0] * (dense.ndim - axis - 1) + [0, max(0, more)]
        dense = F.pad(dense, pad).narrow(axis, border, size)
    assert torch.equal(y.features, read_cells(dense, x) + bias)


@given(st.data())
def test_max_pool_equals_the_dense_pooling_of_active_cells(data):
    x = data.draw(strategies.sparse_tensors(num_axes=st.integers(1, 3)))
    window = data.draw(st.integers(1, min(3, *x.spatial_shape)))
    stride = data.draw(st.integers(1, 3))
    padding = data.draw(st.integers(0, window // 2))
    y = max_pool(x, window, stride, padding)
    absent = x.with_features(torch.ones_like(x.features)).to_dense() == 0
    dense = x.to_dense().masked_fill(absent, float("-inf"))
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(x.spatial_shape) - 1]
    pooled = pool(dense, window, stride, padding)
    assert torch.equal(y.features, read_cells(pooled, y))
    assert int((pooled[:, :1] != float("-inf")).sum()) == len(y.coords)


@given(strategies.sparse_tensors(dtype=torch.float32))
def test_quantized_max_pool_is_the_max_of_the_integers(x):
    scale = torch.tensor(0.5)
    pooled = max_pool(fq.quantize(x, scale), 1, 1)
    assert torch.equal(pooled.features.q, fq.quantize(x.features, scale).q[_sorted_order(x)])
    window = min(2, *x.spatial_shape)
    a = fq.dequantize(max_pool(fq.quantize(x, scale), window))
    b = max_pool(fq.fake_quantize(x, scale), window)
    assert torch.equal(a.features, b.features)


def _sorted_order(x):
    rows = [tuple(row) for row in x.coords.tolist()]
    return sorted(range(len(rows)), key=rows.__getitem__)


@given(st.data())
def test_permuting_cells_permutes_outputs(data):
    x = data.draw(strategies.sparse_tensors())
    order = data.draw(st.permutations(range(len(x.coords))))
    index = torch.tensor(order, dtype=torch.int64)
    shuffled = SparseTensor(x.features[index], x.coords[index], x.spatial_shape, x.batch_size)
    kernel = (3,) * len(x.spatial_shape)
    weight, bias = integer_weight(data, 2, kernel, x.features.shape[1])
    y, z = subm_conv(x, weight, bias), subm_conv(shuffled, weight, bias)
    assert torch.equal(z.features, y.features[index])
    y, z = (sparse_conv(t, weight, bias, stride=2, padding=1) for t in (x, shuffled))
    assert torch.equal(z.coords.long(), y.coords.long())
    assert torch.equal(z.features, y.features)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_cell_and_one_cell(rows, dtype):
    coords = torch.tensor([[0, 2, 1]])[:rows]
    x = SparseTensor.create(torch.ones(rows, 2, dtype=dtype), coords, (4, 4), 1)
    weight = torch.ones(3, 3, 3, 2, dtype=dtype)
    assert subm_conv(x, weight).features.shape == (rows, 3)
    assert sparse_conv(x, weight, padding=1).features.shape == (9 * rows, 3)
    assert max_pool(x, 2).features.shape == (rows, 2)
    assert x.to_dense().sum() == 2 * rows
    assert fq.quantize(x, 0.1).features.q.shape == (rows, 2)
    assert subm_conv(x, weight).features.dtype == dtype


def test_one_graph_serves_every_number_of_cells():
    weight = torch.randn(4, 3, 3, 2, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, m: subm_conv(x, weight, kernel_map=m).features.relu(),
        fullgraph=True,
        dynamic=True,
    )
    graphs = []
    for seed, density in enumerate([0.5, 0.3, 0.7, 0.0]):
        active = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(seed)) < density
        cells = SparseTensor.from_dense(active.float())
        x = cells.with_features(torch.randn(len(cells.coords), 2))
        kernel_map = subm_map(x, 3)
        expected = subm_conv(x, weight, kernel_map=kernel_map).features.relu()
        # Sums of 18 products of order 1, in another order: a few float32 roundings.
        assert torch.allclose(compiled(x, kernel_map), expected, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2]


X = SparseTensor.from_dense(torch.ones(1, 2, 4, 4))
W = torch.ones(3, 3, 3, 2)
OTHER = SparseTensor.from_dense(torch.ones(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: subm_conv(X.features, W), TypeError, "x must be a SparseTensor, got Tensor"),
        (lambda: subm_conv(fq.quantize(X, 0.1), W), TypeError, "got QTensor.*sparse_conv_int8"),
        (lambda: subm_conv(X, W.double()), TypeError, "weight must have the features' dtype"),
        (lambda: subm_conv(X, W.to("meta")), ValueError, "weight must be on cpu like the features"),
        (
            lambda: subm_conv(X, W, torch.ones(3, device="meta")),
            ValueError,
            "bias must be on cpu like the features, got meta",
        ),
        (
            lambda: subm_conv(
                X.map(lambda f: f.to("meta")), W.to("meta"), kernel_map=subm_map(X, 3)
            ),
            ValueError,
            "kernel_map must be on meta like the features, got cpu",
        ),
        (lambda: subm_conv(X, W[..., :1]), ValueError, "Cin = 2 like the features"),
        (lambda: subm_conv(X, W[0]), ValueError, "2 kernel sizes"),
        (lambda: subm_conv(X, W, torch.ones(2)), ValueError, r"bias must have shape \(3,\)"),
        (
            lambda: subm_conv(X, W, kernel_map=subm_map(OTHER, 3)),
            ValueError,
            "16 rows.*got one for 12",
        ),
        (lambda: subm_conv(X, W, kernel_map=subm_map(X, 1)), ValueError, "kernel size"),
        (
            lambda: subm_conv(X, W, dilation=2, kernel_map=subm_map(X, 3)),
            ValueError,
            "dilation must be left",
        ),
        (
            lambda: sparse_conv(X, W, stride=2, kernel_map=conv_map(X, 3)),
            ValueError,
            r"geometry must be left to kernel_map, got \{'stride': 2\}",
        ),
        (lambda: max_pool(X.features, 2), TypeError, "max_pool: x must be a SparseTensor"),
        (lambda: max_pool(X, 2, kernel_map=conv_map(OTHER, 2)), ValueError, "max_pool: kernel_map"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
