"""A network card runs as the layers it was made of do, before and after a file."""

import dataclasses
import json

import pytest
import torch

import fquant as fq
from fquant.serialization import (
    CardLayer,
    CardMap,
    card_maps,
    load_network_card,
    network_card,
    run_card,
    save_network_card,
)
from fquant.sparse import (
    SparseTensor,
    conv_map,
    global_avg_pool,
    max_pool,
    sparse_conv_int8,
    subm_map,
    transpose_map,
    transposed_conv_map,
)

safetensors = pytest.importorskip("safetensors")

STEP = torch.tensor(0.05)
MAPS = (
    CardMap("fine", "subm", kernel_size=(3, 3), dilation=(1, 2)),
    CardMap("down", "conv", "input", (2, 2), (2, 2), (0, 0), (1, 1)),
    CardMap("up", "inverse", "down"),
    CardMap("grown", "transposed", "down", (2, 3), (2, 1), (0, 1), (1, 1), (1, 0)),
    CardMap("pool", "conv", "grown", (2, 2), (2, 2), (0, 0), (1, 1)),
)
LAYERS = (
    CardLayer("stem", "conv", ("input",), "fine", relu=True),
    CardLayer("block", "conv", ("stem",), "fine", residual="stem", relu=True),
    CardLayer("down", "conv", ("block",), "down"),
    CardLayer("up", "conv", ("down",), "up", relu=True),
    CardLayer("both", "cat", ("up", "block")),
    CardLayer("coarse", "conv", ("both",), "down"),
    CardLayer("grown", "conv", ("coarse",), "grown", relu=True),
    CardLayer("pooled", "max_pool", ("grown",), "pool"),
    CardLayer("mean", "global_avg_pool", ("pooled",)),
    CardLayer("hidden", "linear", ("mean",), relu=True),
    CardLayer("head", "linear", ("hidden",)),
)
KERNELS = {
    **{"stem": (4, 3, 3, 2), "block": (4, 3, 3, 4), "down": (6, 2, 2, 4), "up": (4, 2, 2, 6)},
    **{"coarse": (6, 2, 2, 8), "grown": (5, 2, 3, 6)},
}


def parts():
    g = torch.Generator().manual_seed(0)
    narrow = fq.QuantSpec(narrow_range=True, axis=0)
    floats = {name: torch.randn(shape, generator=g) for name, shape in KERNELS.items()}
    weights = fq.quantize_params(floats, dict.fromkeys(floats, narrow))
    weights |= {"hidden": torch.randn(7, 5, generator=g), "head": torch.randn(3, 7, generator=g)}
    biases = {n: torch.randn(len(w.q), generator=g) for n, w in weights.items() if n in KERNELS}
    del biases["down"]
    scales = {name: STEP * (1 + i) for i, name in enumerate(["input", *KERNELS])}
    scales["block"] = scales["up"]
    return weights, biases, scales


def scene(seed):
    g = torch.Generator().manual_seed(seed)
    cells = SparseTensor.from_dense((torch.rand(2, 1, 9, 8, generator=g) < 0.4).float())
    return cells.with_features(torch.randn(len(cells.coords), 2, generator=g))


def by_hand(x):
    weights, biases, scales = parts()
    fine, down = subm_map(x, 3, (1, 2)), conv_map(x, 2, 2)
    grown = transposed_conv_map(down, (2, 3), (2, 1), (0, 1), output_padding=(1, 0))

    def conv(name, x, kernel_map, **options):
        return sparse_conv_int8(
            x,
            weights[name],
            biases.get(name),
            kernel_map=kernel_map,
            output_scale=scales[name],
            **options,
        )

    stem = conv("stem", fq.quantize(x, scales["input"]), fine, relu=True)
    block = conv("block", stem, fine, residual=stem, relu=True)
    up = conv("up", conv("down", block, down), transpose_map(down), relu=True)
    q = torch.cat([up.features.q, block.features.q], dim=1)
    both = up.with_features(dataclasses.replace(up.features, q=q))
    y = conv("grown", conv("coarse", both, down), grown, relu=True)
    mean = global_avg_pool(
        fq.dequantize(max_pool(y, 2, kernel_map=conv_map(y, 2, 2))), count_absent=False
    )
    return (mean @ weights["hidden"].T).relu() @ weights["head"].T


def test_it_runs_as_its_layers_do(tmp_path):
    card = network_card(MAPS, LAYERS, *parts())
    save_network_card(tmp_path / "card", card)
    loaded = load_network_card(tmp_path / "card")
    assert loaded[:2] == card[:2]
    assert loaded.tensors.keys() == card.tensors.keys()
    assert all(torch.equal(loaded.tensors[n], t) for n, t in card.tensors.items())
    for seed in range(3):
        x = scene(seed)
        expected = by_hand(x)
        assert expected.abs().max() > 1
        assert torch.equal(run_card(card, x, card_maps(card, x)), expected)
        assert torch.equal(run_card(loaded, x, card_maps(loaded, x)), expected)


def test_it_compiles():
    card = network_card(MAPS, LAYERS, *parts())
    x = scene(5)
    compiled = torch.compile(
        lambda x, maps: run_card(card, x, maps), fullgraph=True, backend="aot_eager", dynamic=True
    )
    assert torch.equal(compiled(x, card_maps(card, x)), by_hand(x))


def test_the_file_needs_no_fquant_to_be_read(tmp_path):
    weights, _, scales = parts()
    save_network_card(tmp_path / "card", network_card(MAPS, LAYERS, *parts()))
    with safetensors.safe_open(tmp_path / "card", "np") as file:
        document = json.loads(file.metadata()["document"])
        assert (file.metadata()["format"], file.metadata()["version"]) == ("fquant.network", "1")
        assert document["maps"][3] == {
            **{"key": "grown", "op": "transposed", "source": "down", "kernel_size": [2, 3]},
            **{"stride": [2, 1], "padding": [0, 1], "dilation": [1, 1], "output_padding": [1, 0]},
        }
        assert document["layers"][1] == {
            **{"name": "block", "op": "conv", "inputs": ["stem"], "map": "fine"},
            **{"residual": "stem", "relu": True},
        }
        assert file.get_tensor("stem.weight").tolist() == weights["stem"].q.tolist()
        assert file.get_tensor("stem.weight_scale").shape == (4,)
        assert document["amax"]["up"] == pytest.approx(127 * scales["up"].item())
        assert document["amax"].keys() == scales.keys()


def changed(sequence, at, **fields):
    return (*sequence[:at], dataclasses.replace(sequence[at], **fields), *sequence[at + 1 :])


@pytest.mark.parametrize(
    ("maps", "layers", "message"),
    [
        (changed(MAPS, 0, op="sub"), LAYERS, r"map 'fine': op must be one of .* got 'sub'"),
        (changed(MAPS, 2, source="input"), LAYERS, r"map 'up': source must be a map before it"),
        (changed(MAPS, 1, key="fine"), LAYERS, r"map 'fine': key must be there once"),
        (
            MAPS,
            changed(LAYERS, 1, residual="up"),
            r"layer 'block': inputs must be layers before it",
        ),
        (MAPS, changed(LAYERS, 1, op="relu"), r"layer 'block': op must be one of"),
        (MAPS, changed(LAYERS, 1, map=None), r"layer 'block': map must be a key of maps, got None"),
        (
            MAPS,
            changed(LAYERS, 1, map="down"),
            r"layer 'block': weight must have the kernel \(2, 2\)",
        ),
        (
            MAPS,
            changed(LAYERS, 1, name="extra"),
            r"layer 'extra': weight must be int8 with a scale",
        ),
        (
            MAPS,
            changed(LAYERS, 4, inputs=("up", "stem")),
            r"layer 'both': inputs must have one scale",
        ),
        (
            MAPS,
            changed(LAYERS, 3, inputs=("down", "down"), name="stem"),
            r"name must be there once",
        ),
        (MAPS, (), r"layers must not be empty"),
    ],
)
def test_a_network_that_is_not_whole_is_named(maps, layers, message, tmp_path):
    with pytest.raises(ValueError, match=f"network card: .*{message}|{message}"):
        network_card(maps, layers, *parts())
    whole = network_card(MAPS, LAYERS, *parts())
    save_network_card(tmp_path / "card", whole._replace(maps=maps, layers=layers))
    with pytest.raises(ValueError, match=r"load_network_card: .* must be a whole file"):
        load_network_card(tmp_path / "card")


def test_the_last_convolution_may_give_floats():
    weights, biases, scales = parts()
    x = scene(0)
    scales = {"input": scales["input"]}
    card = network_card(MAPS[:1], LAYERS[:1], {"stem": weights["stem"]}, biases, scales)
    assert run_card(card, x, card_maps(card, x)).features.dtype == torch.float32
    with pytest.raises(ValueError, match=r"layer 'block': inputs must be quantized, 'stem' is not"):
        network_card(MAPS, LAYERS[:2], weights, biases, scales)


def test_another_kind_of_file_is_refused(tmp_path):
    fq.save(tmp_path / "tree", torch.ones(2))
    with pytest.raises(
        ValueError, match=r"must be of format 'fquant\.network', got 'fquant\.tree'"
    ):
        load_network_card(tmp_path / "tree")
