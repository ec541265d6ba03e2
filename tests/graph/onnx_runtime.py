"""Runs programs here and their ONNX files in ONNX Runtime, and compares integers."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import fquant as fq
from fquant.graph import is_dequantize, is_quantize, quantization_of
from fquant.graph.onnx.qdq import QUANTIZER

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

DATA = Path(os.environ.get("FQUANT_DATA") or Path(__file__).parents[3] / "shared" / "data")
BATCH = ({0: torch.export.Dim("batch")},)
SUMS = fq.OpRule(ops=("add",), inputs=fq.QuantSpec(), output=fq.QuantSpec())


def prepared(model, inputs, rules):
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, rules, inputs)
    stats = fq.calibrate_model(model, plan, params, [inputs], progress=False)
    return model, plan, params, fq.finalize(plan, stats)


class Watched(torch.fx.Interpreter):
    """Runs a program and keeps what every Q and every DQ node gives."""

    def __init__(self, program):
        super().__init__(program.module(check_guards=False))
        self.integers = {}
        self.dequantized = {}

    def run_node(self, node):
        value = super().run_node(node)
        if is_quantize(node):
            at = quantization_of(node)
            levels = at.format.decode(value, torch.float64).numpy()  # of float8 codes, the values
            self.integers.setdefault(at.name, []).append(levels)
        elif is_dequantize(node):
            self.dequantized[quantization_of(node).name] = value
        return value


def quantized_by_onnxruntime(path, inputs):
    """(outputs, {quantizer: [integers]}) of a file, without optimizations of ONNX Runtime's."""
    model = onnx.load(path)
    names = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            (name,) = [p.value for p in node.metadata_props if p.key == QUANTIZER]
            output = node.output[0]
            kind = next(a.i for a in node.attribute if a.name == "output_dtype")
            if kind not in (
                onnx.TensorProto.INT8,
                onnx.TensorProto.UINT8,
            ):  # not to be had in numpy
                output = output + "_as_int"
                to = (
                    onnx.TensorProto.FLOAT if "FLOAT" in onnx.TensorProto.DataType.Name(kind) else 6
                )
                model.graph.node.append(
                    onnx.helper.make_node("Cast", node.output[:1], [output], to=to)
                )
            names.setdefault(name, []).append(output)
    for output in [o for outputs in names.values() for o in outputs]:
        model.graph.output.append(onnx.ValueInfoProto(name=output))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    values = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True)
    )
    outputs = [values[o.name] for o in onnx.load(path).graph.output]
    return outputs, {name: [values[o] for o in found] for name, found in names.items()}


def compare(program, path, inputs, most=1):
    """Share of equal integers over all quantizers; none more than `most` steps apart."""
    watched = Watched(program)
    expected = watched.run(*inputs)
    outputs, integers = quantized_by_onnxruntime(path, inputs)
    assert integers.keys() <= watched.integers.keys()
    everything = [a for arrays in integers.values() for a in arrays]
    total, equal = 0, 0
    for name, arrays in watched.integers.items():
        for ours in arrays:
            # Calls of a module share a name. A quantizer of the same tensor and scale as another's
            # is merged with it, and its name is gone.
            theirs = integers.get(name, everything)
            gaps = [np.abs(ours - a) for a in theirs if a.shape == ours.shape]
            gap = min(gaps, key=np.sum)
            assert gap.max(initial=0) <= most
            total, equal = total + gap.size, equal + (gap == 0).sum()
    return equal / total, outputs, expected
