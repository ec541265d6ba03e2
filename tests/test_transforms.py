"""Every elementwise public function under every transform."""

import numpy as np
import pytest
import torch

import fquant as fq
from fquant.testing.transforms import TransformCase, transform_matrix
from tests.oracles import clip, in_numpy

# Inside, on the edge, outside, ties, zeros; for amax = 2, scale = 2 / 127.
X = torch.tensor([[-2.5, -2.0, -0.7, 0.0], [0.0078125, 0.31, 1.9999, 7.0]])
AMAX = torch.tensor([[2.0], [1.5]])
SCALE = torch.tensor([[0.03], [0.011]])
FULL = fq.QuantSpec(num_bits=6)
UNSIGNED = fq.QuantSpec(num_bits=4, unsigned=True)
ZERO_POINT = torch.tensor([[3], [-5]])


def affine_oracle(x, low, high):
    step = (high - low) / np.float32(15)
    zero = np.rint(low / step) + np.float32(8)
    return (np.clip(np.rint(x / step) - zero, -8, 7) + zero) * step


QUANTIZED = fq.quantize(X, SCALE, ZERO_POINT, FULL)
ELEMENTWISE = [
    TransformCase(
        "tensor_quant",
        lambda x, amax: fq.tensor_quant(x, amax)[0],
        in_numpy(lambda x, amax: np.clip(np.rint(x * (np.float32(127) / amax)), -127, 127)),
        lambda x, amax: clip(x, -amax.detach(), amax.detach()),
        (X, AMAX),
    ),
    TransformCase(
        "tensor_quant_scale",
        lambda x, amax: fq.tensor_quant(x, amax, 5)[1],
        in_numpy(lambda x, amax: np.float32(15) / amax),
        None,
        (X, AMAX),
    ),
    TransformCase(
        "fake_tensor_quant",
        fq.fake_tensor_quant,
        in_numpy(
            lambda x, amax: (
                np.clip(np.rint(x * (np.float32(127) / amax)), -127, 127) / (np.float32(127) / amax)
            )
        ),
        lambda x, amax: clip(x, -amax, amax),
        (X, AMAX),
    ),
    TransformCase(
        "fake_tensor_quant_unsigned",
        lambda x, amax: fq.fake_tensor_quant(x, amax, 4, unsigned=True),
        in_numpy(
            lambda x, amax: (
                np.clip(np.rint(x * (np.float32(15) / amax)), 0, 15) / (np.float32(15) / amax)
            )
        ),
        lambda x, amax: clip(x, torch.zeros_like(amax), amax),
        (X.abs(), AMAX),
    ),
    TransformCase(
        "fake_affine_tensor_quant",
        lambda x, low, high: fq.fake_affine_tensor_quant(x, low, high, 4),
        in_numpy(affine_oracle),
        clip,
        (X, torch.tensor(-1.0), torch.tensor(2.0)),
    ),
    TransformCase(
        "quantize",
        lambda x, scale: fq.quantize(x, scale, spec=FULL).q,
        in_numpy(lambda x, scale: np.clip(np.rint(x / scale), -32, 31).astype(np.int8)),
        None,
        (X, SCALE),
    ),
    TransformCase(
        "dequantize",
        lambda scale: fq.dequantize(
            fq.QTensor(QUANTIZED.q, scale, QUANTIZED.zero_point, spec=FULL)
        ),
        in_numpy(
            lambda scale: (QUANTIZED.q.numpy() - ZERO_POINT.numpy()).astype(np.float32) * scale
        ),
        lambda scale: (QUANTIZED.q - ZERO_POINT) * scale,
        (SCALE,),
    ),
    TransformCase(
        "fake_quantize",
        lambda x, scale: fq.fake_quantize(x, scale, spec=FULL),
        in_numpy(lambda x, scale: np.clip(np.rint(x / scale), -32, 31) * scale),
        lambda x, scale: clip(x, -32 * scale, 31 * scale),
        (X, SCALE),
    ),
    TransformCase(
        "fake_quantize_zero_point",
        lambda x, scale: fq.fake_quantize(x, scale, ZERO_POINT, FULL),
        in_numpy(
            lambda x, scale: (
                (
                    np.clip(np.rint(x / scale) + ZERO_POINT.numpy(), -32, 31) - ZERO_POINT.numpy()
                ).astype(np.float32)
                * scale
            )
        ),
        lambda x, scale: clip(x, (-32 - ZERO_POINT) * scale, (31 - ZERO_POINT) * scale),
        (X, SCALE),
    ),
    TransformCase(
        "compute_amax",
        lambda x: fq.compute_amax(x, axis=0),
        in_numpy(lambda x: np.abs(x).max(axis=1, keepdims=True)),
        lambda x: 0.0 * x.sum(dim=1, keepdim=True),
        (X,),
    ),
    TransformCase(
        "compute_scale",
        lambda amax: fq.compute_scale(amax, UNSIGNED),
        in_numpy(lambda amax: amax / np.float32(15)),
        lambda amax: amax / 15,
        (AMAX,),
    ),
    TransformCase(
        "fake_quant_params",
        lambda w, b: fq.fake_quant_params({"w": w, "b": b}, {"w": fq.QuantSpec(axis=0)})["w"] + b,
        in_numpy(
            lambda w, b: (
                np.rint(w / (np.abs(w).max(axis=1, keepdims=True) / np.float32(127)))
                * (np.abs(w).max(axis=1, keepdims=True) / np.float32(127))
                + b
            )
        ),
        lambda w, b: w + b,
        (torch.tensor([[0.4, 1.0, -0.2, 0.125], [-2.0, 1.1, 0.3, 0.6]]), torch.tensor(0.5)),
    ),
]


@pytest.mark.parametrize(("case", "check"), transform_matrix(ELEMENTWISE))
def test_transform_matrix(case, check):
    check(case)
