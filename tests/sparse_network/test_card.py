"""A deployed network's card gives the integers of the network."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fquant.serialization import card_maps, load_network_card, run_card, save_network_card
from fquant.sparse import SparseTensor
from fquant.sparse_network import (
    Layer,
    card_of_network,
    first_and_last,
    int8_network,
    make_maps,
)

pytest.importorskip("safetensors")
_spec = importlib.util.spec_from_file_location("networks", Path(__file__).with_name("networks.py"))
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

ENDS = (
    Layer("stem", "subm", (3, 8), dilation=2),
    Layer("down", "conv", (8, 6), (3, 2), (2, 1), (1, 0)),
    Layer("mean", "global_avg_pool"),
    Layer("head", "linear", (6, 40)),
)
LATE = (
    Layer("a", "subm", (3, 4)),
    Layer("b", "subm", (4, 4)),
    Layer("c", "subm", (7, 8), inputs=("b", "input"), relu=False),
)


@pytest.mark.parametrize(
    "layers", [networks.LAYERS, ENDS, LATE], ids=["u_net", "classifier", "input_read_late"]
)
def test_the_card_gives_what_the_network_gives(layers, tmp_path):
    int8 = frozenset(x.name for x in layers if x.is_convolution)
    _, deployed = networks.quantized(layers, int8, networks.scene(0, 0.5))
    save_network_card(tmp_path / "card", card_of_network(layers, deployed))
    card = load_network_card(tmp_path / "card")
    for seed in (1, 2):
        x = networks.scene(seed, 0.4, batch_size=2)
        expected = int8_network(layers, int8)(deployed, x, make_maps(layers, x))
        actual = run_card(card, x, card_maps(card, x))
        if isinstance(expected, SparseTensor):
            assert torch.equal(actual.coords, expected.coords)
            actual, expected = actual.features, expected.features
        assert expected.min() < 0 < expected.max()  # the last layer has no ReLU
        assert torch.equal(actual, expected)


def test_layers_in_floating_point_are_named():
    int8 = networks.ALL - first_and_last(networks.LAYERS)
    _, deployed = networks.quantized(networks.LAYERS, int8, networks.scene(0, 0.5))
    with pytest.raises(ValueError, match=r"convolutions must all be int8, got \['stem', 'head'\]"):
        card_of_network(networks.LAYERS, deployed)
