"""What tests of the compiled kernels need: that they are there, and a number of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fquant_kernels import native

needs_library = pytest.mark.skipif(
    native.why_missing() is not None, reason=f"no compiled kernels: {native.why_missing()}"
)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
