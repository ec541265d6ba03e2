"""Hypothesis profiles: `dev` (50 examples), `ci` (100, the same every run), `thorough` (2000); seeds."""

import functools
import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Inductor else compiles a program of its own, for seconds, to see whether the compiler knows the CPU.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Inductor else keeps processes of its own, each of which imports torch, for a few small programs.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# 8 % of the time of compiling models else goes into looking through what torch keeps for good.
gc.set_threshold(50_000, 20, 50)
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", max_examples=50, deadline=None, suppress_health_check=SLOW_IS_FINE)
settings.register_profile(
    "ci", max_examples=100, deadline=None, derandomize=True, suppress_health_check=SLOW_IS_FINE
)
settings.register_profile(
    "thorough", max_examples=2000, deadline=None, suppress_health_check=SLOW_IS_FINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded():
    """Every test sees the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def onnx_parsed_once():
    """`torch.onnx.export` parses the source of 497 functions of onnxscript at every call: here once."""
    from torch.onnx._internal import _lazy_import

    apis = getattr(
        _lazy_import, "onnxscript_apis", None
    )  # a private name: without it, all the same
    if apis is not None:
        functions = functools.cache(lambda: type(apis).__getattr__(apis, "get_torchlib_ops")())
        apis.get_torchlib_ops = lambda: list(functions())
