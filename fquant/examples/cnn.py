"""A CNN with batch norm and a residual sum: float, after calibration, after fine-tuning.

Run it: `python -m fquant.examples.cnn`.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fquant as fq
from fquant.examples.dense_recipe import Params, accuracy, batches, load_images, parameters, train


class Net(nn.Module):
    """Three convolutions, two of them around a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((self.body(x) + x).relu().mean(dim=(2, 3)))


NORMS = {"stem": "norm", "body.0": "body.1", "body.3": "body.4"}


def main(steps: int = 300, bits: int = 3) -> dict[str, float]:
    """Returns the accuracies in percent: float, quantized after training, fine-tuned."""
    torch.manual_seed(0)
    data, model = load_images(), Net()

    def float_forward(params: Params, x: Tensor) -> Tensor:  # train mode, buffers of this call
        return functional_call(model, {**params, **fresh_buffers(model)}, (x,))

    params = train(float_forward, parameters(model), data, steps, lambda step: 0.01)
    everything = fq.estimate_batch_norm(
        model,
        lambda p, x: (functional_call(model, p := {n: t.clone() for n, t in p.items()}, (x,)), p),
        {**params, **fresh_buffers(model)},
        [images for images, _ in batches(data, 10)],
    )
    folded = fq.fold_batch_norm(model, everything, NORMS)  # a new dict; the model keeps its tensors
    model.eval()

    spec = fq.QuantSpec(bits, narrow_range=True)
    rules = [
        fq.OpRule("stem|head", weight=fq.QuantSpec(narrow_range=True), inputs=fq.QuantSpec()),
        fq.OpRule(ops=("add",), inputs=fq.QuantSpec()),  # the residual sum, by name
        fq.OpRule(weight=spec, inputs=fq.QuantSpec(bits, unsigned=True)),
    ]
    plan = fq.make_plan(model, rules, (data.train_images[:2],))
    stats = fq.calibrate_model(
        model, plan, folded, data.train_images[:512].split(128), progress=False
    )
    qstate = fq.finalize(plan, stats)
    forward = fq.fake_quant(model, plan)
    learned = {name: folded[name] for name in params}
    buffers = {name: folded[name] for name in folded if name not in params}

    def quantized(params: Params, x: Tensor) -> Tensor:
        return forward({**buffers, **params}, qstate, x)

    recipe = fq.fine_tuning(steps=steps * 10, lr=0.1)
    tuned = train(quantized, learned, data, recipe.steps, recipe.learning_rate)
    return {
        "float": accuracy(lambda p, x: functional_call(model, p, (x,)), everything, data),
        "calibrated": accuracy(quantized, learned, data),
        "fine-tuned": accuracy(quantized, tuned, data),
    }


def fresh_buffers(model: nn.Module) -> Params:
    """Returns copies of the buffers: torch's batch norm writes what it is given."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


if __name__ == "__main__":
    for name, percent in main().items():
        print(f"{name:>12}  {percent:6.2f} %")
