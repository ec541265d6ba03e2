"""Lowering: integer layers that agree with the Q/DQ graph, site by site, and a report."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fquant as fq
from fquant.graph import DEFAULT_TABLE, dynamic_rows, int8_ops, site_integers
from fquant.sparse import SparseTensor, sparse_conv, subm_conv
from fquant.testing.models import EXAMPLES

SUMS = fq.OpRule(ops=("add",), inputs=fq.QuantSpec(), output=fq.QuantSpec())
JOINS = fq.OpRule(ops=("cat", "max_pool2d"), inputs=fq.QuantSpec())
SITES = fq.OpRule(ops=("site",), output=fq.QuantSpec())
EXTRA = {"residual": [SUMS], "unet": [JOINS]}


def exported(model, args, rules=None, batches=None, **options):
    model = model.eval()
    params = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    params = {n: p.detach() for n, p in params.items()}
    plan = fq.make_plan(model, rules or fq.w8a8(), args)
    stats = fq.calibrate_model(model, plan, params, batches or [args], progress=False)
    qstate = fq.finalize(plan, stats)
    return fq.export_qdq(model, plan, params, qstate, args, **options)


def zoo(name):
    model, inputs = EXAMPLES[name].model().float(), EXAMPLES[name].inputs()
    inputs = tuple(x.float() for x in inputs)
    if name == "sparse":
        model.cells = model.cells.with_features(model.cells.features.float())
    return exported(model, inputs, [*EXTRA.get(name, []), *fq.w8a8()]), inputs


def agreement(program, lowered, *args):
    """The share of integers that are equal, over all sites that both have; none two steps apart."""
    before, after = site_integers(program, *args), site_integers(lowered, *args)
    equal = total = 0
    for name, q in after.items():
        assert q.shape == before[name].shape, name
        steps = (q.int() - before[name].int()).abs()
        assert steps.max() <= 1, name
        equal, total = equal + (steps == 0).sum().item(), total + q.numel()
    return equal / total, set(after)


def kernels(report):
    return [layer.kernel for layer in report.layers]


LOWERED = {
    "residual": {"conv_int8": 3, "add_int8": 2, "linear_int8": 1},
    "encoder": {"linear_int8": 5},
    "attention": {"linear_int8": 2},
    "recurrent": {"linear_int8": 10},
    "tied": {"linear_int8": 3},
    "unet": {"conv_int8": 1, "conv_transpose_int8": 1},
    "sparse": {"sparse_conv_int8": 2},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_zoo_agrees_at_every_site(name, tmp_path):
    program, inputs = zoo(name)
    before = dict(program.state_dict)
    lowered, report = fq.lower(program)
    counts = {k: kernels(report).count(k) for k in set(kernels(report)) - {""}}
    assert counts == LOWERED[name]
    assert all(layer.reason for layer in report.layers if not layer.kernel)
    share, _ = agreement(program, lowered, *inputs)
    assert share == 1.0  # so few values that none is next to a tie
    y, expected = lowered.module()(*inputs), program.module()(*inputs)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(y.argmax(-1), expected.argmax(-1))
    assert before.keys() == program.state_dict.keys()  # not written
    assert all(torch.equal(t, program.state_dict[n]) for n, t in before.items())
    torch.export.save(lowered, tmp_path / "lowered.pt2")
    for module in (
        torch.export.load(tmp_path / "lowered.pt2").module(),
        torch.compile(lowered.module(), fullgraph=True, backend="aot_eager"),
        fq.prepack(lowered).module(),
    ):
        assert torch.equal(module(*inputs), y)


def dense(kind, cin, cout, kernel, groups, **options):
    return getattr(nn, kind)(cin, cout, kernel, groups=groups, **options)


@st.composite
def layers(draw):
    """A convolution of some kind with what may follow it, and an input that fits."""
    axes = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["Conv", "ConvTranspose"])) + f"{axes}d"
    groups = draw(st.sampled_from([1, 1, 2])) if kind.startswith("Conv") else 1
    groups = 1 if kind.startswith("ConvT") else groups
    options = {
        name: draw(st.integers(low, 2))
        for name, low in (("stride", 1), ("padding", 0), ("dilation", 1))
    }
    kernel = draw(st.integers(1, 3))
    options["padding"] = min(options["padding"], options["dilation"] * (kernel - 1))
    if kind.startswith("ConvT"):
        options["output_padding"] = draw(st.integers(0, max(options["stride"], 1) - 1))
    cin, cout = (groups * draw(st.integers(1, 5)) for _ in range(2))
    conv = dense(kind, cin, cout, kernel, groups, bias=draw(st.booleans()), **options)
    follow = draw(st.sampled_from(["none", "relu", "norm", "norm+relu6", "clamp", "pool"]))
    size = draw(st.integers(5, 8))
    return conv, follow, torch.randn(draw(st.integers(1, 3)), cin, *[size] * axes)


class Layer(nn.Module):
    """A convolution between two marked sites."""

    def __init__(self, conv, follow, axes):
        super().__init__()
        self.conv, self.follow, self.axes = conv, follow, axes
        norm = getattr(nn, f"BatchNorm{axes}d")(conv.out_channels)
        with torch.no_grad():
            norm.weight.uniform_(-1, 1)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        self.norm = norm

    def forward(self, x):
        y = self.conv(x)
        if "norm" in self.follow:
            y = self.norm(y)
        if self.follow == "pool":
            y = getattr(nn.functional, f"max_pool{self.axes}d")(y, 2, 1).relu()
        if "relu6" in self.follow:
            y = nn.functional.relu6(y)
        elif "relu" in self.follow:
            y = y.relu()
        if self.follow == "clamp":
            y = y.clamp(-0.3, 0.2)
        return fq.site("y", y)


@settings(max_examples=10)
@given(layers())
def test_one_convolution_of_any_kind(case):
    conv, follow, x = case
    program = exported(Layer(conv, follow, x.ndim - 2), (x,), [SITES, *fq.w8a8()])
    lowered, report = fq.lower(program)
    assert report.layers[0].kernel, report
    assert "y#0.output" not in [r.reason for r in report.layers]
    share, sites = agreement(program, lowered, x)
    assert "y#0.output" in sites
    assert share > 0.99
    assert torch.equal(fq.prepack(lowered).module()(x), lowered.module()(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_clipped_output_stays_on_its_grid(bits, narrow):
    spec = fq.QuantSpec(bits, narrow_range=narrow)
    rules = [fq.OpRule(ops=("site",), output=spec), *fq.w8a8()]
    x = torch.randn(64, 8)
    model = nn.Sequential(nn.Linear(8, 16), Mark())
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, rules, (x,))
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    qstate = fq.finalize(plan, stats)
    qstate["1/mark#0.output"] = qstate["1/mark#0.output"] / 4  # much is clipped
    program = fq.export_qdq(model, plan, params, qstate, (x,))
    lowered, report = fq.lower(program)
    assert kernels(report) == ["linear_int8"]
    q = site_integers(lowered, x)["1/mark#0.output"]
    assert (q.min(), q.max()) == (spec.q_min, spec.q_max)
    assert agreement(program, lowered, x)[0] > 0.99


class Mark(nn.Module):
    def forward(self, x):
        return fq.site("mark", x)


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


def scene(seed, density):
    g = torch.Generator().manual_seed(seed)
    cells = SparseTensor.from_dense((torch.rand(2, 1, 12, 12, generator=g) < density).float())
    x = cells.with_features(torch.randn(len(cells.coords), 6, generator=g))
    down = fq.sparse.conv_map(x, 2, 2)
    return x, {
        "fine": fq.sparse.subm_map(x, 3),
        "down": down,
        "up": fq.sparse.transpose_map(down),
        "point": fq.sparse.subm_map(x, 1),
    }


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


def test_what_has_several_scales_stays_float_until_it_is_rounded():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            y = self.a(x).relu()
            return self.b(y) + self.c(y * 3)

    x = torch.randn(5, 4)
    program = exported(Fork(), (x,))
    lowered, report = fq.lower(program)
    assert kernels(report) == ["linear_int8"] * 3
    assert report.layers[0].reason == "its result is float: it is also used unrounded"
    assert agreement(program, lowered, x)[0] == 1.0


def test_kept_edges_stay_as_they_are():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(7, 4)
    program = exported(model, (x,))
    lowered, report = fq.lower(program, edges={r"2/linear#0\.input": "keep"})
    assert report.kept == ("0/linear#0.input", "2/linear#0.input", "2/linear#0.weight")
    assert [layer.kernel for layer in report.layers] == ["linear_int8", "weight_only"]
    assert report.layers[0].reason.endswith("edge 2/linear#0.input is kept")
    assert agreement(program, lowered, x)[0] == 1.0
    every = fq.lower(program, edges={".*": "keep"})
    assert not every.report.lowered
    assert torch.equal(every.program.module()(x), program.module()(x))
    with pytest.raises(ValueError, match=r"lower: edges must match quantizers of .*got 'nothing'"):
        fq.lower(program, edges={"nothing": "keep"})
    with pytest.raises(ValueError, match=r"lower: edges must be 'merge' or 'keep', got 'drop'"):
        fq.lower(program, edges={".*": "drop"})


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_only_layers_store_integers(bits):
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 7), nn.Flatten(0, 1))
    tokens = torch.arange(6).reshape(2, 3)
    rules = [fq.OpRule(weight=fq.QuantSpec(bits, narrow_range=True))]
    program = exported(model, (tokens,), rules)
    lowered, report = fq.lower(program)
    assert kernels(report) == ["weight_only"] * 2
    assert torch.equal(lowered.module()(tokens), program.module()(tokens))
    sizes = [t.numel() * t.element_size() for n, t in lowered.state_dict.items() if "scale" not in n]
    weights = (10 * 8 + 8 * 7) * bits // 8
    assert sum(sizes) == weights + 7 * 4  # and the bias
    assert not any(n.startswith("params.") and "weight" in n for n in lowered.state_dict)


def test_reasons_are_given():
    x = torch.randn(3, 4)
    unsigned = exported(nn.Linear(4, 2), (x,), [fq.OpRule(inputs=fq.QuantSpec(unsigned=True))])
    assert "is no signed integer grid" in fq.lower(unsigned).report.layers[0].reason
    dynamic = exported(nn.Linear(4, 2), (x,), fq.w8a8(dynamic=True))
    lowered, report = fq.lower(dynamic)
    assert kernels(report) == ["weight_only"]
    double = exported(nn.Linear(4, 2).double(), (x.double(),))
    assert kernels(fq.lower(double).report) == ["weight_only"]
    table = fq.lower(double, table=()).report
    assert table.layers[0].reason == "the table has no lowering for linear"
    assert "float" in str(table)
    assert "linear" in str(table)


GEOMETRIES = list(itertools.product([1, 2], [0, 1], [1, 2]))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_dense_kernel_maps_are_those_of_the_grid(axes):
    sizes = [4, 5, 3][:axes]
    cells = SparseTensor.from_dense(torch.ones(2, 1, *sizes))
    for stride, padding, dilation in GEOMETRIES:
        geometry = [[v] * axes for v in (2, stride, padding, dilation)]
        dense_map = int8_ops.dense_neighbors(2, sizes, *geometry, torch.device("cpu"))
        kernel_map = fq.sparse.conv_map(cells, 2, stride, padding, dilation)
        if dense_map.shape == kernel_map.neighbors.shape:  # no window of padding alone
            assert torch.equal(dense_map, kernel_map.neighbors)
        extra = [stride - 1] * axes
        up = int8_ops.transposed_neighbors(2, sizes, *geometry, extra, torch.device("cpu"))
        sparse_up = fq.sparse.transposed_conv_map(cells, 2, stride, padding, dilation, extra)
        if up.shape == sparse_up.neighbors.shape:
            assert torch.equal(up, sparse_up.neighbors)


@given(st.data())
@settings(max_examples=30)
def test_integer_pools_are_torchs(data):
    axes = data.draw(st.integers(1, 3))
    kernel, stride, dilation = (data.draw(st.integers(1, 3)) for _ in range(3))
    padding = data.draw(st.integers(0, kernel // 2))
    size = dilation * (kernel - 1) + 1 + data.draw(st.integers(0, 4))
    x = torch.randint(-128, 128, (2, 3, *[size] * axes), dtype=torch.int8)
    geometry = [[v] * axes for v in (kernel, stride, padding, dilation)]
    y = int8_ops.max_pool_int8(x, *geometry)
    pool = getattr(nn.functional, f"max_pool{axes}d")
    assert torch.equal(y.float(), pool(x.float(), kernel, stride, padding, dilation))


def test_the_table_is_an_argument():
    assert {line.kernel for line in DEFAULT_TABLE} >= {"linear_int8", "conv_int8"}
    x = torch.randn(3, 4)
    lowered, report = fq.lower(exported(nn.Linear(4, 2), (x,)), table=DEFAULT_TABLE[1:])
    assert kernels(report) == ["weight_only"]
