"""A network from float to an AOTInductor package of int8 layers, loaded again and compared.

    python -m fquant.examples.package_int8 [folder]

The package is loaded from Python here. Its int8 layers are ops that fquant registers from Python, so a
process without Python cannot run them; the package of the Q/DQ graph, made the same way from `program`,
has torch's own operations only and is loaded in C++ by

    torch::inductor::AOTIModelPackageLoader loader("qdq.pt2");
    std::vector<torch::Tensor> outputs = loader.run({input});
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import fquant as fq


def main(folder: Path) -> None:
    """Exports, lowers, packages and loads; prints the report and whether outputs are equal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    params = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(32, 64)
    plan = fq.make_plan(model, fq.w8a8(), (x,))
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    program = fq.export_qdq(model, plan, params, fq.finalize(plan, stats), (x,))
    lowered, report = fq.lower(program)
    print(report)
    for name, exported in (("qdq", program), ("int8", fq.prepack(lowered))):
        path = str(folder / f"{name}.pt2")
        torch._inductor.aoti_compile_and_package(exported, package_path=path)
        loaded = torch._inductor.aoti_load_package(path)
        difference = (loaded(x) - exported.module()(x)).abs().max().item()
        print(f"{name}.pt2: largest difference from eager {difference:.3g}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
