"""The table of operations: torch's, in every spelling that eager, Dynamo or export hands over."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fquant.interception.attention import multi_head_attention
from fquant.interception.operation import Arguments, Axis, Layout, Op, Slot, op_of
from fquant.interception.recurrent import RECURRENT_OPS, gru, gru_cell, lstm, lstm_cell


@dataclass(frozen=True, repr=False)
class Ops:
    """Which functions are operations, and which modules have their forward written out.

    Attributes:
        table: `{function: Op}`.
        forwards: `{module class: forward(module, *args, **kwargs)}`, run in place of the class's own.
        composites: operations that a forward opens by itself, of which rules must know the names.
    """

    table: Mapping[Any, Op]
    forwards: Mapping[type[nn.Module], Callable[..., Any]]
    composites: tuple[Op, ...] = ()

    def __repr__(self) -> str:  # short, for the signatures that `help` shows
        return f"<table of {len(self.names)} operations>"

    @property
    def names(self) -> frozenset[str]:
        """The names of the operations in the table, and of the composites."""
        return frozenset(op.name for op in (*self.table.values(), *self.composites))


def register_op(
    ops: Ops,
    function: Callable[..., Any],
    inputs: Sequence[int | str] = (0,),
    weight: int | str | None = None,
    axis: Axis = 0,
    name: str | None = None,
    opt_in: bool = False,
) -> Ops:
    """Returns a table with one more function that torch sees: its own or an op of `torch.ops`.

    There is no registry: pass the table on, as `make_plan(..., ops=table)` and to the transforms.

    Args:
        ops: the table to extend, such as `DEFAULT_OPS`.
        function: `torch.something`, `Tensor.something`, `torch.ops.namespace.name` (its overloads too).
        inputs: which arguments are activations, by position, or by name where there is a signature.
        weight: which one is a weight.
        axis: the weight's axis of output channels, or a function of `(args, kwargs)` to a `Layout`.
        name: the operation's name in sites and rules; the function's own unless given.
        opt_in: whether only rules that name the operation apply to it.

    Example:
        >>> ops = fquant.register_op(fquant.DEFAULT_OPS, torch.cumsum)
        >>> "cumsum" in ops.names, "cumsum" in fquant.DEFAULT_OPS.names
        (True, False)
    """
    op = op_of(function, name or function.__name__, inputs, weight, axis, opt_in)
    spellings = [function]
    if isinstance(function, torch._ops.OpOverloadPacket):
        spellings += [getattr(function, overload) for overload in function.overloads()]
    return replace(ops, table={**ops.table, **dict.fromkeys(spellings, op)})


def replace_forward(ops: Ops, module: type[nn.Module], forward: Callable[..., Any]) -> Ops:
    """Returns a table in which modules of a class run `forward(module, *args, **kwargs)` instead.

    For a whole block that is to be quantized in another form, say with its batch norm folded or with
    marks at its joints. The module is the same one, parameters and all, and is not written.

    Example:
        >>> def clipped(module, x):
        ...     return fquant.site("clipped", x.clamp(0, 6))
        >>> ops = fquant.replace_forward(fquant.DEFAULT_OPS, torch.nn.ReLU, clipped)
        >>> rules = [fquant.OpRule(ops=("site",), output=fquant.QuantSpec())]
        >>> fquant.make_plan(torch.nn.ReLU(), rules, (torch.ones(2),), ops=ops).sites[0].name
        'clipped#0'
    """
    return replace(ops, forwards={**ops.forwards, module: forward})


def _layer(name: str, channels: int, axis: Axis = 0, keyword: str = "input") -> Op:
    """An operation (input, weight, ...) whose input has its channels on an axis."""
    slots = (
        Slot("input", "inputs", 0, keyword, channels),
        Slot("weight", "weight", 1, "weight", axis),
    )
    return Op(name, slots)


def _inputs(name: str, *keywords: str, **options: Any) -> Op:
    roles = ["input"] if len(keywords) == 1 else [f"input{i}" for i in range(len(keywords))]
    slots = [
        Slot(r, "inputs", i, k, -1) for i, (r, k) in enumerate(zip(roles, keywords, strict=True))
    ]
    return Op(name, tuple(slots), **options)


def _transposed_layout(call: Arguments) -> Layout:
    """The weight is (in, out / groups, ...): output channels are (group, channel of the group)."""
    args, kwargs = call
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    return Layout(1) if groups == 1 else Layout((0, 2), groups)


def _einsum_slots(count: int) -> tuple[Slot, ...]:
    return tuple(Slot(f"input{i}", "inputs", i + 1, None, -1) for i in range(count))


def _matrix_product(name: str, first: str, second: str, start: int = 0, **options: Any) -> Op:
    slots = (
        Slot("input0", "inputs", start, first, -2),
        Slot("input1", "inputs", start + 1, second, -1),
    )
    return Op(name, slots, **options)


def _table() -> dict[Any, Op]:
    home: Any
    table: dict[Any, Op] = {F.linear: _layer("linear", -1)}
    for axes in (1, 2, 3):
        table[getattr(torch, f"conv{axes}d")] = _layer(f"conv{axes}d", -axes - 1)
        table[getattr(torch, f"conv_transpose{axes}d")] = _layer(
            f"conv_transpose{axes}d", -axes - 1, _transposed_layout
        )
        for kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool"):
            pool = _inputs(f"{kind}{axes}d", "input", opt_in=True)
            for home in (F, torch):
                if hasattr(home, pool.name):
                    table[getattr(home, pool.name)] = pool
    table[torch.bilinear] = Op(
        "bilinear",
        (
            Slot("input0", "inputs", 0, "input1", -1),
            Slot("input1", "inputs", 1, "input2", -1),
            Slot("weight", "weight", 2, "weight", 0),
        ),
    )
    for kind in ("embedding", "embedding_bag"):
        table[getattr(F, kind)] = Op(kind, (Slot("weight", "weight", 1, "weight", 0),))
    for name, second in (("matmul", "other"), ("bmm", "mat2"), ("mm", "mat2")):
        for home in (torch, Tensor):
            table[getattr(home, name)] = _matrix_product(name, "input", second)
    for method in (Tensor.__matmul__, Tensor.__rmatmul__, operator.matmul):
        table[method] = table[torch.matmul]
    table[Tensor.__rmatmul__] = Op("matmul", table[torch.matmul].slots[::-1])
    for home in (torch, Tensor):
        table[home.addmm] = _matrix_product("addmm", "mat1", "mat2", 1)
        table[home.baddbmm] = _matrix_product("baddbmm", "batch1", "batch2", 1)
    table[torch.einsum] = Op("einsum", _einsum_slots(8))
    table[F.scaled_dot_product_attention] = _inputs(
        "scaled_dot_product_attention", "query", "key", "value"
    )
    for name, second in (("add", "other"), ("sub", "other"), ("mul", "other"), ("div", "other")):
        shapes = {"same_shape": name in ("add", "sub"), "both_tensors": True, "opt_in": True}
        op = _inputs(name, "input", second, **shapes)
        for function in (getattr(torch, name), getattr(Tensor, name)):
            table[function] = op
        dunder = "truediv" if name == "div" else name
        table[getattr(operator, dunder)] = table[getattr(Tensor, f"__{dunder}__")] = op
        writing = replace(op, functional=getattr(torch, name))
        table[getattr(operator, f"i{dunder}")] = writing
        table[getattr(Tensor, f"{name}_")] = table[getattr(Tensor, f"__i{dunder}__")] = writing
    for function in (torch.cat, torch.concat, torch.concatenate):
        table[function] = _inputs("cat", "tensors", opt_in=True)
    for name in ("layer_norm", "instance_norm", "group_norm", "batch_norm", "rms_norm"):
        norm = _inputs(name, "input", opt_in=True)
        table[getattr(F, name)] = norm
        if name == "rms_norm":
            table[torch.rms_norm] = norm
    for function in (F.softmax, torch.softmax, Tensor.softmax):
        table[function] = _inputs("softmax", "input", opt_in=True)
    table[F.interpolate] = _inputs("interpolate", "input", opt_in=True)
    return table


DEFAULT_OPS = Ops(
    _table(),
    {
        nn.LSTM: lstm,
        nn.GRU: gru,
        nn.LSTMCell: lstm_cell,
        nn.GRUCell: gru_cell,
        nn.MultiheadAttention: multi_head_attention,
    },
    (*RECURRENT_OPS, Op("site", ())),
)
