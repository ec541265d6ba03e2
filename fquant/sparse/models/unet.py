"""A U-Net for semantic segmentation."""

import itertools
from collections.abc import Sequence

from torch import nn as torch_nn

from fquant.sparse import nn
from fquant.sparse.combine import join_features
from fquant.sparse.models.blocks import (
    INVERSE_CONV,
    SPARSE_CONV,
    SUBM_CONV,
    SparseBasicBlock,
    conv_norm_relu,
    scaled,
)
from fquant.sparse.tensor import SparseTensor

MINK_UNET_WIDTHS = (32, 32, 64, 128, 256, 256, 128, 96, 96)


class MinkUNet(nn.SparseModule):
    """A U-Net in the manner of MinkUNet: logits at every cell of the input.

    The stem is two convolutions. Each level down is a convolution of kernel and stride 2 and two
    residual blocks; each level up an inverse convolution, the encoder's features of that level beside
    its own, and two residual blocks. Batch norm and ReLU follow every convolution.

    Args:
        in_channels: channels of the input.
        num_classes: channels of the output, by a linear layer; None for the last features.
        widths: channels of the stem, of each level down, and of each level up: an odd number.
        width: factor on widths.
        axes: spatial axes, 1 to 4.

    Raises:
        ValueError: widths are not an odd number of at least three.

    Example:
        >>> model = fquant.sparse.models.MinkUNet(1, 10, widths=(4, 8, 4), axes=2)
        >>> x = fquant.sparse.SparseTensor.from_dense(torch.ones(1, 1, 4, 4))
        >>> model.eval()(x).features.shape
        torch.Size([16, 10])

    References:
        Choy, Gwak, Savarese 2019, 4D Spatio-Temporal ConvNets, arXiv 1904.08755; widths, and features
        of the encoder behind those of the decoder: Tang et al. 2020, SPVNAS, arXiv 2007.16100.
    """

    def __init__(
        self,
        in_channels: int = 4,
        num_classes: int | None = 19,
        widths: Sequence[int] = MINK_UNET_WIDTHS,
        width: float = 1.0,
        axes: int = 3,
    ) -> None:
        super().__init__()
        if len(widths) < 3 or len(widths) % 2 == 0:
            raise ValueError(
                f"MinkUNet: widths must be an odd number of at least three, got {tuple(widths)}."
            )
        levels = len(widths) // 2
        channels = scaled(widths, width)
        subm, conv, inverse = SUBM_CONV[axes], SPARSE_CONV[axes], INVERSE_CONV[axes]
        stem = channels[0]
        self.stem = nn.SparseSequential(
            conv_norm_relu(subm(in_channels, stem, 3, bias=False, indice_key="subm0"), stem),
            conv_norm_relu(subm(stem, stem, 3, bias=False, indice_key="subm0"), stem),
        )
        down, up = [], []
        for level, (before, after) in enumerate(itertools.pairwise(channels[: levels + 1])):
            step = conv(before, before, 2, stride=2, bias=False, indice_key=f"down{level}")
            down.append(
                nn.SparseSequential(
                    conv_norm_relu(step, before), *_blocks(before, after, axes, level + 1)
                )
            )
        for i, (before, after) in enumerate(itertools.pairwise(channels[levels:])):
            level = levels - 1 - i
            back = inverse(before, after, 2, indice_key=f"down{level}", bias=False)
            blocks = _blocks(after + channels[level], after, axes, level)
            up.append(_Up(conv_norm_relu(back, after), nn.SparseSequential(*blocks)))
        self.down = torch_nn.ModuleList(down)
        self.up = torch_nn.ModuleList(up)
        self.classifier: torch_nn.Module | None = None
        if num_classes is not None:
            self.classifier = torch_nn.Linear(channels[-1], num_classes)

    def forward(self, x: SparseTensor) -> SparseTensor:
        x = self.stem(x)
        kept = []
        for stage in self.down:
            kept.append(x)
            x = stage(x)
        for stage in self.up:
            x = stage(x, kept.pop())
        return x if self.classifier is None else x.map(self.classifier)


class _Up(nn.SparseModule):
    """One level up: `conv`, the encoder's features beside, `blocks`."""

    def __init__(self, conv: torch_nn.Module, blocks: torch_nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.blocks = blocks

    def forward(self, x: SparseTensor, skip: SparseTensor) -> SparseTensor:
        return self.blocks(join_features(self.conv(x), skip))


def _blocks(before: int, after: int, axes: int, level: int) -> list[torch_nn.Module]:
    return [
        SparseBasicBlock(channels, after, axes, indice_key=f"subm{level}")
        for channels in (before, after)
    ]
