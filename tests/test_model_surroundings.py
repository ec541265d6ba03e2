"""Fake quantization inside what training code puts around a model."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import fquant as fq


def prepared(model, x, rules=None):
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, rules or fq.w8a8(), (x,))
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    return plan, params, fq.finalize(plan, stats)


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def by_hand(params, qstate, x, linear=F.linear):
    for i in (0, 2):
        x = fq.fake_quantize(x, qstate[f"{i}/linear#0.input"])
        spec = fq.QuantSpec(narrow_range=True)
        w = fq.fake_quantize(params[f"{i}.weight"], qstate[f"{i}/linear#0.weight"], spec=spec)
        x = linear(x, w, params[f"{i}.bias"])
        x = x.relu() if i == 0 else x
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(dtype):
    model, x = network().to(dtype), torch.randn(8, 4).to(dtype)
    plan, params, qstate = prepared(model, x)
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert {s.dtype for s in qstate.values()} == {scale_dtype}
    forward = fq.fake_quant(model, plan)
    y = forward(params, qstate, x)
    assert y.dtype == dtype
    assert torch.equal(y, by_hand(params, qstate, x))
    if dtype == torch.bfloat16:
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(params, qstate, x), y)
    gradient = torch.func.grad(lambda p: forward(p, qstate, x).float().square().sum())(params)
    assert all(g.dtype == dtype and bool(g.isfinite().all()) for g in gradient.values())


def test_autocast_rounds_in_float32_and_multiplies_in_bfloat16():
    model, x = network(), torch.randn(8, 4)
    plan, params, qstate = prepared(model, x)
    forward = fq.fake_quant(model, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = forward(params, qstate, x), by_hand(params, qstate, x)
        _, stats = fq.observe(model, plan)(params, fq.init_stats(plan), x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert not torch.equal(y.float(), forward(params, qstate, x))
    torch.testing.assert_close(fq.finalize(plan, stats), qstate, rtol=0.01, atol=0)


def test_checkpointing_around_a_forward_is_exact():
    model, x = network(), torch.randn(8, 4)
    plan, params, qstate = prepared(model, x)
    forward = fq.fake_quant(model, plan)
    results = []
    for wrapped in (False, True):
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        args = (leaves, qstate, x)
        y = checkpoint(forward, *args, use_reentrant=False) if wrapped else forward(*args)
        y.square().sum().backward()
        results.append([p.grad for p in leaves.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Checkpointed(nn.Module):
    """A model that checkpoints its own first block."""

    def __init__(self):
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=False))


def test_checkpointing_inside_a_model_fails_loudly_and_works_by_block():
    model, x = Checkpointed(), torch.randn(8, 4)
    plan, params, qstate = prepared(model, x)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    y = fq.fake_quant(model, plan)(leaves, qstate, x)
    with pytest.raises(CheckpointError, match="A different number of tensors was saved"):
        y.sum().backward()  # the block runs again outside of the transform

    # What the documentation says to do: the block is a function of its own, and that is checkpointed.
    names = {part: {n for n in params if n.startswith(part)} for part in ("block.", "head.")}
    parts = {}
    for part, module, example in (
        ("block.", model.block, x),
        ("head.", model.head, model.block(x)),
    ):
        part_plan, _, part_q = prepared(module, example)
        parts[part] = (fq.fake_quant(module, part_plan), part_q)

    def forward(leaves, use_checkpoint):
        h = x
        for part, (function, q) in parts.items():
            own = {n.removeprefix(part): leaves[n] for n in names[part]}
            call = partial(checkpoint, use_reentrant=False) if use_checkpoint else _call
            h = call(function, own, q, h)
        return h

    gradients = []
    for use_checkpoint in (False, True):
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        forward(leaves, use_checkpoint).square().sum().backward()
        gradients.append([p.grad for p in leaves.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def _call(function, *args):
    return function(*args)


class Score(nn.Module):
    """A model that differentiates inside its forward."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return torch.func.vmap(torch.func.grad(lambda row: self.energy(row).squeeze()))(x)


def test_transforms_inside_a_model():
    model, x = Score(), torch.randn(6, 4)
    w4 = fq.OpRule(weight=fq.QuantSpec(4, narrow_range=True))
    plan, params, qstate = prepared(model, x, [w4])
    assert sorted(plan.quantizers) == ["energy.0/linear#0.weight", "energy.2/linear#0.weight"]
    forward = fq.fake_quant(model, plan)
    for per, amax in (("tensor", x.abs().max()), ("channel", x.abs().amax(0))):
        watching = fq.OpRule(inputs=fq.Quantizer(per=per))
        _, _, seen = prepared(model, x, [watching])  # no wrapper of the inner vmap may leave
        scale = seen["energy.0/linear#0.input"]
        assert torch.equal(scale.flatten(), (amax / 127).flatten())
    rounded = dict(params)
    for i in (0, 2):
        name, spec = f"energy.{i}.weight", fq.QuantSpec(4, narrow_range=True)
        rounded[name] = fq.fake_quantize(
            params[name], qstate[f"energy.{i}/linear#0.weight"], spec=spec
        )
    expected = torch.func.functional_call(model, rounded, (x,))
    torch.testing.assert_close(forward(params, qstate, x), expected)
    per_row = torch.func.vmap(forward, in_dims=(None, None, 0))(params, qstate, x.unsqueeze(1))
    torch.testing.assert_close(per_row.squeeze(1), expected)
    gradient = torch.func.grad(lambda p: forward(p, qstate, x).square().sum())(params)
    assert gradient["energy.0.weight"].abs().sum() > 0


def test_module_form_trains_scales_writes_buffers_and_saves_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(4, 1, 4, 4)
    learned = fq.Quantizer(fq.QuantSpec(4), learn="lsq")
    plan, params, qstate = prepared(model, x, [fq.OpRule(weight=fq.QuantSpec(4), inputs=learned)])
    qstate = {n: s * 0.7 for n, s in qstate.items()}
    module = fq.FakeQuantized(model, plan, qstate).eval()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    assert torch.equal(module(x), fq.fake_quant(model, plan, train=False)(params, qstate, x))
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x).square().sum().backward()
    optimizer.step()
    assert int(model[1].num_batches_tracked) == 1
    after = module.qstate()
    changed = {n for n in qstate if not torch.equal(after[n], qstate[n])}
    assert changed == {"0/conv2d#0.input", "3/linear#0.input"}
    again = fq.FakeQuantized(model, plan, qstate)
    again.load_state_dict(module.state_dict())
    assert all(torch.equal(s, after[n]) for n, s in again.qstate().items())
    module.eval()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_merging_over_ranks_needs_ranks():
    with pytest.raises(RuntimeError, match=r"torch.distributed must be initialized"):
        fq.merge_stats_over_ranks({}, {})
