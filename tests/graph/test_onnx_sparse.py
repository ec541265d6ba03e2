"""Sparse layers in ONNX: two operators of a domain, defined in the file."""

import numpy as np
import pytest
import torch
from torch import nn

import fquant as fq
import fquant_kernels
from fquant.graph import dynamic_rows
from tests.graph.onnx_runtime import prepared, quantized_by_onnxruntime

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


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
