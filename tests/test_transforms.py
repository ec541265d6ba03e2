"""Every elementwise function under every transform, and the proof that the checks can fail.

Sparse operations are in `sparse/test_transforms.py`.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

import fquant as fq
from fquant.testing import transforms
from fquant.testing.transforms import TransformCase, transform_matrix

# Inside, on the edge, outside, ties, zeros; for amax = 2, scale = 2 / 127.
X = torch.tensor([[-2.5, -2.0, -0.7, 0.0], [0.0078125, 0.31, 1.9999, 7.0]])
AMAX = torch.tensor([[2.0], [1.5]])
SCALE = torch.tensor([[0.03], [0.011]])
FULL = fq.QuantSpec(num_bits=6)
UNSIGNED = fq.QuantSpec(num_bits=4, unsigned=True)
ZERO_POINT = torch.tensor([[3], [-5]])


def in_numpy(function):
    """A value oracle in NumPy's arithmetic, of the dtype of the tensors."""
    return lambda *tensors: torch.from_numpy(np.asarray(function(*(t.numpy() for t in tensors))))


def clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clip whose derivative at an edge is that of the inside."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


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


# Below: implementations that are wrong in one way each, and the checks that must catch them.

GOOD = next(case for case in ELEMENTWISE if case.name == "fake_tensor_quant")


def wrong_value(x, amax):
    return fq.fake_tensor_quant(x, amax) * (1 + 2**-20)


def rounds_down(x, amax):
    scale = 127 / amax
    grid = (x * scale).floor().clamp(-127, 127) / scale
    return fq.straight_through(grid, x.clamp(-amax, amax))


def no_gradient(x, amax):
    return fq.fake_tensor_quant(x, amax).detach() + 0.0 * x + 0.0 * amax


def gradient_everywhere(x, amax):
    return fq.straight_through(fq.fake_tensor_quant(x, amax), x + 0.0 * amax)


def exclusive_edge(x, amax):
    inside = torch.where(x.abs() < amax, x, 0.0) + torch.where(
        x.abs() >= amax, amax * x.sign(), 0.0
    )
    return fq.straight_through(fq.fake_tensor_quant(x, amax), inside)


def breaks_the_graph(x, amax):
    torch._dynamo.graph_break()
    return fq.fake_tensor_quant(x, amax)


def reads_values(x, amax):
    if (amax < 0).any():
        raise ValueError
    return fq.fake_tensor_quant(x, amax)


class _PlainFunction(torch.autograd.Function):
    """A modern autograd.Function: fine in eager, dropped by torch.compile(torch.func.grad(...))."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, amax):
        return (x * (127 / amax)).round().clamp(-127, 127) / (127 / amax)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, amax = ctx.saved_tensors
        over = torch.where(x > amax, grad, 0.0) - torch.where(x < -amax, grad, 0.0)
        return torch.where(x.abs() <= amax, grad, 0.0), over.sum(dim=-1, keepdim=True)


@torch.library.custom_op("fquant_tests::registered_autograd", mutates_args=())
def registered_autograd(x: Tensor, amax: Tensor) -> Tensor:
    return fq.fake_tensor_quant(x, amax)


registered_autograd.register_fake(lambda x, amax: torch.empty_like(x))
registered_autograd.register_autograd(
    lambda ctx, grad: (torch.where(ctx.x.abs() <= ctx.amax, grad, 0.0), None),
    setup_context=lambda ctx, inputs, output: vars(ctx).update(x=inputs[0], amax=inputs[1]),
)

VALUE_NAMES = {check.__name__ for check in transforms.VALUE_CHECKS}
DERIVATIVE_NAMES = {check.__name__ for check in transforms.DERIVATIVE_CHECKS}
CAUGHT_BY = {
    wrong_value: VALUE_NAMES,
    rounds_down: VALUE_NAMES,
    no_gradient: DERIVATIVE_NAMES,
    gradient_everywhere: DERIVATIVE_NAMES,
    exclusive_edge: DERIVATIVE_NAMES,
    breaks_the_graph: {"compile_forward", "compile_backward", "compile_grad", "compile_vmap_grad"},
    reads_values: {
        "vmap_others",
        "vmap_all",
        "vmap_grad",
        "grad_vmap",
        "compile_forward",
        "export",
    },
    _PlainFunction.apply: {"jvp", "jacfwd", "hessian", "compile_grad", "compile_vmap_grad"},
    registered_autograd: {"func_grad", "vmap_grad", "jvp", "jacfwd", "jacrev", "hessian"},
}
MUTANTS = [
    pytest.param(mutant, check, id=f"{getattr(mutant, '__name__', mutant)}-{check.__name__}")
    for mutant, names in CAUGHT_BY.items()
    for check in transforms.VALUE_CHECKS + transforms.DERIVATIVE_CHECKS
    if check.__name__ in names
]


@pytest.mark.parametrize(("mutant", "check"), MUTANTS)
@pytest.mark.filterwarnings("ignore")  # what broken implementations warn of is beside the point
def test_the_check_fails_on_a_broken_implementation(mutant, check):
    check(GOOD)
    with pytest.raises(Exception):  # noqa: B017, PT011  # any failure is a catch
        check(GOOD._replace(function=mutant))


def test_every_check_was_seen_to_fail():
    assert set().union(*CAUGHT_BY.values()) == VALUE_NAMES | DERIVATIVE_NAMES
