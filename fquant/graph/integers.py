"""`site_integers`: what a program computes at its quantizers, to compare programs site by site."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from fquant.graph.qdq_ops import is_quantize, quantization_of


def site_integers(
    program: ExportedProgram,
    *args: Any,
    given: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Returns `{quantizer: integers}` of one run of a Q/DQ program, or of one that `lower` returned.

    Both have the same integers at most sites. A quantizer that was merged with an equal one is absent
    from the lowered program, and so are weights; names are not saved with a lowered program. Further
    tensors of one quantizer, of a joined list or of a module called again, are `name[1]`, `name[2]`, ...

    Args:
        program: the program.
        args: its positional arguments.
        given: integers that go on in place of those seen, by quantizer. With the integers of another
            program each layer is compared by itself, and no difference is handed on.
        kwargs: its keyword arguments.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> params = {name: p.detach() for name, p in model.named_parameters()}
        >>> x = torch.tensor([[1.0, 0.5]])
        >>> plan = fquant.make_plan(model, fquant.w8a8(), (x,))
        >>> stats = fquant.calibrate_model(model, plan, params, [x], progress=False)
        >>> program = fquant.export_qdq(model, plan, params, fquant.finalize(plan, stats), (x,))
        >>> site_integers(program, x)["linear#0.input"]
        tensor([[127,  64]], dtype=torch.int8)
    """
    recorder = _Recorder(program.module(check_guards=False), given or {})
    with torch.no_grad():
        recorder.run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False)
    return recorder.seen


def label_quantizers(graph: fx.Graph) -> None:
    """Puts a name that no other node has into `meta["quantizer"]` of Q nodes that have none yet."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if is_quantize(node) and "quantizer" not in node.meta:
            name = quantization_of(node).name
            count = counts[name] = counts.get(name, -1) + 1
            node.meta["quantizer"] = f"{name}[{count}]" if count else name


class _Recorder(fx.Interpreter):
    def __init__(self, module: Any, given: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        label_quantizers(module.graph)
        self.given = given
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        name = n.meta.get("quantizer")
        if name:
            self.seen.setdefault(name, value)
            return self.given.get(name, value)
        return value
