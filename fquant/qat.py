"""Quantization-aware training: pure functions on parameters and step numbers, for any loop.

A training step differentiates `fake_quant(model, plan)(params, qstate, x)` with respect to params, and
with respect to qstate too where scales are trained:

    frozen       qstate from `finalize`, left as it is
    re-observed  `refreshed(plan, qstate, stats)` with `observe`'s stats, every so many steps
    trained      `torch.func.grad(loss, argnums=(0, 1))(params, learned)` after `split_qstate`
"""

import math
from typing import NamedTuple

from torch import Tensor

from fquant.plan import Plan
from fquant.qstate import State, finalize, zero_point_of


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
    """Returns qstate with the scales (and zero points) that are not learned taken anew from statistics.

    Example:
        >>> model, x = torch.nn.Linear(2, 1), torch.tensor([[1.0, -2.0]])
        >>> plan = fquant.make_plan(model, [fquant.OpRule(inputs=fquant.QuantSpec())], (x,))
        >>> params = dict(model.named_parameters())
        >>> stats = fquant.init_stats(plan)  # in a training loop: anew every k steps
        >>> _, stats = fquant.observe(model, plan)(params, stats, x)
        >>> refreshed(plan, {"linear#0.input": torch.tensor(9.0)}, stats)["linear#0.input"] * 127
        tensor(2.)
    """
    learned = {name for name, quantizer in plan.quantizers.items() if quantizer.learn}
    kept = learned | {zero_point_of(name) for name in learned}
    return {
        name: qstate[name] if name in kept else value
        for name, value in finalize(plan, stats).items()
    }
