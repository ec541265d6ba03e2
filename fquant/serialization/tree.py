"""`save` and `load`: trees of tensors, records, observer states, plans and rules.

The document of a file mirrors the tree. A node is null, a boolean, number or string as it is, or

    {"tensor": name}                        a tensor of the file; with "dtype" and "shape", its bytes
    {"dict": {key: node}}  {"list": [node]}  {"tuple": [node]}
    {"record": class, "fields": {name: node}}    a record or NamedTuple
    {"recipe": data}                        a spec, quantizer, rule, plan or observer (fquant.recipes)
    {"dtype": name}                         a torch.dtype
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fquant.recipes import from_dict, to_dict
from fquant.serialization.container import (
    NATIVE_DTYPES,
    bytes_of,
    damaged,
    read_container,
    write_container,
)

FORMAT = "fquant.tree"
VERSION = 1


def save(path: str | Path, tree: Any) -> None:
    """Writes a tree to a file; `load` gives an equal one back, bit for bit.

    The file is safetensors with JSON in its metadata, and written atomically: the old file stays if
    anything fails. There is no pickle in it. Tensors are stored as values: one object in two places
    is stored once and comes back as one object; that a tensor is a Parameter, requires gradients or
    is on a GPU is not stored.

    Args:
        path: of the file; by habit it ends in .safetensors.
        tree: dicts with string or integer keys (an optimizer's state dict), lists and tuples of
            tensors of any dtype; QTensor, PackedTensor, SparseTensor and other records; observer states
            and other NamedTuples; plans, rules, specs and observers; numbers, strings, booleans, dtypes
            and None.

    Raises:
        TypeError: the tree holds anything else; the message says where.
        ValueError: a tensor has no values (meta) or is not dense.
        ImportError: safetensors is not installed (`pip install 'fquant[files]'`).

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> weight = fquant.quantize(torch.tensor([0.5, -1.0]), scale=torch.tensor(0.25))
        >>> fquant.save(path, {"params": {"weight": weight}, "rules": fquant.w8a8()})
        >>> loaded = fquant.load(path)
        >>> loaded["params"]["weight"].q, loaded["rules"] == fquant.w8a8()
        (tensor([ 2, -4], dtype=torch.int8), True)
    """
    encoder = _Encoder()
    document = encoder.encode(tree, "")
    write_container(path, FORMAT, VERSION, document, encoder.tensors)


def load(path: str | Path, *classes: type, device: torch.device | str = "cpu") -> Any:
    """Returns the tree that `save` wrote.

    Args:
        path: of the file.
        *classes: records, NamedTuples, specs or observers of your own in the tree; fquant's are known.
        device: where the tensors go, wherever they were when they were saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, truncated, not of `save`, or of a newer fquant, or it holds
            a class that is not known. Nothing is loaded then.
        ImportError: safetensors is not installed (`pip install 'fquant[files]'`).
    """
    document, tensors = read_container("load", path, FORMAT, VERSION)
    decoder = _Decoder(tensors, classes, torch.device(device))
    try:
        return decoder.decode(document)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise damaged("load", path, f"{type(error).__name__}: {error}") from error


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._nodes: dict[int, dict[str, Any]] = {}  # of tensors already seen

    def encode(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, Mapping):
            return self._dict(value, path)
        if isinstance(value, list) or type(value) in (tuple, torch.Size):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self._below(v, path, i) for i, v in enumerate(value)]}
        names = _field_names(value)
        if names is not None:
            fields = {name: self._below(getattr(value, name), path, name) for name in names}
            return {"record": type(value).__name__, "fields": fields}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {"recipe": to_dict(value)}
        raise TypeError(
            "save: tree must hold tensors, records, plans, rules, numbers, strings, dicts, lists and "
            f"tuples, got {type(value).__name__} at {path!r}."
        )

    def _below(self, value: Any, path: str, key: Any) -> Any:
        return self.encode(value, f"{path}/{key}" if path else str(key))

    def _dict(self, value: Mapping[Any, Any], path: str) -> dict[str, Any]:
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(
                    f"save: dicts must have strings or integers for keys, got {key!r} at {path!r}."
                )
        items = [[key, self._below(v, path, key)] for key, v in value.items()]
        if all(isinstance(key, str) for key in value):
            return {"dict": dict(items)}
        return {"items": items}  # keys of JSON objects are strings

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(
                f"save: tensors must be dense and have values, got {tensor.layout} on "
                f"{tensor.device} at {path!r}."
            )
        if id(tensor) not in self._nodes:
            name = path or "tensor"
            while name in self.tensors or name == "__metadata__":  # which safetensors keeps
                name += "~"
            node: dict[str, Any] = {"tensor": name}
            stored = tensor.detach().resolve_conj()
            if tensor.dtype not in NATIVE_DTYPES:
                node.update(dtype=str(tensor.dtype).removeprefix("torch."), shape=[*tensor.shape])
                stored = bytes_of(stored)
            self.tensors[name] = stored
            self._nodes[id(tensor)] = node
        return self._nodes[id(tensor)]


class _Decoder:
    def __init__(
        self, tensors: Mapping[str, Tensor], classes: tuple[type, ...], device: torch.device
    ) -> None:
        self.tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.classes = classes
        self.records = {cls.__name__: cls for cls in (*_public_classes(), *classes)}

    def decode(self, node: Any) -> Any:
        if not isinstance(node, dict):
            if isinstance(node, list):
                raise ValueError("a node must not be a list")
            return node
        match node:
            case {"tensor": name, "dtype": dtype, "shape": shape}:
                return self.tensors[name].view(_dtype(dtype)).reshape(shape)
            case {"tensor": name}:
                return self.tensors[name]
            case {"dict": items}:
                return {key: self.decode(item) for key, item in items.items()}
            case {"items": items}:
                return {key: self.decode(item) for key, item in items}
            case {"list": items}:
                return [self.decode(item) for item in items]
            case {"tuple": items}:
                return tuple(self.decode(item) for item in items)
            case {"record": name, "fields": fields}:
                return self._record(name, fields)
            case {"recipe": data}:
                return from_dict(data, *self.classes)
            case {"dtype": name}:
                return _dtype(name)
        raise ValueError(f"no kind of node has the keys {sorted(node)}")

    def _record(self, name: str, fields: Mapping[str, Any]) -> Any:
        if name not in self.records:
            raise ValueError(f"{name!r} is no known class; give it to load if it is yours")
        value = self.records[name](**{key: self.decode(item) for key, item in fields.items()})
        if _field_names(value) is None:
            raise ValueError(f"{name!r} is no record")
        return value


def _field_names(value: Any) -> tuple[str, ...] | None:
    """The fields of a record or NamedTuple; None for anything else."""
    if isinstance(value, tuple):
        return getattr(value, "_fields", None)
    if dataclasses.is_dataclass(value) and not pytree.tree_is_leaf(value):
        return tuple(field.name for field in dataclasses.fields(value))
    return None


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


def _public_classes() -> list[type]:
    import fquant
    from fquant import observers, sparse

    modules = (fquant, observers, sparse)
    public = [getattr(module, name) for module in modules for name in module.__all__]
    classes = [value for value in public if isinstance(value, type)]
    return [c for c in classes if dataclasses.is_dataclass(c) or hasattr(c, "_fields")]
