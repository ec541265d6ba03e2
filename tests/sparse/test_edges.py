"""Edges on every layer: no cell, one cell, vanished and repeated cells, huge grids, two devices.

Each layer stands in one table beside what it is on the densified tensor, by torch's dense operators.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from fquant.sparse import SparseTensor, models, nn, pad_to_capacity
from fquant.testing.dense import conv_dense, conv_transpose_dense, read_cells, windows_dense


def tensor(rows, shape=(6, 6), batch_size=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    coords = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    features = torch.randn(len(coords), 3, generator=g, dtype=torch.float64).to(dtype)
    return SparseTensor(features.requires_grad_(), coords, shape, batch_size)


def active(x):
    return x.with_features(torch.ones_like(x.features)).to_dense()


def convolved(layer, x, y):
    dense = conv_dense(x.to_dense(), layer.weight, None, *layer.geometry.sizes[1:])
    return read_cells(dense, y) + layer.bias


def transposed(layer, x, y):
    sizes = layer.geometry.sizes[1:]
    dense = conv_transpose_dense(x.to_dense(), layer.weight, y.spatial_shape, *sizes)
    return read_cells(dense, y) + layer.bias


def undone(layers, x, y):
    down, up = layers
    geometry = down.geometry.sizes[1:]
    there = conv_dense(active(x), torch.ones_like(down.weight), None, *geometry)[:, :1] > 0
    coarse = conv_dense(x.to_dense(), down.weight, down.bias, *geometry) * there
    dense = conv_transpose_dense(coarse, up.weight, x.spatial_shape, *geometry)
    return read_cells(dense, y) + up.bias


def window(x, y, layer, dense, fill):
    return windows_dense(dense, y.spatial_shape, *layer.geometry.sizes, fill=fill)


def max_pooled(layer, x, y):
    dense = x.to_dense().masked_fill(active(x) == 0, float("-inf"))
    return read_cells(window(x, y, layer, dense, float("-inf")).amax(0), y)


def avg_pooled(layer, x, y):
    total = window(x, y, layer, x.to_dense(), 0.0)
    count = len(total) if layer.count_absent else window(x, y, layer, active(x), 0.0).sum(0)
    return read_cells(total.sum(0) / count, y)


def largest(layer, x, y):
    rows = [x.features[x.coords[:, 0] == sample] for sample in range(x.batch_size)]
    return torch.stack([r.amax(0) if len(r) else torch.zeros(3, dtype=r.dtype) for r in rows])


def mean(layer, x, y):
    total = x.to_dense().sum(dim=(2, 3))
    return total / (36 if layer.count_absent else active(x).sum(dim=(2, 3)).clamp(min=1))


def one_by_one(layer, x, y):
    cells = {tuple(row): x.features[i] for i, row in enumerate(x.coords.tolist())}
    zero = torch.zeros(3, dtype=x.features.dtype) + 0 * x.features.sum()
    flat = [
        cells.get((b, i, j), zero) for b in range(x.batch_size) for i in range(6) for j in range(6)
    ]
    return torch.stack(flat).view(x.batch_size, 6, 6, 3).permute(0, 3, 1, 2)


def normed(layer, x, y):
    step = (layer.running_var + layer.eps).sqrt()
    return (x.features - layer.running_mean) / step * layer.weight + layer.bias


def tables(join, *branches):
    return nn.SparseSequential(nn.ConcatTable(*branches), join)


def added(layers, x, y):
    return x.features + convolved(layers[0].get_submodule("1"), x, y)


def joined(layers, x, y):
    return torch.cat([x.features, convolved(layers[0].get_submodule("1"), x, y)], dim=1)


def added_to_the_union(layers, x, y):
    conv = layers[0].get_submodule("1")
    dense = conv_dense(x.to_dense(), conv.weight, None, *conv.geometry.sizes[1:])
    return read_cells(dense + x.to_dense(), y)


def norm_of_inference():
    layer = nn.SparseBatchNorm(3).eval()
    for i, value in enumerate((layer.running_mean, layer.running_var, layer.weight, layer.bias)):
        value.data.copy_(torch.tensor([0.5, 2.0, 3.0]) + i)
    return layer


class Edge(NamedTuple):
    """A layer, and its result of (layer, x, y) in dense operators; y gives the cells."""

    make: Callable[[], Any]
    dense: Callable[[Any, SparseTensor, Any], torch.Tensor]


# All of these look at coordinates.
LAYERS = {
    "SubMConv2d": Edge(lambda: nn.SubMConv2d(3, 4, 3), convolved),
    "SparseConv2d": Edge(lambda: nn.SparseConv2d(3, 4, 3, 2, 1), convolved),
    "SparseConv2d that skips": Edge(lambda: nn.SparseConv2d(3, 4, 1, 2), convolved),
    "SparseConvTranspose2d": Edge(lambda: nn.SparseConvTranspose2d(3, 4, 3, 2, 1), transposed),
    "SparseInverseConv2d": Edge(
        lambda: nn.SparseSequential(
            nn.SparseConv2d(3, 2, 2, 2, indice_key="down"),
            nn.SparseInverseConv2d(2, 4, 2, indice_key="down"),
        ),
        undone,
    ),
    "SparseMaxPool2d": Edge(lambda: nn.SparseMaxPool2d(2), max_pooled),
    "SparseMaxPool2d that skips": Edge(lambda: nn.SparseMaxPool2d(1, 2), max_pooled),
    "SparseAvgPool2d": Edge(lambda: nn.SparseAvgPool2d(2), avg_pooled),
    "SparseAvgPool2d of active cells": Edge(
        lambda: nn.SparseAvgPool2d(2, count_absent=False), avg_pooled
    ),
    "AddTable": Edge(
        lambda: tables(nn.AddTable(), nn.SparseIdentity(), nn.SubMConv2d(3, 3, 3)), added
    ),
    "JoinTable": Edge(
        lambda: tables(nn.JoinTable(), nn.SparseIdentity(), nn.SubMConv2d(3, 4, 3)), joined
    ),
    "AddTableMisaligned": Edge(
        lambda: tables(
            nn.AddTableMisaligned(),
            nn.SparseIdentity(),
            nn.SparseConv2d(3, 3, 3, 1, 1, bias=False),
        ),
        added_to_the_union,
    ),
}
TO_TENSORS = {
    "SparseGlobalMaxPool": Edge(nn.SparseGlobalMaxPool, largest),
    "SparseGlobalAvgPool": Edge(nn.SparseGlobalAvgPool, mean),
    "SparseGlobalAvgPool of active cells": Edge(lambda: nn.SparseGlobalAvgPool(False), mean),
    "ToDense": Edge(nn.ToDense, one_by_one),
}
ROW_BY_ROW = {
    "SparseBatchNorm": Edge(norm_of_inference, normed),
    "SparseReLU": Edge(nn.SparseReLU, lambda layer, x, y: x.features.clamp(min=0)),
    "SparseIdentity": Edge(nn.SparseIdentity, lambda layer, x, y: x.features * 1),
}
EVERY = LAYERS | TO_TENSORS | ROW_BY_ROW
NETWORKS = {
    "SparseBasicBlock": lambda: models.SparseBasicBlock(3, 4, axes=2).eval(),
    "MinkUNet": lambda: models.MinkUNet(3, 4, (2, 2, 2), axes=2).eval(),
}
SCENES = {
    "none": [],
    "one": [[0, 2, 3]],
    "one at the corner": [[0, 5, 5]],
    "two that vanish under a stride": [[0, 1, 1], [0, 3, 5]],
    "an empty sample between": [[2, 0, 0], [0, 4, 1], [0, 4, 2], [2, 5, 3]],
}


def features_of(y):
    return y if isinstance(y, torch.Tensor) else y.features


def derivative(z, by):
    found = torch.autograd.grad(
        z.sin().sum(), by, create_graph=True, materialize_grads=True, allow_unused=True
    )
    return torch.cat([g.flatten() for g in found]) + 0 * by[0].sum()


@pytest.mark.parametrize("name", EVERY)
def test_every_layer_is_the_dense_one_with_two_derivatives(name):
    layer = EVERY[name].make().double()
    for rows in SCENES.values():
        x = tensor(rows, batch_size=3, dtype=torch.float64)
        y = layer(x)
        ours, theirs = features_of(y), EVERY[name].dense(layer, x, y) + 0 * x.features.sum()
        by = [x.features, *layer.parameters()]
        for _ in range(3):
            # Sums of at most 27 products of order 1 in float64, up to twice differentiated.
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
            ours, theirs = derivative(ours, by), derivative(theirs, by)
        x = tensor(rows, batch_size=3)
        single = layer.float()
        with torch.no_grad():  # where the kernels of inference serve
            fast = features_of(single(x))
        assert torch.allclose(fast, features_of(single(x)), atol=1e-5)
        layer.double()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_no_cell_and_of_one(name):
    for rows in (SCENES["none"], SCENES["one"]):
        x = tensor(rows)
        y = NETWORKS[name]()(x)
        (gradient,) = torch.autograd.grad(y.features.sum(), x.features)
        assert y.features.shape == (len(rows), 4)
        assert torch.isfinite(y.features).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("norm", [nn.SparseBatchNorm, torch.nn.BatchNorm1d])
def test_batch_norm_in_training(norm):
    layers = nn.SparseSequential(nn.SubMConv2d(3, 4, 3), norm(4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layers(tensor([[0, 1, 1]]))
    if norm is nn.SparseBatchNorm:  # torch's own would count the batch and move its statistics
        before = {name: b.clone() for name, b in layers[1].named_buffers()}
        assert layers(tensor([])).features.shape == (0, 4)
        assert all(torch.equal(b, before[name]) for name, b in layers[1].named_buffers())


@pytest.mark.parametrize("name", LAYERS | NETWORKS | {"ToDense": None})
def test_rows_that_are_no_cells_are_refused(name):
    layer = NETWORKS[name]() if name in NETWORKS else EVERY[name].make()
    for rows, message in (
        ([[0, 1, 1], [0, 1, 1]], r"coords must not repeat a row, got \[0, 1, 1\] twice"),
        ([[0, 1, 1], [0, -1, 1]], r"coords must lie in .* got row \[0, -1, 1\]"),
        ([[0, 1, 1], [-1, 1, 1]], r"coords must lie in .* got row \[-1, 1, 1\]"),
        ([[0, 1, 6]], r"coords must lie in .* got row \[0, 1, 6\]"),
        ([[1, 1, 1]], r"coords must lie in .* got row \[1, 1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(tensor(rows))


@pytest.mark.parametrize("pool", [nn.SparseGlobalMaxPool, nn.SparseGlobalAvgPool])
def test_samples_beyond_the_batch_are_refused(pool):
    with pytest.raises(ValueError, match="coords must have samples below 2, got 2"):
        pool()(tensor([[2, 1, 1]], batch_size=2))


def test_rows_of_padding_are_left_out_of_dense_tensors():
    x = tensor([[0, 1, 2], [0, 5, 5]])
    assert torch.equal(pad_to_capacity(x, 5).to_dense(), x.to_dense())


@pytest.mark.parametrize("name", LAYERS | NETWORKS)
def test_grids_of_more_than_2_to_the_31_cells(name):
    """The pattern at the far corner gives what it gives in a small grid."""
    pattern = [[0, 0, 1], [0, 1, 1], [0, 3, 2], [0, 4, 4]]
    side = 3_000_000
    far = side - 6
    layer = NETWORKS[name]() if name in NETWORKS else LAYERS[name].make()
    small = layer(tensor(pattern))
    large = layer(tensor([[b, y + far, x + far] for b, y, x in pattern], (side, side)))
    scale = small.spatial_shape[0] / 6
    moved = small.coords[:, 1:] + round(far * scale)
    if name == "SparseConvTranspose2d":
        moved = small.coords[:, 1:] + 2 * far
    interior = (small.coords[:, 1:] > 0).all(dim=1)  # padding is at the small grid's border alone
    assert interior.any()
    rows = {tuple(row): i for i, row in enumerate(large.coords[:, 1:].tolist())}
    for i in interior.nonzero().flatten().tolist():
        j = rows[tuple(moved[i].tolist())]
        assert torch.allclose(small.features[i], large.features[j], atol=1e-6)


def on_meta(x):
    return x.with_features(x.features.to("meta"))


@pytest.mark.parametrize("name", LAYERS | TO_TENSORS | NETWORKS | {"SparseBatchNorm": None})
def test_two_devices_are_refused(name):
    layer = NETWORKS[name]() if name in NETWORKS else EVERY[name].make()
    with pytest.raises(ValueError, match="must be on meta like the features"):
        layer(on_meta(tensor([[0, 1, 1], [0, 2, 2]])))
