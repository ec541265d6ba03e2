"""Lowering of sparse networks: every layer in integers, at any number of cells."""

import torch
from torch import nn

import fquant as fq
from fquant.graph import dynamic_rows
from fquant.sparse import join_features, sparse_conv, subm_conv
from fquant.sparse import nn as sparse_nn
from tests.graph.programs import SITES, agreement, exported, kernels, scene


class SparseResidual(nn.Module):
    """Two convolutions and a residual that is quantized, ReLU, down and up again, joined."""

    def __init__(self):
        super().__init__()
        shapes = [(6, 3, 3, 6), (6, 3, 3, 6), (8, 2, 2, 6), (6, 2, 2, 8), (5, 1, 1, 12)]
        self.w = nn.ParameterList(torch.randn(s) / 6 for s in shapes)
        self.norm = nn.BatchNorm1d(6)
        with torch.no_grad():
            self.norm.weight.uniform_(-1, 1)
            self.norm.running_mean.normal_()

    def forward(self, x, maps):
        y = subm_conv(x, self.w[0], kernel_map=maps["fine"]).map(torch.relu)
        y = subm_conv(y, self.w[1], kernel_map=maps["fine"])
        y = y.with_features((self.norm(y.features) + fq.site("skip", x.features)).relu())
        z = sparse_conv(y, self.w[2], torch.ones(8), kernel_map=maps["down"]).map(torch.relu)
        z = sparse_conv(z, self.w[3], kernel_map=maps["up"]).map(torch.relu)
        both = y.with_features(torch.cat([z.features, y.features], dim=1))
        return subm_conv(both, self.w[4], kernel_map=maps["point"])


def test_a_sparse_network_with_a_residual_runs_in_integers():
    args = scene(0, 0.5)
    program = exported(
        SparseResidual(), args, [SITES, *fq.w8a8()], dynamic_shapes=dynamic_rows(args)
    )
    lowered, report = fq.lower(program)
    assert kernels(report) == ["sparse_conv_int8"] * 5
    assert [layer.operation for layer in report.layers] == [
        "sparse_conv+relu",
        "sparse_conv+batch_norm+add+relu",
        "sparse_conv+relu",
        "sparse_conv+relu",
        "sparse_conv",
    ]
    compiled = torch.compile(
        lowered.module(check_guards=False), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for args in (scene(1, 0.3), scene(2, 0.7)):
        share, sites = agreement(program, lowered, *args)
        assert share > 0.999
        assert len(sites) >= 5
        y = lowered.module()(*args)
        for run in (compiled, fq.prepack(lowered).module()):
            assert torch.equal(run(*args).features, y.features)
    targets = [n.target for n in lowered.graph.nodes]
    assert torch.ops.fquant.sparse_conv.default not in targets


class Joined(nn.Module):
    """Modules of every kind of convolution, joined channels, a pool."""

    def __init__(self):
        super().__init__()
        self.stem = sparse_nn.SparseSequential(sparse_nn.SubMConv2d(6, 8, 3), nn.BatchNorm1d(8))
        self.down = sparse_nn.SparseConv2d(8, 12, 2, 2, indice_key="down")
        self.up = sparse_nn.SparseInverseConv2d(12, 8, 2, indice_key="down")
        self.pool = sparse_nn.SparseMaxPool2d(2)
        self.wider = sparse_nn.SparseConvTranspose2d(16, 4, 2, 2)

    def forward(self, x):
        y = self.stem(x).map(torch.relu)
        z = self.up(self.down(y).map(torch.relu)).map(torch.relu)
        return self.wider(self.pool(join_features(y, z)))


def test_modules_with_joined_channels_and_a_pool_run_in_integers():
    model = Joined().eval()
    cells = [sparse_nn.with_maps(model, scene(seed, 0.4)[0]) for seed in range(3)]
    rules = [fq.OpRule(ops=("cat",), inputs=fq.QuantSpec()), *fq.w8a8()]
    args = cells[:1]
    options = {"batches": [(x,) for x in cells], "dynamic_shapes": dynamic_rows(tuple(args))}
    program = exported(model, tuple(args), rules, **options)
    lowered, report = fq.lower(program)
    assert kernels(report) == ["sparse_conv_int8"] * 4
    targets = [n.target for n in lowered.graph.nodes if n.op == "call_function"]
    assert targets.count(torch.ops.aten.cat.default) == 1
    assert torch.ops.fquant.dequantize.default not in targets
    for x in cells:
        share, sites = agreement(program, lowered, x)
        assert share > 0.999
        # One quantizer rounds both joined tensors; the first is what `down` reads as well.
        assert "cat#0.input[1]" in sites
        assert "cat#0.input" not in sites
        assert torch.allclose(lowered.module()(x).features, program.module()(x).features, atol=1e-5)
