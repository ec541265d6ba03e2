"""Modules against the pure functions; how kernel maps travel and are shared; state dicts."""

import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

import fquant as fq
from fquant.sparse import (
    SparseTensor,
    add_features,
    batch_norm,
    from_points,
    models,
    nn,
    sparse_conv,
    sparse_inverse_conv,
    subm_conv,
)
from fquant.sparse.capture import fast_kernel_serves


def scene(channels, shape, density=0.3, seed=0, batch=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    cells = SparseTensor.from_dense((torch.rand(batch, 1, *shape, generator=g) < density).float())
    return cells.with_features(
        torch.randn(len(cells.coords), channels, generator=g, dtype=torch.float32).to(dtype)
    )


def small_networks():
    torch.manual_seed(0)
    return {
        "BenchmarkNet": (models.BenchmarkNet(width=1 / 32), scene(3, (64, 64, 64), 0.002)),
        "VoxelBackBone8x": (models.VoxelBackBone8x(width=0.25), scene(4, (25, 16, 16), 0.05)),
        "VoxelResBackBone8x": (models.VoxelResBackBone8x(width=0.25), scene(5, (25, 16, 16), 0.05)),
        "MinkUNet": (models.MinkUNet(4, 5, (4, 4, 8, 8, 4), axes=2), scene(4, (9, 9))),
    }


def test_modules_are_the_functions_and_share_maps():
    x = scene(3, (8, 8))
    torch.manual_seed(0)
    first, second = nn.SubMConv2d(3, 4, 3), nn.SubMConv2d(4, 4, 3, bias=False)
    down = nn.SparseConv2d(4, 6, 3, stride=2, padding=1, indice_key="down")
    up = nn.SparseInverseConv2d(6, 4, 3, indice_key="down")
    y = second(first(x))
    assert torch.equal(
        y.features, subm_conv(subm_conv(x, first.weight, first.bias), second.weight).features
    )
    assert x.maps is None  # the input is as it was
    assert list(y.maps) == ["subm k3"]
    z = down(y)
    expected = sparse_conv(y, down.weight, down.bias, stride=2, padding=1)
    assert torch.equal(z.features, expected.features)
    assert z.cells == ("down",)
    coarse = nn.SubMConv2d(6, 6, 3)(z)
    assert list(coarse.maps) == ["subm k3", "down", "down/subm k3"]
    back = up(coarse)
    undone = sparse_inverse_conv(coarse, up.weight, up.bias, kernel_map=z.maps["down"])
    assert torch.equal(back.features, undone.features)
    assert back.cells == ()
    assert second(back).maps["subm k3"] is y.maps["subm k3"]


def test_a_map_that_is_there_is_not_built_again(monkeypatch):
    x = scene(3, (8, 8))
    block = models.SparseBasicBlock(3, 3, axes=2).eval()
    y = block(x)
    monkeypatch.setattr("fquant.sparse.nn.maps.build_map", None)
    again = block(nn.with_maps(block, y))  # would call None
    assert again.maps["subm k3"] is y.maps["subm k3"]


@pytest.mark.parametrize("name", list(small_networks()))
def test_networks_with_maps_beforehand(name):
    model, x = small_networks()[name]
    model.eval()
    y = model(x)
    prepared = nn.with_maps(model, x)
    assert set(prepared.maps) == set(y.maps)
    assert x.maps is None
    assert torch.equal(model(prepared).features, y.features)
    with torch.no_grad():
        fast = model(prepared).features
    # Other orders of summation through up to 40 layers.
    largest = y.features.detach().abs().max().item()
    assert torch.allclose(fast, y.features, rtol=1e-3, atol=1e-4 * largest)
    plan = fq.make_plan(model, fq.w8a8(), (prepared,))
    assert len(plan.sites) >= 12
    model.train()
    loss = model(prepared).features.square().sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)
    assert sum(bool(g.any()) for g in gradients) > len(gradients) / 2


def test_one_compiled_graph_for_scenes_of_any_size():
    model = nn.SparseSequential(
        models.SparseBasicBlock(2, 4, axes=2),
        nn.SparseConv2d(4, 4, 2, 2, indice_key="down"),
        nn.SparseInverseConv2d(4, 2, 2, indice_key="down"),
    ).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    graphs = []
    with torch.no_grad():
        for seed, density in enumerate([0.5, 0.3, 0.6]):
            x = nn.with_maps(model, scene(2, (9, 9), density, seed))
            # Sums of some ten products in another order.
            assert torch.allclose(compiled(x).features, model(x).features, atol=1e-5)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2]


def test_records_with_maps_are_pytrees_and_can_be_stored():
    model, x = small_networks()["MinkUNet"]
    prepared = nn.with_maps(model.eval(), x)
    moved = pytree.tree_map(torch.clone, prepared)  # as .to(device) would do leaf by leaf
    assert torch.equal(model(moved).features, model(x).features)
    stored = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(model(stored).features, model(x).features)
    batched = torch.vmap(lambda f: model(prepared.with_features(f)).features)(
        torch.stack([x.features, x.features * 2])
    )
    assert torch.allclose(batched[0], model(x).features, atol=1e-5)


def test_state_dicts_are_in_spconvs_layout():
    assert nn.SubMConv3d(5, 7, (1, 3, 5)).weight.shape == (7, 1, 3, 5, 5)
    names = list(models.VoxelResBackBone8x().state_dict())
    for name in (
        "conv_input.0.weight",
        "conv_input.1.running_mean",
        "conv1.0.conv1.weight",
        "conv1.0.conv1.bias",
        "conv2.0.0.weight",
        "conv2.1.bn2.running_var",
        "conv_out.0.weight",
    ):
        assert name in names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    x = scene(4, (9, 9), dtype=dtype)
    model = models.MinkUNet(4, 5, (4, 8, 4), axes=2).to(dtype)
    y = model(x).features
    assert y.dtype == dtype
    y.float().sum().backward()
    assert model.stem[0][0].weight.grad.dtype == dtype
    with torch.no_grad():
        assert model.eval()(x).features.dtype == dtype


def test_points_beyond_the_limit_take_no_part():
    points = torch.tensor([[0.1], [1.5], [0.2], [0.3], [1.2]])
    features = torch.tensor([[1.0], [10.0], [3.0], [100.0], [30.0]])
    cells, row = from_points(points, features, 1.0, [0.0], [2.0], max_points=2)
    assert cells.features.T.tolist() == [[2.0, 20.0]]
    assert row.tolist() == [0, 1, 0, 0, 1]


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_returns_what_torchs_module_becomes(training):
    x = scene(3, (6, 6))
    norm = torch.nn.BatchNorm1d(3, momentum=0.3, eps=1e-2).train(training)
    norm.running_mean.normal_()
    norm.weight.data.normal_()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    y, new_mean, new_var = batch_norm(
        x, mean, var, norm.weight, norm.bias, training=training, momentum=0.3, eps=1e-2
    )
    kept = mean.clone()
    expected = norm(x.features)
    assert torch.allclose(y.features, expected, atol=1e-6)
    assert torch.allclose(new_mean, norm.running_mean, atol=1e-6)
    assert torch.allclose(new_var, norm.running_var, atol=1e-6)
    assert torch.equal(mean, kept)
    assert torch.equal(new_mean, mean) != training
    none = SparseTensor(x.features[:0], x.coords[:0], x.spatial_shape, x.batch_size)
    y, unchanged, _ = batch_norm(none, mean, var, training=training)
    assert torch.equal(unchanged, mean)
    assert y.features.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_half_types_is_rounded_once(dtype, training):
    x = scene(3, (6, 6), dtype=dtype)
    mean, var, gamma = torch.zeros(3), torch.ones(3), torch.tensor([0.3, 1.0, -2.0])
    arguments = (mean, var, gamma.to(dtype), gamma.to(dtype))
    y = batch_norm(x, *arguments, training=training)
    exact = batch_norm(x.map(torch.Tensor.float), *arguments, training=training)
    assert torch.equal(y[0].features, exact[0].features.to(dtype))
    assert torch.equal(y[2], exact[2])


def test_the_inference_op_serves_only_where_no_derivative_can_be_asked_for():
    features = torch.ones(1, 1)
    assert not fast_kernel_serves(features)
    with torch.no_grad():
        assert fast_kernel_serves(features)
        assert not fast_kernel_serves(features.double())
        assert not fast_kernel_serves(features.to("meta"))
        inside = []
        torch.vmap(lambda f: (inside.append(fast_kernel_serves(f)), f)[1])(features)
        torch.func.jvp(
            lambda f: (inside.append(fast_kernel_serves(f)), f)[1], (features,), (features,)
        )
        with torch.autograd.forward_ad.dual_level():
            inside.append(fast_kernel_serves(features))
        assert inside == [False] * 3


def test_sequential_hands_on_records_and_features():
    x = scene(3, (6, 6))
    layers = nn.SparseSequential(
        nn.SubMConv2d(3, 4, 3),
        torch.nn.ReLU(),
        nn.SparseBatchNorm(4),
        nn.ToDense(),
        torch.nn.Flatten(),
    ).eval()
    y = layers[2](layers[0](x).map(torch.relu)).to_dense().flatten(1)
    assert torch.equal(layers(x), y)
    tables = nn.ConcatTable(nn.SparseIdentity(), nn.SubMConv2d(3, 3, 3))
    a, b = tables(x)
    assert a is x
    assert torch.equal(nn.AddTable()([a, b]).features, add_features(a, b).features)
    assert nn.AddTable()([a, b]).maps.keys() == {"subm k3"}
    assert nn.JoinTable()([a, b]).features.shape == (len(x.coords), 6)


X = scene(2, (5, 5))
OTHER = scene(2, (5, 5), seed=3)


def with_wrong_map():
    maps = nn.SubMConv2d(2, 2, 3)(OTHER).maps
    return SparseTensor(X.features, X.coords, X.spatial_shape, X.batch_size, maps)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.SubMConv2d(2, 2, 2), ValueError, "SubMConv2d: kernel_size must be odd"),
        (
            lambda: add_features(
                X, SparseTensor(X.features, X.coords.flip(0), X.spatial_shape, X.batch_size)
            ),
            ValueError,
            "add_features: tensors must have the same cells in the same order",
        ),
        (lambda: nn.SubMConv2d(2, 2, 3, 2), ValueError, "and stride 1"),
        (lambda: nn.SubMConv2d(2, 2, 3, groups=2), ValueError, "groups must be 1, got 2"),
        (lambda: nn.SparseConv2d(2, 2, (3, 3, 3)), ValueError, "SparseConv2d: kernel_size must be"),
        (lambda: nn.SubMConv2d(2, 2, 3)(X.features), TypeError, "SubMConv2d: x must be a SparseT"),
        (lambda: nn.SubMConv2d(3, 2, 3)(X), ValueError, "Cin = 2 like the features"),
        (lambda: nn.SubMConv3d(2, 2, 3)(X), ValueError, "2 ints of at least 1"),
        (lambda: nn.SubMConv2d(2, 2, 3)(with_wrong_map()), ValueError, "one of the cells of x"),
        (
            lambda: nn.SubMConv2d(2, 2, 3, dilation=2, indice_key="a")(
                nn.SubMConv2d(2, 2, 3, indice_key="a")(X)
            ),
            ValueError,
            "'a' must name a map of this geometry, subm k3 d2, got subm k3",
        ),
        (
            lambda: nn.SparseInverseConv2d(2, 2, 2, indice_key="down")(X),
            ValueError,
            r"SparseInverseConv2d: indice_key must name the convolution .*got 'down'",
        ),
        (lambda: nn.with_maps(nn.SparseReLU(), X.features), TypeError, "with_maps: x must be"),
        (
            lambda: fq.make_plan(nn.SubMConv2d(2, 2, 3), fq.w8a8(), (X,)),
            ValueError,
            "x.maps must have 'subm k3' where values cannot be read.*with_maps",
        ),
        (lambda: batch_norm(X.features, X, X), TypeError, "batch_norm: x must be a SparseTensor"),
        (
            lambda: batch_norm(X, torch.ones(3), torch.ones(2)),
            ValueError,
            r"running_mean must have shape \(2,\)",
        ),
        (lambda: models.MinkUNet(widths=(4, 4)), ValueError, "odd number of at least three"),
        (lambda: add_features(X, OTHER), ValueError, "same cells in the same order"),
        (lambda: add_features(), ValueError, "at least one, got none"),
        (
            lambda: from_points(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, [0], [1], max_points=0),
            ValueError,
            "max_points must be at least 1",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
