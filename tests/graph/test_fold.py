"""Batch norms in the scales and biases of the layers before them."""

import pytest
import torch
from torch import nn

import fquant as fq
from fquant.graph import fold_norms, is_dequantize, quantization_of, site_integers
from fquant.graph.pattern import NORM
from tests.graph.programs import SITES, Layer, exported, scene
from tests.graph.test_lowering_sparse import SparseResidual


def norms(program):
    return [node for node in program.graph.nodes if node.target is NORM]


@pytest.mark.parametrize("weights", ["integer", "float"])
@pytest.mark.parametrize("bias", [True, False])
def test_values_are_those_of_the_batch_norm(weights, bias):
    x = torch.randn(2, 3, 6)
    layer = Layer(nn.Conv1d(3, 5, 3, bias=bias), "norm+relu", 1)  # gammas of both signs
    with torch.no_grad():
        layer.norm.weight[:2] = torch.tensor([-0.7, 0.0])
    program = exported(layer, (x,), [SITES, *fq.w8a8()], weights=weights)
    before = dict(program.state_dict)
    folded = fold_norms(program)
    assert len(norms(program)) == 1
    assert not norms(folded)
    # y / s_y is below 127 and summed over 9 products of at most as much: rounding apart, the same.
    assert (
        torch.allclose(folded.module()(x), program.module()(x), rtol=0, atol=1e-5)
        or (
            (site_integers(folded, x)["y#0.output"] - site_integers(program, x)["y#0.output"]).abs()
            <= 1
        ).all()
    )
    weight = next(n for n in folded.graph.nodes if is_dequantize(n) and "weight" in str(n.args[5]))
    scale = folded.state_dict["folded.conv_conv1d_0_weight.scale"]
    assert (scale >= 0).all()
    assert quantization_of(weight).scale.meta["val"].shape == scale.shape == (5, 1, 1)
    assert all(torch.equal(program.state_dict[name], tensor) for name, tensor in before.items())
    share = (fq.lower(folded).program.module()(x) == fq.lower(program).program.module()(x)).float()
    assert share.mean() > 0.99


def test_norms_of_a_sparse_network():
    args = scene(0, 0.5)
    program = exported(SparseResidual(), args, [SITES, *fq.w8a8()], weights="integer")
    folded = fold_norms(program)
    assert not norms(folded)
    y, expected = folded.module()(*args).features, program.module()(*args).features
    assert torch.allclose(y, expected, atol=1e-2 * expected.abs().max().item())


def test_what_cannot_be_folded_stays():
    x = torch.randn(4, 3)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    in_blocks = [fq.OpRule(weight=fq.QuantSpec(axis=(0, 1), block=(1, 3)))]
    assert not norms(fold_norms(exported(model, (x,), in_blocks)))  # a block as long as the axis
    per_input = [fq.OpRule(weight=fq.QuantSpec(axis=1), inputs=fq.QuantSpec())]
    unquantized = [fq.OpRule(inputs=fq.QuantSpec())]
    for rules in (per_input, unquantized):
        program = exported(model, (x,), rules)
        assert torch.equal(fold_norms(program).module()(x), program.module()(x))
        assert len(norms(fold_norms(program))) == 1
    with torch.no_grad():
        model[1].weight[0] = -1.0
        model[0].weight[0, 0] = -4.0
    params = {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()]}
    plan = fq.make_plan(model, [fq.OpRule(weight=fq.QuantSpec())], (x,))
    qstate = {"0/linear#0.weight": torch.tensor(0.01)}
    program = fq.export_qdq(model, plan, params, qstate, (x,), weights="integer")
    assert program.state_dict["integers.0_linear_0_weight"][0, 0] == -128  # has no opposite
    assert len(norms(fold_norms(program))) == 1
