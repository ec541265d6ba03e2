"""The layers over one to four axes, under the names that spconv gives them."""

from fquant.sparse.nn.convolution import (
    SparseConv,
    SparseConvTranspose,
    SparseInverseConv,
    SubMConv,
)
from fquant.sparse.nn.pooling import SparseAvgPool, SparseMaxPool


class SubMConv1d(SubMConv):
    """`SubMConv` over one axis."""

    axes = 1


class SubMConv2d(SubMConv):
    """`SubMConv` over two axes."""

    axes = 2


class SubMConv3d(SubMConv):
    """`SubMConv` over three axes."""

    axes = 3


class SubMConv4d(SubMConv):
    """`SubMConv` over four axes."""

    axes = 4


class SparseConv1d(SparseConv):
    """`SparseConv` over one axis."""

    axes = 1


class SparseConv2d(SparseConv):
    """`SparseConv` over two axes."""

    axes = 2


class SparseConv3d(SparseConv):
    """`SparseConv` over three axes."""

    axes = 3


class SparseConv4d(SparseConv):
    """`SparseConv` over four axes."""

    axes = 4


class SparseConvTranspose1d(SparseConvTranspose):
    """`SparseConvTranspose` over one axis."""

    axes = 1


class SparseConvTranspose2d(SparseConvTranspose):
    """`SparseConvTranspose` over two axes."""

    axes = 2


class SparseConvTranspose3d(SparseConvTranspose):
    """`SparseConvTranspose` over three axes."""

    axes = 3


class SparseConvTranspose4d(SparseConvTranspose):
    """`SparseConvTranspose` over four axes."""

    axes = 4


class SparseInverseConv1d(SparseInverseConv):
    """`SparseInverseConv` over one axis."""

    axes = 1


class SparseInverseConv2d(SparseInverseConv):
    """`SparseInverseConv` over two axes."""

    axes = 2


class SparseInverseConv3d(SparseInverseConv):
    """`SparseInverseConv` over three axes."""

    axes = 3


class SparseInverseConv4d(SparseInverseConv):
    """`SparseInverseConv` over four axes."""

    axes = 4


class SparseMaxPool1d(SparseMaxPool):
    """`SparseMaxPool` over one axis."""

    axes = 1


class SparseMaxPool2d(SparseMaxPool):
    """`SparseMaxPool` over two axes."""

    axes = 2


class SparseMaxPool3d(SparseMaxPool):
    """`SparseMaxPool` over three axes."""

    axes = 3


class SparseMaxPool4d(SparseMaxPool):
    """`SparseMaxPool` over four axes."""

    axes = 4


class SparseAvgPool1d(SparseAvgPool):
    """`SparseAvgPool` over one axis."""

    axes = 1


class SparseAvgPool2d(SparseAvgPool):
    """`SparseAvgPool` over two axes."""

    axes = 2


class SparseAvgPool3d(SparseAvgPool):
    """`SparseAvgPool` over three axes."""

    axes = 3


class SparseAvgPool4d(SparseAvgPool):
    """`SparseAvgPool` over four axes."""

    axes = 4
