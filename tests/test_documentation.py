"""README's examples run, in order; the public names are the documented ones; inputs stay pure."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import fquant
import fquant.graph
import fquant.sparse
import fquant_kernels

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 5
    torch._dynamo.reset()
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["gradients"][0]["0.weight"].abs().sum() > 0
    assert isinstance(names["integers"]["0.weight"], fquant.QTensor)
    assert len(names["x"].coords) == 6


@pytest.mark.parametrize("module", [fquant, fquant.graph, fquant.sparse, fquant_kernels])
def test_all_is_what_is_public(module):
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    modules = {name for name in module.__all__ if inspect.ismodule(getattr(module, name))}
    assert public == set(module.__all__) - modules
    assert list(module.__all__) == sorted(module.__all__)


@pytest.mark.parametrize("module", [fquant, fquant.graph, fquant.sparse, fquant_kernels])
def test_public_names_are_documented(module):
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), name


@pytest.mark.parametrize("name", ["quantize", "fake_quantize", "tensor_quant", "calibrate"])
def test_main_functions_have_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(fquant, name))
