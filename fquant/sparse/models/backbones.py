"""Backbones of LiDAR detectors, and the net that spconv is timed with."""

import itertools
from collections.abc import Sequence

from torch import nn as torch_nn

from fquant.sparse import nn
from fquant.sparse.geometry import Sizes
from fquant.sparse.models.blocks import SparseBasicBlock, conv_norm_relu, scaled
from fquant.sparse.tensor import SparseTensor

_MOMENTUM, _EPS = 0.01, 1e-3  # what detectors train with


class BenchmarkNet(nn.SparseSequential):
    """spconv's benchmark net: seven levels of two submanifold convolutions, with max pools between.

    No bias, no norm, no activation, as there. Input: 3 channels on a grid of about
    (80, 1600, 1600); output: 256 channels at 1/64 of the resolution.

    Args:
        in_channels: channels of the input.
        width: factor on all channel counts.

    References:
        spconv, benchmark folder.
    """

    def __init__(self, in_channels: int = 3, width: float = 1.0) -> None:
        widths = scaled((64, 96, 128, 160, 192, 224, 256), width)
        layers: list[torch_nn.Module] = []
        for level, (before, after) in enumerate(itertools.pairwise([in_channels, *widths])):
            if level:
                layers.append(nn.SparseMaxPool3d(2, 2))
            key = f"subm{level}"
            layers.append(nn.SubMConv3d(before, after, 3, bias=False, indice_key=key))
            layers.append(nn.SubMConv3d(after, after, 3, bias=False, indice_key=key))
        super().__init__(*layers)


class _Backbone8x(nn.SparseModule):
    """`conv_input`, `conv1` to `conv4` and `conv_out`, as OpenPCDet names them."""

    conv_input: torch_nn.Module
    conv1: torch_nn.Module
    conv2: torch_nn.Module
    conv3: torch_nn.Module
    conv4: torch_nn.Module
    conv_out: torch_nn.Module

    def levels(self, x: SparseTensor) -> list[SparseTensor]:
        """Returns the features after conv1 to conv4, at 1, 1/2, 1/4 and 1/8 of the resolution."""
        found = []
        x = self.conv_input(x)
        for stage in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = stage(x)
            found.append(x)
        return found

    def forward(self, x: SparseTensor) -> SparseTensor:
        return self.conv_out(self.levels(x)[-1])


class VoxelBackBone8x(_Backbone8x):
    """The backbone of SECOND: convolutions to 1/8 of the resolution, then half the height.

    Every convolution is followed by batch norm and ReLU. Axes are (z, y, x); KITTI's grid is
    (41, 1600, 1408). Parameters have OpenPCDet's names and shapes.

    Args:
        in_channels: channels of the input.
        width: factor on all channel counts.
        last_padding: padding of the last convolution.

    Example:
        >>> model = fquant.sparse.models.VoxelBackBone8x(width=0.25)
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.ones(1, 4, 25, 16, 16))
        >>> model.eval()(x).spatial_shape
        (1, 2, 2)

    References:
        Yan, Mao, Li 2018, SECOND: Sparsely Embedded Convolutional Detection, Sensors 18(10).
    """

    def __init__(self, in_channels: int = 4, width: float = 1.0, last_padding: Sizes = 0) -> None:
        super().__init__()
        c1, c2, c3, c4 = scaled((16, 32, 64, 128), width)
        self.conv_input = _subm(in_channels, c1, 1)
        self.conv1 = nn.SparseSequential(_subm(c1, c1, 1))
        self.conv2 = _stage(c1, c2, 2, 1)
        self.conv3 = _stage(c2, c3, 3, 1)
        self.conv4 = _stage(c3, c3, 4, (0, 1, 1))
        self.conv_out = _height(c3, c4, last_padding)


class VoxelResBackBone8x(_Backbone8x):
    """The residual backbone of CenterPoint: two blocks a level, to 1/8 of the resolution.

    Axes are (z, y, x); its nuScenes grid is (41, 1440, 1440). Parameters have OpenPCDet's names and
    shapes.

    Args:
        in_channels: channels of the input.
        width: factor on all channel counts.
        last_padding: padding of the last convolution.
        block_bias: whether the blocks' convolutions have a bias, as in OpenPCDet's checkpoints.

    Example:
        >>> model = fquant.sparse.models.VoxelResBackBone8x(width=0.25)
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.ones(1, 5, 25, 16, 16))
        >>> model.eval()(x).spatial_shape
        (1, 2, 2)

    References:
        Yin, Zhou, Kraehenbuehl 2021, Center-based 3D Object Detection and Tracking, arXiv 2006.11275.
    """

    def __init__(
        self,
        in_channels: int = 5,
        width: float = 1.0,
        last_padding: Sizes = 0,
        block_bias: bool = True,
    ) -> None:
        super().__init__()
        c1, c2, c3, c4 = scaled((16, 32, 64, 128), width)

        def blocks(channels: int, level: int) -> list[SparseBasicBlock]:
            return [
                SparseBasicBlock(
                    channels,
                    channels,
                    bias=block_bias,
                    momentum=_MOMENTUM,
                    eps=_EPS,
                    indice_key=f"subm{level}",
                )
                for _ in range(2)
            ]

        self.conv_input = _subm(in_channels, c1, 1)
        self.conv1 = nn.SparseSequential(*blocks(c1, 1))
        self.conv2 = nn.SparseSequential(_down(c1, c2, 2, 1), *blocks(c2, 2))
        self.conv3 = nn.SparseSequential(_down(c2, c3, 3, 1), *blocks(c3, 3))
        self.conv4 = nn.SparseSequential(_down(c3, c4, 4, (0, 1, 1)), *blocks(c4, 4))
        self.conv_out = _height(c4, c4, last_padding)


def _subm(before: int, after: int, level: int) -> nn.SparseSequential:
    conv = nn.SubMConv3d(before, after, 3, bias=False, indice_key=f"subm{level}")
    return conv_norm_relu(conv, after, _MOMENTUM, _EPS)


def _down(before: int, after: int, level: int, padding: Sizes) -> nn.SparseSequential:
    conv = nn.SparseConv3d(
        before, after, 3, stride=2, padding=padding, bias=False, indice_key=f"spconv{level}"
    )
    return conv_norm_relu(conv, after, _MOMENTUM, _EPS)


def _stage(before: int, after: int, level: int, padding: Sizes) -> nn.SparseSequential:
    return nn.SparseSequential(
        _down(before, after, level, padding),
        _subm(after, after, level),
        _subm(after, after, level),
    )


def _height(before: int, after: int, padding: int | Sequence[int]) -> nn.SparseSequential:
    """Halves the grid in z only."""
    conv = nn.SparseConv3d(
        before,
        after,
        (3, 1, 1),
        stride=(2, 1, 1),
        padding=padding,
        bias=False,
        indice_key="spconv_down2",
    )
    return conv_norm_relu(conv, after, _MOMENTUM, _EPS)
