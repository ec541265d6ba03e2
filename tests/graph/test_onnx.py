"""ONNX Runtime gives the integers of the Q/DQ program at every QuantizeLinear."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import fquant as fq
from fquant.graph import is_quantize, quantization_of
from fquant.graph.onnx.qdq import QUANTIZER
from fquant.testing.models import EXAMPLES

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BATCH = ({0: torch.export.Dim("batch")},)
SUMS = fq.OpRule(ops=("add",), inputs=fq.QuantSpec(), output=fq.QuantSpec())


def prepared(model, inputs, rules):
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, rules, inputs)
    stats = fq.calibrate_model(model, plan, params, [inputs], progress=False)
    return model, plan, params, fq.finalize(plan, stats)


class Watched(torch.fx.Interpreter):
    """Runs a program and keeps what every Q node gives."""

    def __init__(self, program):
        super().__init__(program.module(check_guards=False))
        self.integers = {}

    def run_node(self, node):
        value = super().run_node(node)
        if is_quantize(node):
            self.integers.setdefault(quantization_of(node).name, []).append(value.numpy())
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
            if kind not in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8):  # not to be had in numpy
                output = output + "_as_int"
                to = onnx.TensorProto.FLOAT if "FLOAT" in onnx.TensorProto.DataType.Name(kind) else 6
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
    values = dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))
    outputs = [values[o.name] for o in onnx.load(path).graph.output]
    return outputs, {name: [values[o] for o in found] for name, found in names.items()}


def compare(program, path, inputs):
    """Share of equal integers over all quantizers; none more than one step apart."""
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
            gaps = [np.abs(ours.astype(int) - a.astype(int)) for a in theirs if a.shape == ours.shape]
            gap = min(gaps, key=np.sum)
            assert gap.max(initial=0) <= 1
            total, equal = total + gap.size, equal + (gap == 0).sum()
    return equal / total, outputs, expected


@pytest.mark.parametrize("weights", ["float", "integer"])
@pytest.mark.parametrize("name", ["residual", "encoder", "recurrent"])
def test_integers_of_the_zoo(name, weights, tmp_path):
    model = EXAMPLES[name].model().float()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, *EXAMPLES[name].inputs()[0].shape[1:], generator=g)
    case = prepared(model, (x,), [SUMS, *fq.w8a8()])
    program = fq.export_qdq(*case, (x[:2],), dynamic_shapes=(BATCH,), weights=weights)
    fq.to_onnx(program, tmp_path / "model.onnx")
    for count in (1, 64):
        share, (y,), expected = compare(program, tmp_path / "model.onnx", (x[:count],))
        print(name, weights, count, share)
        assert share >= 0.999
        assert np.abs(y - expected.numpy()).max() < 0.05
