"""The code on docs/migration.md runs, and the names it gives exist."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

import fquant as fq

PAGE = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()


def test_the_examples_run():
    first, *others = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(first, "migration.md", "exec"), names)
    assert names["y"].shape == (2, 4, 4, 4)
    assert [site.name for site in names["plan"].unquantized] == ["2/conv2d#0"]
    for block in others:
        exec(compile(block, "migration.md", "exec"), names)
    assert len(others) == 3

    def cast(x):
        return x.to(torch.float8_e4m3fn).float()

    y, layers = names["images"], (names["model"][0], names["model"][2])
    for layer in layers:
        y = F.conv2d(cast(y), cast(layer.weight), layer.bias).bfloat16().float()
        y = y.relu() if layer is layers[0] else y
    assert torch.equal(names["y"], y)  # scales of 1 make formats plain casts


def test_our_names_exist():
    rows = [row.split("|")[2] for row in PAGE.splitlines() if row.startswith("| ")][1:]
    called = {name for row in rows for name in re.findall(r"`(?:fq\.)?@?([A-Za-z_]+)\(", row)}
    assert len(called) >= 8
    called -= {"islice"}  # of itertools
    assert all(hasattr(fq, name) or hasattr(fq.sparse, name) for name in called), called
