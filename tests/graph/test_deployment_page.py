"""The page on deployment: its code runs, in order."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    exec(compile(blocks[0], PAGE.name, "exec"), names)
    assert names["report"].layers[0].kernel == "conv_int8"
    assert torch.equal(names["y"], names["lowered"].module()(names["x"]))
    exec(compile(blocks[1], PAGE.name, "exec"), names)
    assert "4/linear#0.input" in names["report"].kept
