"""A network of eleven int8 layers: one compiled graph and one exported program for every scene."""

import torch

import fquant as fq
from fquant.sparse import (
    SparseTensor,
    conv_map,
    max_pool,
    sparse_conv_int8,
    subm_map,
    transpose_map,
)

CHANNELS = 8
NUM_LAYERS = 11
STEP = torch.tensor(0.08)


def make_weights():
    g = torch.Generator().manual_seed(0)
    return [
        fq.quantize(torch.randn(CHANNELS, 3, 3, CHANNELS, generator=g), 0.03)
        for _ in range(NUM_LAYERS)
    ]


def make_scene(seed, density):
    g = torch.Generator().manual_seed(seed)
    cells = SparseTensor.from_dense((torch.rand(2, 1, 12, 12, generator=g) < density).float())
    x = cells.with_features(torch.randn(len(cells.coords), CHANNELS, generator=g))
    down = conv_map(x, 3, stride=2, padding=1)
    maps = {
        "fine": subm_map(x, 3),
        "down": down,
        "coarse": subm_map(down, 3),
        "up": transpose_map(down),
        "pool": conv_map(x, 2, 2),
    }
    return x, maps


def network(weights, x, maps):
    """Residual blocks on two levels, strided and inverse convolutions, max pooling."""

    def conv(i, x, key, residual=None):
        return sparse_conv_int8(
            x, weights[i], kernel_map=maps[key], output_scale=STEP, residual=residual, relu=True
        )

    x = fq.quantize(x, STEP)
    fine = conv(1, conv(0, x, "fine"), "fine", residual=x)
    fine = conv(3, conv(2, fine, "fine"), "fine", residual=fine)
    coarse = conv(4, fine, "down")
    coarse = conv(6, conv(5, coarse, "coarse"), "coarse", residual=coarse)
    coarse = conv(8, conv(7, coarse, "coarse"), "coarse", residual=coarse)
    y = conv(10, conv(9, coarse, "up"), "fine", residual=fine)
    return y.features.q, max_pool(y, 2, kernel_map=maps["pool"]).features.q


SCENES = [(0, 0.5), (1, 0.3), (2, 0.7), (3, 0.0)]


def test_one_compiled_graph_for_every_number_of_cells():
    weights = make_weights()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=True)
    graphs = []
    for scene in SCENES:
        x, maps = make_scene(*scene)
        for actual, expected in zip(
            compiled(weights, x, maps), network(weights, x, maps), strict=True
        ):
            assert torch.equal(actual, expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]


def test_exported_with_a_dynamic_number_of_cells(tmp_path):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = make_weights()

        def forward(self, x, maps):
            return network(self.weights, x, maps)

    x, maps = make_scene(*SCENES[0])
    shapes = torch.export.ShapesCollection()
    for leaf in [x.features, x.coords, *(m.in_coords for m in maps.values())]:
        shapes[leaf] = {0: torch.export.Dim.AUTO}
    for m in maps.values():
        shapes[m.out_coords] = {0: torch.export.Dim.AUTO}
        shapes[m.neighbors] = {1: torch.export.Dim.AUTO}
    program = torch.export.export(Network(), (x, maps), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    for scene in SCENES[:3]:
        x, maps = make_scene(*scene)
        for actual, expected in zip(loaded(x, maps), network(make_weights(), x, maps), strict=True):
            assert torch.equal(actual, expected)
