"""spconv 2.3.8 on CPU as peer: its tensors, state dicts and networks; its models quantized as they are.

Layers are compared one by one in `test_spconv_layers.py`.

Run with OMP_NUM_THREADS=1: with more threads its strided and transposed convolutions race.
"""

import copy
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import fquant as fq
from fquant.sparse import (
    SparseTensor,
    avg_pool,
    from_points,
    global_avg_pool,
    global_max_pool,
    models,
    nn,
)
from fquant.testing.scenes import load_arrays

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peer = pytest.importorskip("spconv.pytorch")
from fquant.interop.spconv import (  # needs spconv
    convert_spconv,
    from_spconv,
    from_spconv_state_dict,
    spconv_ops,
    to_spconv,
    to_spconv_state_dict,
)

LIDAR = Path(os.environ.get("FQUANT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "lidar"
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        os.environ.get("OMP_NUM_THREADS") != "1",
        reason="spconv's CPU convolutions race with more than OMP_NUM_THREADS=1",
    ),
]


def by_key(x):
    """Features in the order of the cells, which is not spconv's."""
    keys = [tuple(row) for row in x.indices.tolist()]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return [keys[i] for i in order], x.features.detach()[order]


def assert_same(ours, theirs, atol=0.0):
    cells, features = by_key(ours)
    their_cells, their_features = by_key(theirs)
    assert cells == their_cells
    assert list(ours.spatial_shape) == list(theirs.spatial_shape)
    assert torch.allclose(features, their_features, rtol=0, atol=atol)


def test_tensors_share_memory():
    x = SparseTensor.from_dense(torch.ones(1, 2, 3))
    assert not x.coords.is_contiguous()  # spconv would read other rows there
    assert to_spconv(x).indices.tolist() == x.coords.tolist()
    coords = x.coords.int().contiguous()
    x = SparseTensor(x.features, coords, x.spatial_shape, x.batch_size)
    there = to_spconv(x)
    back = from_spconv(there)
    for a, b in ((x.features, there.features), (x.coords, there.indices)):
        assert a.data_ptr() == b.data_ptr()
    assert back.features is there.features
    assert back.coords is there.indices
    assert (back.spatial_shape, back.batch_size) == (x.spatial_shape, x.batch_size)


def their_unet():
    return peer.SparseSequential(
        peer.SubMConv2d(2, 8, 3, bias=False, indice_key="s0"),
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        peer.SparseConv2d(8, 8, 2, 2, bias=False, indice_key="d0"),
        peer.SparseBatchNorm(8),
        peer.SparseReLU(),
        peer.SparseInverseConv2d(8, 8, 2, indice_key="d0", bias=False),
        peer.SubMConv2d(8, 4, 1, bias=False),
        peer.SubMConv2d(4, 4, 1, bias=False),  # square: the layouts differ, the shapes do not
        peer.SparseMaxPool2d(2, 2),
        peer.ToDense(),
    ).eval()


def scene(channels, shape=(8, 8), seed=0):
    g = torch.Generator().manual_seed(seed)
    cells = SparseTensor.from_dense((torch.rand(2, 1, *shape, generator=g) < 0.4).float())
    x = SparseTensor(cells.features, cells.coords.int(), cells.spatial_shape, cells.batch_size)
    return x.with_features(torch.randn(len(x.coords), channels, generator=g))


def densified(call):
    with warnings.catch_warnings():  # dense() indexes with a list, which torch deprecates
        warnings.simplefilter("ignore")
        return call()


def test_state_dicts_both_ways():
    theirs, x = their_unet(), scene(2)
    torch.manual_seed(1)
    ours = convert_spconv(copy.deepcopy(theirs))
    for parameter in ours.parameters():
        parameter.data = torch.randn_like(parameter)
    state = from_spconv_state_dict(theirs.state_dict(), ours)
    ours.load_state_dict(state)
    with torch.no_grad():
        expected = densified(lambda: theirs(to_spconv(x)))
    # The pool's floor at 0 is spconv's; the network ends in it.
    assert torch.allclose(ours(x).clamp(min=0), expected, atol=1e-5)
    there = to_spconv_state_dict(ours.state_dict(), ours)
    assert there.keys() == theirs.state_dict().keys()
    assert all(torch.equal(there[name], tensor) for name, tensor in theirs.state_dict().items())
    rsck = {
        name: t.movedim(0, -1).contiguous() if t.dim() == 4 else t
        for name, t in theirs.state_dict().items()
    }
    old = from_spconv_state_dict(rsck, ours, layout="RSCK")
    assert all(torch.equal(old[name], state[name]) for name in state)
    as_it_is = from_spconv_state_dict(theirs.state_dict(), ours, pointwise="weight")
    assert as_it_is["7.weight"] is theirs.state_dict()["7.weight"] or torch.equal(
        as_it_is["7.weight"], theirs[7].weight
    )
    assert not torch.equal(as_it_is["8.weight"], state["8.weight"])


def test_converted_models_share_parameters_and_compute_the_same():
    theirs, x = their_unet(), scene(2)
    before = copy.deepcopy(theirs.state_dict())
    ours = convert_spconv(theirs, max_pool_floor=True)
    with torch.no_grad():
        expected = densified(lambda: theirs(to_spconv(x)))
    assert torch.allclose(ours(x), expected, atol=1e-5)
    assert ours[0].weight is theirs[0].weight
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(torch.equal(v, before[k]) for k, v in theirs.state_dict().items())
    assert (convert_spconv(theirs)(x) < 0).any()  # a maximum of negative values is negative


def test_pools_that_spconv_cannot_run_on_cpu_are_over_active_cells():
    x = scene(3)
    pool = convert_spconv(peer.SparseAvgPool2d(3, 2, 1))
    assert torch.equal(pool(x).features, avg_pool(x, 3, 2, 1, count_absent=False).features)
    mean = convert_spconv(peer.SparseGlobalAvgPool())
    assert torch.equal(mean(x), global_avg_pool(x, count_absent=False))
    largest = convert_spconv(peer.SparseGlobalMaxPool())
    assert torch.equal(largest(x), global_max_pool(x))


def test_modules_that_are_there_twice_stay_one_and_keep_their_mode():
    conv = peer.SubMConv2d(2, 2, 3, bias=False)
    theirs = peer.SparseSequential(conv, torch.nn.BatchNorm1d(2).eval(), conv).train()
    theirs[1].eval()
    ours = convert_spconv(theirs)
    assert ours[0] is ours[2]
    assert [m.training for m in (ours, *ours)] == [m.training for m in (theirs, *theirs)]


def test_a_plan_is_the_same_for_spconvs_modules_and_ours():
    theirs, x = peer.SparseSequential(*list(their_unet())[:9]).eval(), scene(2)
    ours = convert_spconv(theirs)
    ops = spconv_ops()
    rules = [*fq.skip("0"), *fq.w8a8()]
    there = fq.make_plan(theirs, rules, (to_spconv(x),), ops=ops, fake=False)
    here = fq.make_plan(ours, rules, (nn.with_maps(ours, x),))
    assert [s.name for s in there.sites] == [s.name for s in here.sites]
    assert there.quantizers == here.quantizers
    assert {s.op for s in there.sites} == {"subm_conv", "sparse_conv", "sparse_inverse_conv"}

    their_params, our_params = (dict(m.state_dict()) for m in (theirs, ours))
    before = copy.deepcopy(their_params)
    batches = [scene(2, seed=seed) for seed in range(3)]
    their_stats = fq.calibrate_model(
        theirs, there, their_params, [to_spconv(b) for b in batches], ops=ops, progress=False
    )
    our_stats = fq.calibrate_model(ours, here, our_params, batches, progress=False)
    their_scales, our_scales = fq.finalize(there, their_stats), fq.finalize(here, our_stats)
    for name, scale in our_scales.items():
        if name.startswith(("7/", "8/")) and name.endswith("weight"):
            continue  # there these weights are stored in another order
        assert torch.allclose(scale, their_scales[name], rtol=1e-5), name
    with torch.no_grad():
        y = fq.fake_quant(theirs, there, ops=ops)(their_params, their_scales, to_spconv(x))
        z = fq.fake_quant(ours, here)(our_params, our_scales, x)
        exact = theirs(to_spconv(x))
    noise = (by_key(y)[1] - by_key(exact)[1]).square().mean()
    assert 0 < noise < 0.01 * exact.features.square().mean()
    # 1 x 1 weights have scales per row of another arrangement: the last layers differ by rounding.
    assert torch.allclose(by_key(y)[1], by_key(z)[1], atol=0.1 * exact.features.std().item())
    assert all(torch.equal(v, before[k]) for k, v in theirs.state_dict().items())


def test_quantized_weights_reach_spconvs_modules():
    """Three bits of weights alone: far from float, and what the converted model gives."""
    theirs, x = peer.SparseSequential(*list(their_unet())[:7]).eval(), scene(2)
    ours, ops = convert_spconv(theirs), spconv_ops()
    convs = ("subm_conv", "sparse_conv", "sparse_inverse_conv")
    rules = [fq.OpRule(ops=convs, weight=fq.QuantSpec(3, axis=0))]
    plan = fq.make_plan(theirs, rules, (to_spconv(x),), ops=ops, fake=False)
    assert len(plan.sites) == 3
    params = dict(theirs.state_dict())
    stats = fq.calibrate_model(theirs, plan, params, [to_spconv(x)], ops=ops, progress=False)
    scales = fq.finalize(plan, stats)
    with torch.no_grad():
        exact = by_key(theirs(to_spconv(x)))[1]
        y = by_key(fq.fake_quant(theirs, plan, ops=ops)(params, scales, to_spconv(x)))[1]
        z = by_key(fq.fake_quant(ours, plan)(params, scales, x))[1]
    assert (y - exact).abs().max() > 0.1 * exact.abs().max()
    assert torch.allclose(y, z, atol=1e-5)


def test_converted_models_train_where_spconv_cannot():
    ours = convert_spconv(their_unet()).train()
    x = nn.with_maps(ours, scene(2))
    params = {n: p.detach() for n, p in ours.named_parameters()}
    plan = fq.make_plan(ours, fq.w8a8(), (x,))
    scales = fq.finalize(plan, fq.calibrate_model(ours, plan, params, [x], progress=False))
    gradients = torch.func.grad(lambda p: fq.fake_quant(ours, plan)(p, scales, x).square().sum())(
        params
    )
    assert all(gradients[name].any() for name in params if "weight" in name)


def our_network_in_spconv(model):
    """The networks of `fquant.sparse.models` in spconv's modules, for the differential tests."""
    from benches.spconv_networks import to_spconv_modules

    return to_spconv_modules(model, peer)


@pytest.mark.skipif(not LIDAR.is_dir(), reason=f"no scans in {LIDAR}")
@pytest.mark.parametrize("scan", ["ouster_os1_128_frame0", "libpointmatcher_car_cloud400"])
@pytest.mark.parametrize("name", ["VoxelResBackBone8x", "MinkUNet"])
def test_networks_on_real_scans(scan, name):
    points = load_arrays(LIDAR / f"{scan}.npz")["xyz"].astype(np.float32)
    points = torch.from_numpy(points[np.isfinite(points).all(axis=1)])[::8, [2, 1, 0]]
    low = points.amin(0).floor()
    size = [0.2, 0.2, 0.2]
    upper = ((points.amax(0) - low).clamp(min=8.0) + 1.0 + low).tolist()
    x, _ = from_points(points, points - low, size, low.tolist(), upper)
    assert 1000 < len(x.coords) < 50000
    torch.manual_seed(0)
    if name == "MinkUNet":
        ours = models.MinkUNet(3, None, width=0.25)
    else:
        ours = models.VoxelResBackBone8x(3, width=0.5, block_bias=False)
    ours = ours.eval()
    theirs = our_network_in_spconv(ours)
    with torch.no_grad():
        expected = theirs(to_spconv(x))
        y = ours(x)
    # float32 sums in other orders through up to 45 layers: n eps a layer, n up to 27 * 64.
    assert_same(y, expected, atol=1e-4 * max(1.0, expected.features.abs().max().item()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: from_spconv(torch.ones(1)),
            TypeError,
            "from_spconv: x must be a SparseConvTensor",
        ),
        (lambda: to_spconv(torch.ones(1)), TypeError, "to_spconv: x must be a SparseTensor"),
        (
            lambda: to_spconv(SparseTensor(torch.ones(0, 1), torch.ones(0, 2).int(), (2**31,), 1)),
            ValueError,
            "sides below 2\\^31",
        ),
        (
            lambda: from_spconv(
                peer.SparseConvTensor(torch.ones(2, 1), torch.zeros(2, 2).int(), [4], 1)
            ),
            ValueError,
            "coords must not repeat a row",
        ),
        (
            lambda: convert_spconv(peer.SparseConvTranspose1d(1, 1, 3, dilation=2)),
            ValueError,
            "if transposed no dilation",
        ),
        (lambda: convert_spconv(peer.SubMConv1d(1, 1, 3), pointwise="x"), ValueError, "one of"),
        (
            lambda: fq.make_plan(
                peer.SubMConv2d(2, 2, 3, bias=False),
                fq.w8a8(),
                (to_spconv(scene(2)),),
                ops=spconv_ops(),
            ),
            ValueError,
            "SubMConv2d: spconv must have tensors with data.*fake=False",
        ),
        (
            lambda: from_spconv_state_dict({}, torch.nn.Identity(), layout="x"),
            ValueError,
            "layout must be 'KRSC' or 'RSCK'",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
