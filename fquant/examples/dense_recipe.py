"""What the examples of dense networks share: images, and a training loop of pure functions."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fquant.demo.data import Split, load_digits
from fquant.demo.training import adam_init, adam_step
from fquant.testing.scenes import data_folder, load_arrays

Params = dict[str, Tensor]


def load_images() -> Split:
    """Returns 8 x 8 digits: of MNIST where the data folder is there, else scikit-learn's."""
    folder = data_folder("mnist")
    if folder is None:
        return load_digits()
    arrays = load_arrays(folder / "mnist_open.npz")

    def images(name: str, count: int) -> Tensor:
        pixels = torch.from_numpy(arrays[name][:count]).float().unsqueeze(1) / 255
        return F.avg_pool2d(F.pad(pixels, (2, 2, 2, 2)), 4)

    def labels(name: str, count: int) -> Tensor:
        return torch.from_numpy(arrays[name][:count]).long()

    train = images("train_x", 4000), labels("train_y", 4000)
    return Split(*train, images("test_x", 500), labels("test_y", 500))


def parameters(model: nn.Module) -> Params:
    """Returns the parameters by name, detached: the tree that everything here is a function of."""
    return {name: p.detach() for name, p in model.named_parameters()}


def batches(
    data: Split, steps: int, size: int = 64, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields training batches in random order."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data.train_images), (size,), generator=generator)
        yield data.train_images[rows], data.train_labels[rows]


def train(
    forward: Callable[[Params, Tensor], Tensor],
    params: Params,
    data: Split,
    steps: int,
    rate: Callable[[int], float],
) -> Params:
    """Returns params after AdamW on the cross entropy of forward(params, images)."""

    def loss(params: Params, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(forward(params, images), labels)

    state = adam_init(params)
    for step, batch in enumerate(batches(data, steps)):
        params, state = adam_step(params, torch.func.grad(loss)(params, *batch), state, rate(step))
    return params


def accuracy(forward: Callable[[Params, Tensor], Tensor], params: Params, data: Split) -> float:
    """Returns the share of test images that get their own class, in percent."""
    with torch.no_grad():
        classes = forward(params, data.test_images).argmax(1)
    return 100 * (classes == data.test_labels).float().mean().item()
