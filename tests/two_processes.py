"""One process of two: the example, then a fake-quantized model under FSDP2.

Prints what the example returns, and the gradients' largest distance from those of the model on its own.
"""

import json

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fquant as fq
from fquant.examples import distributed as example


def under_fsdp2():
    rank = distributed.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(8, 4)
    plan = fq.make_plan(model, fq.w8a8(), (x,))
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    qstate = fq.finalize(plan, stats)
    forward = fq.fake_quant(model, plan)
    alone = torch.func.grad(lambda p: forward(p, qstate, x).square().mean())(params)

    sharded = fq.FakeQuantized(model, plan, qstate)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))  # the whole module is one unit
    mine = x.chunk(2)[rank]
    sharded(mine).square().mean().backward()
    whole = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    distributed.barrier()  # none closes its connections while another is still reading
    distributed.destroy_process_group()
    return rank, max(float((whole[n] - g).abs().max()) for n, g in alone.items())


if __name__ == "__main__":
    results = example.main()
    rank, apart = under_fsdp2()
    if rank == 0:
        print(json.dumps({"example": results, "fsdp2": apart}))
