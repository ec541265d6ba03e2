"""The ONNX domain "fquant", version 1: two operators for sparse layers, and pooling by standard ones.

    y = ImplicitGemm(features, weight, neighbors, bias)

        features   (N, Cin) float        weight  (Cout, K, Cin) float      bias  (Cout,) float
        neighbors  (K, M) int32, the row of features that output m reads at tap k, -1 for none
        y[m, o] = bias[o] + sum of features[neighbors[k, m]] . weight[o, k] over the k that are there

    neighbors = IndexMap(in_coords, out_coords)

        in_coords, out_coords   (N, 1 + D) and (M, 1 + D) int32 or int64 rows (batch, x_0, ...)
        spatial_shape, kernel_size, stride, padding, dilation     ints, one per axis: the input grid, ...
        offsets                 ints, D for each of the K taps in row-major order: k * dilation - padding
        neighbors[k, m] = the row of in_coords that is out_coords[m] * stride + offsets[k], or -1

Both are in the file as functions of standard operators, so every ONNX runtime can run it; one that knows
the domain puts its own kernels in their place. The functions are definitions, not fast: IndexMap holds
a dense grid, ImplicitGemm gathers all taps.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fquant.optional import require_package

DOMAIN, VERSION = "fquant", 1


_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
_INTEGERS = ["tensor(int32)", "tensor(int64)"]
_TYPES = {  # of inputs, and of the output last
    "ImplicitGemm": {
        **dict.fromkeys(("features", "weight"), _FLOATS),
        **{"neighbors": _INTEGERS, "bias": _FLOATS, "y": _FLOATS},
    },
    "IndexMap": {
        **dict.fromkeys(("in_coords", "out_coords"), _INTEGERS),
        "neighbors": ["tensor(int32)"],
    },
}
_GEOMETRY = ("spatial_shape", "kernel_size", "stride", "padding", "dilation", "offsets")


def _schema(name: str) -> Any:
    """The signature of an operator, which onnxscript asks for."""
    defs = require_package("onnx", "fquant.to_onnx", "onnx").defs
    *inputs, output = (defs.OpSchema.FormalParameter(n, f"T_{n}") for n in _TYPES[name])
    ints = defs.OpSchema.AttrType.INTS
    return defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=inputs,
        outputs=[output],
        type_constraints=[(f"T_{n}", types, "") for n, types in _TYPES[name].items()],
        attributes=[defs.OpSchema.Attribute(n, ints, "") for n in _GEOMETRY if name == "IndexMap"],
    )


def define_sparse_operators(model: Any) -> None:
    """Gives a model of `onnx_ir` the definitions of those operators of the domain that it has."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    from_proto = require_package("onnx_ir", "fquant.to_onnx", "onnx").from_proto
    for function in _definitions():
        if function.name in used:
            definition = from_proto(function.to_function_proto())
            model.functions[definition.identifier()] = definition
            model.opset_imports[DOMAIN] = VERSION


def _definitions() -> list[Any]:
    onnxscript = require_package("onnxscript", "fquant.to_onnx", "onnx")
    op = onnxscript.opset21
    domain = onnxscript.values.Opset(DOMAIN, VERSION)

    @onnxscript.script(domain)
    def ImplicitGemm(features, weight, neighbors, bias):  # type: ignore[no-untyped-def]  # noqa: N802
        count = op.Shape(features, start=0, end=1)
        width = op.Shape(features, start=1, end=2)
        nothing = op.CastLike(
            op.ConstantOfShape(op.Concat(op.Constant(value_ints=[1]), width, axis=0)), features
        )
        absent = op.Less(neighbors, op.CastLike(op.Constant(value_int=0), neighbors))
        rows = op.Where(absent, op.CastLike(count, neighbors), neighbors)
        gathered = op.Gather(op.Concat(features, nothing, axis=0), rows, axis=0)
        return op.Add(op.Einsum(gathered, weight, equation="kmi,oki->mo"), bias)

    @onnxscript.script(domain)
    def IndexMap(  # type: ignore[no-untyped-def]  # noqa: N802
        in_coords,
        out_coords,
        spatial_shape: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        offsets: Sequence[int],
    ):
        zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
        cells_in, cells_out = op.Cast(in_coords, to=7), op.Cast(out_coords, to=7)  # INT64
        batches = op.Slice(op.Concat(cells_in, cells_out, axis=0), zero, one, one)
        last = op.ReduceMax(
            op.Concat(op.Reshape(batches, op.Constant(value_ints=[-1])), zero, axis=0)
        )
        shape = op.Concat(op.Add(last, one), op.Constant(value_ints=spatial_shape), axis=0)
        count = op.Squeeze(op.Shape(cells_in, start=0, end=1))
        rows = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
        empty = op.Expand(op.Constant(value_int=-1), shape)
        grid = op.ScatterND(empty, cells_in, rows)
        axes = op.Shape(op.Constant(value_ints=stride))
        taps = op.Reshape(
            op.Constant(value_ints=offsets), op.Concat(op.Constant(value_ints=[-1]), axes, axis=0)
        )
        shifts = op.Unsqueeze(op.Pad(taps, op.Constant(value_ints=[0, 1, 0, 0])), one)
        steps = op.Concat(one, op.Constant(value_ints=stride), axis=0)
        read = op.Add(op.Unsqueeze(op.Mul(cells_out, steps), zero), shifts)
        last_cell = op.Sub(shape, one)
        inside = op.And(op.GreaterOrEqual(read, zero), op.LessOrEqual(read, last_cell))
        found = op.GatherND(grid, op.Min(op.Max(read, zero), last_cell))
        whole = op.ReduceMin(op.Cast(inside, to=7), op.Constant(value_ints=[-1]), keepdims=0)
        neighbors = op.Where(op.Equal(whole, one), found, op.Constant(value_int=-1))
        return op.Cast(neighbors, to=6)  # INT32

    return [ImplicitGemm, IndexMap]


def sparse_translations() -> dict[Any, Callable[..., Any]]:
    """Returns the functions that emit sparse layers, for `torch.onnx.export`'s translation table."""
    onnxscript = require_package("onnxscript", "fquant.to_onnx", "onnx")
    op = onnxscript.opset21
    domain = onnxscript.values.Opset(DOMAIN, VERSION)
    implicit_gemm, index_map = (
        onnxscript.values.Op(domain, name, _schema(name)) for name in _TYPES
    )

    def emit_conv(features: Any, weight: Any, neighbors: Any, bias: Any = None) -> Any:
        if bias is None:
            bias = op.Constant(value_floats=[0.0] * weight.shape[0])
        return implicit_gemm(features, weight, neighbors, bias)

    def emit_max_pool(features: Any, neighbors: Any) -> Any:
        count, width = (op.Shape(features, start=a, end=a + 1) for a in (0, 1))
        row = op.Concat(op.Constant(value_ints=[1]), width, axis=0)
        lowest = op.Expand(op.Constant(value_float=float("-inf")), row)
        absent = op.Less(neighbors, op.CastLike(op.Constant(value_int=0), neighbors))
        rows = op.Where(absent, op.CastLike(count, neighbors), neighbors)
        gathered = op.Gather(op.Concat(features, lowest, axis=0), rows, axis=0)
        return op.ReduceMax(gathered, op.Constant(value_ints=[0]), keepdims=0)

    def emit_neighbors(
        in_coords: Any,
        out_coords: Any,
        spatial_shape: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Any:
        taps = itertools.product(*map(range, kernel_size))
        return index_map(
            in_coords,
            out_coords,
            spatial_shape=list(spatial_shape),
            kernel_size=list(kernel_size),
            stride=list(stride),
            padding=list(padding),
            dilation=list(dilation),
            offsets=[
                k * d - p for tap in taps for k, d, p in zip(tap, dilation, padding, strict=True)
            ],
        )

    ops = torch.ops.fquant
    return {
        ops.sparse_conv.default: emit_conv,
        ops.sparse_max_pool.default: emit_max_pool,
        ops.kernel_neighbors.default: emit_neighbors,
    }
