"""Quantization-aware training: pure functions on parameters and step numbers, for any loop.

A training step differentiates `fake_quant(model, plan)(params, qstate, x)` with respect to params, and
with respect to qstate too where scales are trained:

    frozen       qstate from `finalize`, left as it is
    re-observed  `refreshed(plan, qstate, stats)` with `observe`'s stats, every so many steps
    trained      `torch.func.grad(loss, argnums=(0, 1))(params, learned)` after `split_qstate`
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fquant.plan import Plan
from fquant.sparse.nn.convolution import SparseConvolution
from fquant.transforms import State, finalize


class FineTuning(NamedTuple):
    """How a quantized model is fine-tuned, from how its float model was trained.

    Attributes:
        steps: number of training steps.
        warmup_steps: steps of linear warmup among them.
        initial_lr: learning rate after the warmup.
        final_lr: learning rate of the last step.
        weight_decay: weight decay.
        batch_size: batch size.
    """

    steps: int
    warmup_steps: int
    initial_lr: float
    final_lr: float
    weight_decay: float
    batch_size: int

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step: linear warmup, then half a cosine.

        Example:
            >>> recipe = fine_tuning(steps=1000, lr=0.1)
            >>> recipe.steps, f"{recipe.learning_rate(0):.0e}", f"{recipe.learning_rate(99):.0e}"
            (100, '1e-03', '1e-05')
        """
        if step < self.warmup_steps:
            return self.initial_lr * (step + 1) / (self.warmup_steps + 1)
        last = max(self.steps - 1 - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / last, 1.0)
        cosine = (1.0 + math.cos(math.pi * progress)) / 2.0
        return self.final_lr + (self.initial_lr - self.final_lr) * cosine


def fine_tuning(
    steps: int, lr: float, weight_decay: float = 0.0, batch_size: int = 1
) -> FineTuning:
    """Returns NVIDIA's recipe: 10 % of the schedule, from 1 % of the rate to 0.01 % by a cosine.

    Args:
        steps: steps of the float training.
        lr: its initial learning rate.
        weight_decay: its weight decay, which is kept.
        batch_size: its batch size, which is kept.

    References:
        pytorch-quantization user guide, "Quantized Fine Tuning".
    """
    return FineTuning(max(1, steps // 10), 0, lr * 0.01, lr * 0.0001, weight_decay, batch_size)


def fine_tuning_with_divisors(
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    batch_size: int = 1,
    *,
    learn_scales: bool = False,
    steps_divisor: int = 10,
    warmup_divisor: int = 10,
    lr_decay: float = 0.01,
    final_lr_ratio: float = 0.01,
    batch_size_divisor: int = 2,
) -> FineTuning:
    """Returns SuperGradients' recipe, with its divisors.

    The batch is divided only where scales are learned, for the memory that takes; the warmup is a
    part of the shortened schedule.

    Example:
        >>> fine_tuning_with_divisors(steps=1000, lr=0.1, batch_size=64, learn_scales=True)
        FineTuning(steps=100, warmup_steps=10, initial_lr=0.001, final_lr=1e-05,
        weight_decay=0.0, batch_size=32)

    References:
        SuperGradients, QATRecipeModificationCallback.
    """
    shortened = max(1, steps // steps_divisor)
    warmup = min(shortened // warmup_divisor or 1, shortened - 1)
    rate = lr * lr_decay
    size = max(1, batch_size // batch_size_divisor) if learn_scales else batch_size
    return FineTuning(shortened, warmup, rate, rate * final_lr_ratio, weight_decay * lr_decay, size)


def refreshed(plan: Plan, qstate: State, stats: State) -> dict[str, Tensor]:
    """Returns qstate with the scales that are not learned taken anew from statistics."""
    learned = {name for name, quantizer in plan.quantizers.items() if quantizer.learn}
    return {
        name: qstate[name] if name in learned else scale
        for name, scale in finalize(plan, stats).items()
    }


def fold_batch_norm(
    model: nn.Module, params: Mapping[str, Tensor], pairs: Mapping[str, str]
) -> dict[str, Tensor]:
    """Returns params in which batch norms are part of the convolutions before them.

        factor = gamma / sqrt(var + eps)
        weight' = weight * factor,    bias' = beta + (bias - mean) * factor

    The batch norms become identities (mean 0, variance 1 - eps, gamma 1, beta bias'), so the same model
    runs with the folded tensors; the convolution's own bias, if any, becomes 0. gamma = 0 gives a zero
    weight and leaves beta. Differentiable in params; nothing is divided by gamma.

    Args:
        model: for the layers' kinds and eps; not read for tensors that params has.
        params: parameters and buffers by name, `running_mean` and `running_var` among them.
        pairs: `{path of the convolution or linear layer: path of the batch norm that follows it}`.

    Raises:
        ValueError: a path names no such layer, or params lack one of its tensors.
    """
    modules = dict(model.named_modules())
    folded = dict(params)
    for conv, norm in pairs.items():
        layer, bn = modules.get(conv), modules.get(norm)
        if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd | SparseConvolution):
            raise ValueError(
                f"fold_batch_norm: pairs must name convolutions or linear layers, got {conv!r}."
            )
        if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"fold_batch_norm: pairs must name batch norms, got {norm!r}.")
        names = [f"{norm}.running_mean", f"{norm}.running_var", f"{conv}.weight"]
        for name in names:
            if name not in params:
                raise ValueError(f"fold_batch_norm: params must have {name!r} for {norm!r}.")
        mean, variance, weight = (params[name] for name in names)
        gamma = params.get(f"{norm}.weight", torch.ones_like(mean))
        beta = params.get(f"{norm}.bias", torch.zeros_like(mean))
        factor = gamma * torch.rsqrt(variance + bn.eps)
        folded[f"{conv}.weight"] = _scale_outputs(layer, weight, factor)
        shift = -mean
        if f"{conv}.bias" in params:
            shift = params[f"{conv}.bias"] - mean
            folded[f"{conv}.bias"] = torch.zeros_like(mean)
        bias = beta + shift * factor
        if not bn.affine:
            folded[f"{norm}.running_mean"] = -bias
        else:
            folded[f"{norm}.running_mean"] = torch.zeros_like(mean)
            folded[f"{norm}.weight"] = torch.ones_like(mean)
            folded[f"{norm}.bias"] = bias
        folded[f"{norm}.running_var"] = torch.full_like(variance, 1.0 - bn.eps)
    return folded


def _scale_outputs(layer: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    if not getattr(layer, "transposed", False):
        return weight * factor.view(-1, *[1] * (weight.ndim - 1))
    groups = int(layer.groups)  # type: ignore[arg-type]
    by_group = weight.reshape(groups, -1, *weight.shape[1:])
    factors = factor.view(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    return (by_group * factors).reshape(weight.shape)
