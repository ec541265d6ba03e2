"""torch's own Q/DQ nodes: the same graph for tools that know these, next to ties another integer."""

import torch
from torch import nn

import fquant as fq
from fquant.graph import is_dequantize, is_quantize, to_quantized_decomposed


def exported(rules, x):
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, rules, (x,))
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    return fq.export_qdq(model, plan, params, fq.finalize(plan, stats), (x,))


def test_nodes_are_torchs_and_values_agree():
    x = torch.randn(6, 3, 5)
    program = exported(fq.w8a8(), x)
    swapped = to_quantized_decomposed(program)
    assert not any(is_quantize(n) or is_dequantize(n) for n in swapped.graph.nodes)
    names = [n.name for n in swapped.graph.nodes]
    assert sum(n.startswith("quantize_per_channel") for n in names) == 2
    assert sum(n.startswith("quantize_per_tensor") for n in names) == 2
    assert torch.allclose(swapped.module()(x), program.module()(x), atol=1e-5)
    assert any(is_quantize(n) for n in program.graph.nodes)


def test_what_torch_has_no_node_for_stays():
    x = torch.randn(6, 3, 5)
    program = exported([fq.OpRule(weight=fq.E4M3, inputs=fq.QuantSpec(12))], x)
    swapped = to_quantized_decomposed(program)
    assert sum(is_quantize(n) for n in swapped.graph.nodes) == 4
    assert torch.equal(swapped.module()(x), program.module()(x))


def test_nodes_of_other_types_stay():
    x = torch.randn(3, 4, dtype=torch.float64)
    model = nn.Linear(4, 2).double()
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, fq.w8a8(), (x,))
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    program = fq.export_qdq(model, plan, params, fq.finalize(plan, stats), (x,))
    swapped = to_quantized_decomposed(program)
    assert sum(is_quantize(n) for n in swapped.graph.nodes) == 2
    assert torch.equal(swapped.module()(x), program.module()(x))


def test_ties_are_rounded_elsewhere_by_torch():
    step = torch.tensor(0.03)
    x = (torch.arange(-100, 100) + 0.5) * step
    theirs = torch.ops.quantized_decomposed.quantize_per_tensor(
        x, step.item(), 0, -128, 127, torch.int8
    )
    ours = fq.quantize(x, step).q
    assert (theirs.int() - ours.int()).abs().max() == 1
