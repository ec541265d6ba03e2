"""The Triton kernels, interpreted on CPU tensors, give the reference's bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# 1,000 and more: FQUANT_TRITON_CASES=1000 python -m pytest tests/kernels/test_triton_interpreter.py
CASES = int(os.environ.get("FQUANT_TRITON_CASES", "30"))


CHECKS = ["conv_int8", "kernel_map", "conv_half"]


def test_interpreted_kernels_equal_the_reference() -> None:
    path = [str(ROOT), str(ROOT / "kernels"), *sys.path]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreter_run", str(CASES), *CHECKS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for check in CHECKS:
        assert f"{check}: {CASES} cases" in done.stdout
