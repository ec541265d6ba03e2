"""`save_program`: a program in a file that holds what runs, and nothing else."""

import copy
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fquant.graph.editor import require_program
from fquant.serialization.atomic import replacing

# What torch notes down of where a node came from: paths of this machine, lines of code, older graphs.
_ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")

# Tensors share entries of the archive up to this size: an entry costs 136 bytes of names. What copies a
# loaded tensor's whole memory (AOTInductor does) then copies no more than this in excess.
_SHARED = 2**16
_ALIGNMENT = 64  # of tensors in an entry, torch's own for memory; the zeros between are deflated


def save_program(program: ExportedProgram, path: str | Path) -> None:
    """Writes a program for `torch.export.load`, without pickle, atomically.

    `torch.export.save` also stores the example inputs, as a pickle with all the memory they are views
    of, and the origin of each node; a lowered network of 95 kB took 1 MB. Here both are left out, small
    tensors share entries of the archive, and entries are deflated. Nothing that runs is lost;
    AOTInductor asks for example inputs, so compile before saving or give them to
    `program.example_inputs` after loading.

    Args:
        program: of `export_qdq` or `lower`; not written. Loading needs `import fquant`.
        path: of the file; by habit it ends in .pt2.

    Example:
        >>> import tempfile
        >>> program = torch.export.export(torch.nn.Linear(2, 1), (torch.ones(3, 2),))
        >>> path = tempfile.mkdtemp() + "/linear.pt2"
        >>> fquant.graph.save_program(program, path)
        >>> torch.equal(torch.export.load(path).module()(torch.ones(3, 2)),
        ...             program.module()(torch.ones(3, 2)))
        True
    """
    require_program("save_program", program)
    bare = _without_example_inputs(program)
    for node in bare.graph.nodes:
        for key in _ORIGINS:
            node.meta.pop(key, None)
    buffer = io.BytesIO()
    torch.export.save(bare, buffer)
    deflate: dict[str, Any] = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 9}
    with (
        zipfile.ZipFile(buffer) as whole,
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", **deflate) as small,
    ):
        entries = {name: whole.read(name) for name in whole.namelist()}
        _share_entries(entries, bare.state_dict)
        for name, data in entries.items():
            small.writestr(name, data)


def _share_entries(entries: dict[str, bytes], state: Mapping[str, Tensor]) -> None:
    """Puts tensors of one kind into common entries, small ones first, as views of one storage are."""
    (listing,) = (name for name in entries if name.endswith("/model_weights_config.json"))
    folder, config = listing.rpartition("/")[0], json.loads(entries[listing])
    stored: dict[str, list[str]] = {}  # names of the tensors in each entry
    for name, tensor in config["config"].items():
        path = f"{folder}/{tensor['path_name']}"
        if entries[path] and not tensor["use_pickle"]:
            stored.setdefault(path, []).append(name)
    shared: dict[str, bytearray] = {}
    filling: dict[str, str] = {}
    for path in sorted(stored, key=lambda path: len(entries[path])):
        data, meta = entries.pop(path), config["config"][stored[path][0]]["tensor_meta"]
        kind = json.dumps([meta[field] for field in ("dtype", "device", "requires_grad")])
        if kind not in filling or len(shared[filling[kind]]) + len(data) > _SHARED:
            filling[kind], shared[path] = path, bytearray()
        home = shared[filling[kind]]
        home.extend(bytes(-len(home) % _ALIGNMENT))
        for name in stored[path]:
            tensor = config["config"][name]
            tensor["path_name"] = filling[kind].rpartition("/")[2]
            offset = tensor["tensor_meta"]["storage_offset"]
            offset["as_int"] += len(home) // state[name].element_size()
        home.extend(data)
    entries.update((path, bytes(data)) for path, data in shared.items())
    entries[listing] = json.dumps(config, separators=(",", ":")).encode()


def _without_example_inputs(program: ExportedProgram) -> ExportedProgram:
    graph = copy.deepcopy(program.graph)
    for node, original in zip(graph.nodes, program.graph.nodes, strict=True):
        node.name = original.name  # the copy renames what is called as a builtin is: `input`
    module = fx.GraphModule(program.graph_module, graph)
    return ExportedProgram(
        module,
        module.graph,
        program.graph_signature,
        _apart(program.state_dict),
        program.range_constraints,
        program.module_call_graph[:1],  # the program's own; the others name modules that are gone
        None,
        program.constants,
        verifiers=program.verifiers,
    )


def _apart(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns tensors that are parts of larger memory as copies; those of a loaded program are."""
    copies: dict[Any, Any] = {}
    found = dict(state)
    for name, tensor in state.items():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous()
        if not plain or tensor.untyped_storage().nbytes() == tensor.nbytes:
            continue
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape)
        if key not in copies:  # tied tensors stay tied
            copies[key] = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copies[key] = nn.Parameter(copies[key], tensor.requires_grad)
        found[name] = copies[key]
    return found
