"""ONNX Runtime gives the integers of the Q/DQ program at every QuantizeLinear."""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fquant as fq
import fquant_kernels
from fquant.graph import dynamic_rows, format_to_text, is_quantize, quantization_of
from fquant.graph.onnx.qdq import QUANTIZER
from fquant.testing.models import EXAMPLES

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
    """Runs a program and keeps what every Q node gives."""

    def __init__(self, program):
        super().__init__(program.module(check_guards=False))
        self.integers = {}

    def run_node(self, node):
        value = super().run_node(node)
        if is_quantize(node):
            at = quantization_of(node)
            levels = at.format.decode(value, torch.float64).numpy()  # of float8 codes, the values
            self.integers.setdefault(at.name, []).append(levels)
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
            gaps = [np.abs(ours - a) for a in theirs if a.shape == ours.shape]
            gap = min(gaps, key=np.sum)
            assert gap.max(initial=0) <= 1
            total, equal = total + gap.size, equal + (gap == 0).sum()
    return equal / total, outputs, expected


def real_inputs(name, count):
    """Patches of photographs or stretches of speech in a model's shape; noise without the data."""
    if not (DATA / "audio").is_dir():
        shape = EXAMPLES[name].inputs()[0].shape[1:]
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    if name == "residual":
        images = np.load(DATA / "fashion" / "fashion_open.npz")["test_x"][: 2 * count]
        patches = images[:, 10:15, 10:15].reshape(count, 2, 5, 5)
        return torch.from_numpy(patches.astype(np.float32) / 128 - 1)
    mel = np.load(DATA / "audio" / "mel_eval.npz")["mel"].reshape(-1, 160, 40)[:count]
    frames, bands = EXAMPLES[name].inputs()[0].shape[1:]
    chosen = np.log(mel.astype(np.float32) + 1e-6)[:, 20 : 20 + frames, 4 : 4 + bands]
    return torch.from_numpy(chosen.copy())


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("residual", "float"),
        ("residual", "integer"),
        ("encoder", "float"),
        ("recurrent", "integer"),
    ],
)
def test_integers_of_the_zoo(name, weights, tmp_path):
    model = EXAMPLES[name].model().float()
    x = real_inputs(name, 200)
    case = prepared(model, (x,), [SUMS, *fq.w8a8()])
    program = fq.export_qdq(*case, (x[:2],), dynamic_shapes=(BATCH,), weights=weights)
    fq.to_onnx(program, tmp_path / "model.onnx")
    for count in (1, 200):
        share, (y,), expected = compare(program, tmp_path / "model.onnx", (x[:count],))
        print(f"{name}, {count} inputs: {100 * share:.4f} % of integers equal")
        assert share >= 0.999
        assert np.abs(y - expected.numpy()).max() <= 0.1 * expected.abs().max()


def mixed(bits, **options):
    return fq.OpRule(weight=fq.QuantSpec(bits, axis=0), inputs=fq.QuantSpec(bits, **options))


FORMATS = {
    "int8": fq.w8a8(),
    "narrow": [fq.OpRule(weight=fq.QuantSpec(axis=0), inputs=fq.QuantSpec(narrow_range=True))],
    "int4": fq.w4a8(),
    **{f"int{b}": [mixed(b)] for b in (2, 3, 6, 7, 9, 12, 15, 16)},
    **{f"uint{b}": [mixed(b, unsigned=True)] for b in (2, 4, 7, 8, 11, 16)},
    **{
        name: [fq.OpRule(weight=getattr(fq, name), inputs=getattr(fq, name))]
        for name in ("E4M3", "E5M2", "E4M3FNUZ", "E5M2FNUZ")
    },
    "blocks": [fq.OpRule(weight=fq.QuantSpec(4, axis=(0, 1), block=(1, 4)))],
    "square blocks": [fq.OpRule(weight=fq.QuantSpec(7, axis=(0, 1), block=(2, 4)))],
    "blocks of rows": [fq.OpRule(weight=fq.QuantSpec(4, axis=1, block=4))],
    "per element": [fq.OpRule(weight=fq.QuantSpec(4, axis=(0, 1)))],
    "activations in blocks": [fq.OpRule(inputs=fq.QuantSpec(5, axis=1, block=4))],
    "per channel": [fq.OpRule(inputs=fq.QuantSpec(5, axis=1))],
    "per token": fq.w8a8(dynamic=True),
}


STORED = ("int4", "int2", "int12", "uint16", "E4M3", "E5M2FNUZ", "blocks")


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
            *("INT4", "INT4", "INT16", "INT16", "FLOAT8E4M3FN", "FLOAT8E5M2FNUZ", "INT4")
        ]
        assert not any("weight" in name and "params" in name for name in types)


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


class SparseNet(nn.Module):
    """A submanifold convolution whose map is built inside, a strided one, and a pool."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 3, 3, 2))
        self.second = nn.Parameter(torch.randn(3, 2, 2, 4))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x, down):
        neighbors = fquant_kernels.kernel_neighbors(
            x.coords, x.coords, x.spatial_shape, (3, 3), (1, 1), (2, 1), (2, 1)
        )
        subm = fq.sparse.KernelMap(
            neighbors, x.coords, x.coords, x.spatial_shape, x.spatial_shape, x.batch_size, (3, 3)
        )
        y = fq.sparse.subm_conv(x, self.first, kernel_map=subm).map(torch.relu)
        z = fq.sparse.sparse_conv(y, self.second, self.bias, kernel_map=down)
        return z.features, fq.sparse.max_pool(y, 2, kernel_map=down).features, neighbors


def scene(seed, density):
    g = torch.Generator().manual_seed(seed)
    cells = fq.sparse.SparseTensor.from_dense(
        (torch.rand(2, 1, 9, 8, generator=g) < density).float()
    )
    x = cells.with_features(torch.randn(len(cells.coords), 2, generator=g))
    return x, fq.sparse.conv_map(x, 2, 2)


def test_sparse_layers_are_two_operators_of_a_domain(tmp_path):
    torch.manual_seed(0)
    case = prepared(SparseNet(), scene(0, 0.5), fq.w8a8())
    args = scene(1, 0.4)
    program = fq.export_qdq(*case, args, dynamic_shapes=dynamic_rows(args), weights="integer")
    fq.to_onnx(program, tmp_path / "sparse.onnx")
    model = onnx.load(tmp_path / "sparse.onnx")
    ours = [(node.domain, node.op_type) for node in model.graph.node if node.domain]
    assert ours == [("fquant", "IndexMap"), ("fquant", "ImplicitGemm"), ("fquant", "ImplicitGemm")]
    for args in (scene(2, 0.3), scene(3, 0.9), scene(4, 0.0)):
        expected = fq.fake_quant(*case[:2])(*case[2:], *args)
        leaves = torch.utils._pytree.tree_leaves(args)
        (y, pooled, neighbors), _ = quantized_by_onnxruntime(tmp_path / "sparse.onnx", leaves)
        assert np.array_equal(neighbors, expected[2].numpy())
        # Float sums of up to 36 products in another order.
        assert np.allclose(pooled, expected[1].numpy(), atol=1e-4)
        assert np.allclose(y, expected[0].numpy(), atol=1e-4)
