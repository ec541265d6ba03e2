"""Edges on every layer: no cell, one cell, vanished and repeated cells, huge grids, two devices."""

import pytest
import torch

from fquant.sparse import SparseTensor, models, nn, sparse_add

LAYERS = {
    "SubMConv2d": lambda: nn.SubMConv2d(3, 4, 3),
    "SparseConv2d": lambda: nn.SparseConv2d(3, 4, 3, 2, 1),
    "SparseConvTranspose2d": lambda: nn.SparseConvTranspose2d(3, 4, 3, 2, 1),
    "SparseInverseConv2d": lambda: nn.SparseSequential(
        nn.SparseConv2d(3, 2, 2, 2, indice_key="down"),
        nn.SparseInverseConv2d(2, 4, 2, indice_key="down"),
    ),
    "SparseMaxPool2d": lambda: nn.SparseMaxPool2d(2),
    "SparseAvgPool2d": lambda: nn.SparseAvgPool2d(2),
    "SparseBasicBlock": lambda: models.SparseBasicBlock(3, 4, axes=2).eval(),
    "MinkUNet": lambda: models.MinkUNet(3, 4, (2, 2, 2), axes=2).eval(),
    "AddTableMisaligned": lambda: nn.SparseSequential(
        nn.ConcatTable(nn.SparseIdentity(), nn.SubMConv2d(3, 3, 3)), nn.AddTableMisaligned()
    ),
    "JoinTable": lambda: nn.SparseSequential(
        nn.ConcatTable(nn.SparseIdentity(), nn.SubMConv2d(3, 3, 3)), nn.JoinTable()
    ),
}
WITHOUT_CELLS = {
    "SparseGlobalMaxPool": nn.SparseGlobalMaxPool,
    "SparseGlobalAvgPool": nn.SparseGlobalAvgPool,
    "ToDense": nn.ToDense,
}


def tensor(rows, shape=(6, 6), batch_size=1):
    g = torch.Generator().manual_seed(0)
    coords = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    features = torch.randn(len(coords), 3, generator=g)
    return SparseTensor(features.requires_grad_(), coords, shape, batch_size)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [[], [[0, 2, 3]]], ids=["none", "one"])
def test_no_cell_and_one_cell(name, rows):
    x, layer = tensor(rows), LAYERS[name]()
    y = layer(x)
    channels = {"SparseMaxPool2d": 3, "SparseAvgPool2d": 3, "JoinTable": 6, "AddTableMisaligned": 3}
    assert y.features.shape[1] == channels.get(name, 4)
    assert len(y.coords) == len(y.features)
    assert bool(len(y.features)) == bool(rows)
    (gradient,) = torch.autograd.grad(y.features.sum(), x.features)
    assert gradient.shape == x.features.shape
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(y.features).all()
    with torch.no_grad():
        assert torch.allclose(layer(x).features, y.features, atol=1e-6)


@pytest.mark.parametrize("name", WITHOUT_CELLS)
def test_samples_without_cells_are_zeros(name):
    y = WITHOUT_CELLS[name]()(tensor([[1, 2, 3]], batch_size=3))
    assert y.shape[:2] == (3, 3)
    assert not y[0].any()
    assert y[1].any()


@pytest.mark.parametrize("norm", [nn.SparseBatchNorm, torch.nn.BatchNorm1d])
def test_batch_norm_in_training(norm):
    layers = nn.SparseSequential(nn.SubMConv2d(3, 4, 3), norm(4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layers(tensor([[0, 1, 1]]))
    if norm is nn.SparseBatchNorm:  # torch's own would count the batch and move its statistics
        before = {name: b.clone() for name, b in layers[1].named_buffers()}
        assert layers(tensor([])).features.shape == (0, 4)
        assert all(torch.equal(b, before[name]) for name, b in layers[1].named_buffers())


@pytest.mark.parametrize(
    "layer", [lambda: nn.SparseConv2d(3, 4, 1, 2), lambda: nn.SparseMaxPool2d(1, 2)]
)
def test_cells_that_vanish_under_a_stride(layer):
    after = nn.SubMConv2d(4, 5, 3)
    y = layer()(tensor([[0, 1, 1], [0, 3, 5]]))
    assert y.features.shape[0] == 0
    if y.features.shape[1] == 4:
        assert after(y).features.shape == (0, 5)
    assert not y.to_dense().any()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1, 1], [0, 1, 1]], r"coords must not repeat a row, got \[0, 1, 1\] twice"),
        ([[0, 1, 1], [0, -1, 1]], r"coords must lie in .* got row \[0, -1, 1\]"),
        ([[0, 1, 1], [-1, 1, 1]], r"coords must lie in .* got row \[-1, 1, 1\]"),
        ([[0, 1, 6]], r"coords must lie in .* got row \[0, 1, 6\]"),
    ],
)
def test_rows_that_are_no_cells_are_refused(name, rows, message):
    with pytest.raises(ValueError, match=message):
        LAYERS[name]()(tensor(rows))


@pytest.mark.parametrize("name", LAYERS)
def test_grids_of_more_than_2_to_the_31_cells(name):
    """The pattern at the far corner gives what it gives in a small grid."""
    pattern = [[0, 0, 1], [0, 1, 1], [0, 3, 2], [0, 4, 5]]
    side = 3_000_000
    far = side - 6
    layer = LAYERS[name]()
    small = layer(tensor(pattern))
    large = layer(tensor([[b, y + far, x + far] for b, y, x in pattern], (side, side)))
    scale = small.spatial_shape[0] / 6
    moved = small.coords[:, 1:] + round(far * scale)
    if name == "SparseConvTranspose2d":
        moved = small.coords[:, 1:] + 2 * far
    interior = (small.coords[:, 1:] > 0).all(dim=1)  # padding is at the small grid's border alone
    rows = {tuple(row): i for i, row in enumerate(large.coords[:, 1:].tolist())}
    for i in interior.nonzero().flatten().tolist():
        j = rows[tuple(moved[i].tolist())]
        assert torch.allclose(small.features[i], large.features[j], atol=1e-6)


@pytest.mark.parametrize("name", LAYERS | WITHOUT_CELLS)
def test_two_devices_are_refused(name):
    x = tensor([[0, 1, 1], [0, 2, 2]])
    layer = {**LAYERS, **WITHOUT_CELLS}[name]()
    with pytest.raises((ValueError, TypeError), match="must be on meta like the features"):
        layer(x.with_features(x.features.to("meta")))


def test_sums_of_tensors_on_two_devices_are_refused():
    x = tensor([[0, 1, 1]])
    other = SparseTensor(x.features.to("meta"), x.coords.to("meta"), x.spatial_shape, 1)
    with pytest.raises(ValueError, match="tensors must be on cpu like"):
        sparse_add(x, other)
    with pytest.raises(ValueError, match="tensors must be on cpu like"):
        nn.AddTable()([x, other])
