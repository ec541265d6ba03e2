"""Backbones as detectors write them, on spconv's modules: planned, calibrated, exported and in int8.

Nothing in them is written for fquant: `post_act_block`, residual blocks that take features out and put
them back, or add records, indice keys, a dense tensor at the end.
"""

import os
import warnings

import pytest
import torch
from torch import nn

import fquant as fq
from fquant import sparse_network as sn
from fquant.graph import dynamic_rows
from fquant.sparse import SparseTensor
from fquant.sparse import nn as sparse_nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    spconv = pytest.importorskip("spconv.pytorch")
from fquant.interop.spconv import convert_spconv, spconv_ops, to_spconv

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        os.environ.get("OMP_NUM_THREADS") != "1",
        reason="spconv's CPU convolutions race with more than OMP_NUM_THREADS=1",
    ),
]


def norm(channels):
    return nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)


def post_act_block(before, after, kernel, indice_key, stride=1, padding=0, conv_type="subm"):
    if conv_type == "subm":
        conv = spconv.SubMConv3d(before, after, kernel, bias=False, indice_key=indice_key)
    else:
        conv = spconv.SparseConv3d(
            before, after, kernel, stride, padding, bias=False, indice_key=indice_key
        )
    return spconv.SparseSequential(conv, norm(after), nn.ReLU())


def replace_feature(out, features):
    """OpenPCDet's way to serve spconv 1 and 2."""
    if "replace_feature" in out.__dir__():
        return out.replace_feature(features)
    out.features = features
    return out


class FeatureBlock(spconv.SparseModule):
    """OpenPCDet's and mmdetection3d's residual block: norms and sums on features."""

    def __init__(self, before, channels, indice_key):
        super().__init__()
        self.conv1 = spconv.SubMConv3d(before, channels, 3, bias=False, indice_key=indice_key)
        self.bn1 = norm(channels)
        self.relu = nn.ReLU()
        self.conv2 = spconv.SubMConv3d(channels, channels, 3, bias=False, indice_key=indice_key)
        self.bn2 = norm(channels)
        self.downsample = None

    def forward(self, x):
        out = self.conv1(x)
        out = replace_feature(out, self.bn1(out.features))
        out = replace_feature(out, self.relu(out.features))
        out = self.conv2(out)
        out = replace_feature(out, self.bn2(out.features))
        identity = x if self.downsample is None else self.downsample(x)
        out = replace_feature(out, out.features + identity.features)
        return replace_feature(out, self.relu(out.features))


class RecordBlock(FeatureBlock):
    """The block of CenterPoint's int8 deployments: sums of records."""

    def __init__(self, before, channels, indice_key):
        super().__init__(before, channels, indice_key)
        self.relu = spconv.SparseReLU()
        self.first = spconv.SparseSequential(self.conv1, self.bn1, nn.ReLU())
        self.second = spconv.SparseSequential(self.conv2, self.bn2)
        del self.conv1, self.conv2, self.bn1, self.bn2

    def forward(self, x):
        return self.relu(self.second(self.first(x)) + x)


class Backbone8x(nn.Module):
    """VoxelBackBone8x, or with a block, VoxelResBackBone8x; a list of levels besides the last."""

    def __init__(self, block=None):
        super().__init__()
        self.conv_input = spconv.SparseSequential(
            spconv.SubMConv3d(4, 8, 3, padding=1, bias=False, indice_key="subm1"),
            norm(8),
            nn.ReLU(),
        )

        def stage(before, after, level, padding):
            layers = []
            if level > 1:
                layers.append(
                    post_act_block(before, after, 3, f"spconv{level}", 2, padding, "spconv")
                )
            if block is not None:
                layers += [block(after, after, f"res{level}") for _ in range(2)]
            else:
                layers.append(post_act_block(after, after, 3, f"subm{level}", padding=1))
            return spconv.SparseSequential(*layers)

        self.conv1 = stage(8, 8, 1, 1)
        self.conv2 = stage(8, 16, 2, 1)
        self.conv3 = stage(16, 16, 3, 1)
        self.conv4 = stage(16, 24, 4, (0, 1, 1))
        self.conv_out = post_act_block(24, 24, (3, 1, 1), "down2", (2, 1, 1), 0, "spconv")

    def forward(self, x):
        x_conv1 = self.conv1(self.conv_input(x))
        x_conv2 = self.conv2(x_conv1)
        x_conv3 = self.conv3(x_conv2)
        x_conv4 = self.conv4(x_conv3)
        return self.conv_out(x_conv4)


class BirdsEyeView(spconv.SparseModule):
    """The start of a backbone, and what CenterPoint does at its end."""

    def __init__(self):
        super().__init__()
        self.conv_input = post_act_block(4, 8, 3, "subm1")
        self.conv1 = FeatureBlock(8, 8, "res1")
        self.conv2 = post_act_block(8, 16, 3, "spconv2", 2, 1, "spconv")
        self.extra_conv = post_act_block(16, 16, (3, 1, 1), "down2", (2, 1, 1), 0, "spconv")

    def forward(self, x):
        out = self.extra_conv(self.conv2(self.conv1(self.conv_input(x)))).dense()
        n, c, d, h, w = out.shape
        return out.view(n, c * d, h, w)


def with_statistics(model):
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.05, 0.3)
        elif name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
    return model.eval()


BLOCKS = {"plain": None, "features": FeatureBlock, "records": RecordBlock}


def scene(seed):
    g = torch.Generator().manual_seed(seed)
    x = SparseTensor.from_dense((torch.rand(1, 1, 25, 16, 16, generator=g) < 0.06).float())
    coords = x.coords.int().contiguous()
    features = torch.randn(len(coords), 4, generator=g)
    return SparseTensor(features, coords, x.spatial_shape, 1)


def decibels(y, exact):
    return 10 * torch.log10(exact.square().sum() / (y - exact).square().sum()).item()


def by_cell(x):
    return {tuple(row): f for row, f in zip(x.indices.tolist(), x.features, strict=True)}


RULES = [*fq.skip("conv_input"), fq.OpRule(ops=("add",), inputs=fq.QuantSpec()), *fq.w8a8()]


@pytest.mark.parametrize("name", BLOCKS)
def test_on_spconvs_modules_and_converted(name):
    """The same sites, scales and values; then int8 from the list of layers that the forward is."""
    torch.manual_seed(0)
    model, x = with_statistics(Backbone8x(BLOCKS[name])), scene(0)
    rules = [rule for rule in RULES if name != "plain" or rule.ops != ("add",)]
    ops, state = spconv_ops(), dict(model.state_dict())
    plan = fq.make_plan(model, rules, (to_spconv(x),), ops=ops, fake=False)
    convs = [site.name for site in plan.sites if "conv" in site.op]
    assert len(convs) == (9 if name == "plain" else 21)
    stats = fq.calibrate_model(
        model, plan, state, [to_spconv(scene(s)) for s in (0, 1)], ops=ops, progress=False
    )
    scales = fq.finalize(plan, stats)
    with torch.no_grad():
        exact = model(to_spconv(x))
        y = fq.fake_quant(model, plan, ops=ops)(state, scales, to_spconv(x))
    assert decibels(y.features, exact.features) > 20

    ours = convert_spconv(model)
    here = fq.make_plan(ours, rules, (sparse_nn.with_maps(ours, x),))
    assert here.quantizers == plan.quantizers
    with torch.no_grad():
        z = fq.fake_quant(ours, here)(state, scales, x)
    theirs, found = by_cell(y), by_cell(z)
    assert found.keys() == theirs.keys()
    apart = torch.stack([found[cell] - theirs[cell] for cell in found])
    # Float sums in another order fall on the other side of a tie here and there.
    assert decibels(y.features + apart, y.features) > 30

    listed = sn.list_layers(ours)
    layers, params = listed.layers, listed.params(state)
    assert sum(bool(layer.residual) for layer in layers) == (0 if name == "plain" else 8)
    int8 = sn.convolutions(layers) - sn.first_and_last(layers)
    net, maps = sn.SparseNetwork(layers, batch_norm=False), sn.make_maps(layers, x)
    plan = fq.make_plan(net, sn.int8_rules(layers, int8), (x, maps))
    batches = [(s, sn.make_maps(layers, s)) for s in (scene(0), scene(1))]
    stats = fq.calibrate_model(net, plan, params, batches, progress=False)
    scales = sn.tie_scales(layers, int8, fq.finalize(plan, stats))
    with torch.no_grad():
        fake = fq.fake_quant(net, plan)(params, scales, x, maps)
        deployed = sn.to_int8(layers, int8, params, scales)
        integer = sn.int8_network(layers, int8)(deployed, x, maps)
    assert decibels(integer.features, fake.features) > 30
    assert decibels(integer.features, ours(x).features.detach()) > 20


def test_exported_and_lowered():
    """The program that was captured on one scene runs another in integers."""
    torch.manual_seed(0)
    ours = convert_spconv(with_statistics(BirdsEyeView()))
    x = sparse_nn.with_maps(ours, scene(0))
    state = dict(ours.state_dict())
    plan = fq.make_plan(ours, RULES, (x,))
    batches = [sparse_nn.with_maps(ours, scene(s)) for s in (0, 1)]
    scales = fq.finalize(plan, fq.calibrate_model(ours, plan, state, batches, progress=False))
    program = fq.export_qdq(
        ours, plan, state, scales, (x,), weights="integer", dynamic_shapes=dynamic_rows((x,))
    )
    lowered, report = fq.lower(program)
    kernels = [layer.kernel for layer in report.layers]
    assert kernels.count("sparse_conv_int8") == 4
    other = batches[1]
    assert len(other.coords) != len(x.coords)
    with torch.no_grad():
        fake = fq.fake_quant(ours, plan)(state, scales, other)
        y = lowered.module(check_guards=False)(other)
        exact = ours(other)
    assert fake.shape == (1, 96, 8, 8)
    assert decibels(y, fake) > 30
    assert decibels(y, exact) > 20
