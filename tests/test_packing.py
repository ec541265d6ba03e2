"""Packed storage of codes of up to 4 bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import fquant as fq
from fquant.testing import strategies


@given(
    strategies.float_tensors(st.tuples(st.integers(0, 3), st.integers(0, 9)), (torch.float32,)),
    st.sampled_from(
        [fq.QuantSpec(b, u) for b in (2, 3, 4) for u in (False, True)] + [fq.E2M1, fq.NF4]
    ),
)
def test_packing_is_lossless(x, spec):
    q = fq.quantize(x, 3.7, spec=spec)
    packed = fq.pack(q)
    per_byte = 4 if spec.num_bits <= 2 else 2
    assert packed.packed.shape == (x.shape[0], -(-x.shape[1] // per_byte))
    assert packed.shape == x.shape
    back = fq.unpack(packed)
    assert torch.equal(back.q, q.q)
    assert back.q.dtype == q.q.dtype
    assert back.spec == q.spec
    assert torch.equal(fq.dequantize(packed), fq.dequantize(q))


def test_packing_golden_and_transforms():
    q = fq.quantize(torch.tensor([[1.0, -2.0, 7.0], [0.0, -8.0, 3.0]]), 1.0, spec=fq.QuantSpec(4))
    packed = fq.pack(q)
    assert packed.packed.tolist() == [[0x1 | 0xE << 4, 0x7], [0x0 | 0x8 << 4, 0x3]]
    two = fq.quantize(torch.tensor([1.0, -2.0, -1.0, 0.0, 1.0]), 1.0, spec=fq.QuantSpec(2))
    assert fq.pack(two).packed.tolist() == [0b00_11_10_01, 0b01]
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: fq.dequantize(p), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed), fq.dequantize(q))
    stacked = pytree.tree_map(lambda leaf: torch.stack([leaf, leaf]), packed)
    assert torch.equal(torch.func.vmap(fq.dequantize)(stacked)[1], fq.dequantize(q))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fq.pack(torch.ones(2)), TypeError, "pack: x must be a QTensor"),
        (lambda: fq.unpack(torch.ones(2)), TypeError, "unpack: x must be a PackedTensor"),
        (lambda: fq.pack(fq.quantize(torch.ones(2), 1.0)), ValueError, "at most 4 bits, got 8"),
        (
            lambda: fq.pack(fq.quantize(torch.ones(2), 1.0, spec=fq.QuantSpec(5))),
            ValueError,
            "at most 4 bits, got 5",
        ),
        (
            lambda: fq.pack(fq.quantize(torch.ones(()), 1.0, spec=fq.QuantSpec(4))),
            ValueError,
            "at least one axis",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
