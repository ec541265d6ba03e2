"""The transform matrix: one function under every torch transform, values and derivatives checked.

A case names a function, what its values are, and a plain function with the right derivatives; the
expected results come from `torch.autograd` on those two alone, one sample at a time. A function joins
by one more `TransformCase` in a list:

    @pytest.mark.parametrize(("case", "check"), transform_matrix(CASES))
    def test_transforms(case, check):
        check(case)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

BATCH_FACTORS = (1.0, 0.5, 1.25)
# Dynamo, AOT autograd and decompositions are under test here; Inductor's arithmetic has own tests.
BACKEND = "aot_eager"


class TransformCase(NamedTuple):
    """One function and what is right for it.

    Attributes:
        name: the test's name.
        function: tensors to one tensor.
        value: an independent definition of the values, for example in NumPy.
        slope: a function in plain torch whose derivatives are the right ones; None for a function
            without derivatives, whose derivatives are then not checked.
        arguments: floating-point tensors; batched checks scale them by 1, 0.5 and 1.25.
        atol: allowed absolute difference; 0 means equal.
    """

    name: str
    function: Callable[..., Tensor]
    value: Callable[..., Tensor]
    slope: Callable[..., Tensor] | None
    arguments: tuple[Tensor, ...]
    atol: float = 0.0

    def expected(self, *args: Tensor) -> Tensor:
        """The right value, as a function that torch.autograd differentiates rightly."""
        value = self.value(*(a.detach() for a in args))
        if self.slope is None:
            return value
        slope = self.slope(*args)
        return value + (slope - slope.detach())

    def batched(self, which: Sequence[bool]) -> tuple[Tensor, ...]:
        """The arguments, those that `which` picks stacked from three scaled copies."""
        return tuple(
            torch.stack([a * f for f in BATCH_FACTORS]) if pick else a
            for a, pick in zip(self.arguments, which, strict=True)
        )

    @property
    def argnums(self) -> tuple[int, ...]:
        """All arguments, for `torch.func.grad(argnums=...)`."""
        return tuple(range(len(self.arguments)))


Check = Callable[[TransformCase], None]


def _weights(like: Tensor) -> Tensor:
    """A fixed cotangent without symmetry."""
    return torch.linspace(0.5, 2.0, like.numel(), dtype=like.dtype).view(like.shape)


def _loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(*args: Tensor) -> Tensor:
        y = function(*args)
        return (y * _weights(y)).sum()

    return loss


def _squared_loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return _loss(lambda *args: function(*args) ** 2)


def _gradients(loss: Callable[..., Tensor], args: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = [a.detach().clone().requires_grad_() for a in args]
    value = loss(*leaves)
    if not value.requires_grad:  # a constant, to autograd
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)


def _same(case: TransformCase, actual: object, expected: object) -> None:
    assert_close(actual, expected, rtol=0.0, atol=case.atol, equal_nan=True)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=BACKEND)


def _samples(
    case: TransformCase, which: Sequence[bool]
) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]], tuple[int | None, ...]]:
    """Batched arguments, the same as a list of single ones, and vmap's in_dims."""
    args = case.batched(which)
    singles = [
        tuple(a[i] if pick else a for a, pick in zip(args, which, strict=True))
        for i in range(len(BATCH_FACTORS))
    ]
    return args, singles, tuple(0 if pick else None for pick in which)


def _vmap(case: TransformCase, which: Sequence[bool]) -> None:
    args, singles, in_dims = _samples(case, which)
    actual = torch.func.vmap(case.function, in_dims)(*args)
    _same(case, actual, torch.stack([case.expected(*single).detach() for single in singles]))


def forward(case: TransformCase) -> None:
    _same(case, case.function(*case.arguments), case.expected(*case.arguments).detach())


def vmap_first(case: TransformCase) -> None:
    _vmap(case, [i == 0 for i in case.argnums])


def vmap_others(case: TransformCase) -> None:
    _vmap(case, [i > 0 or len(case.arguments) == 1 for i in case.argnums])


def vmap_all(case: TransformCase) -> None:
    _vmap(case, [True for _ in case.argnums])


def compile_forward(case: TransformCase) -> None:
    actual = _compiled(case.function)(*case.arguments)
    _same(case, actual, case.expected(*case.arguments).detach())


def export(case: TransformCase) -> None:
    class Exported(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return case.function(*args)

    program = torch.export.export(Exported(), case.arguments)
    _same(case, program.module()(*case.arguments), case.expected(*case.arguments).detach())


def autograd(case: TransformCase) -> None:
    actual = _gradients(_loss(case.function), case.arguments)
    _same(case, actual, _gradients(_loss(case.expected), case.arguments))


def func_grad(case: TransformCase) -> None:
    actual = torch.func.grad(_loss(case.function), case.argnums)(*case.arguments)
    _same(case, actual, _gradients(_loss(case.expected), case.arguments))


def vmap_grad(case: TransformCase) -> None:
    args, singles, in_dims = _samples(case, [True for _ in case.argnums])
    gradient = torch.func.grad(_loss(case.function), case.argnums)
    actual = torch.func.vmap(gradient, in_dims)(*args)
    _same(case, actual, _stacked_gradients(case, singles))


def grad_vmap(case: TransformCase) -> None:
    args, singles, in_dims = _samples(case, [True for _ in case.argnums])
    batched = torch.func.vmap(_loss(case.function), in_dims)
    actual = torch.func.grad(lambda *a: batched(*a).sum(), case.argnums)(*args)
    _same(case, actual, _stacked_gradients(case, singles))


def _stacked_gradients(
    case: TransformCase, singles: list[tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    each = [_gradients(_loss(case.expected), single) for single in singles]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True))


def jvp(case: TransformCase) -> None:
    tangents = tuple(_weights(a) for a in case.arguments)
    actual = torch.func.jvp(case.function, case.arguments, tangents)[1]
    jacobian = _jacobian(case)
    expected = sum(
        (j * t).sum(dim=tuple(range(j.ndim - t.ndim, j.ndim))) if t.ndim else j * t
        for j, t in zip(jacobian, tangents, strict=True)
    )
    _same(case, actual, expected)


def jacrev(case: TransformCase) -> None:
    _same(case, torch.func.jacrev(case.function, case.argnums)(*case.arguments), _jacobian(case))


def jacfwd(case: TransformCase) -> None:
    _same(case, torch.func.jacfwd(case.function, case.argnums)(*case.arguments), _jacobian(case))


def _jacobian(case: TransformCase) -> tuple[Tensor, ...]:
    return torch.autograd.functional.jacobian(case.expected, case.arguments)


def hessian(case: TransformCase) -> None:
    actual = torch.func.hessian(_squared_loss(case.function), case.argnums)(*case.arguments)
    loss = _squared_loss(case.expected)
    _same(case, actual, torch.autograd.functional.hessian(loss, case.arguments))


def compile_backward(case: TransformCase) -> None:
    compiled = _compiled(case.function)

    def loss(*args: Tensor) -> Tensor:
        y = compiled(*args)
        _same(case, y, case.expected(*case.arguments).detach())
        return (y * _weights(y)).sum()

    _same(case, _gradients(loss, case.arguments), _gradients(_loss(case.expected), case.arguments))


def compile_grad(case: TransformCase) -> None:
    compiled = _compiled(torch.func.grad(_loss(case.function), case.argnums))
    _same(case, compiled(*case.arguments), _gradients(_loss(case.expected), case.arguments))


def compile_vmap_grad(case: TransformCase) -> None:
    args, singles, in_dims = _samples(case, [True for _ in case.argnums])
    gradient = torch.func.grad(_loss(case.function), case.argnums)
    actual = _compiled(torch.func.vmap(gradient, in_dims))(*args)
    _same(case, actual, _stacked_gradients(case, singles))


VALUE_CHECKS: tuple[Check, ...] = (
    forward,
    vmap_first,
    vmap_others,
    vmap_all,
    compile_forward,
    export,
)
DERIVATIVE_CHECKS: tuple[Check, ...] = (
    autograd,
    func_grad,
    vmap_grad,
    grad_vmap,
    jvp,
    jacrev,
    jacfwd,
    hessian,
    compile_backward,
    compile_grad,
    compile_vmap_grad,
)
GRAPH_CHECKS: tuple[Check, ...] = (
    compile_forward,
    export,
    compile_backward,
    compile_grad,
    compile_vmap_grad,
)


def side_by_side(cases: Sequence[TransformCase]) -> TransformCase:
    """Returns one case of several: their results in a row, each of its own arguments.

    The cases have one tolerance, one dtype, and all have derivatives or none has.
    """

    def row(functions: list[Callable[..., Tensor]]) -> Callable[..., Tensor]:
        def function(*args: Tensor) -> Tensor:
            rest = iter(args)
            own = [[next(rest) for _ in case.arguments] for case in cases]
            return torch.cat([f(*a).flatten() for f, a in zip(functions, own, strict=True)])

        return function

    slopes = [case.slope for case in cases if case.slope is not None]
    return TransformCase(
        f"{cases[0].name} to {cases[-1].name}",
        row([case.function for case in cases]),
        row([case.value for case in cases]),
        row(slopes) if slopes else None,
        tuple(a for case in cases for a in case.arguments),
        cases[0].atol,
    )


def _rows(cases: Sequence[TransformCase]) -> list[TransformCase]:
    alike: dict[object, list[TransformCase]] = {}
    for case in cases:
        dtype = case.value(*case.arguments).dtype
        alike.setdefault((case.slope is None, case.atol, dtype), []).append(case)
    return [side_by_side(row) if len(row) > 1 else row[0] for row in alike.values()]


def transform_matrix(cases: Sequence[TransformCase]) -> list[object]:
    """Returns every (case, check) pair that applies, as `pytest.param`s with readable ids.

    What is compiled or exported is all cases that are alike `side_by_side`: to start a compiler takes
    longer than one function more.
    """

    def pairs(cases: Sequence[TransformCase], graphs: bool) -> list[object]:
        return [
            pytest.param(case, check, id=f"{case.name}-{check.__name__}")
            for case in cases
            for check in VALUE_CHECKS + (DERIVATIVE_CHECKS if case.slope is not None else ())
            if (check in GRAPH_CHECKS) == graphs
        ]

    return pairs(cases, graphs=False) + pairs(_rows(cases), graphs=True)
