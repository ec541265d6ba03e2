"""What interception costs per operation, over the operations themselves.

    python -m benches.bench_interception

Prints JSON lines: the environment, then microseconds per operation (median over runs) of a chain of
elementwise operations and of one of small linear layers, alone and under transforms that do nothing to
values; then the time to plan a model of 100 modules.
"""

import json
import platform
import time
from unittest import mock

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.benchmark import Timer

import fquant as fq
from fquant import transforms

LAYERS = 50


class Chain(nn.Module):
    """Linear layers by function, in one forward: the cost of modules is not that of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(LAYERS):
            x = torch.nn.functional.linear(x, self.weight)
        return x


def microseconds(function, *args):
    timer = Timer("f(*args)", globals={"f": function, "args": args}, num_threads=1)
    return timer.blocked_autorange(min_run_time=1.0).median * 1e6


def report(**row):
    print(json.dumps(row), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    report(torch=torch.__version__, python=platform.python_version(), machine=platform.machine())
    model, x = Chain(), torch.randn(2, 4)
    params = {n: p.detach() for n, p in model.named_parameters()}
    with mock.patch("warnings.warn"):
        unmatched = fq.make_plan(model, [fq.OpRule("nowhere")], (x,))
    matched = fq.make_plan(model, fq.w8a8(), (x,))
    qstate = {name: torch.ones(()) for name in matched.quantizers}
    bare = microseconds(lambda: functional_call(model, params, (x,))) / LAYERS
    none = fq.fake_quant(model, unmatched)
    assert torch.equal(none(params, {}, x), model(x))
    report(
        question="per op, no matching rule", us=microseconds(none, params, {}, x) / LAYERS - bare
    )
    # The arithmetic is taken out: what remains is finding the site and handing operands over.
    with mock.patch.object(transforms, "_fake", lambda x, quantizer, scale: x):
        forward = fq.fake_quant(model, matched)
        assert torch.equal(forward(params, qstate, x), model(x))
        cost = microseconds(forward, params, qstate, x) / LAYERS - bare
    report(question="per op, two operands matched", us=cost, bare_us=bare)
    modules = nn.Sequential(*[nn.Linear(16, 16) for _ in range(100)])
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        plan = fq.make_plan(modules, fq.w8a8(), (torch.randn(2, 16),))
        seconds.append(time.perf_counter() - start)
    assert len(plan.sites) == 100
    report(question="plan of 100 linear modules", s=sorted(seconds)[1])


if __name__ == "__main__":
    main()
