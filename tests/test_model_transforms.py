"""Whole models under every transform: the zoo of `fquant.testing.models` through the matrix."""

import copy
import functools
import warnings
from typing import ClassVar

import pytest
import torch

import fquant as fq
from fquant.testing import transforms
from fquant.testing.models import EXAMPLES
from fquant.testing.transforms import TransformCase

# Sums in float64 differ by < 1e-12 between transforms; no value of the examples lies that near a tie.
ATOL = 1e-9
SUMS = fq.OpRule(ops=("add",), inputs=fq.QuantSpec(), output=fq.QuantSpec())
JOINS = fq.OpRule(ops=("cat", "max_pool2d"), inputs=fq.QuantSpec())
CHECKS = [
    transforms.vmap_first,
    transforms.vmap_all,
    transforms.func_grad,
    transforms.vmap_grad,
    transforms.grad_vmap,
    transforms.jvp,
    transforms.compile_backward,  # compares the values too
    transforms.compile_grad,
]


def rules_for(name):
    extra = {"residual": [SUMS], "unet": [JOINS]}.get(name, [])
    return [*extra, *fq.w8a8()]


@functools.cache  # nothing writes to what it returns, as is tested below
def prepared(name):
    example = EXAMPLES[name]
    model, inputs = example.model(), example.inputs()
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, rules_for(name), inputs)
    stats = fq.calibrate_model(model, plan, params, [inputs], progress=False)
    # Tighter than what was seen, so that some values are clipped and scales have derivatives.
    qstate = {n: (s * 0.8).double() for n, s in fq.finalize(plan, stats).items()}
    return model, plan, params, qstate, inputs


@functools.cache
def case_of(name, compiled):
    model, plan, params, qstate, inputs = prepared(name)
    if compiled:  # Dynamo traces a program that takes a single float64 of no dimensions twice
        qstate = {n: s.reshape(s.shape or 1) for n, s in qstate.items()}
    weight = next(o.parameter for s in plan.sites for o in s.operands if o.parameter)
    scale = next(n for n in qstate if ".input" in n)
    forward = fq.fake_quant(model, plan)

    def function(x, w, s):
        return forward({**params, weight: w}, {**qstate, scale: s}, x)

    arguments = (*inputs, params[weight], qstate[scale])
    return TransformCase(name, function, function, function, arguments, atol=ATOL)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", EXAMPLES)
def test_model_matrix(name, check):
    compiled = check.__name__.startswith("compile")
    case = case_of(name, compiled)
    if name == "encoder" and not compiled:  # torch's fused attention has no vmap and no jvp rule
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return check(case)
    return check(case)


@pytest.mark.parametrize("name", EXAMPLES)
def test_quantization_does_something_and_little(name):
    model, plan, params, qstate, inputs = prepared(name)
    exact = model(*inputs)
    loose = {n: s / 0.8 for n, s in qstate.items()}
    y = fq.fake_quant(model, plan)(params, loose, *inputs)
    assert not torch.equal(y, exact)
    assert ((y - exact).norm() / exact.norm()).item() < 0.05  # 8 bits, a few layers


@pytest.mark.parametrize("name", EXAMPLES)
def test_observing_leaves_the_output_as_it_is(name):
    model, plan, params, _, inputs = prepared(name)
    y, _ = fq.observe(model, plan)(params, fq.init_stats(plan), *inputs)
    # Attention and recurrence are written out, so sums may be in another order.
    torch.testing.assert_close(y, model(*inputs), rtol=0, atol=ATOL)


def snapshot(model):
    return {
        path: (
            {k: id(v) for k, v in vars(module).items()},
            {
                n: (id(p), p._version, p.detach().clone())
                for n, p in module._parameters.items()
                if p is not None
            },
            {
                n: (id(b), b._version, b.clone())
                for n, b in module._buffers.items()
                if b is not None
            },
            len(module._forward_hooks) + len(module._forward_pre_hooks),
        )
        for path, module in model.named_modules()
    }


def assert_same_snapshot(a, b):
    assert a.keys() == b.keys()
    for path in a:
        assert a[path][0] == b[path][0], path
        assert a[path][3] == b[path][3]
        for before, now in zip(a[path][1:3], b[path][1:3], strict=True):
            assert before.keys() == now.keys()
            for n in before:
                assert before[n][:2] == now[n][:2], n
                assert torch.equal(before[n][2], now[n][2])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
def test_nothing_is_written(name, train):
    model, inputs = EXAMPLES[name].model().train(train), EXAMPLES[name].inputs()
    before, rng = snapshot(model), torch.get_rng_state()
    params = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    versions = {n: p._version for n, p in params.items()}
    kept = copy.copy(params)
    plan = fq.make_plan(model, rules_for(name), inputs)
    empty = fq.init_stats(plan)
    stats = fq.calibrate_model(model, plan, params, [inputs], empty, progress=False)
    qstate = fq.finalize(plan, stats)
    forward = fq.fake_quant(model, plan)
    forward(params, qstate, *inputs).sum().backward()
    buffers = dict(model.named_buffers())
    torch.func.grad(lambda p: forward({**buffers, **p}, qstate, *inputs).sum())(
        {n: p.detach() for n, p in model.named_parameters()}
    )
    assert all(torch.equal(rng, now) for now in [torch.get_rng_state()])
    assert_same_snapshot(before, snapshot(model))
    assert params.keys() == kept.keys()
    assert all(params[n] is kept[n] for n in params)
    assert {n: p._version for n, p in params.items()} == versions
    assert list(empty) == list(stats)
    assert empty[next(iter(empty))].num_values == 0
    assert torch.overrides._get_current_function_mode_stack() == []


class Names(fq.planned_model.FakeQuantizing):
    """Writes down the sites that fake quantization meets."""

    met: ClassVar[list[str]] = []

    def operand(self, name, action, x):
        Names.met.append(name)
        return super().operand(name, action, x)


@pytest.mark.parametrize("name", EXAMPLES)
def test_sites_are_the_same_in_eager_export_and_compile_which_is_done_once(name, monkeypatch):
    model, plan, params, qstate, inputs = prepared(name)
    monkeypatch.setattr(fq.transforms, "FakeQuantizing", Names)
    forward = fq.fake_quant(model, plan)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    def met(call):
        Names.met.clear()
        torch._dynamo.reset()
        with torch.no_grad():  # where torch would take fused kernels
            return call(), list(Names.met)

    class Exported(torch.nn.Module):
        def forward(self, *xs):
            return forward(params, qstate, *xs)

    y, eager = met(lambda: forward(params, qstate, *inputs))
    assert set(eager) == set(plan.quantizers)
    compiled_forward = torch.compile(forward, fullgraph=True, backend=backend)
    z, compiled = met(lambda: compiled_forward(params, qstate, *inputs))
    # Nothing is compiled again where only values change.
    for factor in (1.1, 0.7):
        new = (
            {n: p * factor for n, p in params.items()},
            {n: s * factor for n, s in qstate.items()},
            *(x * factor for x in inputs),
        )
        Names.met.clear()  # as it was when it was compiled
        with torch.no_grad():
            actual, expected = compiled_forward(*new), forward(*new)
        torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)
    assert len(graphs) == 1
    program, exported = met(lambda: torch.export.export(Exported(), inputs, strict=False))
    assert eager == compiled == exported
    for actual in (z, program.module()(*inputs)):
        torch.testing.assert_close(actual, y, rtol=0, atol=ATOL)
    with warnings.catch_warnings():  # of bookkeeping that is back as it was at the end
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects")
        strict = torch.export.export(Exported(), inputs, strict=True)
    # Strict export undoes what Python code writes down; each site rounds once.
    rounded = [n for n in strict.graph.nodes if n.target is torch.ops.aten.round.default]
    assert len(rounded) == len(eager)
