"""Every layer against spconv 2.3.8 on CPU: cells, features, and gradients by features and parameters.

20 cases of layer and axes; 25 examples each or an eighth of the Hypothesis profile's, so 500 drawn
networks, and 5,000 with HYPOTHESIS_PROFILE=thorough. `tests/sparse/test_differential.py` has the same
layers against torch's dense operators, exactly.

spconv's CPU convolutions run backward, but ask for a CUDA stream first (AssertionError: "Torch not
compiled with CUDA enabled"), which the fixture below answers with 0; nothing on the CPU uses it. Its
average pools ("implicit gemm only support cuda"), global pools ("not implemented in cpu-only spconv"),
and sums of different cells ("spconv not compiled with cuda") do not run at all: for their values and
gradients torch's dense operators are the only oracle.

Run with OMP_NUM_THREADS=1: with more threads its strided and transposed convolutions race.
"""

import copy
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fquant.sparse import SparseTensor, from_points
from fquant.testing import strategies
from fquant.testing.scenes import load_arrays

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peer = pytest.importorskip("spconv.pytorch")
from fquant.interop.spconv import convert_spconv, from_spconv_state_dict, to_spconv

LIDAR = Path(os.environ.get("FQUANT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "lidar"
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        os.environ.get("OMP_NUM_THREADS") != "1",
        reason="spconv's CPU convolutions race with more than OMP_NUM_THREADS=1",
    ),
]
KINDS = ["SubMConv", "SparseConv", "SparseConvTranspose", "SparseInverseConv", "SparseMaxPool"]
UNIT = 2.0**-24  # relative rounding error of a float32 operation


@pytest.fixture(autouse=True)
def _no_stream(monkeypatch):
    monkeypatch.setattr("spconv.pytorch.ops.get_current_stream", lambda: 0)


def in_order(x):
    """Cells sorted, and features in their order, which is not spconv's."""
    keys = [tuple(row) for row in x.indices.tolist()]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return [keys[i] for i in order], x.features[order]


def results(model, x, params, cotangent=None):
    """(cells, features, gradients by the input's features and by params)."""
    leaf = x.features.detach().requires_grad_()
    cells, y = in_order(model(x.replace_feature(leaf)))
    seed = torch.ones_like(y) if cotangent is None else cotangent(y)
    return cells, y.detach(), torch.autograd.grad(y, [leaf, *params], seed)


def compare(model, x, cotangent, bound):
    """Runs the model of spconv's modules and its conversion, forward and backward."""
    ours = convert_spconv(model)
    names = [name for name, _ in model.named_parameters()]
    cells, y, gradients = results(ours, x, list(ours.parameters()), cotangent)
    their_cells, z, theirs = results(model, to_spconv(x), list(model.parameters()), cotangent)
    assert cells == their_cells
    by_name = from_spconv_state_dict(dict(zip(names, theirs[1:], strict=True)), ours)
    expected = [z, theirs[0], *(by_name[name] for name in names)]
    for a, b, allowed in zip([y, *gradients], expected, bound(ours, x), strict=True):
        assert bool(((a - b).abs() <= allowed).all()), (a - b).abs().max()


def exactly(ours, x):
    return [0.0] * (2 + len(list(ours.parameters())))


def within_rounding(ours, x):
    """How far two float32 evaluations of a chain of convolutions may lie apart, element by element.

    A sum of n products, in any order, with or without fused operations, is off by at most
    `n u / (1 - n u) sum |products|`, u = 2^-24 (Higham 2002, Accuracy and Stability of Numerical
    Algorithms, section 3.1). Every result here is a sum of products, over the taps and channels of each
    layer in turn and, for gradients by weights, over rows; n is their total. Two evaluations may err in
    opposite directions: twice that. The sums of magnitudes are the network's own on |x|, |weights| and
    |cotangent|, in float64.
    """
    sizes = copy.deepcopy(ours).double()
    for parameter in sizes.parameters():
        parameter.data.abs_()
    magnitudes = x.with_features(x.features.detach().double().abs())
    _, y, gradients = results(sizes, magnitudes, list(sizes.parameters()), torch.ones_like)
    n = len(y) + len(x.coords) + 1
    for layer in ours:
        n += math.prod(layer.kernel_size) * max(layer.in_channels, layer.out_channels)
    step = n * UNIT
    return [2 * step / (1 - step) * size for size in (y, *gradients)]


def network(data, kind, axes, x):
    """Layers of spconv that undo or follow each other, of drawn sizes, that fit x."""
    channels = x.features.shape[1]
    k, s, p, d = map(list, data.draw(strategies.conv_geometries(x.spatial_shape)))
    bias = data.draw(st.booleans())
    if kind == "SparseMaxPool":
        return [getattr(peer, f"SparseMaxPool{axes}d")(k, s, p, d)]
    if kind == "SubMConv":
        k = [data.draw(st.sampled_from([1, 3])) for _ in range(axes)]
        return [getattr(peer, f"SubMConv{axes}d")(channels, 2, k, dilation=d, bias=bias)]
    if kind == "SparseConvTranspose":
        sizes = zip(x.spatial_shape, k, s, p, strict=True)
        p = [c if (n - 1) * b - 2 * c + a >= 1 else 0 for n, a, b, c in sizes]
        p = p if np.prod(k) * np.prod(s) > 1 else [0] * axes
        return [getattr(peer, f"SparseConvTranspose{axes}d")(channels, 2, k, s, p, bias=bias)]
    if np.prod(k) == 1 and kind == "SparseInverseConv":
        k[0], p[0], d[0] = 2, 1, 1  # one tap is one product there, without a map to undo
    elif np.prod(k) == np.prod(s) == 1:
        p = [0] * axes  # it refuses others
    conv = getattr(peer, f"SparseConv{axes}d")
    layers = [conv(channels, 2, k, s, p, d, bias=bias, indice_key="down")]
    if kind == "SparseInverseConv":
        back = getattr(peer, f"SparseInverseConv{axes}d")
        layers.append(back(2, 3, k, indice_key="down", bias=False))
    return layers


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=max(25, settings.default.max_examples // 8),
    suppress_health_check=[*HealthCheck],  # the fixture sets the same for all examples
)
@given(data=st.data())
def test_integers_are_equal(kind, axes, data):
    """Integers in float32 are exact in any order of summation."""
    side = {1: 6, 2: 6, 3: 4, 4: 3}[axes]
    x = data.draw(
        strategies.sparse_tensors(num_axes=st.just(axes), max_side=side, dtype=torch.float32)
    )
    if not len(x.coords):  # spconv refuses none
        x = SparseTensor.from_dense(torch.ones(1, 2, *[2] * axes))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    if kind == "SparseMaxPool":  # values of 0 and below are not spconv's, ties have no one gradient
        values = 1 + torch.randperm(x.features.numel(), generator=g)
        x = x.with_features(values.view(x.features.shape).float())
    model = peer.SparseSequential(*network(data, kind, axes, x))
    for parameter in model.parameters():
        parameter.data = torch.randint(-5, 6, parameter.shape, generator=g).float()
    seed = data.draw(st.integers(0, 2**16))

    def cotangent(y):
        g = torch.Generator().manual_seed(seed)
        return torch.randint(-5, 6, y.shape, generator=g).float()

    compare(model, x, cotangent, exactly)


def scan(name, voxels=2000):
    points = load_arrays(LIDAR / f"{name}.npz")["xyz"].astype(np.float32)
    points = torch.from_numpy(points[np.isfinite(points).all(axis=1)])[:, [2, 1, 0]]
    points = points[points.abs().amax(dim=1).argsort()[: 8 * voxels]]  # the nearest
    low = points.amin(0).floor()
    upper = (points.amax(0) + 1.0).tolist()
    return from_points(points, points - low, [0.2] * 3, low.tolist(), upper)[0]


@pytest.mark.skipif(not LIDAR.is_dir(), reason=f"no scans in {LIDAR}")
@pytest.mark.parametrize("name", ["ouster_os1_128_frame0", "libpointmatcher_car_cloud400"])
def test_layers_on_real_scans(name):
    x = scan(name)
    assert 500 < len(x.coords) < 20000
    torch.manual_seed(0)
    down = {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}
    for layers in (
        [peer.SubMConv3d(3, 16, 3, bias=False)],
        [peer.SubMConv3d(3, 8, 3, dilation=2, bias=False)],
        [peer.SubMConv3d(3, 8, 1, bias=False)],
        [peer.SparseConv3d(3, 16, **down)],
        [peer.SparseConvTranspose3d(3, 4, 2, 2, bias=False)],
        [
            peer.SparseConv3d(3, 8, **down, indice_key="down"),
            peer.SparseInverseConv3d(8, 4, 3, indice_key="down", bias=False),
        ],
    ):
        compare(peer.SparseSequential(*layers), x, torch.cos, within_rounding)


def test_the_bound_is_no_blank_cheque():
    """A wrong tap, or a wrong row, is some thousand times as far off."""
    x = SparseTensor.from_dense(torch.ones(1, 1, 8, 8))
    ours = convert_spconv(peer.SparseSequential(peer.SubMConv2d(1, 4, 3, bias=False)))
    for allowed in within_rounding(ours, x):  # of sums of up to 64 values of order 1
        assert 0 < allowed.max() < 2e-3


@pytest.mark.parametrize(
    "layer",
    [
        lambda: peer.SparseBatchNorm(3, eps=1e-3, momentum=0.2),
        lambda: peer.modules.SparseSyncBatchNorm(3).eval(),
        lambda: peer.SparseSequential(torch.nn.BatchNorm1d(3), torch.nn.ReLU()),
        lambda: peer.SparseSequential(
            peer.ConcatTable().add(peer.SparseIdentity()).add(peer.SparseReLU()), peer.AddTable()
        ),
        lambda: peer.SparseSequential(
            peer.ConcatTable().add(peer.SparseIdentity()).add(peer.SparseReLU()), peer.JoinTable()
        ),
        lambda: peer.SparseSequential(peer.ToDense()),
    ],
    ids=[
        "SparseBatchNorm",
        "SparseSyncBatchNorm",
        "BatchNorm1d and ReLU",
        "AddTable",
        "JoinTable",
        "ToDense",
    ],
)
def test_small_modules_are_equal(layer):
    g = torch.Generator().manual_seed(0)
    x = SparseTensor.from_dense((torch.rand(2, 1, 6, 6, generator=g) < 0.4).float())
    x = x.with_features(torch.randn(len(x.coords), 3, generator=g))
    theirs = layer()
    ours = convert_spconv(copy.deepcopy(theirs))
    found = []
    for model, record in ((ours, x), (theirs, to_spconv(x))):
        leaf = x.features.clone().requires_grad_()
        with warnings.catch_warnings():  # dense() indexes with a list, which torch deprecates
            warnings.simplefilter("ignore")
            y = model(record.replace_feature(leaf))
        y = y if isinstance(y, torch.Tensor) else y.features
        gradients = torch.autograd.grad(y.sin().sum(), [leaf, *model.parameters()])
        found.append([y, *gradients, *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
