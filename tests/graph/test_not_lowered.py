"""What stays in floating point: weights as integers, and the reasons in the report."""

import pytest
import torch
from torch import nn

import fquant as fq
from fquant.graph import DEFAULT_TABLE, is_quantize
from tests.graph.programs import SITES, Mark, exported, kernels, scene
from tests.graph.test_lowering_sparse import SparseResidual


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_only_layers_store_integers(bits):
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 7), nn.Flatten(0, 1))
    tokens = torch.arange(6).reshape(2, 3)
    rules = [fq.OpRule(weight=fq.QuantSpec(bits, narrow_range=True))]
    program = exported(model, (tokens,), rules)
    lowered, report = fq.lower(program)
    assert kernels(report) == ["weight_only"] * 2
    assert torch.equal(lowered.module()(tokens), program.module()(tokens))
    sizes = [
        t.numel() * t.element_size() for n, t in lowered.state_dict.items() if "scale" not in n
    ]
    weights = (10 * 8 + 8 * 7) * bits // 8
    assert sum(sizes) == weights + 7 * 4  # and the bias
    assert not any(n.startswith("params.") and "weight" in n for n in lowered.state_dict)


def test_reasons_are_given():
    x = torch.randn(3, 4)

    def report(rules, dtype=torch.float32, **options):
        program = exported(nn.Linear(4, 2).to(dtype), (x.to(dtype),), rules)
        return fq.lower(program, **options).report

    def reason(rules, **options):
        return report(rules, **options).layers[0].reason

    weight = fq.QuantSpec(axis=0, narrow_range=True)
    wide = [fq.OpRule(inputs=fq.QuantSpec(12), weight=weight)]
    assert kernels(report(wide)) == ["weight_only"]
    table = DEFAULT_TABLE[:1]
    assert "is no integer grid of at most 8 bits" in reason(wide, table=table)
    per_channel = [fq.OpRule(inputs=fq.QuantSpec(axis=1), weight=weight)]
    assert "has a scale per axis 1, not per tensor" in reason(per_channel, table=table)
    asymmetric = [fq.OpRule(inputs=fq.QuantSpec(), weight=fq.Quantizer(symmetric=False))]
    assert "has a zero point" in reason(asymmetric, table=table)
    assert kernels(report(fq.w8a8(), torch.float64)) == ["weight_only"]
    nothing = report(fq.w8a8(), table=())
    assert nothing.layers[0].reason == "the table has no lowering for linear"
    assert "float" in str(nothing)
    assert "linear" in str(nothing)


class Products(nn.Module):
    def forward(self, x):
        return x @ x.transpose(-1, -2)


def test_products_of_activations_stay_float():
    x = torch.randn(2, 3, 4)
    program = exported(Products(), (x,), [fq.OpRule(ops=("matmul",), inputs=fq.QuantSpec())])
    lowered, report = fq.lower(program)
    assert report.layers[0].reason.startswith("a product of two activations has no int8 kernel")
    assert torch.equal(lowered.module()(x), program.module()(x))


def test_sparse_layers_take_no_zero_points():
    """Absent cells hold 0, which is no integer that a kernel skips where it has a zero point."""
    args = scene(0, 0.5)
    signed = fq.Quantizer(symmetric=False)
    for inputs, why in ((fq.QuantSpec(unsigned=True), "is of torch.uint8"), (signed, "has a zero")):
        rules = [fq.OpRule(ops=("sparse_conv",), inputs=inputs, weight=fq.QuantSpec())]
        program = exported(SparseResidual(), args, rules)
        lowered, report = fq.lower(program)
        assert all(why in layer.reason for layer in report.layers)
        assert torch.equal(lowered.module()(*args).features, program.module()(*args).features)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("per", ["token", "tensor"])
def test_ranges_of_the_moment_run_in_integers(symmetric, unsigned, per):
    inputs = fq.Quantizer(fq.QuantSpec(unsigned=unsigned), per, dynamic=True, symmetric=symmetric)
    rules = [fq.OpRule(weight=fq.QuantSpec(axis=0, narrow_range=True), inputs=inputs)]
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))
    x = torch.randn(3, 7, 16)
    program = exported(model, (x.abs() if unsigned else x,), rules)
    lowered, report = fq.lower(program)
    assert kernels(report) == ["dynamic_int8"] * 2
    y, expected = lowered.module()(x), program.module()(x)
    # A step more or less of the second layer's input, where float sums fall next to a tie.
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert not any(n.target is torch.ops.aten.linear.default for n in lowered.graph.nodes)
    assert torch.equal(fq.prepack(lowered).module()(x), y)


class Twice(nn.Module):
    def forward(self, x):
        return fq.site("fine", fq.site("coarse", x)) + 0.0


@pytest.mark.parametrize(("step", "bits"), [(0.04, 8), (0.05, 4)])
def test_integers_on_another_grid_are_rounded_again(step, bits):
    """Q of DQ is nothing on one grid only."""
    x = torch.linspace(-1.0, 1.0, 41)[None]
    rules = [fq.OpRule("1", ops=("site",), output=fq.QuantSpec(bits)), SITES]
    model = nn.Sequential(Mark(), Mark())
    plan = fq.make_plan(model, rules, (x,))
    scales = {"0/mark#0.output": torch.tensor(0.05), "1/mark#0.output": torch.tensor(step)}
    program = fq.export_qdq(model, plan, {}, scales, (x,))
    lowered = fq.lower(program).program
    assert torch.equal(lowered.module()(x), program.module()(x))


class Excited(nn.Module):
    """A convolution to which one value per sample is added."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x) + fq.site("mean", x.mean((1, 2, 3), keepdim=True))


def test_a_residual_of_another_shape_is_no_part_of_the_layer():
    x = torch.randn(2, 3, 5, 5)
    program = exported(Excited(), (x,), [SITES, *fq.w8a8()])
    lowered, report = fq.lower(program)
    assert kernels(report)[0] == "conv_int8"
    assert torch.allclose(lowered.module()(x), program.module()(x), atol=1e-5)


class TwoNorms(nn.Sequential):
    """A batch norm of a batch norm, as a network put together of parts may have."""

    def __init__(self):
        norms = [nn.BatchNorm2d(4) for _ in range(2)]
        super().__init__(nn.Conv2d(3, 4, 3), *norms, nn.ReLU(), nn.Conv2d(4, 2, 3))
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)


class PooledTwice(nn.Module):
    """What is pooled is used as it is and after a ReLU."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = nn.functional.max_pool2d(self.conv(x), 2)
        return fq.site("y", y.relu()) - y


class PooledToTheEdge(nn.Sequential):
    """A pool in ceil mode, which integers have not."""

    def __init__(self):
        pool = nn.MaxPool2d(2, ceil_mode=True)
        super().__init__(nn.Conv2d(3, 4, 2), pool, nn.Conv2d(4, 2, 3))


class AddedBehindReLU(nn.Module):
    """A sum after the ReLU, not before it, as int8 kernels have it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x).relu() + fq.site("skip", x)


@pytest.mark.parametrize(
    ("model", "rules", "operation"),
    [
        (TwoNorms, [], "conv2d+batch_norm"),
        (PooledTwice, [SITES], "conv2d"),
        (PooledToTheEdge, [], "conv2d"),
        (AddedBehindReLU, [SITES], "conv2d+relu"),
    ],
)
def test_what_follows_a_layer_is_done_once_and_by_all_who_read_it(model, rules, operation):
    x = torch.randn(4, 3, 8, 8)
    program = exported(model(), (x,), [*rules, *fq.w8a8()])
    lowered, report = fq.lower(program)
    assert report.layers[0].operation == operation
    assert torch.allclose(lowered.module()(x), program.module()(x), atol=1e-5)


def test_a_kept_edge_of_equal_grids_stays():
    """Q of DQ on one grid is nothing, unless the edge is kept."""
    x = torch.linspace(-1.0, 1.0, 41)[None]
    rules = [fq.OpRule(ops=("site",), output=fq.QuantSpec())]
    plan = fq.make_plan(Twice(), rules, (x,))
    scales = dict.fromkeys(("coarse#0.output", "fine#0.output"), torch.tensor(0.05))
    program = fq.export_qdq(Twice(), plan, {}, scales, (x,))

    def rounded(edges):
        nodes = fq.lower(program, edges=edges).program.graph.nodes
        return sum(is_quantize(node) for node in nodes)

    assert rounded({}) == 1
    assert rounded({"fine.*": "keep"}) == rounded({"coarse.*": "keep"}) == 2
