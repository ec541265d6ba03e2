"""What is saved is what is loaded, bit for bit: formats, dtypes and records."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fquant as fq
from fquant.sparse import SparseTensor, conv_map, transpose_map
from fquant.testing.strategies import quant_cases, sparse_tensors
from tests.serialization.files import assert_identical, round_trip

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
    "int4 in blocks": fq.QuantSpec(4, **BLOCKED),
    "MX": fq.FloatFormat(4, 3, finite="fn", scale_rule="power_of_two_floor", **BLOCKED),
    "NVFP4": dataclasses.replace(fq.NVFP4, **BLOCKED),
    "cut off": fq.FloatFormat(5, 2, max=49152.0, subnormals=False, rounding="toward_zero"),
}


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


def test_sparse_tensor_class_is_what_comes_back():
    x = SparseTensor.from_dense(torch.eye(3)[None, None])
    assert torch.equal(round_trip(x).to_dense(), x.to_dense())
