"""What is saved is what is loaded, bit for bit, whatever the tree is made of."""

import collections
import dataclasses
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import fquant as fq
from fquant.pytree import record, static
from fquant.serialization import container
from fquant.sparse import SparseTensor, conv_map, transpose_map
from fquant.testing.models import EXAMPLES
from fquant.testing.strategies import quant_cases, sparse_tensors

pytest.importorskip("safetensors")

BLOCKED = {"axis": (0, 1), "block": (1, 2)}
GRIDS = {
    **{f"int{b}": fq.QuantSpec(b, narrow_range=b % 2 == 0) for b in range(2, 17)},
    **{f"uint{b}": fq.QuantSpec(b, unsigned=True, axis=0) for b in range(2, 17)},
    **{
        name: getattr(fq, name)
        for name in ("E4M3", "E5M2", "E4M3FNUZ", "E5M2FNUZ", "E2M3", "E3M2", "E2M1", "FP16", "BF16")
    },
    "QPyTorch": fq.QPYTORCH_E4M3,
    "NF4": fq.NF4,
    "infinite codebook": fq.Codebook((-float("inf"), 0.0, float("inf"))),
    "int4 in blocks": fq.QuantSpec(4, **BLOCKED),
    "MX": fq.FloatFormat(4, 3, finite="fn", scale_rule="power_of_two_floor", **BLOCKED),
    "NVFP4": dataclasses.replace(fq.NVFP4, **BLOCKED),
    "cut off": fq.FloatFormat(5, 2, max=49152.0, subnormals=False, rounding="toward_zero"),
}


@record
class Mine:
    """A record of a user."""

    q: Tensor
    note: str = static(default="")


class Pair(NamedTuple):
    """A NamedTuple of a user."""

    left: Tensor
    right: int


def assert_identical(a, b):
    """Same types, dtypes, shapes and bytes, all the way down."""
    assert type(a) is type(b) or isinstance(a, collections.abc.Mapping)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        raw = [container.bytes_of(x) for x in (a, b)]
        assert torch.equal(*raw)
    elif isinstance(a, collections.abc.Mapping):
        assert list(a) == list(b)
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b) or (a != a and b != b)
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_identical(getattr(a, field.name), getattr(b, field.name))
    else:
        assert a == b


def round_trip(tree, *classes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree.safetensors"
        fq.save(path, tree)
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        return fq.load(path, *classes)


@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS.keys())
def test_every_format(spec):
    x = torch.linspace(-3.0, 5.0, 24, dtype=torch.bfloat16).reshape(4, 6)
    x[0, 0], x[1, 1], x[2, 2] = float("nan"), float("inf"), -0.0
    amax = fq.compute_amax(x.nan_to_num(0.0, 3.0), spec.axis, spec.block)
    scale = fq.two_level_scales(amax.float())[0] if spec.scale_rule == "two_level" else amax + 0.25
    q = fq.quantize(x, scale.float(), spec=spec)
    tree = {"q": q, "dequantized": fq.dequantize(q)}
    if spec.num_bits <= 4:
        tree["packed"] = fq.pack(q)
    loaded = round_trip(tree)
    assert_identical(loaded, tree)
    assert loaded["q"].spec == spec
    assert_identical(fq.dequantize(loaded["q"]), tree["dequantized"])
    if "packed" in tree:
        assert_identical(fq.unpack(loaded["packed"]), q)


@settings(max_examples=60)
@given(quant_cases(), st.booleans())
def test_any_quantized_tensor(case, shifted):
    zero_point = 1 if shifted else None
    q = fq.quantize(case.x, case.scale, zero_point, case.spec)
    assert_identical(round_trip(q), q)


@settings(max_examples=40)
@given(sparse_tensors(dtype=torch.float32))
def test_sparse_records(x):
    quantized = fq.quantize(x, 0.5)
    down = conv_map(x, 1, 1)
    tree = [x, quantized, down, transpose_map(down)]
    assert_identical(round_trip(tree), tree)


ALL_DTYPES = [
    dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not dtype.is_complex and "q" not in str(dtype)
]


@pytest.mark.parametrize("dtype", sorted({*ALL_DTYPES, torch.complex64, torch.complex128}, key=str))
def test_every_dtype_and_bit_pattern(dtype):
    try:
        size = torch.empty((), dtype=dtype).element_size()
    except (RuntimeError, NotImplementedError):
        pytest.skip(f"torch makes no tensors of {dtype}")
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (7 * 2 * size,), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        raw = raw % 2
    x = raw.view(dtype).reshape(7, 2)
    tree = {"x": x, "empty": x[:0], "one": x[0, 0], "dtype": dtype}
    assert_identical(round_trip(tree), tree)


def test_payloads_of_nan_and_negative_zero():
    bits = torch.tensor([0x7FC00001, 0x7F800001, -1, -(2**31), 0x7FA5A5A5], dtype=torch.int32)
    assert torch.equal(round_trip(bits.view(torch.float32)).view(torch.int32), bits)


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([torch.float32, torch.int8, fq.QuantSpec(4, axis=(0, 1)), fq.NF4])
    | hnp.arrays("float32", hnp.array_shapes(min_dims=0, min_side=0)).map(torch.from_numpy)
)
TREES = st.recursive(
    PLAIN,
    lambda below: (
        st.lists(below, max_size=3)
        | st.lists(below, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.sampled_from(["a", "a/b", "__metadata__"]), below)
    ),
    max_leaves=8,
)


@settings(max_examples=100)
@given(TREES)
def test_any_tree(tree):
    assert_identical(round_trip(tree), tree)


def test_names_of_tensors_never_collide():
    a, b, c = torch.ones(1), torch.zeros(2), torch.full((3,), 2.0)
    tree = {"a/b": a, "a": {"b": b, "b~": c}, "__metadata__": a + 1, "": b + 1}
    assert_identical(round_trip(tree), tree)
    assert_identical(round_trip(a), a)


def test_a_model_with_all_its_state():
    example = EXAMPLES["residual"]
    model = example.model().float()
    params = {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()]}
    x = example.inputs()[0].float()
    rules = [*fq.skip("stem"), fq.OpRule(inputs=fq.Quantizer(observer=fq.HistogramObserver()))]
    plan = fq.make_plan(model, rules, (x,))
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    tree = {
        "params": params,
        "stats": stats,
        "qstate": fq.finalize(plan, stats),
        "plan": plan,
        "rules": rules,
        "fine_tuning": fq.fine_tuning(100, 0.1),
    }
    loaded = round_trip(tree)
    assert_identical(loaded, tree)
    assert loaded["plan"] == plan
    assert loaded["rules"] == rules
    expected = fq.fake_quant(model, plan)(params, tree["qstate"], x)
    actual = fq.fake_quant(model, loaded["plan"])(loaded["params"], loaded["qstate"], x)
    assert torch.equal(actual, expected)
    assert_identical(
        fq.calibrate_model(model, plan, params, [x], loaded["stats"], progress=False),
        fq.calibrate_model(model, plan, params, [x], stats, progress=False),
    )


OBSERVERS = [
    fq.MaxObserver(axis=0),
    fq.MinMaxObserver(),
    fq.MovingAverageObserver(momentum=0.5, axis=0),
    fq.HistogramObserver(axis=0, num_bins=64, skip_zeros=True),
    fq.FixedWidthHistogramObserver(num_bins=16),
]


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: type(o).__name__)
def test_observers_and_their_states(observer):
    state = observer.update(observer.init(), torch.randn(3, 5))
    tree = {"observer": observer, "state": state, "start": observer.init()}
    loaded = round_trip(tree)
    assert_identical(loaded, tree)
    assert torch.equal(loaded["observer"].amax(loaded["state"]), observer.amax(state))


def test_classes_of_a_user():
    tree = (Mine(torch.ones(2), "mine"), Pair(torch.zeros(()), 3))
    assert_identical(round_trip(tree, Mine, Pair), tree)
    with pytest.raises(ValueError, match="'Mine' is no known class"):
        round_trip(tree)


def test_one_tensor_in_two_places_is_one_again():
    weight = torch.nn.Parameter(torch.randn(2, 2))
    loaded = round_trip({"embed": weight, "head": weight, "view": weight.detach()[0]})
    assert loaded["embed"] is loaded["head"]
    assert not loaded["embed"].requires_grad
    assert torch.equal(loaded["view"], weight[0])


def test_views_are_saved_as_their_values_only(tmp_path):
    big = torch.zeros(1000, 1000)
    fq.save(tmp_path / "view", {"column": big[:, 3], "turned": big[:4, :4].T, "conj": big[0, :1]})
    assert (tmp_path / "view").stat().st_size < 20_000


def test_lazily_conjugated_and_negated_views_are_saved_as_their_values():
    x = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(round_trip(x.conj()), torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(round_trip(x.conj().imag), torch.tensor([-2.0, 4.0]))


def test_what_loads_is_independent_of_the_file(tmp_path):
    fq.save(tmp_path / "x", torch.zeros(1000))
    x = fq.load(tmp_path / "x")
    fq.save(tmp_path / "x", torch.ones(1000))
    assert x.sum() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_from_cuda_to_cpu_and_back(tmp_path):
    x = fq.quantize(torch.randn(4, 4, device="cuda"), 0.1)
    fq.save(tmp_path / "x", x)
    assert fq.load(tmp_path / "x").q.device.type == "cpu"
    assert_identical(fq.load(tmp_path / "x", device="cuda"), x)


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": [object()]}, TypeError, "save: tree must hold tensors.* got object at 'a/0'"),
        ({"a": {1: 2}}, TypeError, "save: dicts must have strings for keys, got 1 at 'a'"),
        ([torch.empty(2, device="meta")], ValueError, "save: tensors must be dense.* meta at '0'"),
        ([torch.zeros(2).to_sparse()], ValueError, "save: tensors must be dense.* at '0'"),
        ({1, 2}, TypeError, "save: tree must hold .* got set at ''"),
    ],
)
def test_bad_input_is_named(tree, error, message, tmp_path):
    with pytest.raises(error, match=message):
        fq.save(tmp_path / "x", tree)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    fq.save(tmp_path / "x", torch.ones(2))

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        fq.save(tmp_path / "x", torch.zeros(2))
    monkeypatch.undo()
    assert torch.equal(fq.load(tmp_path / "x"), torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_without_safetensors_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'fquant\[files\]'"):
        fq.save(tmp_path / "x", torch.ones(2))


def test_sparse_tensor_class_is_what_comes_back():
    x = SparseTensor.from_dense(torch.eye(3)[None, None])
    assert torch.equal(round_trip(x).to_dense(), x.to_dense())
