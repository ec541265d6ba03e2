"""`site_integers`: what a program computes at its quantizers, to compare programs site by site."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from fquant.graph.qdq_ops import is_quantize, quantization_of


def site_integers(program: ExportedProgram, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Returns `{quantizer: integers}` of one run of a Q/DQ program, or of one that `lower` returned.

    Both have the same integers at most sites. A quantizer that was merged with an equal one is absent
    from the lowered program, and so are weights; names are not saved with a lowered program.

    Args:
        program: the program.
        args: its positional arguments.
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
    recorder = _Recorder(program.module(check_guards=False))
    with torch.no_grad():
        recorder.run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False)
    return recorder.seen


class _Recorder(fx.Interpreter):
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        name = n.meta.get("quantizer")
        if name is None and is_quantize(n):
            name = quantization_of(n).name
        if name:
            self.seen.setdefault(name, value)
        return value
