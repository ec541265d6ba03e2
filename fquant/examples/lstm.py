"""An LSTM over the rows of images, in 8 bits: `nn.LSTM` as it is, dynamic ranges per row and step.

Run it: `python -m fquant.examples.lstm`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fquant as fq
from fquant.examples.dense_recipe import Params, accuracy, load_images, parameters, train


class Net(nn.Module):
    """Rows as time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, 0])[0][:, -1])


def main(steps: int = 200) -> dict[str, float]:
    """Returns the accuracies in percent: float, static ranges, ranges per row and step."""
    torch.manual_seed(0)
    data, model = load_images(), Net()
    params = train(lambda p, x: functional_call(model, p, (x,)), parameters(model), data, steps,
                   lambda step: 0.02)  # fmt: skip
    results = {"float": accuracy(lambda p, x: functional_call(model, p, (x,)), params, data)}
    for name, rules in (("static", fq.w8a8()), ("dynamic", fq.w8a8(dynamic=True))):
        plan = fq.make_plan(model, rules, (data.train_images[:2],))
        calibration = data.train_images[:512].split(128)
        stats = fq.calibrate_model(model, plan, params, calibration, progress=False)
        qstate = fq.finalize(plan, stats)
        forward = fq.fake_quant(model, plan)

        def quantized(
            params: Params, x: Tensor, run: Any = forward, scales: Any = qstate
        ) -> Tensor:
            return run(params, scales, x)

        results[name] = accuracy(quantized, params, data)
    return results


if __name__ == "__main__":
    print(main())
