"""What one quantizer of a plan can be: asymmetric, in blocks, learned, with its own observer."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fquant as fq

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)) + 3.0  # far from symmetric
UNSIGNED = fq.QuantSpec(4, unsigned=True)


def prepared(inputs, x=X, weight=None):
    model = nn.Linear(6, 2, bias=False)
    params = {"weight": model.weight.detach()}
    plan = fq.make_plan(model, [fq.OpRule(inputs=inputs, weight=weight)], (x,))
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    return fq.fake_quant(model, plan), params, fq.finalize(plan, stats), plan, stats


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("spec", [UNSIGNED, fq.QuantSpec(4)])
def test_asymmetric_ranges_have_a_zero_point_in_qstate(spec, per):
    quantizer = fq.Quantizer(spec, per, symmetric=False)
    forward, params, qstate, plan, _ = prepared(quantizer)
    assert tuple(qstate) == fq.qstate_names(plan) == ("linear#0.input", "linear#0.input.zero_point")
    low, high = (X.min(), X.max()) if per == "tensor" else (X.amin(0, True), X.amax(0, True))
    scale, zero_point = fq.compute_scale_zero_point(low, high, spec)
    assert torch.equal(qstate["linear#0.input"], scale)
    assert torch.equal(qstate["linear#0.input.zero_point"], zero_point.float())
    expected = F.linear(fq.fake_quantize(X, scale, zero_point, spec), params["weight"])
    assert torch.equal(forward(params, qstate, X), expected)
    # Every entry is a float, so the whole state can be differentiated; integers have derivative 0.
    gradient = torch.func.grad(lambda q: forward(params, q, X + 9).sum())(qstate)
    assert gradient["linear#0.input"].abs().sum() > 0
    assert gradient["linear#0.input.zero_point"].abs().sum() == 0


def test_asymmetric_is_closer_where_values_are_not_symmetric():
    errors = []
    for symmetric in (True, False):
        forward, params, qstate, *_ = prepared(fq.Quantizer(fq.QuantSpec(4), symmetric=symmetric),
                                               X.abs() + 1)  # fmt: skip
        x = X.abs() + 1
        errors.append((forward(params, qstate, x) - F.linear(x, params["weight"])).norm())
    assert errors[1] < 0.8 * errors[0]


def test_dynamic_asymmetric_ranges_follow_each_row():
    quantizer = fq.Quantizer(fq.QuantSpec(4), "token", dynamic=True, symmetric=False)
    forward, params, qstate, *_ = prepared(quantizer)
    assert qstate == {}
    x = X * torch.logspace(0, 3, 8).unsqueeze(1)
    spec = fq.QuantSpec(4)
    rows = [
        fq.fake_quantize(r, *fq.compute_scale_zero_point(r.min(), r.max(), spec), spec) for r in x
    ]
    assert torch.equal(forward(params, qstate, x), F.linear(torch.stack(rows), params["weight"]))


def test_blocks_along_features_have_ranges_of_their_own():
    quantizer = fq.Quantizer(fq.QuantSpec(4, block=3), "token", dynamic=True)
    forward, params, qstate, *_ = prepared(quantizer)
    x = X * torch.tensor([1.0, 1.0, 1.0, 1e3, 1e3, 1e3])
    spec = fq.QuantSpec(4)
    blocks = [
        fq.fake_quantize(part, fq.compute_scale(fq.compute_amax(part, 0), spec), spec=spec)
        for part in x.split(3, dim=1)
    ]
    assert torch.equal(forward(params, qstate, x), F.linear(torch.cat(blocks, 1), params["weight"]))
    weight = fq.Quantizer(fq.QuantSpec(4, axis=(0, 1), block=(1, 3)), per="axis")
    forward, params, qstate, *_ = prepared(None, weight=weight)
    assert qstate["linear#0.weight"].shape == (2, 2)
    scale = fq.compute_scale(fq.compute_amax(params["weight"], (0, 1), (1, 3)), fq.QuantSpec(4))
    assert torch.equal(qstate["linear#0.weight"], scale)


@pytest.mark.parametrize("learn", [True, "lsq", "pact"])
def test_learned_scales_have_the_values_of_frozen_ones_and_their_own_derivative(learn):
    x = X.clone()
    x[0, 0] = 15 * 0.3  # on the upper end exactly
    forward, params, _, plan, _ = prepared(fq.Quantizer(UNSIGNED, learn=learn))
    frozen, *_ = prepared(fq.Quantizer(UNSIGNED))
    qstate = {"linear#0.input": torch.tensor(0.3)}
    assert torch.equal(forward(params, qstate, x), frozen(params, qstate, x))
    assert fq.split_qstate(plan, qstate)[0].keys() == {"linear#0.input"}

    def by_hand(scale):
        if learn == "lsq":
            y = fq.fake_quantize_lsq(x, scale, spec=UNSIGNED)
        elif learn == "pact":
            y = fq.fake_quantize_pact(x, scale * 15, 4)
        else:
            y = fq.fake_quantize(x, scale, spec=UNSIGNED)
        return F.linear(y, params["weight"]).square().sum()

    def loss(qstate, params=params):
        return forward(params, qstate, x).square().sum()

    expected = torch.func.grad(by_hand)(torch.tensor(0.3))
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    for gradient in (torch.func.grad(loss)(qstate), compiled(qstate)):
        torch.testing.assert_close(gradient["linear#0.input"], expected)
    others = {True, "lsq", "pact"} - {learn}
    for other in others:
        one, *_ = prepared(fq.Quantizer(UNSIGNED, learn=other))
        different = torch.func.grad(lambda q, f=one: f(params, q, x).square().sum())(qstate)
        assert not torch.allclose(different["linear#0.input"], expected, rtol=1e-3), other


def test_every_rule_has_its_own_observer():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    kinds = [
        fq.MaxObserver(),
        fq.MovingAverageObserver(0.5),
        fq.HistogramObserver(percentile=90.0),
    ]
    rules = [fq.OpRule(str(i), inputs=fq.Quantizer(observer=kind)) for i, kind in enumerate(kinds)]
    plan = fq.make_plan(model, rules, (X,))
    assert [type(o) for o in plan.observers.values()] == [type(kind) for kind in kinds]
    params = dict(model.named_parameters())
    stats = fq.calibrate_model(model, plan, params, [X, X * 3], progress=False)
    qstate = fq.finalize(plan, stats)
    hidden = [X, model[0](X)]
    for i, kind in enumerate(kinds[:2]):
        state = kind.init()
        for factor in (hidden[i], model[:i](X * 3)):
            state = kind.update(state, factor)
        assert torch.equal(qstate[f"{i}/linear#0.input"], fq.compute_scale(kind.amax(state)))


@pytest.mark.parametrize("spec", [fq.QuantSpec(4), fq.QuantSpec(3, unsigned=True), fq.E2M1])
def test_a_histogram_is_read_out_for_the_grid_of_its_quantizer(spec):
    """Not for 8 bits, the observer's default: at 4 bits the best amax is a third smaller."""
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)).abs()
    observer = fq.HistogramObserver(method="mse")
    *_, qstate, _, _ = prepared(fq.Quantizer(spec, observer=observer), x)
    for_eight_bits = observer.amax(observer.update(observer.init(), x))
    expected = replace(observer, spec=spec).amax(observer.update(observer.init(), x))
    assert not torch.equal(expected, for_eight_bits)
    amax = qstate["linear#0.input"] * spec.q_max
    torch.testing.assert_close(amax, expected)


def test_scales_are_observed_again_every_so_many_steps():
    """The loop of a training run: frozen scales, taken anew every 3 steps from what those steps saw."""
    _, params, qstate, plan, _ = prepared(fq.QuantSpec(), weight=fq.QuantSpec())
    model = nn.Linear(6, 2, bias=False)
    watch = fq.observe(model, plan)
    stats, history = fq.init_stats(plan), []
    for step in range(6):
        x = X * (step + 1)
        _, stats = watch(params, stats, x)
        if step % 3 == 2:
            qstate, stats = fq.refreshed(plan, qstate, stats), fq.init_stats(plan)
        history.append(float(qstate["linear#0.input"] * 127 / X.abs().max()))
    assert history == pytest.approx([1, 1, 3, 3, 3, 6])


def test_fp8_is_its_grid_with_the_largest_value_on_448():
    model = nn.Linear(6, 2, bias=False)
    params = {"weight": model.weight.detach()}
    plan = fq.make_plan(model, fq.fp8(), (X,))
    qstate = fq.finalize(plan, fq.calibrate_model(model, plan, params, [X], progress=False))
    assert qstate["linear#0.input"] == X.abs().max() / 448
    x = (X / qstate["linear#0.input"]).to(torch.float8_e4m3fn).float() * qstate["linear#0.input"]
    w = params["weight"]
    s = w.abs().amax(1, True) / 448
    y = fq.fake_quant(model, plan)(params, qstate, X)
    assert torch.equal(y, F.linear(x, (w / s).to(torch.float8_e4m3fn).float() * s))
    dynamic = fq.make_plan(model, fq.fp8(dynamic=True), (X,))
    assert list(dynamic.observers) == ["linear#0.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn": "lsqq"}, r"learn must be False, True, 'lsq' or 'pact', got 'lsqq'"),
        ({"learn": "pact"}, r"spec must be unsigned for 'pact'"),
        ({"symmetric": False, "spec": fq.E4M3}, r"symmetric must be True .*got spec=FloatFormat"),
        ({"symmetric": False, "learn": "lsq"}, r"symmetric must be True .*got learn='lsq'"),
        ({"symmetric": False, "observer": fq.HistogramObserver()}, r"got observer=Histogram"),
        ({"per": "row"}, r"per must be 'tensor', 'channel', 'token' or 'axis', got 'row'"),
    ],
)
def test_bad_quantizers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fq.Quantizer(**options)


def test_observers_that_know_no_blocks_are_named():
    blocks = fq.Quantizer(fq.QuantSpec(axis=(0, 1), block=(1, 3)), per="axis",
                          observer=fq.MovingAverageObserver())  # fmt: skip
    with pytest.raises(ValueError, match=r"observer must know blocks .*MovingAverageObserver"):
        fq.make_plan(nn.Linear(6, 2), [fq.OpRule(weight=blocks)], (X,))


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)

    def forward(self, indices, x):
        return self.table(indices), fq.site("mark", x)


@pytest.mark.parametrize(
    ("quantizer", "axes"),
    [
        (fq.Quantizer(per="channel"), (-1, -1)),
        (fq.Quantizer(per="token", dynamic=True), ((0, 1), (0, 1, 2))),
        (fq.Quantizer(fq.E4M3), (None, None)),
    ],
)
def test_axes_of_outputs_are_those_of_the_result(quantizer, axes):
    """Not of the first operand, an embedding's table of two axes, and not of a mark's none."""
    rules = [fq.OpRule(ops=("embedding", "site"), output=quantizer)]
    args = (torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 3, 4, 7))
    plan = fq.make_plan(Outputs(), rules, args)
    outputs = [site.operands[-1] for site in plan.sites]
    assert [o.shape for o in outputs] == [(2, 5, 6), (2, 3, 4, 7)]
    assert tuple(o.quantizer.spec.axis for o in outputs) == axes
    assert ("output 2x5x6 e4m3fn" in str(plan)) == (quantizer.spec == fq.E4M3)
