"""The network: six sparse convolutions, ending in one cell per image."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fquant.demo.data import Maps
from fquant.sparse import KernelMap, SparseTensor, sparse_conv

Site = Callable[[str, SparseTensor], SparseTensor]


def as_it_is(name: str, x: SparseTensor) -> SparseTensor:
    """The site that leaves activations in floating point."""
    return x


class SparseConv(nn.Module):
    """Weight `(out, kernel, kernel, in)` and bias of one convolution, any kernel map."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        shape = (out_channels, kernel_size, kernel_size, in_channels)
        spread = (2 / (kernel_size**2 * in_channels)) ** 0.5  # He et al. 2015, for ReLU
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) * spread)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: SparseTensor, kernel_map: KernelMap) -> SparseTensor:
        return sparse_conv(x, self.weight, self.bias, kernel_map=kernel_map)


class DigitNet(nn.Module):
    """8 x 8 pixels to 10 logits; every activation passes a named site.

    A site is where quantization is put, as an argument: the module itself never changes.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.stem = SparseConv(1, 32, 3, generator)
        self.block = SparseConv(32, 32, 3, generator)
        self.down = SparseConv(32, 64, 2, generator)
        self.coarse = SparseConv(64, 64, 3, generator)
        self.patch = SparseConv(64, 128, 2, generator)
        self.head = SparseConv(128, 10, 2, generator)

    def forward(self, x: SparseTensor, maps: Maps, site: Site = as_it_is) -> Tensor:
        """Returns logits `(images, 10)`, in the order of the images."""
        x = site("input", x)
        x = site("stem", self.stem(x, maps.fine).map(torch.relu))
        y = self.block(x, maps.fine)
        x = site("block", y.with_features(torch.relu(y.features + x.features)))
        x = site("down", self.down(x, maps.fine_to_coarse).map(torch.relu))
        x = site("coarse", self.coarse(x, maps.coarse).map(torch.relu))
        x = site("patch", self.patch(x, maps.coarse_to_patch).map(torch.relu))
        return self.head(x, maps.patch_to_image).features


SITES = ("input", "stem", "block", "down", "coarse", "patch")
