"""What interception costs per operation, over the operations themselves.

    python -m benches interception

Prints JSON lines: the machine, then microseconds of process CPU time per operation, of a chain of small
linear layers in one forward, alone and under transforms that do nothing to values; then the time to
plan a model of 100 modules. All variants take turns in one run.
"""

import time
from unittest import mock

import torch
from torch import nn
from torch.func import functional_call

import fquant as fq
from benches import harness
from fquant import transforms

LAYERS = 50
CALLS = 40  # of the chain, in one measurement


class Chain(nn.Module):
    """Linear layers by function, in one forward: the cost of modules is not that of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(LAYERS):
            x = torch.nn.functional.linear(x, self.weight)
        return x


def main() -> None:
    torch.set_num_threads(1)
    harness.report(harness.machine())
    model, x = Chain(), torch.randn(2, 4)
    params = {n: p.detach() for n, p in model.named_parameters()}
    with mock.patch("warnings.warn"):
        unmatched = fq.fake_quant(model, fq.make_plan(model, [fq.OpRule("nowhere")], (x,)))
    plan = fq.make_plan(model, fq.w8a8(), (x,))
    qstate = {name: torch.ones(()) for name in plan.quantizers}
    matched = fq.fake_quant(model, plan)

    def many(function, *args):
        return lambda: [function(*args) for _ in range(CALLS)]

    # The arithmetic is taken out: what remains is finding the site and handing operands over.
    with mock.patch.object(transforms, "fake_quantize_operand", lambda x, *_: x):
        runs = {
            "bare": many(lambda: functional_call(model, params, (x,))),
            "no matching rule": many(unmatched, params, {}, x),
            "two operands matched": many(matched, params, qstate, x),
        }
        for run in runs.values():
            assert torch.equal(run()[0], model(x))
        timings = harness.interleaved(runs, rounds=25)
    us = {name: t.median / LAYERS / CALLS * 1e6 for name, t in timings.items()}
    for name in list(runs)[1:]:
        cost = us[name] - us["bare"]
        harness.report({"question": f"per op, {name}", "us": cost, "bare_us": us["bare"]})
    modules = nn.Sequential(*[nn.Linear(16, 16) for _ in range(100)])
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        plan = fq.make_plan(modules, fq.w8a8(), (torch.randn(2, 16),))
        seconds.append(time.perf_counter() - start)
    assert len(plan.sites) == 100
    harness.report({"question": "plan of 100 linear modules", "s": sorted(seconds)[1]})


if __name__ == "__main__":
    main()
