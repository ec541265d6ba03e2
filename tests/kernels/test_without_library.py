"""Importing works where the compiled library is missing: the reference serves, and says so."""

import os
import subprocess
import sys

SCRIPT = """
import sys
from pathlib import Path

exists = Path.exists
Path.exists = lambda self: exists(self) and self.name != "libfquant_kernels.so"
import torch
import fquant_kernels
from fquant_kernels import native

assert native.available_isas() == ()
for backend in fquant_kernels.backends():
    assert backend.unavailable is None or backend.device == "cuda" or (
        "libfquant_kernels.so is not in" in backend.unavailable
    ), backend
coords = torch.tensor([[0, 3], [0, 4]])
print(fquant_kernels.kernel_neighbors(coords, coords, [8], [3], [1], [1], [1]).tolist())
"""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_reference_serves_where_the_library_is_missing() -> None:
    result = run(FQUANT_CPU_ISA="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[[-1, 0], [0, 1], [1, -1]]"


def test_a_forced_instruction_set_without_library_is_an_error() -> None:
    result = run(FQUANT_CPU_ISA="avx2")
    assert result.returncode != 0
    assert "the compiled CPU kernels are missing" in result.stderr
