"""Kernel maps of a network, their cache, capacity mode, and the choice of int8 layers."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant as fq
import fquant_kernels
from fquant.sparse import (
    avg_pool,
    conv_map,
    global_avg_pool,
    global_max_pool,
    max_pool,
    pad_map,
    pad_to_capacity,
    sparse_conv,
    sparse_conv_int8,
    subm_map,
    transpose_map,
    valid_count,
    without_padding,
)
from fquant.sparse_network import (
    Layer,
    LayerTime,
    MapCache,
    cached_maps,
    choose_int8,
    describe_choices,
    first_and_last,
    int8_network,
    level_counts,
    make_maps,
    measured_times,
    pad_network,
)
from fquant_kernels import native

_spec = importlib.util.spec_from_file_location("networks", Path(__file__).with_name("networks.py"))
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)
ALL, LAYERS = networks.ALL, networks.LAYERS


def test_layers_of_one_geometry_share_a_map():
    x = networks.scene(0, 0.4)
    maps = make_maps(LAYERS, x)
    down = conv_map(x, 3, 2, 1)
    pool = conv_map(down, 2, 2)
    expected = {
        "input/subm3": subm_map(x, 3),
        "input/conv3s2p1": down,
        "input/conv3s2p1/subm3": subm_map(down, 3),
        "input/conv3s2p1/conv2s2p0": pool,
        "input/conv3s2p1/conv2s2p0/subm3": subm_map(pool, 3),
        "input/conv3s2p1/inverse": transpose_map(down),
        "input/subm1": subm_map(x, 1),
    }
    assert maps.keys() == expected.keys()
    for key, kernel_map in expected.items():
        assert torch.equal(maps[key].neighbors, kernel_map.neighbors)
        assert torch.equal(maps[key].out_coords, kernel_map.out_coords)


def test_pairs_are_listed_where_convolutions_share_a_map():
    layers = [
        Layer("a", "subm", (1, 2)),
        Layer("down", "conv", (2, 2), 2, 2),
        Layer("up", "inverse", (2, 2), 2, undoes="down"),
        Layer("b", "subm", (2, 2)),
    ]
    x = networks.scene(1, 0.4, channels=1)
    plain, listed = make_maps(layers, x), make_maps(layers, x, pairs=True)
    assert {key for key, m in listed.items() if m.pairs is not None} == {"input/subm3"}
    assert all(m.pairs is None for m in plain.values())
    subm = listed["input/subm3"]
    want = fquant_kernels.pair_rulebook(subm.neighbors, len(subm.in_coords))
    assert all(torch.equal(a, b) for a, b in zip(subm.pairs, want, strict=True))
    rows = len(subm.in_coords)
    assert pad_map(subm, rows + 1, rows + 1).pairs is None


def test_layers_that_differ_in_dilation_do_not_share_a_map():
    layers = [
        Layer("near", "subm", (3, 2)),
        Layer("far", "subm", (3, 2), dilation=2, inputs=("input",)),
        Layer("down", "conv", (3, 2), 3, 2, 1, inputs=("input",)),
        Layer("wide", "conv", (3, 2), 3, 2, 1, 2, inputs=("input",)),
    ]
    x = networks.scene(0, 0.4)
    expected = [subm_map(x, 3), subm_map(x, 3, 2), conv_map(x, 3, 2, 1), conv_map(x, 3, 2, 1, 2)]
    for found, kernel_map in zip(make_maps(layers, x).values(), expected, strict=True):
        assert torch.equal(found.neighbors, kernel_map.neighbors)


def test_the_cache_goes_by_content_and_comes_out_anew():
    scenes = [networks.scene(seed, 0.4) for seed in range(3)]
    empty = MapCache.empty(2)
    maps, one = cached_maps(LAYERS, scenes[0], empty)
    assert not empty.entries
    copy = scenes[0].with_features(scenes[0].features + 1)  # other features, equal cells
    again, two = cached_maps(LAYERS, copy, one)
    assert again is maps
    assert (two.hits, two.misses) == (1, 1)
    _, three = cached_maps(LAYERS, scenes[1], two)
    _, four = cached_maps(LAYERS, scenes[0], three)  # now scene 1 is the least recently used
    _, five = cached_maps(LAYERS, scenes[2], four)
    assert (five.hits, five.misses, len(five.entries)) == (2, 3, 2)
    assert cached_maps(LAYERS, scenes[0], five)[1].hits == 3
    assert cached_maps(LAYERS, scenes[1], five)[1].misses == 4
    full = MapCache.empty(3)
    for x in (*scenes, scenes[1]):
        _, full = cached_maps(LAYERS, x, full)
    assert (len(full.entries), full.hits) == (3, 1)  # a lookup in the middle drops nothing
    with pytest.raises(ValueError, match=r"MapCache.empty: capacity must be positive, got 0"):
        MapCache.empty(0)


@pytest.mark.parametrize("what", ["order", "grid", "batch size", "dtype", "network"])
def test_the_cache_tells_scenes_apart(what):
    x = networks.scene(0, 0.4)
    _, cache = cached_maps(LAYERS, x, MapCache.empty(2))
    layers = LAYERS
    if what == "order":
        x = type(x)(x.features.flip(0), x.coords.flip(0), x.spatial_shape, x.batch_size)
    elif what == "grid":
        x = type(x)(x.features, x.coords, (10, 9), x.batch_size)
    elif what == "batch size":
        x = type(x)(x.features, x.coords, x.spatial_shape, x.batch_size + 1)
    elif what == "dtype":
        x = type(x)(x.features, x.coords.int(), x.spatial_shape, x.batch_size)
    else:
        layers = (*LAYERS, Layer("more", "subm", (4, 4), 5))
    assert cached_maps(layers, x, cache)[1].hits == 0


@given(extra=st.integers(0, 9), seed=st.integers(0, 5), density=st.sampled_from([0.0, 0.1, 0.5]))
def test_padded_rows_change_nothing(extra, seed, density):
    x = networks.scene(seed, density, batch_size=2)
    kernel_map = conv_map(x, 3, 2, 1)
    rows, outputs = len(x.coords), len(kernel_map.out_coords)
    wide = pad_to_capacity(x, rows + extra)
    wide_map = pad_map(kernel_map, rows + extra, outputs + extra)
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    y = sparse_conv(x, weight, kernel_map=kernel_map)
    padded = sparse_conv(wide, weight, kernel_map=wide_map)
    assert padded.features.shape[0] == outputs + extra
    assert not padded.features[outputs:].any()
    assert torch.equal(without_padding(padded).features, y.features)
    assert torch.equal(without_padding(padded).coords, y.coords)
    assert valid_count(padded) == outputs
    pooled = max_pool(wide, 3, kernel_map=wide_map)
    expected = max_pool(x, 3, kernel_map=kernel_map)
    assert torch.equal(without_padding(pooled).features, expected.features)
    for absent in (True, False):
        mean = avg_pool(wide, 3, count_absent=absent, kernel_map=wide_map)
        expected = avg_pool(x, 3, count_absent=absent, kernel_map=kernel_map)
        assert torch.equal(without_padding(mean).features, expected.features)
        assert torch.isfinite(mean.features).all()
    assert torch.equal(global_max_pool(padded), global_max_pool(y))
    assert torch.equal(global_avg_pool(padded), global_avg_pool(y))
    mean = global_avg_pool(y, count_absent=False)
    assert torch.equal(global_avg_pool(padded, count_absent=False), mean)
    assert torch.equal(without_padding(wide).features, x.features)


def test_padded_submanifold_layers():
    """The middle tap is summed first where each row of a block has it; rows of padding have none."""
    x = networks.scene(0, 0.5)
    rows, kernel_map = len(x.coords), subm_map(x, 3)
    wide, wide_map = pad_to_capacity(x, rows + 5), pad_map(kernel_map, rows + 5, rows + 5)
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = sparse_conv(x, weight, kernel_map=kernel_map).features
        padded = sparse_conv(wide, weight, kernel_map=wide_map).features
        sizes = sparse_conv(x.map(torch.abs), weight.abs(), kernel_map=kernel_map).features
    assert (
        (padded[:rows] - y).abs() <= 2 * 81 * 2**-24 * sizes
    ).all()  # as fquant.sparse.conv says
    weight = fq.quantize(weight, 0.02)
    results = [
        sparse_conv_int8(
            fq.quantize(record, 0.02), weight, kernel_map=m, output_scale=torch.tensor(0.1)
        ).features.q
        for record, m in ((x, kernel_map), (wide, wide_map))
    ]
    assert torch.equal(results[1][:rows], results[0])


def test_overflow_is_an_error_and_nothing_is_cut_off():
    x = networks.scene(0, 0.5)
    rows = len(x.coords)
    with pytest.raises(ValueError, match=rf"must hold the {rows} rows there are, got {rows - 1}"):
        pad_to_capacity(x, rows - 1)
    kernel_map = subm_map(x, 3)
    with pytest.raises(ValueError, match="pad_map: in_capacity"):
        pad_map(kernel_map, rows - 1, rows)
    with pytest.raises(ValueError, match="pad_map: out_capacity"):
        pad_map(kernel_map, rows, rows - 1)
    maps = make_maps(LAYERS, x)
    counts = level_counts(LAYERS, x, maps)
    tight = {**counts, "input/conv3s2p1": counts["input/conv3s2p1"] - 1}
    with pytest.raises(ValueError, match=r"cells at 'input/conv3s2p1' for"):
        pad_network(LAYERS, x, maps, tight)
    assert pad_network(LAYERS, x, maps, counts)[0].coords.shape[0] == rows  # just enough
    with pytest.raises(ValueError, match="capacity must have every level"):
        pad_network(LAYERS, x, maps, {"input": 999})


def test_one_static_graph_for_scenes_padded_to_a_capacity():
    int8 = ALL - first_and_last(LAYERS)
    _, deployed = networks.quantized(LAYERS, int8, networks.scene(0, 0.5))
    forward = int8_network(LAYERS, int8)
    scenes = [networks.scene(seed, 0.4) for seed in range(3)]
    found = [level_counts(LAYERS, x, make_maps(LAYERS, x)) for x in scenes]
    capacity = {level: max(counts[level] for counts in found) + 5 for level in found[0]}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend="aot_eager")
    for x in scenes:
        maps = make_maps(LAYERS, x)
        wide, wide_maps = pad_network(LAYERS, x, maps, capacity)
        expected = forward(deployed, x, maps).features
        for y in (forward(deployed, wide, wide_maps), compiled(deployed, wide, wide_maps)):
            assert torch.equal(without_padding(y).features, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_quantized_features_are_padded_too():
    x = fq.quantize(networks.scene(0, 0.5), 0.1)
    wide = pad_to_capacity(x, len(x.coords) + 3)
    assert wide.features.q.shape[0] == len(x.coords) + 3
    assert torch.equal(without_padding(wide).features.q, x.features.q)


def test_the_last_layer_with_weights_is_last_whatever_follows():
    layers = [Layer(name, "subm", (2, 2)) for name in "abc"]
    for end in (Layer("pool", "max_pool"), Layer("mean", "global_avg_pool")):
        assert first_and_last([*layers, end]) == {"a", "c"}


def test_the_choice_follows_the_nearest_time_and_what_it_is_told():
    slow, fast = LayerTime(27, (8, 8), 90.0, 70.0), LayerTime(27, (64, 64), 60.0, 150.0)
    layers = [
        Layer("first", "subm", (4, 8)),
        Layer("narrow", "subm", (8, 16)),
        Layer("wide", "subm", (16, 64)),
        Layer("last", "subm", (64, 64)),
    ]

    def chosen(**options):
        return {c.layer for c in choose_int8(layers, [slow, fast], **options) if c.int8}

    assert chosen() == {"wide"}
    # The channels of "narrow" and one tap: of two times with these channels, that of one tap.
    point, full = LayerTime(1, (8, 16), 5.0, 9.0), LayerTime(27, (8, 16), 90.0, 70.0)
    by_taps = [*layers[:1], Layer("narrow", "subm", (8, 16), 1), *layers[2:]]
    for times in ([point, full], [full, point]):
        assert [c.int8 for c in choose_int8(by_taps, times)][1]
        assert not [c.int8 for c in choose_int8(layers, times)][1]
    back, forth = LayerTime(27, (64, 16), 90.0, 70.0), LayerTime(27, (16, 64), 60.0, 150.0)
    assert [c.int8 for c in choose_int8(layers, [back, forth])] == [False, True, True, False]
    assert chosen(in_float=()) == {"wide", "last"}
    assert chosen(in_int8={"narrow", "first"}) == {"first", "narrow", "wide"}
    assert chosen(in_float={"wide"}) == {"last"}
    text = describe_choices(choose_int8(layers, [slow, fast], in_float={"wide"}, in_int8={"first"}))
    assert [line.split()[1] for line in text.splitlines()] == ["int8", "float32", "float32", "int8"]
    assert text.count("as told") == 2
    with pytest.raises(ValueError, match="times must have an entry"):
        choose_int8(layers, [])
    with pytest.raises(ValueError, match=r"names must be convolutions of layers, got \['z'\]"):
        choose_int8(layers, [slow], in_float={"z"})


@pytest.mark.parametrize("isa", native.ISAS)
def test_the_table_that_ships_says_where_it_was_measured(isa):
    machine, times = measured_times(isa)
    assert {"cpu", "isa", "threads", "torch", "scene"} == machine.keys()
    assert machine["isa"] == isa
    assert {t.taps for t in times} == {1, 8, 9, 27}
    assert all(0 < t.int8 < 1e6 and 0 < t.float32 < 1e6 for t in times)


def test_the_table_is_that_of_the_instruction_set_in_use(monkeypatch):
    for isa in native.available_isas():
        monkeypatch.setenv("FQUANT_CPU_ISA", isa)
        assert measured_times() == measured_times(isa)
    with pytest.raises(ValueError, match=r"isa must be one of .*avx2.*, got 'neon'"):
        measured_times("neon")
