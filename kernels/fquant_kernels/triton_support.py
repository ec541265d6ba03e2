"""Whether the Triton kernels can run, and their registration without importing Triton."""

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fquant_kernels.library import register_backend

# Below, index loads are not pipelined (3.2), and int8 products do not compile (sm_75, up to 3.9).
MIN_TRITON = (3, 4)
MIN_CAPABILITY = (8, 0)
# For compute capability 10 and up, the assembler in Triton 3.6 (ptxas 12.9) contracts
# mul.rn.f32x2 and add.rn.f32x2 in spite of --fmad=false; the one in 3.9 (13.4) does not.
MIN_TRITON_BLACKWELL = (3, 9)

# For every launch: by default a product and a sum become one rounding, which no definition has.
COMPILE_OPTIONS = {"enable_fp_fusion": False}

_implementations: dict[str, Callable[..., Any]] = {}


def why_unavailable(device: torch.device | int | None = None) -> str | None:
    """Returns why the Triton kernels cannot run on a CUDA device, or None where they can.

    Args:
        device: a CUDA device; the current one when not given.
    """
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "the package triton is not installed"
    have = tuple(int(part) for part in version.split(".")[:2])
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs, this is an AMD build of torch"
    capability = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    if capability < MIN_CAPABILITY:
        return f"{name} has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    need = MIN_TRITON_BLACKWELL if capability[0] >= 10 else MIN_TRITON
    if have < need:
        return f"triton must be {need[0]}.{need[1]} or newer on {name}, got {version}"
    return None


@functools.cache
def _availability(index: int) -> str | None:
    reason = why_unavailable(index)
    if reason is not None:
        warnings.warn(
            f"fquant_kernels: the slow reference computes on cuda:{index}: {reason}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def register_triton(
    op: Any,
    check_args: Callable[..., None],
    module: str,
    reference: Callable[..., Any],
) -> None:
    """Runs the function of the op's name in `module` for CUDA tensors, imported at its first call.

    Where Triton cannot run, the reference does, and the first call for a device warns with the
    reason.
    """
    name = op.name().removeprefix("fquant::")

    def cuda(*args: Any, **kwargs: Any) -> Any:
        tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        if _availability(tensor.get_device()) is not None:
            return reference(*args, **kwargs)
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    _implementations[op.name()] = cuda
    register_backend(op, "cuda", check_args, cuda)


def triton_ops() -> dict[str, Callable[..., Any]]:
    """Returns the ops that have a Triton implementation, by name; touches no GPU."""
    return dict(_implementations)
