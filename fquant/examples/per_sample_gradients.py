"""The gradient of a quantized network for every image on its own, as private or robust training needs.

Run it: `python -m fquant.examples.per_sample_gradients`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

import fquant as fq
from fquant.examples.dense_recipe import Params, load_images, parameters


def main(size: int = 64, norm: float = 1.0) -> dict[str, float]:
    """Returns the norms of the gradients of single images, and that of the mean of the clipped ones."""
    torch.manual_seed(0)
    data = load_images()
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    params = parameters(model)
    images, labels = data.train_images[:size], data.train_labels[:size]
    plan = fq.make_plan(model, fq.w4a8(), (images,))
    qstate = fq.finalize(plan, fq.calibrate_model(model, plan, params, [images], progress=False))
    forward = fq.fake_quant(model, plan)

    def loss(params: Params, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(forward(params, qstate, image.unsqueeze(0)), label.unsqueeze(0))

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(params, images, labels)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    shrink = (norm / norms).clamp(max=1.0)
    clipped = {n: torch.einsum("n,n...->...", shrink, g) / size for n, g in gradients.items()}

    def batch_loss(params: Params) -> Tensor:
        return F.cross_entropy(forward(params, qstate, images), labels)

    whole = grad(batch_loss)(params)
    apart = max(float((gradients[n].mean(0) - g).abs().max()) for n, g in whole.items())
    return {
        "smallest": norms.min().item(),
        "largest": norms.max().item(),
        "clipped mean": torch.stack([g.square().sum() for g in clipped.values()])
        .sum()
        .sqrt()
        .item(),
        "mean against batch": apart,
    }


if __name__ == "__main__":
    print(main())
