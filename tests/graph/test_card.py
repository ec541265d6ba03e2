"""A lowered program's card gives the program's integers, and so does that of its file."""

import dataclasses

import pytest
import torch
from torch import nn

import fquant as fq
from fquant.graph import card_of_program, dynamic_rows, save_program
from fquant.serialization import card_maps, load_network_card, run_card, save_network_card
from fquant.sparse import (
    conv_map,
    max_pool,
    sparse_conv,
    subm_conv,
    subm_map,
    transpose_map,
    transposed_conv_map,
)
from tests.graph.programs import SITES, exported
from tests.graph.programs import scene as cells
from tests.graph.test_lowering_sparse import SparseResidual

pytest.importorskip("safetensors")


class Geometries(nn.Module):
    """A map of each kind, with sizes that differ by axis, a pool, and cells that are left and joined."""

    def __init__(self):
        super().__init__()
        shapes = [
            (6, 3, 1, 6),
            (4, 3, 2, 6),
            (4, 3, 3, 4),
            (5, 2, 3, 4),
            (4, 3, 2, 5),
            (2, 3, 2, 4),
        ]
        self.w = nn.ParameterList(torch.randn(s) / 4 for s in shapes)
        self.norm = nn.BatchNorm1d(4)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([-0.7, 0.4, 1.3, -1.1]))
            self.norm.bias.normal_()

    def forward(self, x, m):
        bias = torch.linspace(-1, 1, 12).split([6, 4, 2])
        y = subm_conv(x, self.w[0], bias[0], kernel_map=m["wide"]).map(torch.relu)
        y = sparse_conv(y, self.w[1], kernel_map=m["down"])
        y = y.with_features(self.norm(y.features).relu())
        y = max_pool(y, 3, kernel_map=m["pool"])
        z = subm_conv(y, self.w[2], bias[1], kernel_map=m["coarse"]).map(torch.relu)
        z = sparse_conv(z, self.w[3], kernel_map=m["grow"]).map(torch.relu)
        z = sparse_conv(z, self.w[4], kernel_map=m["shrink"])
        return sparse_conv(z, self.w[5], bias[2], kernel_map=m["back"])


def geometries(seed, density):
    x, _ = cells(seed, density)
    down = conv_map(x, (3, 2), (2, 1), (1, 0), (1, 2))
    pool = conv_map(down, 3, 2, 1)
    grow = transposed_conv_map(pool, (2, 3), (2, 1), (0, 1), output_padding=(1, 0))
    shrink = conv_map(grow, (3, 2), 2)
    maps = {"wide": subm_map(x, (3, 1), (2, 1)), "down": down, "pool": pool, "grow": grow}
    maps |= {"coarse": subm_map(pool, 3), "shrink": shrink, "back": transpose_map(shrink)}
    return x, maps


def lowered_with(model, args, rules=()):
    return fq.lower(exported(model, args, [*rules, *fq.w8a8()], dynamic_shapes=dynamic_rows(args)))


@pytest.mark.parametrize(
    ("model", "scene", "rules"), [(SparseResidual, cells, [SITES]), (Geometries, geometries, [])]
)
def test_the_card_gives_what_the_lowered_program_gives(model, scene, rules, tmp_path):
    lowered, report = lowered_with(model(), scene(0, 0.5), rules)
    assert len(report.kept) == 1  # the input's Q node
    save_program(lowered, tmp_path / "lowered.pt2")
    cards = [card_of_program(p) for p in (lowered, torch.export.load(tmp_path / "lowered.pt2"))]
    save_network_card(tmp_path / "card", cards[1])
    cards.append(load_network_card(tmp_path / "card"))
    for card in cards[1:]:
        assert card[:2] == cards[0][:2]
        assert all(torch.equal(card.tensors[n], t) for n, t in cards[0].tensors.items())
    assert all((t >= 0).all() for n, t in cards[0].tensors.items() if n.endswith("scale"))
    for seed, density in ((1, 0.3), (2, 0.7)):
        x, maps = scene(seed, density)
        expected, y = lowered.module()(x, maps), run_card(cards[2], x, card_maps(cards[2], x))
        assert expected.features.abs().max() > 0.1
        assert torch.equal(y.coords, expected.coords)
        assert torch.equal(y.features, expected.features)


def test_steps_are_those_of_the_calibration():
    """What other engines ask for, real units, and not only the same integers."""
    args = cells(0, 0.5)
    program = exported(
        SparseResidual(), args, [SITES, *fq.w8a8()], dynamic_shapes=dynamic_rows(args)
    )
    card = card_of_program(fq.lower(program).program)
    for site, layer in (
        ("subm_conv#1.input", "subm_conv_0"),
        ("sparse_conv#1.input", "sparse_conv_0"),
    ):
        scale = program.state_dict[f"scales.{fq.graph.qdq_ops.state_name(site)}"]
        assert torch.equal(card.tensors[f"{layer}.output_scale"], scale)
    weight = program.state_dict["scales.subm_conv_0_weight"].flatten()
    assert torch.allclose(card.tensors["subm_conv_0.weight_scale"], weight, rtol=2**-22, atol=0)
    assert torch.allclose(card.tensors["sparse_conv_0.bias"], torch.ones(8), rtol=2**-22, atol=0)


class Layers(nn.Module):
    def __init__(self, between, last):
        super().__init__()
        self.w = nn.ParameterList([torch.ones(6, 3, 3, 6), torch.ones(6, 1, 1, 6)])
        self.between, self.last = between, last

    def forward(self, x, maps):
        y = subm_conv(x, self.w[0], kernel_map=maps["fine"]).map(self.between)
        return self.last(subm_conv(y, self.w[1], kernel_map=maps["point"]))


def by_hand(maps):
    return {**maps, "fine": dataclasses.replace(maps["fine"], geometry="")}


@pytest.mark.parametrize(
    ("between", "last", "change", "message"),
    [
        (torch.tanh, None, None, r"step 'tanh' must be a sparse convolution, .*aten\.tanh"),
        (nn.Hardtanh(-1.0, 2.0), None, None, r"step 'clamp_default' must be a sparse convolution"),
        (None, lambda y: y.features.mean(), None, r"step 'mean' must be a sparse convolution"),
        (None, None, by_hand, r"step 'sparse_conv_int8_default' must be one by a kernel map among"),
    ],
)
def test_what_a_card_has_not_is_named(between, last, change, message):
    x, maps = cells(0, 0.5)
    model = Layers(between or torch.relu, last or (lambda y: y))
    args = (x, maps if change is None else change(maps))
    with pytest.raises(ValueError, match=f"card_of_program: {message}"):
        card_of_program(lowered_with(model, args).program)
