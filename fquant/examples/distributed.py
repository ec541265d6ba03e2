"""Calibration and fine-tuning on several processes: one exchange of statistics, then DDP.

Run it: `torchrun --nproc-per-node 2 -m fquant.examples.distributed`; without torchrun it is one process.
"""

import json
import os

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fquant as fq
from fquant.examples.dense_recipe import load_images, parameters

SIZE = 64  # images per step, over all processes


def main(steps: int = 20) -> dict[str, list[float]]:
    """Returns every scale after calibration, and the losses of the steps."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1:
        distributed.init_process_group("gloo")
    torch.manual_seed(0)
    data = load_images()
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    observer = fq.HistogramObserver(percentile=99.9)
    inputs = fq.Quantizer(fq.QuantSpec(4), observer=observer)
    rules = [fq.OpRule(weight=fq.QuantSpec(4, narrow_range=True), inputs=inputs)]
    plan = fq.make_plan(model, rules, (data.train_images[:2],))

    mine = data.train_images[:512].split(64)[rank::world]  # each process sees its own batches
    stats = fq.calibrate_model(model, plan, parameters(model), mine, progress=False)
    if world > 1:
        stats = fq.merge_stats_over_ranks(stats, plan.observers)
    qstate = fq.finalize(plan, stats)

    quantized: nn.Module = fq.FakeQuantized(model, plan, qstate)
    if world > 1:
        quantized = DistributedDataParallel(quantized)
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.3)
    losses = []
    for step in range(steps):
        rows = torch.arange(step * SIZE, (step + 1) * SIZE) % len(data.train_images)
        rows = rows.chunk(world)[rank]
        loss = F.cross_entropy(quantized(data.train_images[rows]), data.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            distributed.all_reduce(mean)
        losses.append((mean / world).item())
    return {"losses": losses, **{name: scale.flatten().tolist() for name, scale in qstate.items()}}


if __name__ == "__main__":
    results = main()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(results))
    if distributed.is_initialized():
        distributed.destroy_process_group()
