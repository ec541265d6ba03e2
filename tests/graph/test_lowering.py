"""Lowering: integer layers that agree with the Q/DQ graph, site by site, and a report."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import fquant as fq
from fquant.graph import DEFAULT_TABLE, save_program, site_integers
from fquant.testing.models import EXAMPLES
from tests.graph.programs import (
    SITES,
    Layer,
    Mark,
    agreement,
    dense,
    exported,
    kernels,
    layers,
    zoo,
)

LOWERED = {
    "residual": {"conv_int8": 3, "add_int8": 2, "linear_int8": 1},
    "encoder": {"linear_int8": 5},
    "attention": {"linear_int8": 2},
    "recurrent": {"linear_int8": 10},
    "tied": {"linear_int8": 3},
    "unet": {"conv_int8": 1, "conv_transpose_int8": 2},
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
    torch.export.save(lowered, tmp_path / "whole.pt2")
    save_program(lowered, tmp_path / "lowered.pt2")
    sizes = [(tmp_path / file).stat().st_size for file in ("whole.pt2", "lowered.pt2")]
    print(f"{name}: torch.export.save {sizes[0]} bytes, save_program {sizes[1]}")
    assert sizes[1] < sizes[0] / 3
    for module in (
        torch.export.load(tmp_path / "lowered.pt2").module(),
        torch.compile(lowered.module(), fullgraph=True, backend="aot_eager"),
        fq.prepack(lowered).module(),
    ):
        assert torch.equal(module(*inputs), y)


def test_any_batch_runs_whatever_the_example_was(tmp_path):
    x = torch.randn(16, 2, 6, 6)  # from 16 on torch runs another convolution
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4))
    varying = (({0: torch.export.Dim("batch")},),)
    program = exported(model, (x,), dynamic_shapes=varying)
    lowered, report = fq.lower(program)
    assert kernels(report) == ["conv_int8"] * 2
    torch.export.save(lowered, tmp_path / "lowered.pt2")
    loaded = torch.export.load(tmp_path / "lowered.pt2")
    for one in (lowered, fq.prepack(lowered), loaded):
        assert torch.equal(one.module()(x[:2]), lowered.module()(x)[:2])


QUICK = [phase for phase in Phase if phase is not Phase.explain]
RANGES = [
    fq.Quantizer(),
    fq.Quantizer(fq.QuantSpec(unsigned=True)),
    fq.Quantizer(fq.QuantSpec(unsigned=True), symmetric=False),
    fq.Quantizer(symmetric=False),
    fq.Quantizer(fq.QuantSpec(5, unsigned=True), symmetric=False),
]


@settings(max_examples=8, phases=QUICK)
@given(layers(), st.sampled_from(RANGES), st.sampled_from(RANGES))
def test_one_convolution_of_any_kind_and_range(case, inputs, output):
    conv, follow, x = case
    groups_transposed = "Transpose" in type(conv).__name__ and conv.groups > 1
    weight = fq.Quantizer(
        fq.QuantSpec(narrow_range=True), "tensor" if groups_transposed else "channel"
    )
    x = x.abs() - 0.25 if inputs.spec.unsigned else x
    rules = [fq.OpRule(ops=("site",), output=output), fq.OpRule(weight=weight, inputs=inputs)]
    program = exported(Layer(conv, follow, x.ndim - 2), (x,), rules)
    lowered, report = fq.lower(program)
    assert report.layers[0].kernel not in ("", "weight_only"), report
    assert report.layers[0].reason == ""
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


class Clamped(nn.Module):
    def forward(self, x):
        return fq.site("mark", x.clamp(-0.5, 0.9))


@pytest.mark.parametrize(("step", "least", "most"), [(0.01, 0, 127), (0.013, 12, 119)])
def test_a_bound_that_is_no_relu_is_kept(step, least, most):
    """-0.5 at scale 0.01 and zero point 50 is the integer 0; at 0.013, -38.5 rounds up, 69.2 down."""
    grid = fq.Quantizer(fq.QuantSpec(), symmetric=False)
    model, x = nn.Sequential(nn.Linear(8, 16), Clamped()), torch.randn(16, 8)
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, [fq.OpRule(ops=("site",), output=grid), *fq.w8a8()], (x,))
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    qstate = fq.finalize(plan, stats)
    qstate["1/mark#0.output"] = torch.tensor(step)
    qstate["1/mark#0.output.zero_point"] = torch.tensor(50.0)
    program = fq.export_qdq(model, plan, params, qstate, (x,))
    lowered, report = fq.lower(program)
    assert kernels(report) == ["linear_int8"]
    q = site_integers(lowered, x)["1/mark#0.output"]
    assert (q.min(), q.max()) == (least, most)
    assert agreement(program, lowered, x)[0] > 0.99


@pytest.mark.parametrize("kind", ["Conv1d", "ConvTranspose1d"])
def test_groups_with_a_zero_point(kind):
    conv = dense(kind, 4, 6, 3, 2, padding=1)
    x = torch.rand(2, 4, 7) - 0.1
    inputs = fq.Quantizer(fq.QuantSpec(unsigned=True), symmetric=False)
    weight = fq.Quantizer(fq.QuantSpec(narrow_range=True), "channel")
    program = exported(
        Layer(conv, "relu", 1), (x,), [SITES, fq.OpRule(weight=weight, inputs=inputs)]
    )
    lowered, report = fq.lower(program)
    assert report.layers[0].kernel.startswith("conv")
    assert agreement(program, lowered, x)[0] > 0.99
    assert torch.equal(fq.prepack(lowered).module()(x), lowered.module()(x))


def test_sums_and_residuals_of_unsigned_values_with_zero_points():
    """A residual of a convolution, a sum of two layers, and a pool, all on asymmetric grids."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv1d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x):
            y = self.a(x) + fq.site("skip", x)
            z = self.b(y.relu())
            joined = torch.nn.functional.max_pool1d(z + y, 2)
            return fq.site("end", self.c(joined.relu()))

    ranged = fq.Quantizer(fq.QuantSpec(unsigned=True), symmetric=False)
    rules = [
        fq.OpRule(ops=("site",), output=ranged),
        fq.OpRule(weight=fq.QuantSpec(axis=0, narrow_range=True), inputs=ranged),
    ]
    x = torch.randn(3, 4, 10)
    program = exported(Net(), (x,), rules)
    lowered, report = fq.lower(program)
    assert kernels(report) == ["conv_int8"] * 3 + [""] * (len(kernels(report)) - 3)
    assert report.layers[0].operation == "conv1d+add"
    share, sites = agreement(program, lowered, x)
    assert share > 0.98
    assert "end#0.output" in sites


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
    first = fq.lower(program, edges={r"2/.*": "merge", ".*": "keep"})  # the first that matches
    assert first.report.kept == ("0/linear#0.input", "0/linear#0.weight", "2/linear#0.input")
    every = fq.lower(program, edges={".*": "keep"})
    assert not every.report.lowered
    assert torch.equal(every.program.module()(x), program.module()(x))
    with pytest.raises(ValueError, match=r"lower: edges must match quantizers of .*got 'nothing'"):
        fq.lower(program, edges={"nothing": "keep"})
    with pytest.raises(ValueError, match=r"lower: edges must be 'merge' or 'keep', got 'drop'"):
        fq.lower(program, edges={".*": "drop"})


def test_the_table_is_an_argument():
    assert {line.kernel for line in DEFAULT_TABLE} >= {"linear_int8", "conv_int8"}
    x = torch.randn(3, 4)
    report = fq.lower(exported(nn.Linear(4, 2), (x,)), table=DEFAULT_TABLE[1:]).report
    assert kernels(report) == ["weight_only"]
