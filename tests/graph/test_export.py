"""The Q/DQ graph: the values of fake quantization, bit for bit, as one functional program."""

import pytest
import torch
from torch import nn

import fquant as fq
from fquant.graph import (
    dynamic_rows,
    format_from_text,
    format_to_text,
    granularity_of,
    is_dequantize,
    is_quantize,
    quantization_of,
)
from fquant.graph.export import store_integers
from fquant.sparse import SparseTensor, max_pool, sparse_conv, subm_conv
from fquant.testing.models import EXAMPLES

SUMS = fq.OpRule(ops=("add",), inputs=fq.QuantSpec(), output=fq.QuantSpec())
JOINS = fq.OpRule(ops=("cat", "max_pool2d"), inputs=fq.QuantSpec())
EXTRA = {"residual": [SUMS], "unet": [JOINS]}


def prepared(model, inputs, rules):
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, rules, inputs)
    stats = fq.calibrate_model(model, plan, params, [inputs], progress=False)
    return model, plan, params, fq.finalize(plan, stats)


def zoo(name, rules=None, dtype=torch.float64):
    inputs = tuple(x.to(dtype) for x in EXAMPLES[name].inputs())
    rules = [*EXTRA.get(name, []), *(rules or fq.w8a8())]
    return prepared(EXAMPLES[name].model().to(dtype), inputs, rules), inputs


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_graph_is_fake_quantization_bit_for_bit(name, tmp_path):
    case, inputs = zoo(name)
    model, plan, params, qstate = case
    before = {n: (id(p), p._version) for n, p in model.named_parameters()}
    program = fq.export_qdq(*case, inputs)
    assert before == {n: (id(p), p._version) for n, p in model.named_parameters()}
    expected = fq.fake_quant(model, plan)(params, qstate, *inputs)
    # What weights="integer" gives: from the same trace, and it leaves the program as it is.
    for one, weights in ((store_integers(program), "integer"), (program, "float")):
        assert torch.equal(one.module()(*inputs), expected)
        torch.export.save(one, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2")
        assert torch.equal(loaded.module()(*inputs), expected)
        nodes = list(loaded.graph.nodes)
        quantized = {quantization_of(n).name for n in nodes if is_dequantize(n)}
        assert quantized <= set(plan.quantizers)
        if weights == "float":
            assert quantized == set(plan.quantizers)
            assert {quantization_of(n).name for n in nodes if is_quantize(n)} == quantized
            assert set(one.state_dict) >= {f"params.{n}" for n in params}
        else:
            assert not any(
                is_quantize(n) and n.args[0].op == "placeholder" and "param" in n.args[0].name
                for n in nodes
            )
        targets = [n.target for n in nodes if isinstance(n.target, torch._ops.OpOverload)]
        assert not any(target._schema.is_mutable for target in targets)


@pytest.mark.parametrize(
    "rules",
    [
        fq.w4a8(),
        fq.w8a8(dynamic=True),
        [fq.OpRule(weight=fq.E4M3, inputs=fq.E5M2)],
        [fq.OpRule(weight=fq.QuantSpec(4, axis=(0, 1), block=(1, 2)), inputs=fq.QuantSpec(12))],
        [fq.OpRule(weight=fq.NF4, inputs=fq.QuantSpec(unsigned=True))],
    ],
    ids=["w4a8", "dynamic", "fp8", "blocks", "nf4"],
)
def test_every_kind_of_quantizer_is_captured(rules):
    name = "attention" if rules[0].weight.spec.block is None else "tied"
    case, inputs = zoo(name, rules, torch.float32)  # scales of float64 are traced twice
    program = fq.export_qdq(*case, inputs)
    expected = fq.fake_quant(*case[:2])(*case[2:], *inputs)
    assert torch.equal(program.module()(*inputs), expected)
    assert torch.equal(
        torch.compile(program.module(), fullgraph=True, backend="aot_eager")(*inputs), expected
    )


@pytest.mark.parametrize("name", ["residual", "recurrent"])
def test_stored_integers_are_a_quarter_of_the_weights(name):
    case, inputs = zoo(name)
    program = fq.export_qdq(*case, inputs, weights="integer")
    integers = {n: t for n, t in program.state_dict.items() if n.startswith("integers.")}
    quantized = [n for n in case[1].quantizers if n.split(".")[-1].startswith("weight")]
    assert len(integers) == len(quantized)
    assert all(t.dtype == torch.int8 for t in integers.values())
    kept = {n for n in program.state_dict if n.startswith("params.") and "weight" in n}
    assert not [n for n in kept if "bn" not in n and ".1." not in n]


def test_batch_size_may_vary():
    model = EXAMPLES["residual"].model()
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    case = prepared(model, (x,), [SUMS, *fq.w8a8()])
    shapes = ({0: torch.export.Dim("batch")},)
    program = fq.export_qdq(*case, (x[:2],), dynamic_shapes=(shapes,))
    for count in (1, 3, 6):
        expected = fq.fake_quant(*case[:2])(*case[2:], x[:count])
        assert torch.equal(program.module()(x[:count]), expected)


class Widened(nn.Module):
    """Writes into a tensor of another type, which is more than a copy."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        wide = torch.zeros(x.shape[0], 2, dtype=torch.float64)
        return wide.copy_(self.linear(x)) / 3


def test_copies_to_another_type_stay():
    x = torch.randn(4, 3)
    case = prepared(Widened(), (x,), fq.w8a8())
    y = fq.export_qdq(*case, (x,)).module()(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, fq.fake_quant(*case[:2])(*case[2:], x))


class SparseNet(nn.Module):
    """Records and kernel maps go in, records come out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 3, 3, 2))
        self.second = nn.Parameter(torch.randn(3, 2, 2, 4))

    def forward(self, x, maps):
        y = subm_conv(x, self.first, kernel_map=maps["subm"]).map(torch.relu)
        z = sparse_conv(y, self.second, kernel_map=maps["down"])
        return {"coarse": z, "pooled": max_pool(y, 2, kernel_map=maps["down"])}


def scene(seed, density):
    g = torch.Generator().manual_seed(seed)
    cells = SparseTensor.from_dense((torch.rand(2, 1, 8, 8, generator=g) < density).float())
    x = cells.with_features(torch.randn(len(cells.coords), 2, generator=g))
    return x, {"subm": fq.sparse.subm_map(x, 3), "down": fq.sparse.conv_map(x, 2, 2)}


def test_sparse_records_of_any_number_of_cells(tmp_path):
    torch.manual_seed(0)
    case = prepared(SparseNet(), scene(0, 0.5), fq.w8a8())
    args = scene(1, 0.4)
    program = fq.export_qdq(*case, args, dynamic_shapes=dynamic_rows(args), weights="integer")
    torch.export.save(program, tmp_path / "sparse.pt2")
    loaded = torch.export.load(tmp_path / "sparse.pt2")
    calls = [n.target for n in loaded.graph.nodes if n.op == "call_function"]
    assert calls.count(torch.ops.fquant.sparse_conv.default) == 2
    assert calls.count(torch.ops.fquant.sparse_max_pool.default) == 1
    unguarded = loaded.module(check_guards=False)  # torch's check of records stops Dynamo
    compiled = torch.compile(unguarded, fullgraph=True, backend="aot_eager", dynamic=True)
    for args in (scene(2, 0.3), scene(3, 0.8)):
        with (
            torch.no_grad()
        ):  # one kernel for float sums everywhere; else compiled sums differ in order
            expected = fq.fake_quant(*case[:2])(*case[2:], *args)
            results = [run(*args) for run in (loaded.module(), compiled)]
        for actual in results:
            for name, record in expected.items():
                assert torch.equal(actual[name].features, record.features)
                assert torch.equal(actual[name].coords, record.coords)
                assert actual[name].spatial_shape == record.spatial_shape


def test_formats_and_granularities_are_read_back():
    for spec in (fq.QuantSpec(4, axis=(0, 1), block=(1, 32)), fq.E4M3, fq.NF4, fq.NVFP4):
        assert format_from_text(format_to_text(spec)) == spec
    with pytest.raises(ValueError, match=r"format_from_text: text must be that of a format"):
        format_from_text("[1]")
    assert granularity_of((), (3, 4)) == "tensor"
    assert granularity_of((3, 1), (3, 4)) == "axis 0"


def test_bad_input_is_named():
    case, inputs = zoo("tied")
    with pytest.raises(ValueError, match=r"export_qdq: weights must be 'float' or 'integer'"):
        fq.export_qdq(*case, inputs, weights="int8")
    with pytest.raises(ValueError, match=r"export_qdq: qstate must have every .*lacks"):
        fq.export_qdq(*case[:3], {}, inputs)
    q = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"fquant::quantize has no derivative"):
        torch.ops.fquant.quantize(q, torch.ones(()), None, format_to_text(fq.QuantSpec()), "x")
