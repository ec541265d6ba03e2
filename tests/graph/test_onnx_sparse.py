"""Sparse layers in ONNX: two operators of a domain, defined in the file."""

import numpy as np
import pytest
import torch
from torch import nn

import fquant as fq
import fquant_kernels
from fquant.graph import dynamic_rows
from tests.graph.onnx_runtime import Watched, prepared, quantized_by_onnxruntime

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx.reference")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("onnx_parsed_once")


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


@pytest.fixture(scope="module")
def exported(tmp_path_factory, onnx_parsed_once):
    """(model, plan, params and scales; program; file)."""
    torch.manual_seed(0)
    case = prepared(SparseNet(), scene(0, 0.5), fq.w8a8())
    args = scene(1, 0.4)
    program = fq.export_qdq(*case, args, dynamic_shapes=dynamic_rows(args), weights="integer")
    path = tmp_path_factory.mktemp("sparse") / "sparse.onnx"
    fq.to_onnx(program, path)
    return case, program, path


def test_sparse_layers_are_two_operators_of_a_domain(exported):
    case, program, path = exported
    model = onnx.load(path)
    ours = [(node.domain, node.op_type) for node in model.graph.node if node.domain]
    assert ours == [("fquant", "IndexMap"), ("fquant", "ImplicitGemm"), ("fquant", "ImplicitGemm")]
    integers = set()
    for args in (scene(2, 0.3), scene(3, 0.9), scene(4, 0.0)):
        expected = fq.fake_quant(*case[:2])(*case[2:], *args)
        leaves = torch.utils._pytree.tree_leaves(args)
        watched = Watched(program)
        watched.run(*leaves, enable_io_processing=False)
        (y, pooled, neighbors), found = quantized_by_onnxruntime(path, leaves)
        for name, (theirs,) in found.items():  # weights are stored, the others are quantized here
            assert np.array_equal(theirs, watched.integers[name][0]), name
        integers |= set(found)
        assert np.array_equal(neighbors, expected[2].numpy())
        # Float sums of up to 36 products in another order.
        assert np.allclose(pooled, expected[1].numpy(), atol=1e-4)
        assert np.allclose(y, expected[0].numpy(), atol=1e-4)
    assert integers == {"subm_conv#0.input", "sparse_conv#0.input"}


def test_the_functions_of_the_file_are_run_by_the_reference_of_onnx(exported):
    """Another implementation of the standard operators, from the definitions in the file."""
    _, program, path = exported
    args = scene(1, 0.4)
    model = onnx.load(path)
    assert {f.name for f in model.functions} == {"IndexMap", "ImplicitGemm"}
    watched = Watched(program)
    leaves = torch.utils._pytree.tree_leaves(args)
    watched.run(*leaves, enable_io_processing=False)
    names = {
        n.output[0]: n.metadata_props[0].value for n in model.graph.node if "Quantize" in n.op_type
    }
    quantized = [n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in quantized)
    reference = onnx.reference.ReferenceEvaluator(model)
    feed = {i.name: x.numpy() for i, x in zip(model.graph.input, leaves, strict=True)}
    values = dict(zip(reference.output_names, reference.run(None, feed), strict=True))
    for output in quantized:
        assert np.array_equal(values[output], watched.integers[names[output]][0])
