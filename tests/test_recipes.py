"""Rules and plans as files."""

import builtins

import pytest
import torch
from torch import nn

import fquant as fq

RULES = [
    *fq.skip("head", nn.Embedding),
    fq.OpRule(
        "stem.*", (nn.Conv2d,), weight=fq.QuantSpec(4, axis=(0, 1), block=(1, 4)), share=False
    ),
    fq.OpRule(ops=("add",), inputs=fq.Quantizer(symmetric=False)),
    fq.OpRule(inputs=fq.Quantizer(fq.E4M3, observer=fq.MovingAverageObserver(0.5), learn=True)),
    *fq.fp8(),
]


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_rules_and_plans_survive_files(suffix, tmp_path):
    if suffix != "json":
        pytest.importorskip("yaml")
    path = tmp_path / f"recipe.{suffix}"
    fq.save_recipe(path, RULES)
    assert fq.load_recipe(path) == RULES
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plan = fq.make_plan(model, [*fq.skip("1"), *fq.w4a8(dynamic=True)], (torch.ones(1, 2),))
    fq.save_recipe(str(path), plan)
    assert fq.load_recipe(str(path)) == plan
    assert hash(fq.load_recipe(path)) == hash(plan)


def test_a_recipe_can_be_written_by_hand(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
        # the last layer stays in floating point
        - {kind: OpRule, path: head}
        - kind: OpRule
          weight: {kind: QuantSpec, num_bits: 4, narrow_range: true}
          inputs: {kind: Quantizer, per: token, dynamic: true}
        """
    )
    rules = fq.load_recipe(path)
    assert rules[0] == fq.OpRule("head")
    assert rules[1] == fq.w4a8(dynamic=True)[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "", r"path must end in .json, .yaml or .yml, got .*a.toml"),
        ("a.json", "{", r"a.json must hold a recipe: "),
        ("a.json", '[{"kind": "os"}]', r"kind must be the name of a known class, got 'os'"),
        ("a.json", '[{"kind": "OpRule", "wait": 1}]', r"OpRule must have fields .*got \['wait'\]"),
        ("a.json", '[{"kind": "OpRule", "path": "("}]', r"path must be a regular expression"),
        ("a.json", '[{"kind": "QuantSpec"}]', r"a.json must hold rules or a plan"),
        ("a.json", "3", r"a.json must hold rules or a plan"),
        ("a.yaml", "[a: {", r"a.yaml must hold a recipe: not YAML"),
        ("a.yaml", "- !!python/object/apply:os.getcwd []", r"a.yaml must hold a recipe: not YAML"),
    ],
)
def test_bad_files_are_named(name, text, message, tmp_path):
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        fq.load_recipe(path)


def test_yaml_without_its_package_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_yaml(name, *args, **kwargs):
        if name == "yaml":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_yaml)
    with pytest.raises(ImportError, match=r"pip install 'fquant\[yaml\]'"):
        fq.save_recipe(tmp_path / "a.yaml", RULES)
