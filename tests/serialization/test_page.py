"""The page about files: its code runs, its recipe has the keys that recipes have."""

import re
from pathlib import Path

import pytest
import torch

import fquant as fq
from fquant.commands.recipe import KEYS

for package in ("yaml", "safetensors", "onnx", "onnxscript"):
    pytest.importorskip(package)
PAGE = (Path(__file__).parents[2] / "docs" / "files.md").read_text()


def test_its_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(code, "files.md", "exec"), names)
    assert names["state"]["plan"] == names["plan"]
    assert {p.name for p in tmp_path.iterdir()} == {"net.safetensors", "net.onnx"}
    expected = fq.fake_quant(names["net"], names["plan"])(
        names["params"], names["qstate"], names["batches"][1]
    )
    assert torch.equal(names["program"].module()(names["batches"][1]), expected)


def test_its_recipe_has_known_keys():
    import yaml

    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    recipe = yaml.safe_load(text)
    assert recipe.keys() == set(KEYS[""])
    for key in ("calibration", "export", "outputs"):
        assert recipe[key].keys() <= set(KEYS[key])
    fq.rules_from_dicts(recipe["rules"][:1])
