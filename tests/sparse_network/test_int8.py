"""int8 networks against their fake-quantized forms and against float."""

import copy
import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.utils import _pytree as pytree

import fquant as fq
from fquant.sparse import SparseTensor
from fquant.sparse_network import (
    Layer,
    SparseNetwork,
    check_layers,
    convolutions,
    first_and_last,
    fold_network,
    int8_network,
    int8_rules,
    make_maps,
    quantized_values,
    tie_scales,
    to_int8,
)
from fquant.sparse_network.sites import value_scale_name

_spec = importlib.util.spec_from_file_location("networks", Path(__file__).with_name("networks.py"))
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)
ALL, LAYERS = networks.ALL, networks.LAYERS


def test_batch_norm_folds_into_the_convolution():
    x = networks.scene(0, 0.5)
    maps = make_maps(LAYERS, x)
    model = SparseNetwork(LAYERS, 2)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
            model.get_parameter(name.rpartition(".")[0] + ".weight").data.uniform_(-1, 1)
    model.eval()
    folded = fold_network(LAYERS, model.state_dict())
    plain = SparseNetwork(LAYERS, 2, batch_norm=False)
    assert folded.keys() == plain.state_dict().keys()
    expected, actual = model(x, maps), functional_call(plain, folded, (x, maps))
    assert torch.allclose(actual.features, expected.features, atol=1e-4)


@settings(max_examples=settings.default.max_examples // 4)
@given(int8=st.sets(st.sampled_from(sorted(ALL))), seed=st.integers(0, 3))
def test_integers_are_those_of_fake_quantization(int8, seed):
    x = networks.scene(seed, 0.4)
    maps = make_maps(LAYERS, x)
    if int8:
        fake, deployed = networks.quantized(LAYERS, int8, x)
        expected = fake(x, maps).features
    else:
        expected = functional_call(
            SparseNetwork(LAYERS, 2, batch_norm=False), networks.parameters(LAYERS), (x, maps)
        ).features
        deployed = to_int8(LAYERS, int8, networks.parameters(LAYERS), {})
    actual = int8_network(LAYERS, int8)(deployed, x, maps).features
    # A float sum in another order may round to the next integer: rarely, and by one step of a value,
    # which is amax / 127; a wrong scale, residual or join would be off everywhere.
    close = torch.isclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert close.double().mean() > 0.9
    assert (actual - expected).abs().max() <= 0.1 * expected.abs().max() + 1e-4


def test_int8_is_near_float_and_the_values_are_integers():
    x = networks.scene(0, 0.5, batch_size=3)
    maps = make_maps(LAYERS, x)
    int8 = ALL - first_and_last(LAYERS)
    _, deployed = networks.quantized(LAYERS, int8, x)
    y, values = int8_network(LAYERS, int8, with_values=True)(deployed, x, maps)
    model = SparseNetwork(LAYERS, 2, batch_norm=False)
    expected = functional_call(model, networks.parameters(LAYERS), (x, maps))
    noise = (y.features - expected.features).square().sum() / expected.features.square().sum()
    assert 0 < noise < 1e-3
    on_the_grid = {name for name, v in values.items() if isinstance(v.features, fq.QTensor)}
    assert on_the_grid == {"stem", "block", "down", "deep", "pool", "rise"}
    assert quantized_values(LAYERS, int8) == on_the_grid - {"pool"}


def test_a_residual_that_no_int8_layer_reads_otherwise_is_on_a_grid():
    layers = [
        Layer("a", "subm", (3, 4)),
        Layer("b", "subm", (4, 4)),
        Layer("c", "subm", (4, 4), residual="a"),
        Layer("d", "subm", (4, 4), 1, relu=False),
    ]
    assert quantized_values(layers, {"c"}) == {"a", "b"}
    x = networks.scene(0, 0.5)
    maps = make_maps(layers, x)
    fake, deployed = networks.quantized(layers, {"c"}, x)
    actual = int8_network(layers, {"c"})(deployed, x, maps).features
    assert torch.allclose(actual, fake(x, maps).features, atol=1e-5)


def test_what_is_joined_shares_the_larger_scale():
    names = {v: value_scale_name(v) for v in ("rise", "block", "down")}
    scales = {names["rise"]: torch.tensor(0.5), names["block"]: torch.tensor(2.0)}
    scales[names["down"]] = torch.tensor(3.0)
    tied = tie_scales(LAYERS, {"join"}, scales)
    assert tied[names["rise"]] == tied[names["block"]] == 2.0
    assert tied[names["down"]] == 3.0
    assert scales[names["rise"]] == 0.5
    assert tie_scales(LAYERS, {"block"}, scales) == scales  # nothing that int8 reads is joined
    with pytest.raises(ValueError, match=r"tie_scales: scales must have every joined value"):
        tie_scales(LAYERS, {"join"}, {})


def test_chains_of_joins_share_one_scale():
    layers = [
        *(Layer(name, "subm", (2, 2), 1, inputs=("input",)) for name in "abc"),
        Layer("ab", "subm", (4, 2), 1, inputs=("a", "b")),
        Layer("bc", "subm", (4, 2), 1, inputs=("b", "c")),
    ]
    scales = {value_scale_name(v): torch.tensor(float(i)) for i, v in enumerate("abc")}
    assert [float(s) for s in tie_scales(layers, {"ab", "bc"}, scales).values()] == [2.0] * 3
    assert [float(s) for s in tie_scales(layers, {"ab"}, scales).values()] == [1.0, 1.0, 2.0]


def test_a_join_for_a_float_layer_keeps_each_scale():
    # "join" is in float; both it reads are on grids of their own, which must not be mixed up.
    x = networks.scene(0, 0.5)
    maps = make_maps(LAYERS, x)
    layers = (*LAYERS[:-1], Layer("also", "subm", (12, 4), 1, inputs=("rise",)))
    int8 = {"deep", "down", "also", "rise"}
    fake, deployed = networks.quantized(layers, int8, x)
    assert deployed.scales["rise"] != deployed.scales["block"]
    _, values = int8_network(layers, int8, with_values=True)(deployed, x, maps)
    joined = int8_network(layers[:-1], int8 - {"also"})
    assert not isinstance(values["join"].features, fq.QTensor)
    assert torch.allclose(joined(deployed, x, maps).features, values["join"].features, atol=0.05)
    assert torch.allclose(fake(x, maps).features, values["also"].features, atol=0.05)


@pytest.mark.parametrize("pairs", [False, True])
def test_one_graph_for_every_number_of_cells_and_of_samples(pairs):
    int8 = ALL - first_and_last(LAYERS)
    _, deployed = networks.quantized(LAYERS, int8, networks.scene(0, 0.5))
    forward = int8_network(LAYERS, int8)
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    graphs = []
    # The first has no count of cells that equals one of channels, which the compiler would take for one.
    for seed, density, batch_size in [(0, 0.4, 3), (1, 0.2, 5), (2, 0.6, 2), (3, 0.3, 7)]:
        x = networks.scene(seed, density, batch_size, size=13)
        maps = make_maps(LAYERS, x)
        got = compiled(deployed, x, make_maps(LAYERS, x, pairs=True) if pairs else maps).features
        assert torch.equal(got, forward(deployed, x, maps).features)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1], graphs


def test_nothing_is_written():
    x = networks.scene(0, 0.5)
    maps = make_maps(LAYERS, x)
    _, deployed = networks.quantized(LAYERS, ALL, x)
    before = copy.deepcopy((deployed, x, maps))
    int8_network(LAYERS, ALL)(deployed, x, maps)
    after = (deployed, x, maps)
    for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
        assert torch.equal(a, b)


def test_a_scene_without_cells():
    empty = networks.scene(0, 0.0)
    maps = make_maps(LAYERS, empty)
    _, deployed = networks.quantized(LAYERS, ALL, networks.scene(0, 0.5))
    y = int8_network(LAYERS, ALL)(deployed, empty, maps)
    assert y.features.shape == (0, 4)


def test_pooled_logits_of_a_classifier():
    layers = (
        Layer("a", "subm", (3, 8)),
        Layer("b", "subm", (8, 8)),
        Layer("mean", "global_avg_pool"),
        Layer("logits", "linear", (8, 5)),
    )
    assert first_and_last(layers) == {"a", "logits"}
    x = networks.scene(0, 0.5, batch_size=2)
    fake, deployed = networks.quantized(layers, {"b"}, x)
    maps = make_maps(layers, x)
    actual = int8_network(layers, {"b"})(deployed, x, maps)
    assert actual.shape == (2, 5)
    assert torch.allclose(actual, fake(x, maps), atol=1e-2)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([Layer("a", "conv2d", (1, 1))], "op must be one of"),
        ([Layer("a", "subm", (1, 1)), Layer("a", "subm", (1, 1))], "name must be new"),
        ([Layer("a.b", "subm", (1, 1))], "without dots"),
        ([Layer("a", "subm", (1, 1), inputs=("z",))], "inputs must be earlier layers"),
        (
            [Layer("a", "subm", (1, 2)), Layer("b", "subm", (1, 1))],
            "channels must begin with the 2",
        ),
        ([Layer("a", "subm", (1, 2), residual="input")], "residual must go to a convolution"),
        ([Layer("a", "inverse", (1, 2), undoes="q")], "undoes must name a 'conv'"),
        ([Layer("a", "subm", (1, 2), undoes="a")], "undoes must name a 'conv'"),
    ],
)
def test_a_wrong_list_is_named(layers, message):
    with pytest.raises(ValueError, match=message):
        check_layers(layers)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [Layer("a", "conv", (1, 1), 2, 2), Layer("b", "subm", (2, 1), inputs=("a", "input"))],
            "inputs must lie at the same cells",
        ),
        ([Layer("a", "conv", (1, 1), 2, 2, residual="input")], "residual must lie at the cells"),
        (
            [Layer("a", "conv", (1, 1), 2, 2), Layer("b", "inverse", (1, 1), 3, undoes="a")],
            "undoes must name a convolution with its cells",
        ),
    ],
)
def test_values_at_other_cells_are_named(layers, message):
    with pytest.raises(ValueError, match=message):
        make_maps(layers, networks.scene(0, 0.5))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"int8 must name convolutions of layers, got \['pool'\]"):
        int8_rules(LAYERS, {"pool"})
    with pytest.raises(ValueError, match=r"to_int8: params must be without batch norm"):
        to_int8(LAYERS, set(), SparseNetwork(LAYERS, 2).state_dict(), {})
    with pytest.raises(ValueError, match=r"to_int8: scales must have every quantizer"):
        to_int8(LAYERS, {"deep"}, networks.parameters(LAYERS), {})
    missing = networks.parameters(LAYERS)
    del missing["deep.weight"]
    with pytest.raises(ValueError, match=r"to_int8: params .* lacks \['deep.weight'\]"):
        to_int8(LAYERS, {"deep"}, missing, {})
    assert int8_rules(LAYERS, set()) == []
    assert convolutions(LAYERS) == ALL


def test_what_is_joined_and_was_not_tied_is_refused():
    """Joined integers have one scale, so that the others' would be lost without a word."""
    model, x = SparseNetwork(LAYERS, 2, batch_norm=False), networks.scene(0, 0.4)
    params, maps = networks.parameters(LAYERS), make_maps(LAYERS, x)
    plan = fq.make_plan(model, int8_rules(LAYERS, ALL), (x, maps))
    stats = fq.calibrate_model(model, plan, params, [(x, maps)], progress=False)
    scales = fq.finalize(plan, stats)
    to_int8(LAYERS, ALL, params, tie_scales(LAYERS, ALL, scales))
    with pytest.raises(ValueError, match=r"to_int8: scales must be equal .* tie_scales .*'rise'"):
        to_int8(LAYERS, ALL, params, scales)


def test_maps_of_other_cells_are_refused():
    """As many cells of the same grid, elsewhere: shapes alone would let them pass."""
    x = networks.scene(0, 0.4)
    fake, deployed = networks.quantized(LAYERS, ALL, x)
    there = make_maps(LAYERS, x)
    moved = SparseTensor.from_dense(x.to_dense().roll(1, -1))
    assert moved.coords.shape == x.coords.shape
    int8 = int8_network(LAYERS, ALL)
    for name, function in (("SparseNetwork", fake), ("int8_network", partial(int8, deployed))):
        with pytest.raises(ValueError, match=rf"{name}: maps must be of the cells of x"):
            function(moved, there)
        with pytest.raises(
            ValueError, match=rf"{name}: maps must be make_maps.*lacks 'input/subm3'"
        ):
            function(x, {})
    copied = SparseTensor(x.features, x.coords.clone(), x.spatial_shape, x.batch_size)
    assert torch.equal(int8(deployed, copied, there).features, int8(deployed, x, there).features)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
        lambda f, x: torch.func.grad(lambda x: torch.func.vmap(f)(x[None]).sum())(x),
        lambda f, x: torch.func.vmap(torch.func.grad(f))(x[None]),
    ],
)
def test_a_derivative_is_refused_and_not_zero(transform):
    x = networks.scene(0, 0.4)
    maps = make_maps(LAYERS, x)
    _, deployed = networks.quantized(LAYERS, ALL, x)
    int8 = int8_network(LAYERS, ALL)
    with pytest.raises(RuntimeError, match=r"int8_network has no derivative.*fake_quant"):
        transform(lambda f: int8(deployed, x.with_features(f), maps).features.sum(), x.features)
