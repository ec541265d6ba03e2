"""`fquant inspect FILE`: what a file holds, without running or unpickling anything in it.

Files of `fquant.save`, network cards and other safetensors files; programs of `torch.export.save`;
ONNX models. Each becomes tables of tensors, sites, scales and sizes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fquant.commands.program_archive import read_program_archive
from fquant.commands.table import print_table, size_text
from fquant.formats import grid_name
from fquant.graph import format_from_text, granularity_of
from fquant.optional import require_package
from fquant.recipes import from_dict
from fquant.serialization.container import read_container
from fquant.serialization.network_card import FORMAT as CARD
from fquant.serialization.network_card import load_network_card
from fquant.serialization.tree import FORMAT as TREE
from fquant.serialization.tree import VERSION

TENSOR_HEADER = ("name", "kind", "dtype", "shape", "size", "scale")


def inspect_file(path: Path) -> None:
    """Prints what a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or none of the kinds above.
        ImportError: a package that reads this kind of file is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"inspect: FILE must be a file, got {str(path)!r}.")
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(b"PK\x03\x04"):
        _program(path)
    elif len(start) == 9 and start[8:9] == b"{":
        _safetensors(path)
    elif path.suffix == ".onnx":
        _onnx(path)
    else:
        raise ValueError(
            f"inspect: {str(path)!r} must be a safetensors file, a program of torch.export.save or an "
            "ONNX model (.onnx)."
        )


def _safetensors(path: Path) -> None:
    package = require_package("safetensors", "fquant inspect", "files")
    try:
        with package.safe_open(path, framework="pt") as file:
            form = (file.metadata() or {}).get("format")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except package.SafetensorError as error:
        raise ValueError(f"inspect: {str(path)!r} must be a whole file, got {error}.") from error
    if form == CARD:
        _card(path)
    elif form == TREE:
        document, tensors = read_container("inspect", path, TREE, VERSION)
        plans = list(_rows_of_recipes(document, ""))
        rows = list(_rows_of_tree(document, tensors, ""))
        print_table(_title(path, "fquant.save", len(rows)), TENSOR_HEADER, rows)
        for name, recipe in plans:
            print(f"\n{name}\n{recipe}")
    else:
        rows = [_tensor_row(name, tensor) for name, tensor in tensors.items()]
        print_table(_title(path, "safetensors", len(rows)), TENSOR_HEADER, rows)


def _rows_of_tree(node: Any, tensors: dict[str, Tensor], path: str) -> Iterator[tuple[Any, ...]]:
    if not isinstance(node, dict):
        return
    if "tensor" in node:
        yield _tensor_row(path, tensors[node["tensor"]])
    fields = node.get("fields", {})
    codes = fields.get("q", fields.get("packed"))
    if node.get("record") in ("QTensor", "PackedTensor") and codes is not None:
        q = tensors[codes["tensor"]]
        kind = _grid_of(from_dict(fields["spec"]["recipe"]))
        scale = _range(tensors[fields["scale"]["tensor"]])
        yield (path, kind, _dtype(q), _shape(q), size_text(q.nbytes), scale)
        return
    children = fields or _entries(node)
    if not children:
        children = {str(i): v for i, v in enumerate(node.get("list") or node.get("tuple") or ())}
    for name, child in children.items():
        yield from _rows_of_tree(child, tensors, f"{path}/{name}" if path else name)


def _rows_of_recipes(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every plan."""
    if isinstance(node, dict) and "recipe" in node:
        if node["recipe"].get("kind") == "Plan":
            yield path, str(from_dict(node["recipe"]))
    elif isinstance(node, dict):
        for name, child in _entries(node).items():
            yield from _rows_of_recipes(child, f"{path}/{name}" if path else name)


def _entries(node: Any) -> dict[str, Any]:
    """The values of a dict, whose keys may be integers."""
    return {str(key): v for key, v in [*node.get("dict", {}).items(), *node.get("items", ())]}


def _card(path: Path) -> None:
    card = load_network_card(path)
    rows = []
    for layer in card.layers:
        weight = card.tensors.get(f"{layer.name}.weight")
        step = card.tensors.get(f"{layer.name}.output_scale")
        rows.append(
            (
                layer.name,
                layer.op + (" + residual" if layer.residual else "") + (" + relu" * layer.relu),
                ", ".join((*layer.inputs, *([layer.residual] if layer.residual else []))),
                layer.map or "",
                "" if weight is None else f"{_dtype(weight)} {_shape(weight)}",
                "" if step is None else f"{step.item():.4g}",
            )
        )
    header = ("layer", "op", "inputs", "map", "weight", "output scale")
    print_table(_title(path, "network card", len(rows)), header, rows)
    geometry = ("key", "op", "source", "kernel_size", "stride", "padding", "dilation")
    maps = [[getattr(one, name) or "" for name in geometry] for one in card.maps]
    print_table("maps", geometry, maps)


def _program(path: Path) -> None:
    archive = read_program_archive(path)
    rows = []
    for name, tensor in archive.tensors.items():
        value = tensor.value if "scale" in name else None
        scale = "" if value is None else _range(value)
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        rows.append((name, "tensor", tensor.dtype, shape, size_text(tensor.nbytes), scale))
    print_table(_title(path, "program", len(rows)), TENSOR_HEADER, rows)
    print_table("operations", ("name", "calls"), list(archive.operations.items()))
    sites: dict[str, tuple[Any, ...]] = {}
    for node in archive.quantizers:
        steps, values = node.scale
        kind = "DQ of stored integers" if node.stored and node.op == "dequantize" else "Q/DQ"
        step = "dynamic" if values is None else _range(values)
        grid = _grid_of(format_from_text(node.format))
        sites[node.name] = (node.name, kind, grid, granularity_of(steps, node.shape), step)
    print_table("quantizers", ("name", "nodes", "grid", "scale per", "scale"), list(sites.values()))


def _onnx(path: Path) -> None:
    onnx = require_package("onnx", "fquant inspect", "onnx")
    decode_error = require_package("google.protobuf.message", "fquant inspect", "onnx").DecodeError
    try:
        rows, sites = _onnx_rows(onnx, onnx.load(path).graph)
    except (decode_error, IndexError) as error:  # IndexError: a node lacks an input or output
        raise ValueError(f"inspect: {str(path)!r} must be an ONNX model, got {error}.") from error
    print_table(_title(path, "ONNX", len(rows)), TENSOR_HEADER, rows)
    print_table("quantizers", ("name", "nodes", "type", "scale per", "scale"), sites)


def _onnx_rows(onnx: Any, graph: Any) -> tuple[list[Any], list[Any]]:
    """Rows of initializers and of quantizers."""
    types = onnx.TensorProto.DataType
    rows = [
        (
            one.name,
            "initializer",
            types.Name(one.data_type).lower(),
            "x".join(map(str, one.dims)) or "scalar",
            size_text(len(one.raw_data)),
            "",
        )
        for one in graph.initializer
    ]
    names = {node.output[0]: node for node in graph.node}
    held = {one.name: one for one in graph.initializer}
    sites = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        attributes = {a.name: a.i for a in node.attribute}
        source = names.get(node.input[0])
        kinds = [a.i for a in source.attribute if a.name == "output_dtype"] if source else []
        kinds += [held[node.input[0]].data_type] if node.input[0] in held else []
        scale = held.get(node.input[1])
        step = (
            "dynamic" if scale is None else _range(torch.tensor(onnx.numpy_helper.to_array(scale)))
        )
        name = next(
            (p.value for p in node.metadata_props if p.key == "fquant.quantizer"), node.name
        )
        kind = types.Name(kinds[0]).lower() if kinds else ""
        layout = f"axis {attributes.get('axis', 1)}"
        if attributes.get("block_size"):
            layout = f"block of {attributes['block_size']} along {layout}"
        elif scale is not None and not scale.dims:
            layout = "tensor"
        sites.append((name, "Q/DQ" if source else "DQ of stored integers", kind, layout, step))
    return rows, sites


def _tensor_row(name: str, tensor: Tensor) -> tuple[Any, ...]:
    scale = _range(tensor) if "scale" in name or "qstate" in name else ""
    return (name, "tensor", _dtype(tensor), _shape(tensor), size_text(tensor.nbytes), scale)


def _title(path: Path, kind: str, count: int) -> str:
    return f"{path}: {kind}, {size_text(path.stat().st_size)}, {count} entries"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _range(scale: Tensor) -> str:
    if scale.numel() == 0:
        return ""
    low, high = scale.min().item(), scale.max().item()
    return f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}"


def _grid_of(spec: Any) -> str:
    return grid_name(spec) + " narrow" * getattr(spec, "narrow_range", False)
