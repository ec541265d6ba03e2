"""Parameter trees and the rules that choose their grids."""

import warnings

import pytest
import torch
from torch.func import functional_call

import fquant as fq

MODEL = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
GENERATOR = torch.Generator().manual_seed(0)
PARAMS = {n: torch.randn(p.shape, generator=GENERATOR) for n, p in MODEL.named_parameters()}
RULES = [
    fq.Rule(r"2\..*", fq.QuantSpec(num_bits=4)),
    fq.Rule(r".*\.weight", fq.QuantSpec(axis=0)),
]


def test_first_matching_rule_decides():
    specs = fq.assign_specs(PARAMS, RULES)
    assert specs == {
        "0.weight": fq.QuantSpec(axis=0),
        "2.weight": fq.QuantSpec(num_bits=4),
        "2.bias": fq.QuantSpec(num_bits=4),
    }
    skipped = fq.assign_specs(PARAMS, [fq.Rule(r"2\..*", None), *RULES[1:]])
    assert list(skipped) == ["0.weight"]


def test_unused_rules_are_reported():
    with pytest.warns(fq.UnusedRuleWarning, match="nowhere"):
        fq.assign_specs(PARAMS, [*RULES, fq.Rule("nowhere.*", None)])
    with pytest.warns(fq.UnusedRuleWarning):  # shadowed by an earlier rule
        fq.assign_specs(PARAMS, [fq.Rule(".*", None), *RULES])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fq.assign_specs(PARAMS, RULES)


def test_rules_match_whole_names():
    with pytest.warns(fq.UnusedRuleWarning):
        assert fq.assign_specs(["conv1.weight"], [fq.Rule("conv1", fq.QuantSpec())]) == {}


def test_fake_is_dequantize_of_quantize():
    specs = fq.assign_specs(PARAMS, RULES)
    fake = fq.fake_quant_params(PARAMS, specs)
    records = fq.quantize_params(PARAMS, specs)
    assert isinstance(records["0.weight"], fq.QTensor)
    assert records["0.weight"].scale.shape == (4, 1)
    for name, value in fq.dequantize_params(records).items():
        assert torch.equal(value, fake[name])
    assert fake["0.bias"] is PARAMS["0.bias"]
    assert not torch.equal(fake["0.weight"], PARAMS["0.weight"])


def test_given_scales_are_used_and_trained():
    specs = fq.assign_specs(PARAMS, RULES)
    frozen = {name: scale * 2 for name, scale in fq.param_scales(PARAMS, specs).items()}
    fake = fq.fake_quant_params(PARAMS, specs, frozen)
    levels = fake["0.weight"] / frozen["0.weight"]
    assert torch.allclose(levels, levels.round(), atol=1e-5)
    tight = {name: scale / 2 for name, scale in frozen.items()}
    x = torch.eye(3)

    def loss(params, scales):
        return functional_call(MODEL, fq.fake_quant_params(params, specs, scales), (x,)).sum()

    gradients = torch.func.grad(loss, argnums=(0, 1))(PARAMS, {n: s / 2 for n, s in tight.items()})
    assert gradients[1]["0.weight"].abs().sum() > 0


def test_pure():
    before = {n: p.clone() for n, p in PARAMS.items()}
    versions = [p._version for p in PARAMS.values()]
    specs = fq.assign_specs(PARAMS, RULES)
    fq.fake_quant_params(PARAMS, specs)
    fq.quantize_params(PARAMS, specs)
    assert list(PARAMS) == list(before)
    assert all(torch.equal(PARAMS[n], before[n]) for n in before)
    assert [p._version for p in PARAMS.values()] == versions


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fq.Rule("(", None), ValueError, r"path must be a regular expression, got '\('"),
        (lambda: fq.Rule(".*", 8), TypeError, "spec must be a QuantSpec or None, got 8"),
        (
            lambda: fq.fake_quant_params(PARAMS, {"gone": fq.QuantSpec()}),
            ValueError,
            r"specs must name parameters of params, got \['gone'\]",
        ),
        (
            lambda: fq.quantize_params(PARAMS, {"0.bias": fq.QuantSpec()}, {}),
            ValueError,
            r"scales must have every name in specs, lacks \['0.bias'\]",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
