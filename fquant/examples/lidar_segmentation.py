"""Semantic segmentation of LiDAR points by a sparse U-Net: float, PTQ, QAT and int8 in one table.

    python -m fquant.examples.lidar_segmentation [--seed N] [--picture FILE] [--quick] [--synthetic]

With real data (`pdal_autzen.npz`, airborne LiDAR, found in `$FQUANT_DATA/lidar` or
`../shared/data/lidar`): four classes of height over the ground, learnt from intensity, color,
return number and shape, tested on tiles held back. `--validate` tests on a part of the training tiles
instead, which is how the rate was chosen. Without it: synthetic scans of a spinning sensor
with the classes ground, vegetation and building. Which layers run in int8 is chosen by measured
times; the first and the last stay in float.
"""

import argparse
import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fquant.examples import sparse_recipe as recipe
from fquant.examples.sparse_recipe import Batch, Row
from fquant.qat import fine_tuning
from fquant.sparse import from_points
from fquant.sparse_network import (
    Choice,
    Layer,
    choose_int8,
    describe_choices,
    measured_times,
)
from fquant.testing import scenes

DATA = "pdal_autzen.npz"
HEIGHTS = ("below 1 ft", "1 to 6 ft", "6 to 20 ft", "over 20 ft")
COLORS = ("#b9a27f", "#5aa05a", "#4878a8", "#c0504d")


class Cloud(NamedTuple):
    """Points of one scan.

    Attributes:
        points: `(P, 3)` positions, up last.
        features: `(P, C)`.
        labels: `(P,)` classes.
    """

    points: Tensor
    features: Tensor
    labels: Tensor


class Task(NamedTuple):
    """Clouds to learn from and to test on, with the names of the classes and the size of a voxel."""

    train: list[Cloud]
    test: list[Cloud]
    classes: tuple[str, ...]
    voxel: tuple[float, float, float]


class Result(NamedTuple):
    """What came out: the rows of the table, the labels they are measured on, and what ran in int8."""

    rows: list[Row]
    labels: Tensor
    choices: tuple[Choice, ...]
    classes: tuple[str, ...]


def unet(
    in_channels: int, num_classes: int, widths: Sequence[int] = (16, 32, 48)
) -> tuple[Layer, ...]:
    """Returns a U-Net of three levels with residuals: kernels of 3, strides of 2, skips joined."""
    a, b, c = widths
    return (
        Layer("stem", "subm", (in_channels, a)),
        Layer("fine", "subm", (a, a), residual="stem"),
        Layer("down1", "conv", (a, b), 3, 2, 1),
        Layer("middle", "subm", (b, b), residual="down1"),
        Layer("down2", "conv", (b, c), 3, 2, 1),
        Layer("coarse", "subm", (c, c), residual="down2"),
        Layer("up2", "inverse", (c, b), 3, undoes="down2"),
        Layer("join1", "subm", (2 * b, b), inputs=("up2", "middle")),
        Layer("up1", "inverse", (b, a), 3, undoes="down1"),
        Layer("join0", "subm", (2 * a, a), inputs=("up1", "fine")),
        Layer("head", "subm", (a, num_classes), 1, relu=False),
    )


def airborne(path: Path, validate: bool = False) -> Task:
    """Returns the airborne LiDAR tiles: every third diagonal of tiles of 140 feet is for testing.

    With validate, those tiles are left out, and every fourth diagonal the other way among the rest is
    for testing.
    """
    data = scenes.load_arrays(path)
    xyz, returns = data["xyz"], data["returns"].astype(np.float32)
    features = np.concatenate(
        [
            np.ones((len(xyz), 1)),
            np.log1p(data["intensity"].astype(np.float32))[:, None] / 6,
            data["rgb"] / 255.0,
            (returns[:, 0] / returns[:, 1].clip(1))[:, None],
        ],
        axis=1,
    ).astype(np.float32)
    column, row = (np.floor(xyz[:, i] / 140).astype(int) for i in (0, 1))
    test = (column + row) % 3 == 2
    train = ~test
    if validate:
        test = train & ((column - row) % 4 == 0)
        train &= ~test

    def cloud(chosen: np.ndarray) -> Cloud:
        labels = data["label_hag"][chosen].astype(np.int64)
        return Cloud(*map(torch.from_numpy, (xyz[chosen], features[chosen], labels)))

    return Task([cloud(train)], [cloud(test)], HEIGHTS, (5.0, 5.0, 2.0))


def synthetic(train: int, test: int, sensor: scenes.Sensor | None = None) -> Task:
    """Returns scans of generated scenes, each scene in one scan."""
    if sensor is None:
        kitti = scenes.SENSORS["kitti"]
        sensor = dataclasses.replace(kitti, beams=32, columns=720, plants=80, walls=20)

    def cloud(seed: int) -> Cloud:
        points, classes = scenes.labelled_scan(dataclasses.replace(sensor, seed=seed))
        distance = np.linalg.norm(points, axis=1)
        features = np.stack([np.ones(len(points)), points[:, 2] / 3, distance / 50], axis=1)
        return Cloud(
            torch.from_numpy(points.astype(np.float32)),
            torch.from_numpy(features.astype(np.float32)),
            torch.from_numpy(classes),
        )

    clouds = [cloud(1000 + i) for i in range(train + test)]
    return Task(clouds[:train], clouds[train:], scenes.CLASSES, (0.3, 0.3, 0.2))


def voxelized(layers: Sequence[Layer], cloud: Cloud, voxel: Sequence[float]) -> Batch:
    """Returns the cloud as a batch: the mean feature of each voxel, and the voxel of each point."""
    size = torch.tensor(voxel)
    lower = cloud.points.amin(0)
    cells = ((cloud.points - lower).double() / size).floor().amax(0) + 1
    x, row = from_points(
        cloud.points - lower, cloud.features, list(voxel), [0.0] * 3, (cells * size).tolist()
    )
    return recipe.make_batch(layers, x, row, cloud.labels)


def augmented(cloud: Cloud, generator: torch.Generator) -> Cloud:
    """Returns the cloud turned about the vertical, scaled, thinned, with other light and colors."""
    angle, mirror, size, keep = torch.rand(4, generator=generator).tolist()
    turn = torch.tensor(2 * torch.pi * angle)
    across = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()]).view(2, 2)
    across = across * (0.9 + 0.2 * size)
    across = across * torch.tensor([1.0 if mirror < 0.5 else -1.0, 1.0])
    kept = torch.rand(len(cloud.points), generator=generator) < 0.6 + 0.4 * keep
    points = cloud.points[kept]
    points = torch.cat([points[:, :2] @ across.T, points[:, 2:]], dim=1)
    features = cloud.features[kept]
    light = 1 + 0.1 * torch.randn(features.shape[1], generator=generator)
    noise = 0.02 * torch.randn(features.shape, generator=generator)
    return Cloud(points, features * light + noise, cloud.labels[kept])


def training_batches(layers: Sequence[Layer], task: Task, steps: int, seed: int) -> Iterator[Batch]:
    """Yields one augmented cloud a step."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        cloud = augmented(task.train[step % len(task.train)], generator)
        yield voxelized(layers, cloud, task.voxel)


def intersection_over_union(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Returns, per class, the share of points in both among those in either, in percent."""
    pairs = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    both = pairs.view(num_classes, num_classes).double()
    return 100 * both.diag() / (both.sum(0) + both.sum(1) - both.diag()).clamp(min=1)


def run(
    task: Task,
    steps: int = 160,
    rate: float = 3e-3,
    seed: int = 0,
    repeats: int = 5,
    progress: bool | None = None,
) -> Result:
    """Trains, quantizes, fine-tunes and compares; prints what it finds."""
    layers = unet(task.train[0].features.shape[1], len(task.classes))
    machine, times = measured_times()
    choices = choose_int8(layers, times)
    print(f"int8 or float32 by times measured on {machine['cpu']}, {machine['isa']}:")
    print(describe_choices(choices))
    int8 = frozenset(choice.layer for choice in choices if choice.int8)

    batches = training_batches(layers, task, steps, seed)
    trained = recipe.train_float(layers, 3, batches, steps, rate, seed, progress)
    calibration = [voxelized(layers, cloud, task.voxel) for cloud in task.train]
    ptq = recipe.quantize_network(layers, 3, int8, trained, calibration, progress)
    schedule = fine_tuning(steps, rate)
    batches = training_batches(layers, task, schedule.steps, seed + 1)
    qat = recipe.fine_tune(layers, ptq, batches, schedule, progress)

    test = [voxelized(layers, cloud, task.voxel) for cloud in task.test]
    rows = recipe.compare(layers, ptq, qat, test, repeats)
    labels = torch.cat([batch.labels for batch in test])
    result = Result(rows, labels, choices, task.classes)
    count = len(task.classes)
    metrics = {"mIoU %": lambda p, labels: intersection_over_union(p, labels, count).mean().item()}
    print(f"\n{recipe.table(rows, labels, metrics, 'ms / scan')}")
    return result


def save_picture(path: Path, cloud: Cloud, result: Result) -> bool:
    """Draws the first test cloud from above; returns whether matplotlib was there to do it."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    count = len(cloud.points)
    by_name = {row.name: row.logits[:count].argmax(1) for row in result.rows}
    panels = {
        "labels": cloud.labels,
        "float": by_name["float"],
        "int8 after QAT": by_name["QAT, int8"],
    }
    x, y = cloud.points[:, 0], cloud.points[:, 1]
    wide = (x.amax() - x.amin()) > (y.amax() - y.amin())
    figure = Figure(figsize=(7, 7.6) if wide else (9, 3.6), layout="constrained")
    axes = figure.subplots(3, 1) if wide else figure.subplots(1, 3)
    for axis, (title, classes) in zip(axes, panels.items(), strict=True):
        colors = ListedColormap(COLORS[: len(result.classes)])
        drawn = axis.scatter(
            x, y, c=classes, cmap=colors, vmin=-0.5, vmax=len(result.classes) - 0.5, s=0.6, lw=0
        )
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
    handles = [
        axes[0].scatter([], [], color=COLORS[i], label=name)
        for i, name in enumerate(result.classes)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    del drawn
    figure.savefig(path, dpi=80)
    return True


def main(arguments: Sequence[str] | None = None) -> Result:
    """Runs the example from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds: small and untrained")
    parser.add_argument("--synthetic", action="store_true", help="generated scans in any case")
    parser.add_argument("--picture", type=Path, help="where to draw the predictions")
    parser.add_argument("--validate", action="store_true", help="test on training tiles held back")
    parser.add_argument("--rate", type=float, default=3e-3, help="of the float training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    progress = False if options.no_progress else None
    folder = scenes.data_folder()
    if options.quick:
        small = dataclasses.replace(
            scenes.SENSORS["kitti"], beams=16, columns=180, plants=40, walls=12
        )
        task = synthetic(4, 1, small)
        result = run(task, 8, options.rate, options.seed, repeats=1, progress=progress)
    else:
        real = folder is not None and (folder / DATA).exists() and not options.synthetic
        if real and folder is not None:
            task = airborne(folder / DATA, options.validate)
        else:
            task = synthetic(12, 4)
        result = run(task, rate=options.rate, seed=options.seed, progress=progress)
    if options.picture:
        drawn = save_picture(options.picture, task.test[0], result)
        print(f"picture: {options.picture}" if drawn else "picture: none, matplotlib is missing")
    return result


if __name__ == "__main__":
    main()
