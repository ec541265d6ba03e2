"""Fine-tuning schedules, batch norm folding, trained and re-observed scales; rules and plans as data."""

import json

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fquant as fq

LEARNED = fq.Quantizer(fq.QuantSpec(num_bits=4), learn=True)
RULES = [fq.OpRule(weight=fq.QuantSpec(num_bits=4), inputs=LEARNED)]


def test_schedules_have_the_published_numbers():
    recipe = fq.fine_tuning(steps=1000, lr=0.1, weight_decay=1e-4, batch_size=32)
    assert recipe[:2] == (100, 0)
    rates = [recipe.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3)  # 1 % of the rate
    assert rates[-1] == pytest.approx(1e-5)  # 0.01 % of it
    assert rates == sorted(rates, reverse=True)
    assert recipe.learning_rate(50) == pytest.approx((rates[0] + rates[-1]) / 2, rel=0.05)
    divided = fq.fine_tuning_with_divisors(1000, 0.1, 1e-2, 64)
    assert divided == (100, 10, 1e-3, 1e-5, 1e-4, 64)
    assert divided.learning_rate(0) < divided.learning_rate(10) == pytest.approx(1e-3)
    assert fq.fine_tuning_with_divisors(1, 0.1, batch_size=1, learn_scales=True).steps == 1


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(4, 6), nn.BatchNorm1d, (5, 4)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d, (2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d, (2, 4, 3, 3)),
    ],
)
def test_folding_keeps_the_function_and_survives_gamma_zero(layer, norm, shape, affine):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(layer, norm(6, affine=affine)).double().eval()
    params = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    params = {n: p.detach().clone() for n, p in params.items()}
    params["1.running_mean"] = torch.randn(6, dtype=torch.float64, generator=generator)
    params["1.running_var"] = torch.rand(6, dtype=torch.float64, generator=generator) + 0.5
    if affine:
        params["1.weight"] = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0, 1e-3], dtype=torch.float64)
        params["1.bias"] = torch.randn(6, dtype=torch.float64, generator=generator)
    x = torch.randn(*shape, dtype=torch.float64, generator=generator)
    before = {n: p.clone() for n, p in params.items()}
    folded = fq.fold_batch_norm(model, params, {"0": "1"})
    expected = functional_call(model, params, (x,))
    torch.testing.assert_close(functional_call(model, folded, (x,)), expected, rtol=0, atol=1e-12)
    assert all(torch.equal(params[n], before[n]) for n in params)
    # Nothing is left for the batch norm to scale: its input is its output but for the bias.
    inner = functional_call(model[0], {n[2:]: p for n, p in folded.items() if n[0] == "0"}, (x,))
    if affine:
        bias = folded["1.bias"].view(1, -1, *[1] * (x.ndim - 2))
        torch.testing.assert_close(inner + bias, expected, rtol=0, atol=1e-12)

    def loss(p):
        return functional_call(model, fq.fold_batch_norm(model, p, {"0": "1"}), (x,)).sum()

    trained = {n: params[n] for n, _ in model.named_parameters()}
    if affine:  # else the shift goes to the running mean, which torch does not differentiate
        gradients = torch.func.grad(lambda p: loss({**params, **p}))(trained)
        assert all(bool(g.isfinite().all()) for g in gradients.values())


def test_folding_names_what_is_wrong():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    params = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with pytest.raises(ValueError, match=r"must name convolutions or linear layers, got '1'"):
        fq.fold_batch_norm(model, params, {"1": "1"})
    with pytest.raises(ValueError, match=r"must name batch norms, got '0'"):
        fq.fold_batch_norm(model, params, {"0": "0"})
    with pytest.raises(ValueError, match=r"params must have '1.running_mean'"):
        fq.fold_batch_norm(model, dict(model.named_parameters()), {"0": "1"})


def prepared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(64, 4)
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, RULES, (x,))
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    return model, x, params, plan, stats


def test_training_parameters_and_scales_lowers_the_loss():
    model, x, params, plan, stats = prepared()
    qstate = {n: s * 0.5 for n, s in fq.finalize(plan, stats).items()}
    learned, frozen = fq.split_qstate(plan, qstate)
    assert sorted(learned) == ["0/linear#0.input", "2/linear#0.input"]
    forward = fq.fake_quant(model, plan)
    target = model(x).detach()

    def loss(params, learned):
        return (forward(params, {**learned, **frozen}, x) - target).square().mean()

    step = torch.func.grad(loss, argnums=(0, 1))
    first = loss(params, learned)
    for _ in range(60):
        by_params, by_scales = step(params, learned)
        params = {n: p - 0.2 * by_params[n] for n, p in params.items()}
        learned = {n: s - 0.005 * by_scales[n] for n, s in learned.items()}
    assert loss(params, learned) < 0.75 * first  # 4 bits leave a floor
    assert all(by_scales[n] != 0 for n in by_scales)


def test_scales_are_observed_again_but_for_the_learned():
    model, x, params, plan, stats = prepared()
    qstate = fq.finalize(plan, stats)
    bigger = {n: p * 3 for n, p in params.items()}
    _, stats = fq.observe(model, plan)(bigger, fq.init_stats(plan), x)
    again = fq.refreshed(plan, qstate, stats)
    assert torch.equal(again["0/linear#0.input"], qstate["0/linear#0.input"])
    assert torch.allclose(again["0/linear#0.weight"], 3 * qstate["0/linear#0.weight"])


def test_a_learned_scale_keeps_its_zero_point():
    x = torch.tensor([[1.0, 9.0]])
    rules = [fq.OpRule(inputs=fq.Quantizer(symmetric=False, learn=True))]
    plan = fq.make_plan(nn.Linear(2, 1), rules, (x,))
    name = "linear#0.input"
    qstate = {name: torch.tensor(0.5), f"{name}.zero_point": torch.tensor(7.0)}
    params = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    stats = fq.calibrate_model(nn.Linear(2, 1), plan, params, [x], progress=False)
    assert fq.refreshed(plan, qstate, stats) == qstate


def test_dynamic_ranges_need_no_calibration():
    model, x, params, *_ = prepared()
    plan = fq.make_plan(model, fq.w8a8(dynamic=True), (x,))
    assert list(plan.observers) == ["0/linear#0.weight", "2/linear#0.weight"]
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    y = fq.fake_quant(model, plan)(params, fq.finalize(plan, stats), x * 1000)
    exact = model(x * 1000)
    assert ((y - exact).norm() / exact.norm()).item() < 0.02
    # One scale per row: a huge row leaves the others as they are.
    spoiled = torch.cat([x[:1] * 1e6, x[1:]])
    forward = fq.fake_quant(model, plan)
    qstate = fq.finalize(plan, stats)
    one, other = forward(params, qstate, spoiled)[1:], forward(params, qstate, x)[1:]
    torch.testing.assert_close(one, other)


def test_rules_and_plans_survive_json():
    model, x, *_ = prepared()
    rules = [
        *fq.skip("2", nn.Embedding),
        fq.OpRule(r"0.*", (nn.Linear,), weight=fq.QuantSpec(4, axis=(0, 1)), share=False),
        fq.OpRule(inputs=fq.Quantizer(observer=fq.MovingAverageObserver(0.5), learn=True)),
    ]
    again = fq.rules_from_dicts(json.loads(json.dumps(fq.rules_to_dicts(rules))))
    assert again == rules
    plan = fq.make_plan(model, RULES, (x,))
    copy = fq.plan_from_dict(json.loads(json.dumps(fq.plan_to_dict(plan))))
    assert copy == plan
    assert hash(copy) == hash(plan)
    assert plan.diff(copy) == ""
    other = fq.make_plan(model, [*fq.skip("0"), *RULES], (x,))
    assert plan.diff(other).splitlines()[0].startswith("- 0/linear#0")
    assert [site.name for site in other.unquantized] == ["0/linear#0"]
    with pytest.raises(ValueError, match=r"kind must be the name of a known class, got 'os'"):
        fq.rules_from_dicts([{"kind": "os"}])


def test_skipping_by_name_covers_what_is_below_and_types_what_is_inside():
    class Block(nn.Sequential):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Block(nn.Linear(2, 2)), Block(Block(nn.Linear(2, 2))))
    for what, kept in (("2", {"0/linear#0", "1.0/linear#0"}), (Block, {"0/linear#0"})):
        plan = fq.make_plan(model, [*fq.skip(what), *fq.w8a8()], (torch.ones(1, 2),))
        assert {name.rpartition(".")[0] for name in plan.quantizers} == kept
