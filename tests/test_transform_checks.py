"""The proof that the checks of the transform matrix can fail."""

import functools

import pytest
import torch
from torch import Tensor

import fquant as fq
from fquant.testing import transforms
from tests.test_transforms import ELEMENTWISE

# Implementations that are wrong in one way each, and the checks that must catch them.
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


@functools.cache
def passes_on_the_right_one(check):
    check(GOOD)
    return True


@pytest.mark.parametrize(("mutant", "check"), MUTANTS)
@pytest.mark.filterwarnings("ignore")  # what broken implementations warn of is beside the point
def test_the_check_fails_on_a_broken_implementation(mutant, check):
    assert passes_on_the_right_one(check)
    with pytest.raises(Exception):  # noqa: B017, PT011  # any failure is a catch
        check(GOOD._replace(function=mutant))


def test_every_check_was_seen_to_fail():
    assert set().union(*CAUGHT_BY.values()) == VALUE_NAMES | DERIVATIVE_NAMES
