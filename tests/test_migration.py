"""The code on docs/migration.md runs, and the names it gives exist."""

import re
from pathlib import Path

import fquant as fq

PAGE = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()


def test_the_example_runs():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(block, "migration.md", "exec"), names)
    assert names["y"].shape == (2, 4, 4, 4)
    assert [site.name for site in names["plan"].unquantized] == ["2/conv2d#0"]


def test_our_names_exist():
    rows = [row.split("|")[2] for row in PAGE.splitlines() if row.startswith("| ")][1:]
    called = {name for row in rows for name in re.findall(r"`(?:fq\.)?@?([A-Za-z_]+)\(", row)}
    assert len(called) >= 8
    assert all(hasattr(fq, name) for name in called), called
