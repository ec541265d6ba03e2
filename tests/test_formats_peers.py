"""Formats against torch's dtypes, ml_dtypes and ONNX Runtime."""

import numpy as np
import pytest
import torch

import fquant as fq
from tests.format_cases import PRESETS, points_between

NAN, INF = float("nan"), float("inf")
TORCH_DTYPES = {
    "E4M3": torch.float8_e4m3fn,
    "E5M2": torch.float8_e5m2,
    "E4M3FNUZ": torch.float8_e4m3fnuz,
    "E5M2FNUZ": torch.float8_e5m2fnuz,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
}


ML_DTYPES = {
    "E4M3": "float8_e4m3fn",
    "E5M2": "float8_e5m2",
    "E4M3FNUZ": "float8_e4m3fnuz",
    "E5M2FNUZ": "float8_e5m2fnuz",
    "E2M3": "float6_e2m3fn",
    "E3M2": "float6_e3m2fn",
    "E2M1": "float4_e2m1fn",
    "E3M4": "float8_e3m4",
    "E4M3IEEE": "float8_e4m3",
    "E4M3B11FNUZ": "float8_e4m3b11fnuz",
}


WIDE = {**PRESETS, "FP16": fq.FP16, "BF16": fq.BF16}


def cast_cases(spec):
    x = points_between(spec.levels().unique())
    x = torch.cat([x, -x])
    return x[x.abs() <= spec.q_max]  # beyond, casts overflow where fquant saturates


@pytest.mark.parametrize(("name", "dtype"), TORCH_DTYPES.items())
def test_against_torch_casts(name, dtype):
    spec = WIDE[name]
    x = cast_cases(spec)
    assert torch.equal(spec.snap(x), x.to(dtype).float())
    if spec.num_bits == 8:
        assert torch.equal(spec.encode(spec.snap(x)), x.to(dtype).view(torch.uint8))
        codes = torch.arange(256, dtype=torch.uint8)
        theirs = codes.view(dtype).float()
        assert torch.equal(
            spec.decode(codes, torch.float32).nan_to_num(9e9), theirs.nan_to_num(9e9)
        )


@pytest.mark.peer
@pytest.mark.parametrize(("name", "dtype"), ML_DTYPES.items())
def test_against_ml_dtypes(name, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    spec = WIDE[name]
    x = cast_cases(spec)
    theirs = x.numpy().astype(getattr(ml_dtypes, dtype))
    assert np.array_equal(spec.snap(x).numpy(), theirs.astype(np.float32))
    assert np.array_equal(spec.encode(spec.snap(x)).numpy(), theirs.view(np.uint8))


@pytest.mark.peer
@pytest.mark.parametrize(
    ("spec", "onnx_type"),
    [
        (fq.E4M3, "FLOAT8E4M3FN"),
        (fq.E5M2, "FLOAT8E5M2"),
        (fq.E4M3FNUZ, "FLOAT8E4M3FNUZ"),
        (fq.QuantSpec(8), "INT8"),
        (fq.QuantSpec(8, unsigned=True), "UINT8"),
        (fq.QuantSpec(4), "INT4"),
        (fq.QuantSpec(4, unsigned=True), "UINT4"),
        (fq.QuantSpec(16), "INT16"),
    ],
)
def test_against_onnx_runtime(spec, onnx_type):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    helper, proto = onnx.helper, onnx.TensorProto
    scale = np.float32(0.37)
    x = np.concatenate([np.arange(-2000, 2000) / 8, np.random.default_rng(0).normal(0, 30, 4000)])
    x = (x.astype(np.float32) * scale).astype(np.float32)
    kind = getattr(proto, onnx_type)
    initializers = [
        helper.make_tensor("s", proto.FLOAT, [], [scale]),
        helper.make_tensor("z", kind, [], [0]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    sides = [helper.make_tensor_value_info(n, proto.FLOAT, [None]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "qdq", sides[:1], sides[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    theirs = session.run(None, {"x": x})[0]
    ours = fq.fake_quantize(torch.from_numpy(x), float(scale), spec=spec)
    assert np.array_equal(ours.numpy(), theirs)
