"""Small models of the kinds that quantization must get right, with example inputs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fquant.sparse import KernelMap, SparseTensor, conv_map, sparse_conv, subm_conv, subm_map


class Example(NamedTuple):
    """A model and what to call it with.

    Attributes:
        build: makes the model, random but for the seed.
        inputs: positional arguments; the first is a float tensor, or tokens.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]

    def model(self) -> nn.Module:
        """The model, always the same, in eval mode and float64."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().eval().double()


class ResidualNet(nn.Module):
    """Convolutions with batch norm and residual sums, in place and not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = (self.first(x) + x).relu()
        y = self.second(x)
        y += x
        return self.head(y.relu().mean(dim=(2, 3)))


class Encoder(nn.Module):
    """torch's own Transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


class Attention(nn.Module):
    """Attention by hand, with a mask, `@`, einsum and a learned matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Parameter(torch.randn(6, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.transpose(-2, -1) / 6**0.5
        future = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
        scores = scores + torch.zeros_like(future, dtype=x.dtype).masked_fill(future, -1e9)
        return (torch.einsum("bts,bsd->btd", scores.softmax(dim=-1), v) @ self.out).mean(dim=1)


class Recurrent(nn.Module):
    """A bidirectional LSTM and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(self.lstm(x)[0])
        return self.head(y[:, -1])


class Tied(nn.Module):
    """One matrix as embedding and as head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        mixed = x @ self.embed(torch.arange(5, device=x.device))
        return self.head(self.body(mixed).tanh())


class UNet(nn.Module):
    """Down and up again, with a grouped transposed convolution and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 4, 2, stride=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.last = nn.ConvTranspose2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.max_pool2d(self.down(x).relu(), 1)).relu()
        return self.last(torch.cat([y, x], dim=1)).mean(dim=(2, 3))


class SparseNet(nn.Module):
    """Submanifold and strided sparse convolutions of features at fixed cells."""

    def __init__(self) -> None:
        super().__init__()
        self.subm = nn.Parameter(torch.randn(4, 3, 3, 2) / 4)
        self.strided = nn.Parameter(torch.randn(3, 2, 2, 4) / 4)
        active = torch.rand(1, 1, 6, 6) < 0.4
        self.cells = SparseTensor.from_dense(active.double())
        self.maps: tuple[KernelMap, KernelMap] = (
            subm_map(self.cells, 3),
            conv_map(self.cells, 2, stride=2),
        )

    def forward(self, features: Tensor) -> Tensor:
        x = subm_conv(
            self.cells.with_features(features[: len(self.cells.coords)]),
            self.subm,
            kernel_map=self.maps[0],
        )
        y = sparse_conv(x.map(torch.relu), self.strided, kernel_map=self.maps[1])
        values = y.features
        assert isinstance(values, Tensor)
        return values.mean(dim=0)


def _normal(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return lambda: (x.clone(),)


EXAMPLES = {
    "residual": Example(ResidualNet, _normal(2, 2, 5, 5)),
    "encoder": Example(Encoder, _normal(2, 3, 8)),
    "attention": Example(Attention, _normal(2, 4, 6)),
    "recurrent": Example(Recurrent, _normal(2, 2, 3)),
    "tied": Example(Tied, _normal(2, 5)),
    "unet": Example(UNet, _normal(2, 2, 4, 4)),
    "sparse": Example(SparseNet, _normal(40, 2)),
}
