"""Formats of gradients: one format forward, another backward, as in FP8 training."""

from typing import Any

import torch
from torch import Tensor

from fquant.affine import fake_quantize
from fquant.checks import as_broadcastable, compute_dtype, require_floating, require_positive
from fquant.formats import Format, require_format
from fquant.presets import E4M3, E5M2
from fquant.pytree import from_constant, to_constant
from fquant.records import lifts_to_features
from fquant.scales import compute_amax, compute_scale


def fake_quantize_gradient(
    x: Tensor, spec: Format = E5M2, scale: Tensor | float | None = None
) -> Tensor:
    """Returns x; in reverse mode its gradient is fake-quantized.

    No composition of linear derivatives rounds a gradient, so this is the one function here with a
    derivative of its own. In forward mode tangents pass unrounded: rounding cotangents has no
    transpose.

    Args:
        x: floating point, any shape.
        spec: the grid of the gradient.
        scale: of the gradient, a number or a tensor that meets x; None for what the gradient's own
            amax gives, by `spec.axis`, `spec.block` and `spec.scale_rule`.

    Raises:
        TypeError: x is not a floating-point tensor, or spec not a Format.
        ValueError: a scale that does not meet x, or is not positive (checked in eager code);
            stochastic rounding, which needs noise.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> weights = torch.tensor([1.1, 3.3])
        >>> torch.func.grad(lambda x: (fake_quantize_gradient(x, scale=1.0) * weights).sum())(x)
        tensor([1.0000, 3.5000])
    """
    function = "fake_quantize_gradient"
    require_floating(function, "x", x)
    require_format(function, spec)
    if spec.rounding == "stochastic":
        raise ValueError(f"{function}: spec must not round stochastically, got {spec}.")
    own = scale is None
    step = as_broadcastable(function, "scale", 1.0 if scale is None else scale, x, compute_dtype(x))
    require_positive(function, "scale", step)
    return _quantized_gradient(x, step.detach(), own, to_constant(spec))


@lifts_to_features
def fake_quantize_both(
    x: Tensor,
    scale: Tensor | float,
    spec: Format = E4M3,
    gradient_spec: Format = E5M2,
    gradient_scale: Tensor | float | None = None,
) -> Tensor:
    """Returns `fake_quantize(x, scale, spec=spec)`, whose incoming gradient is fake-quantized first.

    With the defaults: E4M3 forward, E5M2 gradients, the recipe of FP8 training. The gradient that
    comes in is rounded to `gradient_spec`, then masked as `fake_quantize` does.

    Example:
        >>> x = torch.tensor([0.3, 500.0])
        >>> fake_quantize_both(x, 1.0)
        tensor([3.1250e-01, 4.4800e+02])
        >>> torch.func.grad(lambda x: (1.1 * fake_quantize_both(x, 1.0, gradient_scale=1.0)).sum())(x)
        tensor([1., 0.])

    References:
        Micikevicius et al. 2022, arXiv 2209.05433; INT-FP-QSim, arXiv 2307.03712.
    """
    y = fake_quantize(x, scale, spec=spec)
    return fake_quantize_gradient(y, gradient_spec, gradient_scale)


class _QuantizedGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, own: bool, spec: tuple[Any, ...]) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, scale, ctx.own, ctx.spec = inputs
        ctx.save_for_backward(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (scale,) = ctx.saved_tensors
        spec = from_constant(ctx.spec)
        if ctx.own:
            scale = compute_scale(compute_amax(gradient, spec.axis, spec.block), spec)
        return fake_quantize(gradient, scale, spec=spec), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return tangent.clone()


# Dynamo drops the backward of an autograd.Function under torch.func.grad, unless it is kept from
# looking inside (torch 2.11 to 2.13).
@torch.compiler.allow_in_graph
def _quantized_gradient(x: Tensor, scale: Tensor, own: bool, spec: tuple[Any, ...]) -> Tensor:
    return _QuantizedGradient.apply(x, scale, own, spec)
