"""The compiled CPU kernels: a C library beside this file, called through ctypes.

The library has one path per instruction set and asks the processor which of them run.
`FQUANT_CPU_ISA`, read at every call, forces one of `ISAS`. `FQUANT_LIBRARY_FOLDER`, read at import,
is a folder with another build of the library (for `make sanitize`).
"""

import ctypes
import functools
import os
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

import fquant_kernels

ISAS = ("scalar", "avx2", "avxvnni", "avx512vnni")
FORCE_ISA = "FQUANT_CPU_ISA"
FOLDER = "FQUANT_LIBRARY_FOLDER"
LIBRARY = "libfquant_kernels.so"

# Status codes of csrc/fquant_kernels.h.
INDEX_OUT_OF_RANGE, OUT_OF_MEMORY = 1, 2

_P, _N = c_void_p, c_int64
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "fquant_isa_available": (c_int, [c_int]),
    "fquant_best_isa": (c_int, []),
    "fquant_packed_bytes": (c_int64, [c_int, c_int, _N, _N, _N]),
    "fquant_pack_int8": (c_int, [c_int, _P, _N, _N, _N, _P]),
    "fquant_pack_float": (c_int, [c_int, _P, _N, _N, _N, _P]),
    "fquant_list_pairs": (c_int, [c_int, _P, _N, _N, _N, _P, _P, _P]),
    "fquant_conv_int8": (
        c_int,
        [c_int, _P, _N, _N, _P, _N, *[_P] * 4, _N, _N, *[_P] * 3, c_float, c_int, c_int, _P, _N],
    ),
    "fquant_conv_float": (c_int, [c_int, _P, _N, _N, _P, _N, _P, _N, _N, _P, _P, _N]),
    "fquant_kernel_neighbors": (
        c_int,
        [c_int, c_int, _P, _N, _P, _N, c_int, _P, _P, _P, _P, _P, _P, _N],
    ),
    "fquant_transpose_neighbors": (c_int, [_P, _N, _N, _N, _P, _N]),
    "fquant_output_keys": (
        _P,
        [c_int, _P, _N, c_int, _P, _P, _P, _P, _P, _P, c_int, POINTER(c_int64)],
    ),
    "fquant_take_coords": (None, [_P, c_int, c_int, _P, _P]),
    "fquant_abs_histogram": (c_int, [c_int, _P, _N, _N, _P, _N, _P, _N]),
    "fquant_peak": (c_int64, [c_int, c_int, _N, POINTER(c_int32)]),
}


def _paths() -> list[Path]:
    """Where the library may be: an editable install adds its folder to the package's path."""
    given = os.environ.get(FOLDER)
    folders = [given] if given else list(fquant_kernels.__path__)
    return [Path(folder) / LIBRARY for folder in folders]


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Returns the library, or why there is none."""
    found = [path for path in _paths() if path.exists()]
    if not found:
        return f"{LIBRARY} is not in {', '.join(str(path.parent) for path in _paths())}"
    try:
        loaded = ctypes.CDLL(str(found[0]))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"{found[0]} does not load: {error}"
    return loaded


def why_missing() -> str | None:
    """Returns why the compiled library cannot be used, or None where it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def why_unavailable() -> str | None:
    """Returns why CPU ops do not use the library, or None where they do.

    Where an instruction set is forced they always do, so that a missing library is an error then.
    """
    return None if os.environ.get(FORCE_ISA) else why_missing()


def library() -> ctypes.CDLL:
    """Returns the library.

    Raises:
        RuntimeError: there is none; the message says why.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(f"fquant_kernels: the compiled CPU kernels are missing: {loaded}.")
    return loaded


def available_isas() -> tuple[str, ...]:
    """Returns the instruction sets this processor runs, worst first; empty without the library."""
    return () if why_missing() is not None else _available(library())


@functools.cache  # asked twice per convolution: 8 us of 35
def _available(loaded: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(isa for i, isa in enumerate(ISAS) if loaded.fquant_isa_available(i))


def describe_isas() -> str:
    """Returns the best instruction set there is, which is used unless one is forced, and all others."""
    isas = available_isas()
    return f"{isas[-1]} (of {', '.join(isas)})" if isas else ""


def choose_isa(isa: str | None = None) -> int:
    """Returns the number of the instruction set to use.

    That is `isa`, else what `FQUANT_CPU_ISA` says, else the best one there is.

    Raises:
        ValueError: the name is none of `ISAS`.
        RuntimeError: the processor lacks it, or the library is missing.
    """
    where = f"fquant_kernels: {FORCE_ISA if isa is None else 'isa'} must be"
    wanted = os.environ.get(FORCE_ISA) if isa is None else isa
    if not wanted:
        return int(library().fquant_best_isa())
    if wanted not in ISAS:
        raise ValueError(f"{where} one of {', '.join(ISAS)}, got {wanted!r}.")
    if wanted not in available_isas():
        raise RuntimeError(
            f"{where} one this processor runs ({', '.join(available_isas())}), got {wanted!r}."
        )
    return ISAS.index(wanted)


def chosen_isa(isa: str | None = None) -> str:
    """Returns the name of the instruction set that `choose_isa` gives the number of."""
    return ISAS[choose_isa(isa)]


def pointer(tensor: Tensor | None) -> int | None:
    """Returns the address of a dense tensor's first element, or None for None."""
    return None if tensor is None else tensor.data_ptr()


def raise_for(status: int, function: str) -> None:
    """Raises what a status code of the library stands for; 0 is success."""
    if status == INDEX_OUT_OF_RANGE:
        raise IndexError(
            f"{function}: neighbors must be below the number of input rows, got a larger index."
        )
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"{function}: no memory for scratch buffers.")
    if status != 0:
        raise RuntimeError(f"{function}: the compiled kernel failed with status {status}.")


def measure_peak(isa: str | None = None, is_float: bool = False, rounds: int = 1 << 22) -> int:
    """Runs the path's multiply-accumulate instruction on registers; returns the operations done."""
    sink = ctypes.c_int32(0)
    done = library().fquant_peak(choose_isa(isa), is_float, rounds, ctypes.byref(sink))
    return int(done)


def num_threads() -> int:
    """Returns how many threads a kernel may use: torch's own setting."""
    return torch.get_num_threads()
