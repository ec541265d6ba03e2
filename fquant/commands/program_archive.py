"""What a file of `torch.export.save` says of itself, read as the zip of JSON and bytes that it is.

`torch.export.load` may unpickle what is in a file, and runs code of the ops it finds; here nothing is.
"""

import json
import math
import struct
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The numbers that torch's format gives dtypes (torch/_export/serde/schema.py, ScalarType).
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}

# What reading a damaged zip, JSON that lies, or another program's zip raises.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError),
    *(KeyError, TypeError, ValueError, AttributeError, StopIteration, OSError),
)


class StoredTensor(NamedTuple):
    """A parameter, buffer or constant: what it is, and its values unless they are pickled."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    value: Tensor | None


class QuantizeNode(NamedTuple):
    """A Q or DQ node.

    Attributes:
        op: "quantize" or "dequantize".
        name: the quantizer.
        format: the grid, as text.
        scale: the shape of the step, and its values if it is stored; None if it is computed.
        shape: of what is quantized; -1 for sizes that vary.
        stored: whether what it reads is state of the program.
    """

    op: str
    name: str
    format: str
    scale: tuple[tuple[int, ...], Tensor | None]
    shape: tuple[int, ...]
    stored: bool


@dataclass(frozen=True)
class ProgramArchive:
    """The contents of a file.

    Attributes:
        tensors: by name.
        quantizers: the Q and DQ nodes, in order.
        operations: how often each op is called, by its name.
    """

    tensors: dict[str, StoredTensor]
    quantizers: list[QuantizeNode]
    operations: Counter[str]


def read_program_archive(path: Path) -> ProgramArchive:
    """Returns what is in a file of `torch.export.save`, without loading it.

    Raises:
        ValueError: it is damaged, or no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except _DAMAGE as error:
        raise ValueError(
            f"inspect: {str(path)!r} must be a program of torch.export.save, got "
            f"{type(error).__name__}: {error}."
        ) from error


def _read(archive: zipfile.ZipFile) -> ProgramArchive:
    model = next(n for n in archive.namelist() if n.endswith("models/model.json"))
    root = model.removesuffix("models/model.json")
    tensors: dict[str, StoredTensor] = {}
    for kind in ("weights", "constants"):
        config = json.loads(archive.read(f"{root}data/{kind}/model_{kind}_config.json"))["config"]
        for name, entry in config.items():
            meta = entry.get("tensor_meta")
            if meta is not None:
                file = f"{root}data/{kind}/{entry['path_name']}"
                tensors[name] = _tensor(meta, b"" if entry["use_pickle"] else archive.read(file))
    module = json.loads(archive.read(model))["graph_module"]
    graph, state = module["graph"], _state_names(module["signature"])
    shapes = {name: _shape(meta) for name, meta in graph["tensor_values"].items()}
    operations: Counter[str] = Counter()
    quantizers = []
    for node in graph["nodes"]:
        operations[node["target"].removeprefix("torch.ops.")] += 1
        op = node["target"].removeprefix("torch.ops.fquant.").removesuffix(".default")
        if op in ("quantize", "dequantize"):
            given = {one["name"]: one["arg"] for one in node["inputs"]}
            x, scale = (
                given[n]["as_tensor"]["name"] for n in ("x" if op == "quantize" else "q", "scale")
            )
            held = tensors.get(state.get(scale, ""))
            quantizers.append(
                QuantizeNode(
                    op,
                    given["name"]["as_string"],
                    given["format"]["as_string"],
                    (shapes[scale], None if held is None else held.value),
                    shapes[x],
                    x in state,
                )
            )
    return ProgramArchive(tensors, quantizers, operations)


def _state_names(signature: Any) -> dict[str, str]:
    """{placeholder: name in the program's state}."""
    found = {}
    for spec in signature["input_specs"]:
        for entry in spec.values():
            for key in ("buffer_name", "parameter_name", "tensor_constant_name"):
                if isinstance(entry, dict) and entry.get(key):
                    found[entry["arg"]["name"]] = entry[key]
    return found


def _tensor(meta: Any, data: bytes) -> StoredTensor:
    shape, dtype = _shape(meta), _DTYPES.get(meta["dtype"])
    count = math.prod(shape)
    if dtype is None:
        return StoredTensor(f"dtype {meta['dtype']}", shape, len(data), None)
    text, nbytes = str(dtype).removeprefix("torch."), count * dtype.itemsize
    if not data or count == 0:
        return StoredTensor(text, shape, nbytes, None)
    strides, offset = _ints(meta["strides"]), meta["storage_offset"]["as_int"]
    value = torch.frombuffer(bytearray(data), dtype=dtype).as_strided(shape, strides, offset)
    return StoredTensor(text, shape, nbytes, value)


def _shape(meta: Any) -> tuple[int, ...]:
    return _ints(meta["sizes"])


def _ints(sizes: Any) -> tuple[int, ...]:
    return tuple(size.get("as_int", -1) for size in sizes)
