"""torch's own Transformer layers on the rows of images, in 8 bits, all but the first and last layer.

Run it: `python -m fquant.examples.transformer`.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fquant as fq
from fquant.examples.dense_recipe import accuracy, load_images, parameters, train


class Net(nn.Module):
    """Rows as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(torch.randn(8, 32) / 6)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x[:, 0]) + self.position).mean(dim=1))


def main(steps: int = 200) -> dict[str, float]:
    """Returns the accuracies in percent."""
    torch.manual_seed(0)
    data, model = load_images(), Net().eval()
    params = train(lambda p, x: functional_call(model, p, (x,)), parameters(model), data, steps,
                   lambda step: 0.003)  # fmt: skip
    example = (data.train_images[:2],)
    everything = fq.make_plan(model, fq.w8a8(), example)
    plan = fq.make_plan(model, [*fq.skip_first_and_last(everything), *fq.w8a8()], example)
    stats = fq.calibrate_model(
        model, plan, params, data.train_images[:512].split(128), progress=False
    )
    qstate = fq.finalize(plan, stats)
    forward = fq.fake_quant(model, plan)
    return {
        "float": accuracy(lambda p, x: functional_call(model, p, (x,)), params, data),
        "calibrated": accuracy(lambda p, x: forward(p, qstate, x), params, data),
        "quantizers": float(len(plan.quantizers)),
    }


if __name__ == "__main__":
    print(main())
