"""Lists of layers made from modules compute what the modules do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn as torch_nn
from torch.func import functional_call

from fquant.sparse import SparseTensor, add_features, join_features, models, nn
from fquant.sparse_network import SparseNetwork, list_layers, make_maps


def scene(channels, size, axes, density):
    g = torch.Generator().manual_seed(0)
    shape = (1, 1, *[size] * axes)
    x = SparseTensor.from_dense((torch.rand(shape, generator=g) < density).float())
    return x.with_features(torch.randn(len(x.coords), channels, generator=g))


def with_statistics(model):
    g = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=g) + 0.01)
        elif name.endswith("running_mean"):
            buffer.copy_(0.01 * torch.randn(buffer.shape, generator=g))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=g))
    return model.eval()


def same(model, x, axes=3):
    listed = list_layers(model)
    params = listed.params(model.state_dict())
    network = SparseNetwork(listed.layers, axes, batch_norm=False)
    assert params.keys() == network.state_dict().keys()
    maps = make_maps(listed.layers, x)
    with torch.no_grad():
        expected, actual = model(x), functional_call(network, params, (x, maps))
    assert torch.equal(actual.coords, expected.coords)
    size = expected.features.abs().max()
    assert size > 0
    # Batch norm folded: another order of float32 operations, through tens of layers.
    assert torch.allclose(actual.features, expected.features, rtol=0, atol=1e-4 * float(size))
    return listed


@pytest.mark.parametrize(
    ("make", "channels", "size", "residuals"),
    [
        (models.MinkUNet, 4, 20, 16),
        (models.VoxelResBackBone8x, 5, 40, 8),
        (models.VoxelBackBone8x, 4, 40, 0),
    ],
)
def test_networks_of_the_literature(make, channels, size, residuals):
    model = with_statistics(make(in_channels=channels, width=0.25))
    listed = same(model, scene(channels, size, 3, 0.02))
    assert sum(bool(layer.residual) for layer in listed.layers) == residuals


def test_pools_and_dilation():
    model = nn.SparseSequential(
        nn.SubMConv2d(3, 4, 3, dilation=2),
        nn.SparseReLU(),
        nn.SparseMaxPool2d(2, 2),
        nn.SparseConv2d(4, 4, (3, 1), stride=(2, 1), padding=(1, 0)),
        torch_nn.ReLU(),
        torch_nn.Linear(4, 5),
    )
    with_statistics(model)
    listed = same(model, scene(3, 12, 2, 0.3), axes=2)
    assert [layer.op for layer in listed.layers] == ["subm", "max_pool", "conv", "linear"]


@given(width=st.sampled_from([0.25, 0.5]), axes=st.integers(1, 3))
def test_u_nets_of_any_number_of_axes(width, axes):
    model = models.MinkUNet(2, 3, widths=(8, 8, 16, 8, 8), width=width, axes=axes)
    same(with_statistics(model), scene(2, 9, axes, 0.5), axes)


class OnFeatures(torch_nn.Module):
    """Features taken out and put back, as forwards for spconv do."""

    def __init__(self, last=lambda x, y: torch.cat([x.features, y.features], dim=1)):
        super().__init__()
        self.first, self.second = (nn.SubMConv2d(3, 3, 3, bias=False) for _ in range(2))
        self.norm = torch_nn.BatchNorm1d(3)
        self.head = nn.SubMConv2d(6, 2, 1)
        self.last = last

    def forward(self, x):
        x = self.first(x)
        x = x.replace_feature(torch.relu(self.norm(x.features)))
        y = self.second(x)
        y = y.with_features(y.features + x.features)
        return self.head(y.replace_feature(self.last(x, y)))


def test_forwards_on_features_are_listed_as_they_are():
    torch.manual_seed(0)
    listed = same(with_statistics(OnFeatures()), scene(3, 9, 2, 0.4), axes=2)
    assert [layer.residual for layer in listed.layers] == ["", "first", ""]
    assert [layer.relu for layer in listed.layers] == [True, False, False]
    assert listed.layers[-1].inputs == ("first", "second")


class NormAfterSum(OnFeatures):
    def forward(self, x):
        x = self.first(x)
        y = self.second(x)
        return y.with_features(self.norm(y.features + x.features))


class SumOfThree(OnFeatures):
    def forward(self, x):
        x = self.first(x)
        y = self.second(x)
        return (y + x) + x


class TwoReaders(torch_nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.SubMConv1d(2, 2, 3)
        self.last = nn.SubMConv1d(4, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        return self.last(join_features(y, y.map(torch.relu)))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_without_parameters_of_its_own(affine):
    norm = nn.SparseBatchNorm(2, affine=affine)
    model = nn.SparseSequential(nn.SubMConv1d(2, 2, 3), norm).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    listed = list_layers(model)
    x = SparseTensor.from_dense(torch.randn(1, 2, 9))
    network = SparseNetwork(listed.layers, 1, batch_norm=False)
    args = (x, make_maps(listed.layers, x))
    y = functional_call(network, listed.params(model.state_dict()), args)
    assert torch.allclose(y.features, model(x).features, atol=1e-6)
    with pytest.raises(ValueError, match=r"state must have parameters and buffers.*running_mean"):
        listed.params(dict(model.named_parameters()))


class OfThreeArguments(torch_nn.Module):
    def forward(self, features, coords, batch_size=1):
        return features


class SumOfInputs(torch_nn.Module):
    def forward(self, x):
        return add_features(x, x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            OfThreeArguments(),
            r"must take one SparseTensor, got one that takes \['features', 'coords'",
        ),
        (NormAfterSum(), "batch norm that does not follow a convolution"),
        (SumOfThree(), "or of three"),
        (TwoReaders(), "which others read as well"),
        (SumOfInputs(), "which is no convolution's result"),
        (nn.SparseSequential(nn.SubMConv1d(2, 2, 3), nn.SparseAvgPool1d(2)), "SparseAvgPool1d"),
        (
            nn.SparseSequential(nn.SparseInverseConv1d(2, 2, 2, indice_key="down")),
            "the inverse of 'down', which no layer before has",
        ),
        (
            nn.SparseSequential(
                nn.SubMConv1d(2, 2, 3), torch_nn.BatchNorm1d(2, track_running_stats=False)
            ),
            "batch norm without running statistics",
        ),
        (nn.SparseSequential(nn.SubMConv1d(2, 2, 3), torch_nn.Tanh()), "Tanh"),
        (OnFeatures(lambda x, y: torch.cat([x.features, y.features])), "other than channels"),
        (OnFeatures(lambda x, y: y.features + 1), "a sum of"),
        (OnFeatures(lambda x, y: torch.add(x.features, y.features, alpha=2)), "a sum of"),
        (OnFeatures(lambda x, y: y.features * 2), "mul"),
        (OnFeatures(lambda x, y: y.features[:, :1]), "getitem"),
        (
            nn.SparseSequential(nn.SubMConv1d(2, 2, 3), torch_nn.ReLU(), torch_nn.BatchNorm1d(2)),
            "which is no convolution's result",
        ),
    ],
)
def test_what_no_layer_does_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        list_layers(model)
