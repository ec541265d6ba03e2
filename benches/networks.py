"""Sparse networks as lists of steps, the way their papers and repositories give them.

Sources: spconv's benchmark net (spconv/benchmark); VoxelBackBone8x (OpenPCDet) and
VoxelResBackBone8x (CenterPoint), backbones of LiDAR detectors; MinkUNet at width 1 (SPVNAS).
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

Sizes = tuple[int, int, int]


class Step(NamedTuple):
    """One layer, or one move of features.

    Attributes:
        kind: "subm", "conv", "inverse" (undoes the latest open "conv"), "pool"; "keep", "add" and
            "concat" store features and bring them back.
        channels: input and output channels of a convolution.
        kernel: taps per axis (z, y, x).
        stride: of "conv" and "pool".
        padding: of "conv".
        add: name of kept features, added before the activation.
        name: of "keep" and "concat".
        relu: whether the convolution ends in ReLU.
    """

    kind: str
    channels: tuple[int, int] = (0, 0)
    kernel: Sizes = (3, 3, 3)
    stride: Sizes = (1, 1, 1)
    padding: Sizes = (0, 0, 0)
    add: str = ""
    name: str = ""
    relu: bool = True


def subm(cin: int, cout: int, **options: object) -> Step:
    return Step("subm", (cin, cout), **options)  # type: ignore[arg-type]


def down(cin: int, cout: int, kernel: int = 3, padding: Sizes = (1, 1, 1)) -> Step:
    return Step("conv", (cin, cout), (kernel,) * 3, (2, 2, 2), padding)


def height(cin: int, cout: int) -> Step:
    """The last layer of the detectors' backbones: halves the grid in z only."""
    return Step("conv", (cin, cout), (3, 1, 1), (2, 1, 1))


def block(cin: int, cout: int, name: str) -> list[Step]:
    """A residual block; its shortcut is a 1 x 1 convolution where widths differ."""
    first = [Step("keep", name=name), subm(cin, cout)]
    if cin == cout:
        return [*first, subm(cout, cout, add=name)]
    shortcut = [
        Step("keep", name=f"{name}.main"),
        Step("back", name=name),
        subm(cin, cout, kernel=(1, 1, 1), relu=False),
        Step("keep", name=f"{name}.shortcut"),
        Step("back", name=f"{name}.main"),
    ]
    return [*first, *shortcut, subm(cout, cout, add=f"{name}.shortcut")]


def benchmark_net() -> list[Step]:
    widths = [64, 96, 128, 160, 192, 224, 256]
    steps = [subm(3, 64), subm(64, 64)]
    for before, after in itertools.pairwise(widths):
        steps.append(Step("pool", kernel=(2, 2, 2), stride=(2, 2, 2)))
        steps += [subm(before, after), subm(after, after)]
    return steps


def voxel_backbone() -> list[Step]:
    steps = [subm(4, 16), subm(16, 16)]
    for cin, cout, padding in ((16, 32, 1), (32, 64, 1), (64, 64, 0)):
        steps += [down(cin, cout, padding=(padding, 1, 1)), subm(cout, cout), subm(cout, cout)]
    return [*steps, height(64, 128)]


def voxel_res_backbone() -> list[Step]:
    steps = [subm(5, 16), *block(16, 16, "0.0"), *block(16, 16, "0.1")]
    levels = ((16, 32, 1), (32, 64, 1), (64, 128, 0))
    for i, (cin, cout, padding) in enumerate(levels, start=1):
        steps.append(down(cin, cout, padding=(padding, 1, 1)))
        steps += [*block(cout, cout, f"{i}.0"), *block(cout, cout, f"{i}.1")]
    return [*steps, height(128, 128)]


def mink_unet() -> list[Step]:
    steps = [subm(4, 32), subm(32, 32)]
    widths = [32, 32, 64, 128, 256]
    for i in range(4):
        cin, cout = widths[i], widths[i + 1]
        steps += [Step("keep", name=f"level{i}"), down(cin, cin, 2, (0, 0, 0))]
        steps += [*block(cin, cout, f"down{i}.0"), *block(cout, cout, f"down{i}.1")]
    for i, (cin, cout) in enumerate(((256, 256), (256, 128), (128, 96), (96, 96))):
        level = 3 - i
        steps += [
            Step("inverse", (cin, cout), (2, 2, 2)),
            Step("concat", name=f"level{level}"),
            *block(cout + widths[level], cout, f"up{i}.0"),
            *block(cout, cout, f"up{i}.1"),
        ]
    return steps


# Name: the steps, the scene of `fquant.testing.scenes`, and the least grid the network is used with.
NETWORKS: dict[str, tuple[Callable[[], list[Step]], str, Sizes]] = {
    "benchmark_net": (benchmark_net, "nuscenes", (80, 1600, 1600)),
    "VoxelBackBone8x": (voxel_backbone, "waymo", (41, 1504, 1504)),
    "VoxelResBackBone8x": (voxel_res_backbone, "nuscenes", (41, 1440, 1440)),
    "MinkUNet": (mink_unet, "kitti", (16, 16, 16)),
}
