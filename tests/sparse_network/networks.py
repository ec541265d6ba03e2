"""A small network with everything in it, scenes for it, and its quantized forms."""

import torch

import fquant as fq
from fquant.sparse import SparseTensor
from fquant.sparse_network import (
    Layer,
    SparseNetwork,
    convolutions,
    int8_rules,
    make_maps,
    tie_scales,
    to_int8,
)

LAYERS = (
    Layer("stem", "subm", (3, 8)),
    Layer("block", "subm", (8, 8), residual="stem"),
    Layer("down", "conv", (8, 16), 3, 2, 1),
    Layer("deep", "subm", (16, 16), residual="down"),
    Layer("pool", "max_pool", kernel_size=2, stride=2),
    Layer("bottom", "subm", (16, 16)),
    Layer("rise", "inverse", (16, 12), 3, inputs=("deep",), undoes="down"),
    Layer("join", "subm", (20, 8), inputs=("rise", "block"), relu=False),
    Layer("head", "subm", (8, 4), 1, relu=False),
)


def scene(seed, density, batch_size=1, channels=3, axes=2, size=9):
    g = torch.Generator().manual_seed(seed)
    shape = (batch_size, 1, *[size] * axes)
    cells = SparseTensor.from_dense((torch.rand(shape, generator=g) < density).float())
    return cells.with_features(torch.randn(len(cells.coords), channels, generator=g))


def parameters(layers, axes=2, seed=0):
    """Parameters without batch norm, biases not zero."""
    g = torch.Generator().manual_seed(seed + 1)
    model = SparseNetwork(layers, axes, batch_norm=False, seed=seed)
    return {
        name: p.detach() + (0.1 * torch.randn(p.shape, generator=g) if "bias" in name else 0)
        for name, p in model.named_parameters()
    }


def quantized(layers, int8, x, axes=2):
    """(fake-quantized function of (x, maps), deployed network)."""
    model = SparseNetwork(layers, axes, batch_norm=False)
    params, maps = parameters(layers, axes), make_maps(layers, x)
    plan = fq.make_plan(model, int8_rules(layers, int8), (x, maps))
    stats = fq.calibrate_model(model, plan, params, [(x, maps)], progress=False)
    scales = tie_scales(layers, int8, fq.finalize(plan, stats))
    fake = fq.fake_quant(model, plan)
    return (lambda x, maps: fake(params, scales, x, maps)), to_int8(layers, int8, params, scales)


ALL = convolutions(LAYERS)
