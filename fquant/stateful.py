"""`FakeQuantized`: the one stateful form, for what insists on a module (DDP, FSDP2, trainers)."""

from typing import Any

import torch
from torch import Tensor, nn

from fquant.interception.ops import DEFAULT_OPS, Ops
from fquant.plan import Plan
from fquant.qstate import State, split_qstate
from fquant.transforms import fake_quant


class FakeQuantized(nn.Module):
    """A module whose forward is `fake_quant(model, plan)` of its own parameters and scales.

    It holds the model itself, whose parameters it trains, and the scales: learned ones as parameters,
    the rest as buffers, both under their names in qstate with ":" for ".". In train mode it writes what
    the model's buffers become, as any module does. `self.training` decides for all modules inside.

    Args:
        model: what the plan was made for; shared, not copied.
        plan: where to quantize.
        qstate: from `fquant.finalize`; copied.
        ops: the table that the plan was made with.

    Raises:
        ValueError: (in forward) as `fquant.fake_quant`.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.ones(3, 2)
        >>> plan = fquant.make_plan(model, fquant.w8a8(), (x,))
        >>> params = dict(model.named_parameters())
        >>> qstate = fquant.finalize(plan, fquant.calibrate_model(model, plan, params, [x]))
        >>> module = FakeQuantized(model, plan, qstate)
        >>> torch.equal(module(x), fquant.fake_quant(model, plan)(params, qstate, x))
        True
        >>> sorted(module.qstate()) == sorted(qstate)
        True
    """

    def __init__(
        self, model: nn.Module, plan: Plan, qstate: State, *, ops: Ops = DEFAULT_OPS
    ) -> None:
        super().__init__()
        self.model = model
        learned, frozen = split_qstate(plan, qstate)
        self._names = tuple(qstate)
        for name, value in frozen.items():
            self.register_buffer(_key(name), value.detach().clone())
        for name, value in learned.items():
            self.register_parameter(_key(name), nn.Parameter(value.detach().clone()))
        self._forwards = tuple(
            fake_quant(model, plan, train=train, with_buffers=True, ops=ops)
            for train in (False, True)
        )

    def qstate(self) -> dict[str, Tensor]:
        """Returns the scales as they are now."""
        return {name: getattr(self, _key(name)) for name in self._names}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the model's output with its sites on the grid."""
        buffers = dict(self.model.named_buffers())
        params = {**dict(self.model.named_parameters()), **buffers}
        y, after = self._forwards[self.training](params, self.qstate(), *args, **kwargs)
        if self.training:
            with torch.no_grad():
                for name, buffer in buffers.items():
                    buffer.copy_(after[name])
        return y


def _key(name: str) -> str:
    return name.replace(".", ":")
