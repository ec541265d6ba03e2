"""The container of every file: safetensors, with these strings in its metadata.

    format      which kind of file this is
    version     of that format; readers refuse versions above theirs
    document    JSON
    sha256      of the three above and of every tensor's name, dtype, shape and bytes

Nothing in it is code, and nothing is loaded before the checksum has been found right.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fquant.optional import require_package
from fquant.serialization.atomic import replacing

# What every safetensors reader knows; tensors of other dtypes go as their bytes.
NATIVE_DTYPES = (
    torch.bool,
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


def write_container(
    path: str | Path, form: str, version: int, document: Any, tensors: Mapping[str, Tensor]
) -> None:
    """Writes a file, atomically; tensors are of `NATIVE_DTYPES` and may share memory.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: document holds what JSON does not.
    """
    safetensors = require_package("safetensors.torch", "fquant.save", "files")
    text = json.dumps(document)
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {
        "format": form,
        "version": str(version),
        "document": text,
        "sha256": _checksum(form, str(version), text, owned),
    }
    with replacing(path) as temporary:
        safetensors.save_file(owned, temporary, metadata)


def read_container(
    function: str, path: str | Path, form: str, version: int
) -> tuple[Any, dict[str, Tensor]]:
    """Returns (document, tensors on the CPU) of a file of `write_container`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, truncated, of another format or of a newer version.
        ImportError: safetensors is not installed.
    """
    package = require_package("safetensors", f"fquant.{function}", "files")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{function}: path must be a file, got {str(path)!r}.")
    try:
        with package.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            _require_format(function, path, form, version, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except package.SafetensorError as error:
        raise damaged(function, path, f"not a whole safetensors file, {error}") from error
    text = metadata["document"]
    if metadata["sha256"] != _checksum(form, metadata["version"], text, tensors):
        raise damaged(function, path, "the contents do not match their checksum")
    try:
        return json.loads(text), tensors
    except (ValueError, RecursionError) as error:
        raise damaged(function, path, f"its document is not JSON, {error}") from error


def bytes_of(tensor: Tensor) -> Tensor:
    """Returns the bytes of a dense tensor, uint8 of one axis."""
    if tensor.numel() == 0:  # torch cannot view these
        return torch.empty(0, dtype=torch.uint8)
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def damaged(function: str, path: str | Path, reason: str) -> ValueError:
    """Returns the error for a file that cannot be read."""
    return ValueError(
        f"{function}: {str(path)!r} must be a whole file, got a damaged one: {reason}."
    )


def _require_format(
    function: str, path: str | Path, form: str, version: int, metadata: Mapping[str, str]
) -> None:
    if metadata.get("format") != form:
        got = metadata.get("format", "a safetensors file of another program")
        raise ValueError(f"{function}: {str(path)!r} must be of format {form!r}, got {got!r}.")
    missing = {"version", "document", "sha256"} - metadata.keys()
    if missing or not metadata["version"].isdecimal():
        raise damaged(function, path, f"its metadata lacks {sorted(missing) or 'a version'}")
    if int(metadata["version"]) > version:
        raise ValueError(
            f"{function}: {str(path)!r} must be of format version {version} or older, got "
            f"{metadata['version']}: a newer fquant wrote it."
        )


def _checksum(form: str, version: str, text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([form, version, text]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(bytes_of(tensor).numpy().data)
    return digest.hexdigest()
