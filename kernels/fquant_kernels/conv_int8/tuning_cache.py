"""A persistent cache of measured launch parameters: one small JSON file per layer shape and GPU.

One file per key, written under another name and then renamed, so that processes that tune at the
same time can neither tear a file nor lose each other's results.
"""

import functools
import json
import os
import re
import tempfile
from pathlib import Path

import torch

FOLDER_VARIABLE = "FQUANT_TUNING_DIR"


def folder_from_environment() -> Path | None:
    """Returns the cache's folder, or None where the cache is off."""
    value = os.environ.get(FOLDER_VARIABLE)
    return Path(value) if value else None


def key(op: str, device: torch.device, **shape: int) -> str:
    """Returns the file name of a measurement: what the best parameters depend on."""
    import triton

    gpu = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device))
    sizes = "_".join(f"{name}{value}" for name, value in shape.items())
    return f"{op}_{gpu}_triton{triton.__version__}_{sizes}.json"


@functools.lru_cache(maxsize=1024)
def look_up(folder: Path, name: str) -> tuple[int, ...] | None:
    """Returns the stored parameters, or None; reads each file once per process.

    Raises:
        ValueError: the file is not one that `store` wrote.
    """
    if not (folder / name).is_file():
        return None
    text = (folder / name).read_text(encoding="utf-8")
    try:
        values = json.loads(text)["config"]
        valid = len(values) == 4 and all(type(value) is int and value > 0 for value in values)
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise ValueError(
            f"tuning cache: {folder / name} must hold four positive integers under 'config', got "
            f"{text[:80]!r}. Delete the file and tune again."
        )
    return tuple(values)


def store(folder: Path, name: str, config: tuple[int, ...], milliseconds: float) -> None:
    """Writes one measurement, in place of an older one."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"config": list(config), "milliseconds": milliseconds}
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=folder, prefix=f".{name}.", delete=False
    ) as file:
        json.dump(record, file)
    os.replace(file.name, folder / name)
    look_up.cache_clear()
