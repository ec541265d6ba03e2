"""Every layer, 1 to 4 axes, against torch's dense operators: cells, features and gradients, exactly.

Features, weights and cotangents are small integers in float64, so sums are exact in any order.
28 cases of layer and axes, 20 examples each or a tenth of the Hypothesis profile's, and two for all
axes, 40 each: 640, and 6,400 with HYPOTHESIS_PROFILE=thorough.
"""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fquant.sparse import SparseTensor, nn
from fquant.testing import strategies
from fquant.testing.dense import conv_dense, conv_transpose_dense, read_cells, windows_dense

EXAMPLES = max(20, settings.default.max_examples // 10)
LAYERS = ["SubMConv", "SparseConv", "SparseConvTranspose", "SparseInverseConv"]
POOLS = ["SparseMaxPool", "SparseAvgPool", "SparseAvgPool of active cells"]


def draw_case(data, axes):
    side = {1: 6, 2: 6, 3: 4, 4: 3}[axes]
    return data.draw(strategies.sparse_tensors(num_axes=st.just(axes), max_side=side, max_cells=20))


def integers(data, *shape):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    return torch.randint(-5, 6, shape, generator=g).double()


def filled(data, layer):
    """The layer with integer parameters."""
    layer = layer.double()
    for parameter in layer.parameters():
        parameter.data = integers(data, *parameter.shape)
    return layer


def assert_equal_with_gradients(data, y, expected, inputs):
    assert torch.equal(y, expected)
    cotangent = integers(data, *y.shape)
    ours = torch.autograd.grad(y, inputs, cotangent, allow_unused=True)
    theirs = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True)
    for a, b, x in zip(ours, theirs, inputs, strict=True):
        zero = torch.zeros_like(x)
        assert torch.equal(zero if a is None else a, zero if b is None else b)


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_convolutions(kind, axes, data):
    x = draw_case(data, axes)
    features = x.features.requires_grad_()
    channels, bias = x.features.shape[1], data.draw(st.booleans())
    cls = getattr(nn, f"{kind}{axes}d")
    if kind == "SubMConv":
        kernel = tuple(data.draw(st.sampled_from([1, 3])) for _ in range(axes))
        dilation = tuple(data.draw(st.integers(1, 2)) for _ in range(axes))
        layer = filled(data, cls(channels, 2, kernel, dilation=dilation, bias=bias))
        y = layer(x)
        assert y.coords is x.coords
        dense = conv_dense(x.to_dense(), layer.weight, None, *layer.geometry.sizes[1:])
    elif kind == "SparseConvTranspose":
        k, s, p, d = (
            tuple(data.draw(st.integers(least, most)) for _ in range(axes))
            for least, most in ((1, 3), (1, 3), (0, 1), (1, 2))
        )
        extra = tuple(data.draw(st.integers(0, step - 1)) for step in s)
        shape = [
            (n - 1) * step - 2 * border + spread * (taps - 1) + more + 1
            for n, taps, step, border, spread, more in zip(
                x.spatial_shape, k, s, p, d, extra, strict=True
            )
        ]
        assume(min(shape) >= 1)
        layer = filled(data, cls(channels, 2, k, s, p, d, bias=bias, output_padding=extra))
        y = layer(x)
        assert list(y.spatial_shape) == shape
        dense = conv_transpose_dense(x.to_dense(), layer.weight, shape, s, p, d)
    else:
        geometry = data.draw(strategies.conv_geometries(x.spatial_shape))
        down = nn.__dict__[f"SparseConv{axes}d"]
        first = filled(data, down(channels, 2, *geometry, bias=bias, indice_key="down"))
        y, layer = first(x), first
        dense = conv_dense(x.to_dense(), first.weight, None, *geometry[1:])
        assert y.spatial_shape == tuple(dense.shape[2:])
        if kind == "SparseInverseConv":
            features = integers(data, len(y.coords), 2).requires_grad_()
            coarse = y.with_features(features)
            layer = filled(data, cls(2, 3, geometry.kernel_size, indice_key="down", bias=bias))
            y = layer(coarse)
            assert torch.equal(y.coords, x.coords)
            dense = conv_transpose_dense(
                coarse.to_dense(), layer.weight, x.spatial_shape, *geometry[1:]
            )
    if kind in ("SparseConv", "SparseConvTranspose"):
        rows = y.coords.tolist()
        assert rows == sorted(rows)
        # Nothing is left out: without the bias the result is zero at every other cell.
        at_cells = y.with_features(read_cells(dense, y)).to_dense()
        assert torch.equal(at_cells, dense)
    expected = read_cells(dense, y)
    expected = expected if layer.bias is None else expected + layer.bias
    assert_equal_with_gradients(data, y.features, expected, [features, *layer.parameters()])


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", POOLS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_pools(kind, axes, data):
    x = draw_case(data, axes)
    if kind == "SparseMaxPool":  # ties have no one gradient
        x = x.with_features(torch.randperm(x.features.numel()).view(x.features.shape).double() - 20)
    features = x.features.requires_grad_()
    geometry = data.draw(strategies.conv_geometries(x.spatial_shape))
    cls = getattr(nn, f"{kind.split()[0]}{axes}d")
    options = {"count_absent": "active" not in kind} if "Avg" in kind else {}
    y = cls(*geometry, **options)(x)
    absent = x.with_features(torch.ones_like(x.features)).to_dense() == 0
    if kind == "SparseMaxPool":
        dense = x.to_dense().masked_fill(absent, float("-inf"))
        taps = windows_dense(dense, y.spatial_shape, *geometry, fill=float("-inf"))
        expected = read_cells(taps.amax(dim=0), y)
        present = taps.amax(dim=0)[:, :1] != float("-inf")
    else:
        taps = windows_dense(x.to_dense(), y.spatial_shape, *geometry, fill=0.0)
        held = windows_dense((~absent).double(), y.spatial_shape, *geometry, fill=0.0)
        present = held.sum(dim=0)[:, :1] > 0
        count = read_cells(held.sum(dim=0), y) if "active" in kind else len(taps)
        expected = read_cells(taps.sum(dim=0), y) / count
    assert int(present.sum()) == len(y.coords)
    if kind == "SparseMaxPool":
        assert_equal_with_gradients(data, y.features, expected, [features])
    else:  # quotients are rounded, so their gradients are sums of rounded numbers
        assert torch.equal(y.features, expected)
        cotangent = integers(data, *expected.shape)
        ours = torch.autograd.grad(y.features, features, cotangent)[0]
        theirs = torch.autograd.grad(expected, features, cotangent)[0]
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@settings(max_examples=2 * EXAMPLES)
@given(data=st.data())
def test_the_inference_op_computes_the_same(data):
    """Integers in float32 are exact too, so the fast kernel is compared bit for bit."""
    axes = data.draw(st.integers(1, 4))
    x = draw_case(data, axes)
    x = x.with_features(x.features.float())
    layer = filled(data, getattr(nn, f"SubMConv{axes}d")(x.features.shape[1], 17, 3)).float()
    with torch.no_grad():
        assert torch.equal(layer(x).features, layer(x.with_features(x.features)).features)
        fast = layer(x).features
    assert torch.equal(fast, layer(x).features.detach())


@settings(max_examples=2 * EXAMPLES)
@given(data=st.data())
def test_sums_over_the_union_are_dense_sums(data):
    from fquant.sparse import sparse_add

    a = draw_case(data, data.draw(st.integers(1, 4)))
    cells = a.batch_size
    for size in a.spatial_shape:
        cells *= size
    keys = data.draw(st.lists(st.integers(0, cells - 1), unique=True, max_size=10))
    dense = torch.zeros(a.batch_size, *a.spatial_shape).flatten()
    dense[keys] = 1.0
    b = SparseTensor.from_dense(dense.view(a.batch_size, 1, *a.spatial_shape))
    b = b.with_features(integers(data, len(keys), a.features.shape[1]))
    y = sparse_add(a, b)
    assert torch.equal(y.to_dense(), a.to_dense() + b.to_dense())
    assert y.coords.dtype == a.coords.dtype
    rows = y.coords.tolist()
    assert rows == sorted(map(list, {tuple(r) for t in (a, b) for r in t.coords.tolist()}))
    module = nn.AddTableMisaligned()([a, b])
    assert torch.equal(module.features, y.features)
    follow = nn.__dict__[f"SubMConv{len(a.spatial_shape)}d"](a.features.shape[1], 1, 3).double()
    assert follow(module).features.shape == (len(rows), 1)
