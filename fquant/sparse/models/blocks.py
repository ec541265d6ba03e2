"""Building blocks of the networks."""

from collections.abc import Sequence

from torch import nn as torch_nn

from fquant.sparse import nn
from fquant.sparse.combine import add_features
from fquant.sparse.geometry import Sizes
from fquant.sparse.tensor import SparseTensor

# By number of axes, for networks of any.
SUBM_CONV = {c.axes: c for c in (nn.SubMConv1d, nn.SubMConv2d, nn.SubMConv3d, nn.SubMConv4d)}
SPARSE_CONV = {
    c.axes: c for c in (nn.SparseConv1d, nn.SparseConv2d, nn.SparseConv3d, nn.SparseConv4d)
}
INVERSE_CONV = {
    c.axes: c
    for c in (
        nn.SparseInverseConv1d,
        nn.SparseInverseConv2d,
        nn.SparseInverseConv3d,
        nn.SparseInverseConv4d,
    )
}


def conv_norm_relu(
    conv: torch_nn.Module, channels: int, momentum: float = 0.1, eps: float = 1e-5
) -> nn.SparseSequential:
    """Returns conv, batch norm over `channels`, ReLU, in a SparseSequential (keys 0, 1, 2)."""
    return nn.SparseSequential(
        conv, torch_nn.BatchNorm1d(channels, eps=eps, momentum=momentum), torch_nn.ReLU()
    )


class SparseBasicBlock(nn.SparseModule):
    """Two submanifold convolutions with batch norm, and the shortcut around them.

        y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))

    The shortcut is x itself, or a 1 x 1 convolution and batch norm (`downsample`) where channels differ.

    Args:
        in_channels: channels of x.
        channels: channels of y.
        axes: spatial axes.
        kernel_size: taps per axis.
        bias: whether the 3 x 3 convolutions have a bias.
        momentum: of batch norm.
        eps: of batch norm.
        indice_key: as of the convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        axes: int = 3,
        kernel_size: Sizes = 3,
        bias: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        indice_key: str | None = None,
    ) -> None:
        super().__init__()
        conv = SUBM_CONV[axes]

        def norm() -> torch_nn.Module:
            return nn.SparseBatchNorm(channels, eps=eps, momentum=momentum)

        self.conv1 = conv(in_channels, channels, kernel_size, bias=bias, indice_key=indice_key)
        self.bn1 = norm()
        self.relu = nn.SparseReLU()
        self.conv2 = conv(channels, channels, kernel_size, bias=bias, indice_key=indice_key)
        self.bn2 = norm()
        self.downsample: nn.SparseSequential | None = None
        if in_channels != channels:
            self.downsample = nn.SparseSequential(
                conv(in_channels, channels, 1, bias=False), norm()
            )

    def forward(self, x: SparseTensor) -> SparseTensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(add_features(y, identity))


def scaled(widths: Sequence[int], width: float) -> list[int]:
    """Returns channel counts times a factor, rounded, at least 1."""
    return [max(1, round(w * width)) for w in widths]
