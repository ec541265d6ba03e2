"""Images as sparse tensors, classified by a 2-D sparse network: float, PTQ, QAT and int8 in one table.

    python -m fquant.examples.sparse_images [mnist | fashion | digits] [--quick]

Pixels that are not zero are the active cells: 19 % of MNIST, 50 % of Fashion-MNIST. `mnist` and
`fashion` are read from `$FQUANT_DATA` or `../shared/data`; `digits` ships with scikit-learn and is
what runs without them.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fquant.demo.data import load_digits
from fquant.examples import sparse_recipe as recipe
from fquant.examples.sparse_recipe import Batch, Row
from fquant.qat import fine_tuning
from fquant.sparse import SparseTensor
from fquant.sparse_network import Layer, choose_int8, describe_choices, measured_times
from fquant.testing.scenes import data_folder, load_arrays

BATCH_SIZE = 64


class Images(NamedTuple):
    """Images `(N, H, W)` from 0 to `white`, and their classes, to learn from and to test on."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    white: float


class Result(NamedTuple):
    """The rows of the table, and the labels they are measured on."""

    rows: list[Row]
    labels: Tensor


def classifier(num_classes: int = 10) -> tuple[Layer, ...]:
    """Returns two halvings with residual blocks between, a mean over cells, and a linear layer."""
    return (
        Layer("stem", "subm", (1, 16)),
        Layer("fine", "subm", (16, 16), residual="stem"),
        Layer("down1", "conv", (16, 32), 3, 2, 1),
        Layer("middle", "subm", (32, 32), residual="down1"),
        Layer("down2", "conv", (32, 64), 3, 2, 1),
        Layer("coarse", "subm", (64, 64), residual="down2"),
        Layer("mean", "global_avg_pool"),
        Layer("logits", "linear", (64, num_classes)),
    )


def load(name: str) -> Images:
    """Returns "mnist", "fashion" or "digits".

    Raises:
        FileNotFoundError: the data are not there.
    """
    if name == "digits":
        split = load_digits()
        return Images(
            split.train_images[:, 0],
            split.train_labels,
            split.test_images[:, 0],
            split.test_labels,
            1.0,
        )
    folder = data_folder(name)
    if folder is None:
        raise FileNotFoundError(
            f"load: name must be 'digits' where there is no folder {name!r} in $FQUANT_DATA or "
            f"../shared/data, got {name!r}."
        )
    data = load_arrays(folder / f"{name}_open.npz")
    x, y, tx, ty = (torch.from_numpy(data[k]) for k in ("train_x", "train_y", "test_x", "test_y"))
    return Images(x, y.long(), tx, ty.long(), 255.0)


def image_batch(layers: Sequence[Layer], images: Tensor, labels: Tensor, white: float) -> Batch:
    """Returns images as one batch; image i is row i of the network's output."""
    x = SparseTensor.from_dense(images.float().unsqueeze(1) / white)
    return recipe.make_batch(layers, x, torch.arange(len(labels)), labels)


def shuffled(layers: Sequence[Layer], images: Images, steps: int, seed: int) -> Iterator[Batch]:
    """Yields batches of images drawn without replacement, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    left: list[Tensor] = []
    for _ in range(steps):
        if not left:
            left = list(torch.randperm(len(images.train), generator=generator).split(BATCH_SIZE))
        rows = left.pop()
        yield image_batch(layers, images.train[rows], images.train_labels[rows], images.white)


def run(
    images: Images,
    steps: int = 240,
    rate: float = 4e-3,
    seed: int = 0,
    repeats: int = 3,
    progress: bool | None = None,
) -> Result:
    """Trains, quantizes, fine-tunes and compares; prints what it finds."""
    layers = classifier()
    machine, times = measured_times()
    choices = choose_int8(layers, times, axes=2)
    print(f"int8 or float32 by times measured on {machine['cpu']}, {machine['isa']}:")
    print(describe_choices(choices))
    int8 = frozenset(choice.layer for choice in choices if choice.int8)

    batches = shuffled(layers, images, steps, seed)
    trained = recipe.train_float(layers, 2, batches, steps, rate, seed, progress)
    calibration = list(shuffled(layers, images, 8, seed + 1))
    ptq = recipe.quantize_network(layers, 2, int8, trained, calibration, progress)
    schedule = fine_tuning(steps, rate / 10)
    batches = shuffled(layers, images, schedule.steps, seed + 2)
    qat = recipe.fine_tune(layers, ptq, batches, schedule, progress)

    parts = zip(images.test.split(500), images.test_labels.split(500), strict=True)
    test = [image_batch(layers, x, y, images.white) for x, y in parts]
    rows = recipe.compare(layers, ptq, qat, test, repeats)
    print(f"\n{recipe.table(rows, images.test_labels, {}, 'ms / 500')}")
    return Result(rows, images.test_labels)


def main(arguments: Sequence[str] | None = None) -> Result:
    """Runs the example from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "data", nargs="?", choices=("mnist", "fashion", "digits"), help="default: what there is"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds: digits, few steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    progress = False if options.no_progress else None
    if options.quick:
        return run(load("digits"), 16, seed=options.seed, repeats=1, progress=progress)
    name = options.data or ("digits" if data_folder("mnist") is None else "mnist")
    return run(load(name), seed=options.seed, progress=progress)


if __name__ == "__main__":
    main()
