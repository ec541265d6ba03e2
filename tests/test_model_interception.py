"""Site names, and everything a model may do that must not lead astray."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fquant as fq

INT8 = fq.QuantSpec()


class Net(nn.Module):
    """A module around a function, for patterns of a few lines."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def names(model, *args, rules=None, **options):
    return [s.name for s in fq.make_plan(model, rules or fq.w8a8(), args, **options).sites]


def run(model, *args, rules=None, **options):
    """Plans, calibrates, and returns (float output, quantized output, plan, forward, params, qstate)."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, rules or fq.w8a8(), args, **options)
    stats = fq.calibrate_model(model, plan, params, [args], progress=False)
    qstate = fq.finalize(plan, stats)
    forward = fq.fake_quant(model, plan)
    return model(*args), forward(params, qstate, *args), plan, forward, params, qstate


def test_values_are_those_of_layers_quantized_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(2, 2, 4, 4)
    _, y, _, _, params, _ = run(model, x)

    def grid(t, axis=None, narrow=False):
        spec = fq.QuantSpec(narrow_range=narrow)
        return fq.fake_quantize(t, fq.compute_scale(fq.compute_amax(t, axis), spec), spec=spec)

    # The second input's range was observed in the float model.
    hidden = F.conv2d(x, params["0.weight"], params["0.bias"]).relu().flatten(1)
    scale = fq.compute_scale(hidden.abs().max())
    h = F.conv2d(grid(x), grid(params["0.weight"], 0, True), params["0.bias"]).relu().flatten(1)
    h = fq.fake_quantize(h, scale)
    assert torch.equal(y, F.linear(h, grid(params["3.weight"], 0, True), params["3.bias"]))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_transposed_convolutions_keep_one_scale_per_output_channel(axes, groups):
    layer = getattr(nn, f"ConvTranspose{axes}d")(4, 6, 2, groups=groups, bias=False).double()
    with torch.no_grad():  # output channel c has amax c + 1
        per_group = torch.arange(1.0, 7.0, dtype=torch.float64).view(groups, 1, 6 // groups)
        layer.weight.clamp_(-0.1, 0.1).view(groups, 4 // groups, 6 // groups, -1)[..., 0] = (
            per_group
        )
    x = torch.randn(1, 4, *[3] * axes, dtype=torch.float64)
    params = dict(layer.named_parameters())
    plan = fq.make_plan(layer, fq.w8(), (x,))
    qstate = fq.finalize(plan, fq.calibrate_model(layer, plan, params, [x], progress=False))
    (scale,) = qstate.values()
    assert torch.allclose(scale.flatten() * 127, torch.arange(1.0, 7.0, dtype=scale.dtype))
    error = fq.fake_quant(layer, plan)(params, qstate, x) - layer(x)
    # Each output channel's error is below what its own step allows: 2^axes taps of 4 / groups inputs.
    bound = x.abs().max() * 4 / groups * scale.flatten() / 2 * 2**axes
    assert bool((error.abs().amax(dim=[0, *range(2, 2 + axes)]) <= bound).all())


def test_names_are_counted_per_call_and_shared_by_default():
    shared = nn.Linear(3, 3)
    model = Net(lambda m, x: m.a(m.a(x)) @ x.mT @ F.linear(x, m.a.weight), a=shared)
    x = torch.randn(2, 3)
    assert names(model, x) == ["a/linear#0", "matmul#0", "linear#0", "matmul#1"]
    apart = [fq.OpRule("a", share=False, inputs=INT8, weight=INT8), *fq.w8a8()]
    assert names(model, x, rules=apart)[:2] == ["a/linear#0@0", "a/linear#0@1"]
    _, y, plan, *_, qstate = run(model, x, rules=apart)
    assert qstate["a/linear#0@0.input"] != qstate["a/linear#0@1.input"]
    assert y.shape == (2, 3)
    assert plan.sites[0].operands[1].parameter == "a.weight"


def test_submodule_forward_other_methods_and_containers():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.hidden = [nn.Linear(2, 2)]  # not registered: no parameters of the model
            self.bound = self.inner.forward
            self.blocks = nn.ModuleDict({"x": nn.Linear(2, 2)})

        def forward(self, x):
            return self.inner.forward(x)

        def encode(self, x, scale=1.0):
            return self.bound(self.hidden[0](self.blocks["x"](x))) * scale

    model, x = Odd(), torch.randn(3, 2)
    assert names(model, x) == ["inner/linear#0"]
    found = names(model, x, method="encode", kwargs={"scale": 2.0})
    assert found == ["blocks.x/linear#0", "hidden.0/linear#0", "inner/linear#0"]
    plan = fq.make_plan(model, fq.w8a8(), (x,), method="encode")
    params = dict(model.named_parameters())
    stats = fq.calibrate_model(model, plan, params, [{"x": x}], progress=False)
    y = fq.fake_quant(model, plan)(params, fq.finalize(plan, stats), x, scale=3.0)
    assert torch.allclose(y, model.encode(x, 3.0), atol=0.1)


def test_instance_forwards_are_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"'0' must not have a forward set on the instance"):
        fq.make_plan(model, fq.w8a8(), (torch.ones(1, 2),))


def test_in_place_residuals_are_those_out_of_place():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    rules = [fq.OpRule(ops=("add",), inputs=fq.QuantSpec(5)), fq.OpRule(inputs=INT8)]

    def in_place(m, x):
        y = m.layer(x)
        alias = y
        y += x
        return alias

    results = []
    for function in (lambda m, x: m.layer(x) + x, in_place, lambda m, x: m.layer(x).add_(x)):
        model = Net(function, layer=layer)
        _, y, plan, forward, params, qstate = run(model, x, rules=rules)
        assert [s.op for s in plan.sites] == ["linear", "add"]

        def loss(p, f=forward, q=qstate):
            return f(p, q, x).square().sum()

        torch._dynamo.reset()
        compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
        results.append((y, torch.func.grad(loss)(params), compiled(params)))
    for y, gradient, compiled in results:
        assert torch.equal(y, results[0][0])
        for name in gradient:
            torch.testing.assert_close(gradient[name], results[0][1][name])
            torch.testing.assert_close(compiled[name], results[0][1][name])


def test_masks_and_numbers_are_no_residuals():
    rules = [fq.OpRule(ops=("add", "mul"), inputs=INT8)]
    mask = torch.full((3, 3), -1e9).triu(1)
    model = Net(lambda m, x: ((x + mask) * 2 + 1).int() + 1 + (x + x).int())
    assert names(model, torch.ones(2, 3, 3), rules=rules) == ["add#0"]


def test_exceptions_inside_a_model_leave_everything_in_place():
    class Caught(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad = Net(lambda m, x: F.linear(x, torch.ones(7, 7)))
            self.good = nn.Linear(2, 2)

        def forward(self, x, fail=False):
            try:
                self.bad(x)
            except RuntimeError:
                if fail:
                    raise
            return F.linear(self.good(x), torch.ones(2, 2))

    model, x = Caught(), torch.randn(1, 2)
    assert names(model, x)[1:] == ["good/linear#0", "linear#0"]
    _, y, _, forward, params, qstate = run(model, x)
    with pytest.raises(RuntimeError):
        forward(params, qstate, x, fail=True)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert fq.interception.stack.RUNNING.interpreters == []
    assert torch.equal(forward(params, qstate, x), y)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.block = nn.Sequential(self.norm, nn.ReLU())

    def forward(self, x):
        return self.b(self.block(self.a(x)))


def test_a_state_dict_may_name_a_tensor_twice():
    model, x = Shared().eval(), torch.randn(4, 2)
    _, y, plan, forward, params, qstate = run(model, x)
    state = model.state_dict()
    assert {"b.weight", "block.0.running_mean"} <= state.keys() - params.keys()
    assert torch.equal(forward(state, qstate, x), y)
    program = fq.export_qdq(model, plan, state, qstate, (x,))
    assert torch.equal(program.module()(x), y)
    two = {**state, "b.weight": state["b.weight"].clone()}
    with pytest.raises(ValueError, match=r"one tensor for 'a.weight' and 'b.weight'.*Leave out"):
        forward(two, qstate, x)


def test_threads_do_not_meet():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(16, 8)
    _, _, plan, forward, params, qstate = run(model, x)
    variants = [{n: p * (i + 1) for n, p in params.items()} for i in range(4)]
    expected = [forward(v, qstate, x) for v in variants]
    other = fq.observe(model, plan)
    wrong = []

    def work(i):
        for _ in range(30):
            if not torch.equal(forward(variants[i], qstate, x), expected[i]):
                wrong.append(i)
            other(variants[i], fq.init_stats(plan), x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_one_inside_another():
    inner_model = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    _, _, _, inner, inner_params, inner_q = run(inner_model, x)
    model = Net(lambda m, x: m.layer(inner(inner_params, inner_q, x)), layer=nn.Linear(3, 3))
    everything = [fq.OpRule(ops=("add", "mul", "div", "sub"), inputs=INT8), *fq.w8a8()]
    assert names(model, x, rules=fq.w8a8()) == ["layer/linear#0"]
    with pytest.warns(fq.UnusedRuleWarning):
        assert names(model, x, rules=everything) == ["layer/linear#0"]


def test_user_ops_marks_and_replaced_blocks():
    x = torch.randn(3, 4)

    @fq.quantizable(inputs=("x",), weight="w", axis=0)
    def composite(x, w):
        return (x + x) @ w.T  # nothing of this is seen on its own

    model = Net(
        lambda m, x: fq.site("res", composite(x, m.w) * 1.0), w=nn.Parameter(torch.randn(2, 4))
    )
    rules = [
        fq.OpRule(ops=("add",), inputs=INT8),
        fq.OpRule(ops=("site",), output=INT8),
        *fq.w8a8(),
    ]
    with pytest.warns(fq.UnusedRuleWarning, match=r"'add'"):
        plan = fq.make_plan(model, rules, (x,))
    assert list(plan.quantizers) == ["composite#0.input", "composite#0.weight", "res#0.output"]
    assert plan.quantizers["composite#0.weight"].spec.axis == 0

    ops = fq.register_op(fq.DEFAULT_OPS, torch.cumsum, inputs=(0,))
    model = Net(lambda m, x: torch.cumsum(x, 0))
    assert names(model, x, ops=ops) == ["cumsum#0"]
    params, plan = {}, fq.make_plan(model, fq.w8a8(), (x,), ops=ops)
    stats = fq.calibrate_model(model, plan, params, [x], ops=ops, progress=False)
    y = fq.fake_quant(model, plan, ops=ops)(params, fq.finalize(plan, stats), x)
    assert not torch.equal(y, model(x))


def test_control_flow_is_planned_on_real_values():
    def branches(m, x):
        return m.a(x) if x.sum() > 0 else m.b(x)

    model = Net(branches, a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"must not read values of tensors"):
        fq.make_plan(model, fq.w8a8(), (x,))
    plan = fq.make_plan(model, fq.w8a8(), (x,), fake=False)
    other = fq.make_plan(model, fq.w8a8(), (-x,), fake=False)
    params = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"site 'b/linear#0': must be in the plan"):
        fq.calibrate_model(model, plan, params, [-x], progress=False)
    both = plan.merge(other)
    stats = fq.calibrate_model(model, both, params, [x], progress=False)
    with pytest.raises(ValueError, match=r"'b/linear#0.input'.*at least one"):
        fq.finalize(both, stats)
    stats = fq.calibrate_model(model, both, params, [-x], stats, progress=False)
    y = fq.fake_quant(model, both)(params, fq.finalize(both, stats), -x)
    assert torch.allclose(y, model(-x), atol=0.05)


def test_batch_norm_in_train_mode_returns_its_statistics():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).train()
    x = torch.randn(4, 2, 3, 3)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    params = {**dict(model.named_parameters()), **buffers}
    plan = fq.make_plan(model, [fq.OpRule("nowhere.*"), *fq.w8()][1:], (x,))
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    qstate = fq.finalize(plan, stats)
    _, new = fq.fake_quant(model, plan, with_buffers=True)(params, qstate, x)
    assert int(new["1.num_batches_tracked"]) == 1
    assert not torch.equal(new["1.running_mean"], buffers["1.running_mean"])
    assert torch.equal(params["1.running_mean"], torch.zeros(3))
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    _, same = fq.fake_quant(model, plan, with_buffers=True, train=False)(params, qstate, x)
    assert torch.equal(same["1.running_mean"], buffers["1.running_mean"])


def test_distinct_and_unknown_names_are_told():
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    _, _, plan, forward, params, qstate = run(model, x)
    with pytest.raises(ValueError, match=r"params must have every parameter, lacks 'bias'"):
        forward({"weight": params["weight"]}, qstate, x)
    with pytest.raises(ValueError, match=r"params must name tensors of the model, got 'other'"):
        forward({**params, "other": x}, qstate, x)
    with pytest.raises(ValueError, match=r"qstate must have every .*, lacks 'linear#0.input'"):
        forward(params, {}, x)
    with pytest.raises(ValueError, match=r"qstate must be of this plan, got \['more'\]"):
        forward(params, {**qstate, "more": x}, x)
    with pytest.raises(ValueError, match=r"site 'linear#0.weight': .*shape that broadcasts"):
        forward(params, {**qstate, "linear#0.weight": torch.ones(3, 1)}, x)
    with pytest.raises(ValueError, match=r"stats must have every .*, lacks"):
        fq.observe(model, plan)(params, {}, x)
    other = fq.make_plan(
        model, [fq.OpRule(inputs=fq.Quantizer(observer=fq.HistogramObserver()))], (x,)
    )
    of_max = {"linear#0.input": fq.MaxObserver().init()}
    for call in (
        lambda: fq.finalize(other, of_max),
        lambda: fq.observe(model, other)(params, of_max, x),
    ):
        with pytest.raises(
            ValueError, match=r"HistogramState at site 'linear#0.input', got MaxState"
        ):
            call()
    with pytest.raises(ValueError, match=r"rules must name operations of ops, .*got \['conv9d'\]"):
        fq.make_plan(model, [fq.OpRule(ops=("conv9d",))], (x,))
    with pytest.raises(ValueError, match=r"path must be a regular expression"):
        fq.OpRule("(")
    with pytest.raises(ValueError, match=r"site 'add#0': .*must not write to out="):
        run(
            Net(lambda m, x: torch.add(x, x, out=torch.empty(1, 2))),
            x,
            rules=[fq.OpRule(ops=("add",), inputs=INT8)],
        )


def test_operations_that_write_their_input_are_named():
    doubled = fq.register_op(fq.DEFAULT_OPS, torch.Tensor.mul_, name="doubled")
    model = Net(lambda m, x: (x + 0).mul_(2))
    with pytest.raises(ValueError, match=r"site 'doubled#0': .*must not write its input in place"):
        fq.make_plan(model, fq.w8a8(), (torch.ones(2),), ops=doubled)
    assert len(fq.make_plan(model, fq.w8(), (torch.ones(2),), ops=doubled).sites) == 1
    renormed = nn.Sequential(nn.Embedding(3, 2, max_norm=1.0))
    for fake in (True, False):
        with pytest.raises(ValueError, match=r"site '0/embedding#0': .*write its weight in place"):
            fq.make_plan(renormed, fq.w8(), (torch.tensor([1]),), fake=fake)


def test_trees_go_in_and_come_out():
    def tree(m, batch, scale=None):
        h = {"hidden": m.a(batch["x"][0]) * scale["by"]}
        return [h, (m.b(h["hidden"]), batch["tokens"])]

    model = Net(tree, a=nn.Linear(2, 3), b=nn.Linear(3, 1))
    x, tokens = torch.randn(4, 2), torch.arange(4)
    args, kwargs = ({"x": [x], "tokens": tokens},), {"scale": {"by": torch.tensor(2.0)}}
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, fq.w8a8(), args, kwargs)
    assert [s.name for s in plan.sites] == ["a/linear#0", "b/linear#0"]
    exact, stats = fq.observe(model, plan)(params, fq.init_stats(plan), *args, **kwargs)
    y = fq.fake_quant(model, plan)(params, fq.finalize(plan, stats), *args, **kwargs)
    leaves, structure = torch.utils._pytree.tree_flatten(y)
    assert structure == torch.utils._pytree.tree_structure(exact)
    assert leaves[2] is tokens
    assert torch.allclose(leaves[0], model(*args, **kwargs)[0]["hidden"], atol=0.1)
