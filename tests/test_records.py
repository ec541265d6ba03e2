"""Records are trees: they pass every transform, and keep what is static."""

import dataclasses

import pytest
import torch
from torch.utils import _pytree as pytree

import fquant as fq
from fquant.sparse import KernelMap, SparseTensor, conv_map, subm_conv, subm_map

SPEC = fq.QuantSpec(num_bits=4, axis=(0, 1))
WEIGHT = fq.quantize(
    torch.tensor([[0.5, -1.0], [2.0, 0.1]]), torch.tensor([[0.25], [0.5]]), None, SPEC
)
SHIFTED = fq.quantize(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), 0.5, 3)
FLOAT = fq.FloatFormat(4, 3, finite="fn", axis=(0, 1), block=(1, 2), scale_rule="power_of_two")
CELLS = SparseTensor.from_dense(torch.tensor([[[0.0, 1.0, 2.0, 0.0, 3.0]]]))
RECORDS = {
    "QTensor": WEIGHT,
    "QTensor with a zero point": SHIFTED,
    "QTensor of codes": fq.quantize(torch.ones(2, 4), torch.ones(2, 2), spec=FLOAT),
    "QTensor of a codebook": fq.quantize(torch.ones(2), 1.0, spec=fq.NF4),
    "PackedTensor": fq.pack(fq.quantize(torch.ones(2, 3), 1.0, 1, fq.QuantSpec(4))),
    "SparseTensor": CELLS,
    "quantized SparseTensor": fq.quantize(CELLS, 0.1),
    "KernelMap": conv_map(CELLS, 2, 2),
}
by_name = pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS.keys())


def static_fields(record):
    return {
        f.name: getattr(record, f.name)
        for f in dataclasses.fields(record)
        if "static" in f.metadata
    }


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    leaves, structure = pytree.tree_flatten(actual)
    expected_leaves, expected_structure = pytree.tree_flatten(expected)
    assert structure == expected_structure
    assert static_fields(actual) == static_fields(expected)
    for a, b in zip(leaves, expected_leaves, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@by_name
def test_tree_map_keeps_what_is_static(record):
    assert_same(pytree.tree_map(lambda leaf: leaf.clone(), record), record)
    assert all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(record))


@by_name
def test_context_survives_json(record):
    structure = pytree.tree_structure(record)
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure


@by_name
def test_vmap(record):
    stacked = pytree.tree_map(lambda leaf: torch.stack([leaf, leaf]), record)
    back = torch.func.vmap(lambda r: pytree.tree_map(lambda leaf: leaf + 0, r))(stacked)
    assert_same(pytree.tree_map(lambda leaf: leaf[1], back), record)


@by_name
def test_compiled_functions_take_and_return_records(record):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda r: pytree.tree_map(lambda leaf: leaf + 1, r), fullgraph=True, backend="aot_eager"
    )
    assert_same(compiled(record), pytree.tree_map(lambda leaf: leaf + 1, record))


@by_name
@pytest.mark.parametrize("strict", [False, True])
def test_export_saved_and_loaded(record, strict, tmp_path):
    class Doubled(torch.nn.Module):
        def forward(self, r):
            return pytree.tree_map(lambda leaf: leaf * 2, r)

    program = torch.export.export(Doubled(), (record,), strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert_same(loaded.module()(record), pytree.tree_map(lambda leaf: leaf * 2, record))


def test_gradients_with_respect_to_float_leaves():
    def loss(floats, rebuild):
        return (fq.dequantize(rebuild(floats)["w"]) ** 2).sum()

    floats, rebuild = fq.split_floating({"w": WEIGHT, "steps": torch.tensor([3])})
    assert len(floats) == 1
    (gradient,) = torch.func.grad(loss)(floats, rebuild)
    expected = (2 * WEIGHT.scale * WEIGHT.q.float() ** 2).sum(dim=1, keepdim=True)
    assert torch.allclose(gradient, expected)
    restored = rebuild(floats)
    assert_same(restored["w"], WEIGHT)


def test_gradient_through_a_sparse_record():
    kernel_map = subm_map(CELLS, 3)
    weight = torch.ones(1, 3, 1)

    def loss(x):
        return subm_conv(x, weight, kernel_map=kernel_map).features.sum()

    floats, rebuild = fq.split_floating(CELLS)
    (gradient,) = torch.func.grad(lambda f: loss(rebuild(f)))(floats)
    assert gradient.flatten().tolist() == [2, 2, 1]  # cells 1 and 2 touch, cell 4 is alone


def test_quantizing_a_record_leaves_coordinates_alone():
    for function in (
        lambda x: fq.quantize(x, 0.5),
        lambda x: fq.fake_quantize(x, 0.5),
        lambda x: fq.dequantize(fq.quantize(x, 0.5)),
        lambda x: fq.fake_tensor_quant(x, 3.0),
    ):
        y = function(CELLS)
        assert y.coords is CELLS.coords
        assert static_fields(y) == static_fields(CELLS)
    assert torch.equal(fq.fake_quantize(CELLS, 0.4).features, fq.fake_quantize(CELLS.features, 0.4))


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        WEIGHT.scale = torch.ones(())
    assert KernelMap.__dataclass_params__.frozen
