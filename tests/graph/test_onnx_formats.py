"""Every format that ONNX has is exported exactly; what it has not is an error that names the site."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fquant as fq
from fquant.graph import format_to_text
from tests.graph.onnx_runtime import BATCH, Watched, compare, prepared

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("onnx_parsed_once")


def mixed(bits, **options):
    return fq.OpRule(weight=fq.QuantSpec(bits, axis=0), inputs=fq.QuantSpec(bits, **options))


FORMATS = {
    "int8": fq.w8a8(),
    "narrow": [fq.OpRule(weight=fq.QuantSpec(axis=0), inputs=fq.QuantSpec(narrow_range=True))],
    "int4": fq.w4a8(),
    **{f"int{b}": [mixed(b)] for b in (3, 7, 12, 16)},
    **{f"uint{b}": [mixed(b, unsigned=True)] for b in (4, 8, 11, 16)},
    **{
        name: [fq.OpRule(weight=getattr(fq, name), inputs=getattr(fq, name))]
        for name in ("E4M3", "E5M2", "E4M3FNUZ", "E5M2FNUZ")
    },
    "blocks": [fq.OpRule(weight=fq.QuantSpec(4, axis=(0, 1), block=(1, 4)))],
    "square blocks": [fq.OpRule(weight=fq.QuantSpec(7, axis=(0, 1), block=(2, 4)))],
    "activations in blocks": [fq.OpRule(inputs=fq.QuantSpec(5, axis=1, block=4))],
    "per channel": [fq.OpRule(inputs=fq.QuantSpec(5, axis=1))],
    "per token": fq.w8a8(dynamic=True),
    "whole, dynamic": [fq.OpRule(inputs=fq.Quantizer(fq.QuantSpec(), dynamic=True))],
}


STORED = ("int4", "int12", "E4M3", "E5M2FNUZ", "blocks")


class Parallel(nn.Module):
    """One layer per format, all with the same input."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 6) for _ in range(count))

    def forward(self, x):
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize(("weights", "names"), [("float", tuple(FORMATS)), ("integer", STORED)])
def test_every_format_that_onnx_has_is_exact(weights, names, tmp_path):
    rules = [
        dataclasses.replace(rule, path=rf"layers\.{i}")
        for i, name in enumerate(names)
        for rule in FORMATS[name]
    ]
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    case = prepared(Parallel(len(names)), (x,), rules)
    # Half the range: what is beyond saturates, at the ends of the format and not of the ONNX type.
    case = (*case[:3], {name: scale / 2 for name, scale in case[3].items()})
    x[0, :3] = torch.tensor([1e3, -1e3, 0.0])
    program = fq.export_qdq(*case, (x[:2],), dynamic_shapes=(BATCH,), weights=weights)
    fq.to_onnx(program, tmp_path / "model.onnx")
    share, outputs, expected = compare(program, tmp_path / "model.onnx", (x,))
    assert share == 1
    for name, y, z in zip(names, outputs, expected, strict=True):
        # Sums of 16 products of at most 1e3 * 1, in another order: 16 * 1e3 * 2^-24.
        assert np.allclose(y, z.numpy(), rtol=0, atol=1e-3), name
    if weights == "integer":
        types = {i.name: i.data_type for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
        kinds = [types[f"integers.layers_{i}_linear_0_weight"] for i in range(len(names))]
        assert [onnx.TensorProto.DataType.Name(kind) for kind in kinds] == [
            *("INT4", "INT16", "FLOAT8E4M3FN", "FLOAT8E5M2FNUZ", "INT4")
        ]
        assert not any("weight" in name and "params" in name for name in types)


def test_fp4_is_exact_in_the_reference_of_onnx(tmp_path):
    """In opset 23; ONNX Runtime 1.32 has no implementation of the type on the CPU."""
    reference = pytest.importorskip("onnx.reference")
    rules = [
        fq.OpRule(path=r"layers\.0", weight=fq.E2M1, inputs=fq.E2M1),
        fq.OpRule(path=r"layers\.1", weight=dataclasses.replace(fq.E2M1, axis=0)),
        fq.OpRule(
            path=r"layers\.2", weight=dataclasses.replace(fq.E2M1, axis=(0, 1), block=(1, 4))
        ),
        fq.OpRule(path=r"layers\.3", inputs=dataclasses.replace(fq.E2M1, axis=1)),
    ]
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    case = prepared(Parallel(4), (x,), rules)
    case = (*case[:3], {name: scale / 2 for name, scale in case[3].items()})
    x[0, :3] = torch.tensor([1e3, -1e3, 0.0])
    scale = case[3]["layers.0/linear#0.input"]
    x[1] = torch.arange(16) * scale / 4  # ties among them
    program = fq.export_qdq(*case, (x[:2],), dynamic_shapes=(BATCH,), weights="integer")
    fq.to_onnx(program, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert [o.version for o in model.opset_import if o.domain == ""] == [23]
    run = Watched(program)
    run.run(x)
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    names = {n.output[0]: n.metadata_props[0].value for n in nodes}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    evaluator = reference.ReferenceEvaluator(model)
    values = dict(
        zip(evaluator.output_names, evaluator.run(None, {"args_0": x.numpy()}), strict=True)
    )
    assert set(names.values()) == set(run.dequantized)
    for output, name in names.items():
        assert np.array_equal(values[output], run.dequantized[name].numpy()), name
        assert len(np.unique(values[output])) > 10
    stored = [onnx.TensorProto.DataType.Name(i.data_type) for i in model.graph.initializer]
    assert stored.count("FLOAT4E2M1") == 3


class Shifted(nn.Module):
    """The two nodes with zero points, and in bfloat16."""

    def forward(self, x):
        ops, grid = torch.ops.fquant, format_to_text(fq.QuantSpec(unsigned=True))
        narrow = format_to_text(fq.QuantSpec(7, unsigned=True))
        step, zero = torch.tensor([[0.5], [0.25]]), torch.tensor([[3], [200]], dtype=torch.int32)
        scalar = torch.tensor(0.5), torch.tensor(100, dtype=torch.int32)
        y = ops.quantize(x, step, zero, grid, "per channel")
        z = ops.quantize(x.bfloat16(), *scalar, narrow, "per tensor")
        return (
            ops.dequantize(y, step, zero, grid, torch.float32, "per channel"),
            ops.dequantize(z, *scalar, narrow, torch.bfloat16, "per tensor").float(),
        )


def test_zero_points_and_half_types(tmp_path):
    x = torch.linspace(-90.0, 90.0, 722).reshape(2, 361)
    program = torch.export.export(Shifted(), (x,))
    fq.to_onnx(program, tmp_path / "model.onnx")
    share, outputs, expected = compare(program, tmp_path / "model.onnx", (x,))
    assert share == 1
    for y, z in zip(outputs, expected, strict=True):
        assert np.array_equal(y, z.numpy())


def program_of(rules, dtype=torch.float32, **options):
    x = torch.randn(2, 4, dtype=dtype)
    return fq.export_qdq(*prepared(nn.Linear(4, 2).to(dtype), (x,), rules), (x,), **options)


UPWARD = [fq.OpRule(weight=fq.QuantSpec(rounding="ceil"))]


@pytest.mark.parametrize(
    ("rules", "dtype", "message"),
    [
        (
            [fq.OpRule(weight=fq.NF4)],
            torch.float32,
            "'linear#0.weight': to_onnx: a format must be one that ONNX",
        ),
        (
            [fq.OpRule(inputs=fq.E3M2)],
            torch.float32,
            "'linear#0.input': to_onnx: a format must be one that ONNX",
        ),
        (
            UPWARD,
            torch.float32,
            "'linear#0.weight': to_onnx: rounding must be half to even.*weights='integer'",
        ),
        (
            fq.w8a8(),
            torch.float64,
            "'linear#0.input': to_onnx: x must be of float32 or a half type",
        ),
    ],
)
def test_what_onnx_has_not_is_named(rules, dtype, message, tmp_path):
    with pytest.raises(ValueError, match=f"site {message}"):
        fq.to_onnx(program_of(rules, dtype), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_inputs_and_outputs_have_the_names_given(tmp_path):
    program, path = program_of(fq.w8a8()), tmp_path / "model.onnx"
    fq.to_onnx(program, path, input_names=["image"], output_names=["logits"])
    graph = onnx.load(path).graph
    assert [[v.name for v in values] for values in (graph.input, graph.output)] == [
        ["image"],
        ["logits"],
    ]
    x = torch.randn(2, 4)
    onnxruntime = pytest.importorskip("onnxruntime")
    (y,) = onnxruntime.InferenceSession(path).run(["logits"], {"image": x.numpy()})
    np.testing.assert_allclose(y, program.module()(x).numpy(), atol=1e-5)
    for names in ([], ["a", "b"]):
        with pytest.raises(ValueError, match=r"to_onnx: output_names must be 1 different names"):
            fq.to_onnx(program, path, output_names=names)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_onnx_the_extra_is_named(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"to_onnx needs {package}: pip install 'fquant\[onnx\]'"
    ):
        fq.to_onnx(program_of(fq.w8()), tmp_path / "model.onnx")


def test_weights_on_a_narrow_grid_are_clipped_only_where_they_reach_it(tmp_path):
    model, x = nn.Linear(8, 4), torch.randn(2, 8)
    *case, qstate = prepared(model, (x,), fq.w8())
    for factor in (1.0, 0.5):
        scales = {name: scale * factor for name, scale in qstate.items()}
        fq.to_onnx(fq.export_qdq(*case, scales, (x,)), tmp_path / "model.onnx")
        graph = onnx.load(tmp_path / "model.onnx").graph
        (node,) = [node for node in graph.node if node.op_type == "QuantizeLinear"]
        stored = {
            i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy())
            for i in graph.initializer
        }
        limit = 127 * scales["linear#0.weight"]
        assert torch.equal(stored[node.input[0]], model.weight.clamp(-limit, limit))
        assert torch.equal(stored[node.input[0]], model.weight) == (factor == 1)
