"""Which operations of sparse layers are sites: those of the model, none of what layers are made of."""

import pytest
import torch

import fquant as fq
from fquant.sparse import batch_norm, from_points, models, nn, sync_batch_norm
from tests.sparse.test_modules import scene

ZEROS, ONES = torch.zeros(3), torch.ones(3)


def voxelized(x):
    points = x.coords[:, 1:].double() / 2
    return from_points(points, x.features, 0.7, [0.0, 0.0], [4.0, 4.0])[0]


LAYERS = {
    "max pool": nn.SparseMaxPool2d(2),
    "max pool with gradients": lambda x: nn.SparseMaxPool2d(2)(x.map(torch.Tensor.requires_grad_)),
    "average pool": nn.SparseAvgPool2d(2),
    "average pool of active cells": nn.SparseAvgPool2d(2, count_absent=False),
    "global average pool": nn.SparseGlobalAvgPool(count_absent=False),
    "batch norm": lambda x: batch_norm(x, ZEROS, ONES, ONES, ZEROS, training=True)[0],
    "synchronized batch norm": lambda x: sync_batch_norm(x, ZEROS, ONES, ONES, ZEROS)[0],
    "voxelization": voxelized,
}


class Model(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def sites_of(model, x, fake=False):
    rule = fq.OpRule(ops=("cat", "add", "sub", "mul", "div", "matmul"), inputs=fq.QuantSpec())
    return [site.name for site in fq.make_plan(model, [rule], (x,), fake=fake).sites]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore::fquant.UnusedRuleWarning")
def test_arithmetic_inside_a_layer_is_no_site(name):
    assert sites_of(Model(LAYERS[name]), scene(3, (8, 8))) == []


def test_sums_over_a_union_are_one_site_whether_maps_are_there_or_not():
    model = nn.SparseSequential(
        nn.ConcatTable(nn.SparseIdentity(), nn.SparseConv2d(3, 3, 3, 1, 1)), nn.AddTableMisaligned()
    )
    x = scene(3, (8, 8))
    sites = ["0.1/sparse_conv#0", "1/add#0"]
    assert sites_of(model, x) == sites
    assert sites_of(model, nn.with_maps(model, x), fake=True) == sites


def test_a_pool_behind_joined_channels_keeps_finite_scales():
    """An absent cell is -inf inside of a max pool."""
    unet = models.MinkUNet(3, 4, (4, 4, 4), axes=2)
    head = nn.SparseSequential(unet, nn.SparseMaxPool2d(2)).eval()
    x = nn.with_maps(head, scene(3, (9, 9)))
    rules = [fq.OpRule(ops=("cat",), inputs=fq.QuantSpec()), *fq.w8a8()]
    plan = fq.make_plan(head, rules, (x,))
    stats = fq.calibrate_model(head, plan, head.state_dict(), [x], progress=False)
    assert all(torch.isfinite(scale).all() for scale in fq.finalize(plan, stats).values())
