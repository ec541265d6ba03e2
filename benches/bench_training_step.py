"""A compiled training step of ResNet-20, fake-quantized against float.

    python -m benches training_step [batch size]

The step is one graph: forward in train mode with batch norm, cross entropy, gradients, SGD. Float and
w8a8 (all layers, frozen scales) take turns in one run. Prints JSON lines: the machine, then one row.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

import fquant as fq
from benches import harness


class Block(nn.Module):
    """Two convolutions around an identity, whose new channels are zeros (He et al. 2015, option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.more = outputs // inputs, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(kept, (0, 0, 0, 0, 0, self.more)))


class ResNet20(nn.Module):
    """The network for 32 x 32 images of He et al. 2015, arXiv 1512.03385, section 4.2, with n = 3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*map(Block, widths, widths[1:]))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def step_of(forward):
    """Returns (params, buffers) -> (params, buffers, loss) after one step of SGD."""

    def loss(params, buffers, x, labels):
        y, buffers = forward(params, buffers, x)
        return F.cross_entropy(y, labels), buffers

    def step(params, buffers, x, labels):
        gradients, (value, buffers) = grad_and_value(loss, has_aux=True)(params, buffers, x, labels)
        return {n: p - 0.1 * gradients[n] for n, p in params.items()}, buffers, value

    return step


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    model = ResNet20().train()
    params = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    x, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    plan = fq.make_plan(model, fq.w8a8(), (x,))
    assert len(plan.quantizers) == 2 * 20
    stats = fq.calibrate_model(model, plan, {**params, **buffers}, [x], progress=False)
    qstate = fq.finalize(plan, stats)
    quantized = fq.fake_quant(model, plan, train=True, with_buffers=True)

    def float_forward(params, buffers, x):
        new = {n: b.clone() for n, b in buffers.items()}
        return functional_call(model, {**params, **new}, (x,)), new

    def quantized_forward(params, buffers, x):
        return quantized({**params, **buffers}, qstate, x)

    runs = {}
    for name, forward in (("float", float_forward), ("w8a8", quantized_forward)):
        step = step_of(forward)
        compiled = torch.compile(step, fullgraph=True)
        runs[name] = lambda f=compiled: f(params, buffers, x, labels)
        for a, b in zip(runs[name](), step(params, buffers, x, labels), strict=True):
            # Sums over a batch in another order; a value next to a tie may take the other step.
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
    harness.report(harness.machine())
    timings = harness.interleaved(runs, rounds=15)
    harness.report(
        {
            "question": "compiled training step of ResNet-20, w8a8 over float",
            "batch": batch,
            "float_ms": timings["float"].median * 1e3,
            "w8a8_ms": timings["w8a8"].median * 1e3,
            "ratio": 1 / timings["w8a8"].ratio(timings["float"]),
            "spread": max(t.spread for t in timings.values()),
        }
    )


if __name__ == "__main__":
    main()
