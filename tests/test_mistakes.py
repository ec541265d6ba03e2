"""What a user of models and programs may get wrong: refused, or reported, with the way out."""

import inspect
import re

import pytest
import torch
from torch import nn

import fquant as fq

MODEL = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
X = torch.randn(8, 4)
PARAMS = MODEL.state_dict()
PLAN = fq.make_plan(MODEL, fq.w8a8(), (X,))
QSTATE = fq.finalize(PLAN, fq.calibrate_model(MODEL, PLAN, PARAMS, [X], progress=False))
W4 = fq.QuantSpec(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fq.make_plan(MODEL, fq.w8a8, (X,)), r"make_plan: rules must be a list of OpRules"),
        (lambda: fq.make_plan(MODEL, "w8a8", (X,)), r"make_plan: rules .*w8a8\(\) .*got 'w8a8'"),
        (lambda: fq.make_plan(MODEL, fq.w8a8()[0], (X,)), r"make_plan: rules must be a list"),
        (lambda: fq.make_plan(MODEL, [fq.Rule(".*", W4)], (X,)), r"rules .* got Rule\("),
        (lambda: fq.assign_specs(PARAMS, fq.w8a8()), r"assign_specs: rules .*OpRules are for make"),
        (
            lambda: fq.fake_quant_params(PARAMS, fq.w8a8()),
            r"fake_quant_params: specs must be a dict .*assign_specs\(params, rules\), got list",
        ),
        (lambda: fq.Quantizer(8), r"Quantizer: spec must be a QuantSpec, .*got 8"),
        (lambda: fq.Quantizer(observer="mse"), r"Quantizer: observer .*Observer\(method='mse'\)"),
        (lambda: fq.fake_quant(MODEL, fq.w8a8()), r"fake_quant: plan must be a Plan, .*got list"),
        (lambda: fq.observe(MODEL, None), r"observe: plan must be a Plan, .*got NoneType"),
        (lambda: fq.finalize({}, PLAN), r"finalize: plan must be a Plan, .*got dict"),
        (
            lambda: fq.fake_quant(MODEL, PLAN)(MODEL, QSTATE, X),
            r"fake_quant: params must be a dict .*state_dict\(\), got Sequential",
        ),
        (
            lambda: fq.fake_quant(MODEL, PLAN)(PARAMS, X),
            r"fake_quant: qstate must be a dict by quantizer, got Tensor",
        ),
        *(
            (
                lambda call=call: call(MODEL),
                rf"{name}: program must be an ExportedProgram, from export",
            )
            for name, call in {
                "lower": fq.lower,
                "prepack": fq.prepack,
                "to_onnx": lambda program: fq.to_onnx(program, "no.onnx"),
                "fold_norms": fq.graph.fold_norms,
                "save_program": lambda program: fq.graph.save_program(program, "no.pt2"),
                "to_quantized_decomposed": fq.graph.to_quantized_decomposed,
            }.items()
        ),
    ],
)
def test_another_kind_of_thing_is_a_type_error(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_calibrating_with_no_data_names_the_site_and_the_cause():
    batches = iter([X])
    fq.calibrate_model(MODEL, PLAN, PARAMS, batches, progress=False)
    stats = fq.calibrate_model(MODEL, PLAN, PARAMS, batches, progress=False)
    with pytest.raises(ValueError, match=r"site '0/linear#0.input': .*No batch reached it"):
        fq.finalize(PLAN, stats)


def test_what_a_model_raises_in_calibration_has_a_note_on_the_batch():
    with pytest.raises(TypeError) as raised:
        fq.calibrate_model(MODEL, PLAN, PARAMS, [X, [X, X]], progress=False)
    (note,) = raised.value.__notes__
    assert re.search(r"batch 1 is a list of 2\. .*\(batch\[0\] for batch in loader\)", note)
    with pytest.raises(RuntimeError) as raised:
        fq.calibrate_model(MODEL, PLAN, PARAMS, [torch.ones(8, 3)], progress=False)
    assert "batch 0 is a tensor of shape (8, 3)." in raised.value.__notes__[0]


def test_a_trained_scale_needs_a_rate_of_its_own():
    """At the rate for amax a step of SGD overshoots 127^2 times; at rate / 127^2 it is amax's step."""
    learn = fq.Quantizer(fq.QuantSpec(8), learn=True)
    plan = fq.make_plan(MODEL, [fq.OpRule(inputs=learn)], (X,))
    scales = fq.finalize(plan, fq.calibrate_model(MODEL, plan, PARAMS, [X / 2], progress=False))
    forward, rate, name = fq.fake_quant(MODEL, plan), 0.05, "0/linear#0.input"

    def loss(scale):
        return -forward(PARAMS, {**scales, name: scale}, X).square().sum()

    amax = scales[name] * 127
    by_amax = amax - rate * torch.func.grad(lambda a: loss(a / 127))(amax)
    by_step = scales[name] - rate / 127**2 * torch.func.grad(loss)(scales[name])
    torch.testing.assert_close(by_step * 127, by_amax)
    assert by_amax != amax
    with pytest.raises(ValueError, match=r"site '0/linear#0.input': .*positive") as raised:
        forward(PARAMS, {**scales, name: scales[name] - 0.05}, X)
    assert "lower learning rate" in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (fq.OpRule("head"), r"rules\[0\] decided no site: no operation is at a path that matches "
                            r"'head', but at \['0', '2'\]\."),
        (fq.OpRule(types=("Conv2d",)), r"no operation is in a module of types \('Conv2d',\)"),
        (fq.OpRule(ops=("matmul",)), r"meets path '\.\*', types \(\) and ops \('matmul',\) at once"),
    ],
)  # fmt: skip
def test_a_rule_that_decided_nothing_says_why(rule, why):
    with pytest.warns(fq.UnusedRuleWarning, match=why):
        fq.make_plan(MODEL, [rule, *fq.w8a8()], (X,))


def test_a_rule_behind_others_says_so():
    with pytest.warns(fq.UnusedRuleWarning, match=r"rules\[1\] .*: rules before it took what it"):
        fq.make_plan(MODEL, [*fq.w8a8(), fq.OpRule("2")], (X,))


def test_names_like_an_unknown_operation_are_given():
    with pytest.raises(ValueError, match=r"got \['Linear'\]\. Names like it: .*linear"):
        fq.make_plan(MODEL, [fq.OpRule(ops=("Linear",))], (X,))


def test_blocks_and_axes_are_checked_with_the_plan():
    for quantizer, message in (
        (fq.Quantizer(fq.QuantSpec(4, block=3), "channel"), r"block must divide axis 0 of size 4"),
        (fq.Quantizer(fq.QuantSpec(4, axis=2), "axis"), r"axis must name different axes"),
    ):
        with pytest.raises(ValueError, match=r"site '0/linear#0.weight': make_plan: " + message):
            fq.make_plan(MODEL, [fq.OpRule(weight=quantizer)], (X,))


def test_a_view_of_a_sparse_tensor_is_refused_with_the_way_out():
    values = X.to_sparse(1).values()
    with pytest.raises(ValueError, match=r"make_plan: arguments must be .*clone\(\) it"):
        fq.make_plan(MODEL, fq.w8a8(), (values,))
    assert fq.make_plan(MODEL, fq.w8a8(), (values.clone(),)) == PLAN


def test_recipes_are_named_when_they_are_no_text(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_bytes(b"\xd8\x00")
    with pytest.raises(ValueError, match=r"load_recipe: .*recipe\.json must hold a recipe"):
        fq.load_recipe(path)
    with pytest.raises(ValueError, match=r"load_recipe: path must end in \.json"):
        fq.load_recipe(tmp_path / "not_there.safetensors")


def test_help_shows_signatures_without_whole_tables():
    for function in (fq.make_plan, fq.calibrate_model, fq.fake_quant, fq.export_qdq, fq.lower):
        assert len(str(inspect.signature(function))) < 1500, function.__name__


def test_sparse_modules_say_where_another_kind_of_tensor_comes_from():
    block = nn.Sequential(fq.sparse.nn.SubMConv1d(1, 1, 3))  # no SparseModule
    x = fq.sparse.SparseTensor.from_dense(torch.ones(1, 1, 3))
    with pytest.raises(
        TypeError, match=r"got Tensor\. A SparseSequential hands features to modules"
    ):
        fq.sparse.nn.SparseSequential(block)(x)
    other = type("SparseConvTensor", (), {})()
    with pytest.raises(TypeError, match=r"got SparseConvTensor\..* from_spconv\(x\)"):
        block(other)
