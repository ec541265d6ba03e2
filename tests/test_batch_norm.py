"""Batch norm folded while training, and its statistics taken anew."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fquant as fq

OPS = fq.replace_forward(
    fq.DEFAULT_OPS, nn.Sequential, lambda m, x: fq.folded_conv_batch_norm(m[0], m[1], x)
)
BLOCKS = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)), (4, 2, 5, 5)),
    "bias": (lambda: nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.BatchNorm1d(4)), (4, 2, 5)),
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (8, 3)),
    "plain": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)), (8, 3)),
}  # fmt: skip


def prepared(name):
    torch.manual_seed(0)
    build, shape = BLOCKS[name]
    model = build().double()
    params = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    buffers = {n: b + 0.3 if b.is_floating_point() else b.clone() for n, b in model.named_buffers()}
    return model, params, buffers, torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_folded_block_is_the_block(name, train):
    model, params, buffers, x = prepared(name)
    model.train(train)
    with pytest.warns(fq.UnusedRuleWarning):
        plan = fq.make_plan(model, [fq.OpRule("none", weight=fq.QuantSpec())], (x,), ops=OPS)
    assert [site.op for site in plan.sites] == [plan.sites[0].op]
    folded = fq.fake_quant(model, plan, ops=OPS, with_buffers=True)
    y, after = folded({**params, **buffers}, {}, x)
    copies = {n: b.clone() for n, b in buffers.items()}
    torch.testing.assert_close(y, functional_call(model, {**params, **copies}, (x,)))
    for n in copies:  # the running statistics move as torch's do, and the caller's stay
        torch.testing.assert_close(after[n], copies[n])
        assert torch.equal(after[n], buffers[n]) != (train and "running" in n) or "tracked" in n

    def loss(p, forward):
        return forward(p).square().sum()

    direct = {n: b.clone() for n, b in buffers.items()}
    with torch.no_grad():
        pass
    ours = torch.func.grad(loss)(params, lambda p: folded({**p, **buffers}, {}, x)[0])
    params_ = {n: p.clone().requires_grad_() for n, p in params.items()}
    functional_call(model, {**params_, **direct}, (x,)).square().sum().backward()
    for n, gradient in ours.items():
        expected = params_[n].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)


def test_gamma_zero_has_values_and_gradients_under_quantization():
    model, params, buffers, x = prepared("conv")
    params["1.weight"] = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    plan = fq.make_plan(model, fq.w4a8(), (x,), ops=OPS)
    stats = fq.calibrate_model(model, plan, {**params, **buffers}, [x], ops=OPS, progress=False)
    assert list(stats) == ["conv2d#0.input", "conv2d#0.weight"]
    forward = fq.fake_quant(model, plan, train=True, ops=OPS)
    qstate = fq.finalize(plan, stats)
    y = forward({**params, **buffers}, qstate, x)
    assert torch.allclose(y[:, 0], params["1.bias"][0])

    def loss(p):
        return forward({**p, **buffers}, qstate, x).square().sum()

    eager = torch.func.grad(loss)(params)
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(params)
    for n, gradient in eager.items():
        assert bool(gradient.isfinite().all()), n
        torch.testing.assert_close(compiled[n], gradient)
    assert eager["1.weight"][0] != 0  # the channel can come back


def test_folding_names_what_is_wrong():
    with pytest.raises(TypeError, match=r"layer must be nn.Linear or .*got ConvTranspose1d"):
        fq.folded_conv_batch_norm(
            nn.ConvTranspose1d(2, 2, 2), nn.BatchNorm1d(2), torch.ones(1, 2, 3)
        )
    with pytest.raises(ValueError, match=r"x must be \(batch, features\).*got \(1, 2, 3\)"):
        fq.folded_conv_batch_norm(nn.Linear(3, 2), nn.BatchNorm1d(2), torch.ones(1, 2, 3))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_estimates_are_those_of_update_bn(momentum):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.ReLU(),
                          nn.Linear(4, 2), nn.BatchNorm1d(2, momentum=momentum))  # fmt: skip
    batches = [torch.randn(16, 3) * (i + 1) for i in range(3)]
    params = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    params = {n: p.detach() + 0 for n, p in params.items()}
    with pytest.warns(fq.UnusedRuleWarning):
        plan = fq.make_plan(model, [fq.OpRule("none")], (batches[0],))
    forward = fq.fake_quant(model, plan, train=True, with_buffers=True)
    kept = {n: p.clone() for n, p in params.items()}
    new = fq.estimate_batch_norm(model, lambda p, x: forward(p, {}, x), params, batches)
    assert all(torch.equal(params[n], kept[n]) for n in params)
    torch.optim.swa_utils.update_bn(batches, model)
    for n, b in model.named_buffers():
        if "running" in n:
            torch.testing.assert_close(new[n], b)
            assert not torch.equal(new[n], params[n])
    assert new.keys() == params.keys()


def test_estimates_name_what_is_missing():
    model = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match=r"must have \['running_mean', 'running_var'\]"):
        fq.estimate_batch_norm(model, None, {}, [])
    with pytest.raises(ValueError, match=r"batches must hold at least one"):
        fq.estimate_batch_norm(model, None, dict(model.named_buffers()), [])
