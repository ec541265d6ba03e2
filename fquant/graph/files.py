"""`save_program`: a program in a file that holds what runs, and nothing else."""

import copy
import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from fquant.graph.editor import require_program
from fquant.serialization.atomic import replacing

# What torch notes down of where a node came from: paths of this machine, lines of code, older graphs.
_ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def save_program(program: ExportedProgram, path: str | Path) -> None:
    """Writes a program for `torch.export.load`, without pickle, atomically.

    `torch.export.save` also stores the example inputs, as a pickle with all the memory they are views
    of, and the origin of each node; a lowered network of 95 kB took 1 MB. Here both are left out, and
    the file is deflated. Nothing that runs is lost; AOTInductor asks for example inputs, so compile
    before saving or give them to `program.example_inputs` after loading.

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
        for name in whole.namelist():
            small.writestr(name, whole.read(name))


def _without_example_inputs(program: ExportedProgram) -> ExportedProgram:
    graph = copy.deepcopy(program.graph)
    for node, original in zip(graph.nodes, program.graph.nodes, strict=True):
        node.name = original.name  # the copy renames what is called as a builtin is: `input`
    module = fx.GraphModule(program.graph_module, graph)
    return ExportedProgram(
        module,
        module.graph,
        program.graph_signature,
        program.state_dict,
        program.range_constraints,
        program.module_call_graph,
        None,
        program.constants,
        verifiers=program.verifiers,
    )
