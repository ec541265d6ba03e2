"""int8 convolution on records: it is the fake-quantized network, and refuses what it cannot do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant as fq
from fquant.sparse import (
    SparseTensor,
    conv_map,
    sparse_conv,
    sparse_conv_int8,
    subm_map,
    with_pairs,
)
from fquant.testing import strategies

WEIGHTS = fq.QuantSpec(narrow_range=True, axis=0)


@given(st.data())
def test_int8_is_the_fake_quantized_convolution(data):
    """Computed in float64, where the only difference left is a tie within the float32 epilogue."""
    x = data.draw(strategies.sparse_tensors(dtype=torch.float32))
    geometry = data.draw(strategies.conv_geometries(x.spatial_shape))
    kernel_map = conv_map(x, *geometry)
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    weight = torch.randn(5, *geometry.kernel_size, x.features.shape[1], generator=g)
    bias = torch.randn(5, generator=g)
    residual = SparseTensor(
        torch.randn(len(kernel_map.out_coords), 5, generator=g),
        kernel_map.out_coords,
        kernel_map.out_shape,
        x.batch_size,
    )
    relu, add, per_channel = (data.draw(st.booleans()) for _ in range(3))
    spec = WEIGHTS if per_channel else fq.QuantSpec(narrow_range=True)
    qx, qr = fq.quantize(x, 0.07), fq.quantize(residual, 0.03)
    qw = fq.quantize_params({"w": weight}, {"w": spec})["w"]
    step = torch.tensor(0.11)
    out = sparse_conv_int8(
        qx,
        qw,
        bias,
        kernel_map=kernel_map,
        output_scale=step,
        residual=qr if add else None,
        relu=relu,
    )
    y = sparse_conv(
        fq.dequantize(qx).map(torch.Tensor.double),
        fq.dequantize(qw).double(),
        bias.double(),
        kernel_map=kernel_map,
    ).features
    y = y + fq.dequantize(qr).features if add else y
    exact = (y.relu() if relu else y) / step.double()
    assert out.features.spec == fq.QuantSpec()
    assert torch.equal(out.coords, kernel_map.out_coords)
    error = (out.features.q - exact.clamp(-128, 127)).abs()
    assert error.numel() == 0 or error.max() <= 0.5 + 1e-3
    listed = sparse_conv_int8(
        qx,
        qw,
        bias,
        kernel_map=with_pairs(kernel_map),
        output_scale=step,
        residual=qr if add else None,
        relu=relu,
    )
    assert torch.equal(listed.features.q, out.features.q)
    floats = sparse_conv_int8(
        qx, qw, bias, kernel_map=kernel_map, residual=qr if add else None, relu=relu
    )
    assert floats.features.dtype == torch.float32
    assert torch.allclose(floats.features.double(), exact * step, atol=1e-4)


X = fq.quantize(SparseTensor.from_dense(torch.ones(1, 2, 4, 4)), 0.1)
W = fq.quantize(torch.ones(3, 3, 3, 2), 0.1)
MAP = subm_map(X, 3)
STEP = torch.tensor(0.1)


def conv(x=X, w=W, **options):
    return sparse_conv_int8(x, w, **{"kernel_map": MAP, "output_scale": STEP, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: conv(x=X.features), TypeError, "x must be a SparseTensor, got QTensor"),
        (lambda: conv(x=fq.dequantize(X)), TypeError, "x.features must be a QTensor, got Tensor"),
        (lambda: conv(w=fq.dequantize(W)), TypeError, "weight must be a QTensor"),
        (
            lambda: conv(x=fq.quantize(fq.dequantize(X), 0.1, 3)),
            TypeError,
            "without a zero point, got a zero point",
        ),
        (
            lambda: conv(w=fq.quantize(torch.ones(3, 3, 3, 2), 0.1, None, fq.QuantSpec(16))),
            TypeError,
            "signed 8-bit without a zero point, got torch.int16",
        ),
        (
            lambda: conv(x=fq.quantize(fq.dequantize(X), torch.full((2,), 0.1))),
            ValueError,
            "one scale for all",
        ),
        (
            lambda: conv(w=fq.quantize(torch.ones(2, 3, 3, 2), torch.full((2,), 0.1))),
            ValueError,
            r"weight.scale must have one step.*\(2, 1, 1, 1\), got \(2,\)",
        ),
        (lambda: conv(w=fq.quantize(torch.ones(3, 3, 3, 1), 0.1)), ValueError, "Cin = 2"),
        (lambda: conv(kernel_map=subm_map(X, 1)), ValueError, "kernel_map must have the weight's"),
        (lambda: conv(bias=torch.ones(2)), ValueError, r"bias must have shape \(3,\)"),
        (lambda: conv(residual=X), ValueError, r"residual must have shape \(16, 3\)"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
