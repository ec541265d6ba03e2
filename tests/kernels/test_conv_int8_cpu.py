"""The compiled int8 convolution against the reference, bit for bit, on every path."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant_kernels
from fquant_kernels import native
from fquant_kernels.conv_int8 import cpu, reference
from tests.kernels.library import needs_library, num_threads
from tests.kernels.strategies import SETTINGS, ConvCase, conv_cases

pytestmark = needs_library


def isa_params() -> list[object]:
    available = native.available_isas()
    return [
        pytest.param(isa, marks=pytest.mark.skipif(isa not in available, reason="not this CPU"))
        for isa in native.ISAS
    ]


each_isa = pytest.mark.parametrize("isa", isa_params())


def random_case(num_rows: int, num_channels: int, num_out: int, taps: int = 27) -> ConvCase:
    random = torch.Generator().manual_seed(7)
    features = torch.randint(-128, 128, (num_rows, num_channels), generator=random)
    weight = torch.randint(-128, 128, (num_out, taps, num_channels), generator=random)
    neighbors = torch.randint(-num_rows, num_rows, (taps, num_rows), generator=random)
    return ConvCase(
        features.to(torch.int8),
        weight.to(torch.int8),
        neighbors.clamp(min=-1).to(torch.int32),
        torch.rand(num_out, generator=random) * 1e-3,
        torch.randn(num_out, generator=random),
        None,
        None,
        False,
        None,
    )


@each_isa
@SETTINGS
@given(case=conv_cases())
def test_every_path_gives_the_bits_of_the_reference(isa: str, case: ConvCase) -> None:
    want = reference.sparse_conv_int8(*case)
    got = cpu.sparse_conv_int8(*case, isa=isa)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


@each_isa
@pytest.mark.parametrize("taps", [1, 8, 27, 31, 32])
@pytest.mark.parametrize("num_channels", [16, 32])
@pytest.mark.parametrize("num_out", [1, 15, 16, 17, 48])
def test_few_channels(isa: str, taps: int, num_channels: int, num_out: int) -> None:
    for num_rows in (1, 127, 129, 300):
        case = random_case(num_rows, num_channels, num_out, taps)
        want = reference.sparse_conv_int8(*case)
        assert torch.equal(cpu.sparse_conv_int8(*case, isa=isa), want)
        neighbors = case.neighbors.clone()
        neighbors[taps - 1, num_rows - 1] = num_rows
        with pytest.raises(IndexError):
            cpu.sparse_conv_int8(*case._replace(neighbors=neighbors), isa=isa)


@each_isa
def test_sums_beyond_2_to_the_24_are_rounded_once_to_float32(isa: str) -> None:
    # 27 * 300 products of 127 * 127, and one of 127 * 126: odd sums, not floats.
    features = torch.full((1, 300), 127, dtype=torch.int8)
    weight = torch.full((40, 27, 300), 127, dtype=torch.int8)
    weight[1::2, 0, 0] = 126
    neighbors = torch.zeros((27, 3), dtype=torch.int32)
    got = cpu.sparse_conv_int8(
        features, weight, neighbors, torch.ones(40), out_dtype=torch.float32, isa=isa
    )
    want = torch.full((3, 40), 27 * 300 * 127 * 127, dtype=torch.int64)
    want[:, 1::2] -= 127
    assert want.min() > 2**24
    assert torch.equal(got, want.float())


@each_isa
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_that_are_allowed_do_not_wrap(isa: str, sign: int) -> None:
    # K * Cin = 131071 products of 2^14 come within 2^14 of 2^31, where int32 ends.
    features = torch.full((1, 131071), -128, dtype=torch.int8)
    weight = torch.full((17, 1, 131071), -128 if sign > 0 else 127, dtype=torch.int8)
    neighbors = torch.zeros((1, 1), dtype=torch.int32)
    got = cpu.sparse_conv_int8(
        features, weight, neighbors, torch.ones(17), out_dtype=torch.float32, isa=isa
    )
    exact = torch.tensor(131071 * -128 * int(weight[0, 0, 0])).float()
    assert torch.equal(got, exact.expand(1, 17))


def segments(weight: torch.Tensor) -> torch.Tensor:
    """Returns the quads per segment of the packed bytes for inputs that are not negative."""
    num_out, taps, num_channels = weight.shape
    tile = 32 * (4 + 24 * -(-num_channels // 16))
    assert num_out == 32
    return cpu.pack_weight(weight, "avx2")[-taps * tile :].view(torch.int32)[:: tile // 4]


@pytest.mark.skipif("avx2" not in native.available_isas(), reason="not this CPU")
@pytest.mark.parametrize(
    ("values", "quads"),
    [
        ([32, 32, 32, 32], 4),  # 8 * 32 * 127 = 32512: starts at 0
        ([33, 33, 32, 32], 2),  # 8 * 33 * 127 = 33528: would start below 0, and nothing above
        ([33, 33, -32, -32], 4),
        ([64, 64, -64, -64], 4),  # 8 * 64 * 127 = 65024
        ([65, 65, -65, -65], 2),  # 8 * 65 * 127 = 66040: more than int16 has
        ([65, -65, 0, 0], 2),  # the same, of both signs
        ([64, 64, 64, 64], 2),
        ([127, 127, -128, -127], 2),
        ([127, 127, 127, 127], 1),
        ([-128, -128, -128, -128], 1),
    ],
)
def test_int16_sums_never_wrap(values: list[int], quads: int) -> None:
    weight = torch.zeros((32, 2, 48), dtype=torch.int8)
    weight[5] = torch.tensor(values, dtype=torch.int8).repeat(12)
    weight[6] = -weight[5].clamp(min=-127)
    assert (segments(weight) == quads).all()
    for value in (127, 126, 1):
        features = torch.full((3, 48), value, dtype=torch.int8)
        features[1, 20:] = 0
        features[2, ::3] = 0
        neighbors = torch.tensor([[0, 1, 2], [1, -1, 0]], dtype=torch.int32)
        args = (features, weight, neighbors, torch.ones(32))
        got = cpu.sparse_conv_int8(*args, out_dtype=torch.float32, isa="avx2")
        assert torch.equal(got, reference.sparse_conv_int8(*args, out_dtype=torch.float32))


@each_isa
@pytest.mark.parametrize("num_channels", [384, 385, 900])
def test_wide_layers(isa: str, num_channels: int) -> None:
    # Their weights are read in parts of 384 channels where no input is negative (AVX2).
    case = random_case(40, num_channels, 40, taps=2)
    case = case._replace(features=case.features.clamp(min=0))
    whole = case._replace(neighbors=torch.arange(40, dtype=torch.int32).expand(2, 40).contiguous())
    for each in (case, whole):
        want = reference.sparse_conv_int8(*each)
        assert torch.equal(cpu.sparse_conv_int8(*each, isa=isa), want)


@each_isa
@pytest.mark.parametrize("place", [0, 31, 32, 98])
def test_one_negative_input_is_seen(isa: str, place: int) -> None:
    features = torch.full((99, 1), 100, dtype=torch.int8)
    features[place] = -100
    weight = torch.full((1, 1, 1), 3, dtype=torch.int8)
    neighbors = torch.arange(99, dtype=torch.int32)[None]
    args = (features, weight, neighbors, torch.ones(1))
    got = cpu.sparse_conv_int8(*args, out_dtype=torch.float32, isa=isa)
    assert torch.equal(got, features * 3.0)


@each_isa
def test_ties_go_to_even_and_the_rest_saturates(isa: str) -> None:
    sums = torch.tensor([-128, -3, -1, 0, 1, 3, 5, 127], dtype=torch.int8)
    weight = torch.ones((1, 1, 1), dtype=torch.int8)
    neighbors = torch.arange(8, dtype=torch.int32)[None]

    def conv(scale: float) -> list[int]:
        out = cpu.sparse_conv_int8(sums[:, None], weight, neighbors, torch.tensor([scale]), isa=isa)
        return out[:, 0].tolist()

    assert conv(0.5) == [-64, -2, 0, 0, 0, 2, 2, 64]
    assert conv(3.0) == [-128, -9, -3, 0, 3, 9, 15, 127]


@each_isa
def test_no_fma_in_the_epilogue(isa: str) -> None:
    # In float32 acc * scale rounds to 1 exactly; a fused multiply-add would leave 2^-23 or more.
    acc, scale = 49, torch.tensor(1.0 / 49.0)
    exact = acc * scale.double() - 1.0
    assert exact != 0
    assert float(acc * scale) == 1.0
    got = cpu.sparse_conv_int8(
        torch.tensor([[acc]], dtype=torch.int8),
        torch.ones((1, 1, 1), dtype=torch.int8),
        torch.zeros((1, 1), dtype=torch.int32),
        scale[None],
        torch.tensor([-1.0]),
        out_dtype=torch.float32,
        isa=isa,
    )
    assert got.item() == 0.0


@each_isa
def test_float16_overflow_and_subnormals_round_as_torch(isa: str) -> None:
    random = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 18, (600,), generator=random)
    bias = torch.randn(600, generator=random) * 2.0**exponents
    bias[:6] = torch.tensor([65519.9, 65520.0, -65520.0, 2.0**-25, 3 * 2.0**-25, -0.0])
    features = torch.zeros((1, 1), dtype=torch.int8)
    weight = torch.zeros((600, 1, 1), dtype=torch.int8)
    neighbors = torch.zeros((1, 1), dtype=torch.int32)
    args = (features, weight, neighbors, torch.ones(600), bias)
    got = cpu.sparse_conv_int8(*args, out_dtype=torch.float16, isa=isa)
    assert torch.equal(got, reference.sparse_conv_int8(*args, out_dtype=torch.float16))


@each_isa
@SETTINGS
@given(data=st.data())
def test_the_number_of_threads_changes_nothing(isa: str, data: st.DataObject) -> None:
    case = random_case(data.draw(st.sampled_from([600, 3000])), 33, 65)
    outputs = []
    for threads in (1, 2, 5):
        with num_threads(threads):
            outputs.append(cpu.sparse_conv_int8(*case, isa=isa))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@each_isa
def test_non_contiguous_arguments_are_handled(isa: str) -> None:
    case = random_case(300, 24, 40)
    want = reference.sparse_conv_int8(*case)
    strided = [
        torch.stack([t, t], dim=-1)[..., 0] if isinstance(t, torch.Tensor) else t for t in case
    ]
    assert not strided[0].is_contiguous()
    assert torch.equal(cpu.sparse_conv_int8(*strided, isa=isa), want)
    flipped = case._replace(features=case.features.T.contiguous().T)
    assert torch.equal(cpu.sparse_conv_int8(*flipped, isa=isa), want)


@each_isa
@pytest.mark.parametrize("place", [0, 255, 256, 299])
def test_an_index_out_of_range_is_an_error_and_no_read(isa: str, place: int) -> None:
    case = random_case(300, 24, 40)
    for wrong in (300, 2**31 - 1):
        neighbors = case.neighbors.clone()
        neighbors[5, place] = wrong
        with pytest.raises(IndexError, match="neighbors must be below the number of input rows"):
            cpu.sparse_conv_int8(*case._replace(neighbors=neighbors), isa=isa)


@each_isa
def test_arguments_are_not_written(isa: str) -> None:
    case = random_case(300, 30, 40)
    copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in case]
    cpu.sparse_conv_int8(*case, isa=isa)
    for before, after in zip(copies, case, strict=True):
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after)


def test_packing_is_pure_and_padded_with_nothing() -> None:
    weight = torch.randint(-128, 128, (17, 3, 5), dtype=torch.int8)
    for isa in native.available_isas():
        first, second = cpu.pack_weight(weight, isa), cpu.pack_weight(weight, isa)
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()
        assert cpu.pack_weight(weight[:0], isa).numel() == 0


def test_the_environment_forces_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(10, 3, 3)
    for isa in native.available_isas():
        monkeypatch.setenv(native.FORCE_ISA, isa)
        assert native.chosen_isa() == isa
        fquant_kernels.sparse_conv_int8(*case)
    monkeypatch.setenv(native.FORCE_ISA, "sse9")
    with pytest.raises(ValueError, match=r"FQUANT_CPU_ISA must be one of scalar, avx2.*'sse9'"):
        fquant_kernels.sparse_conv_int8(*case)
    monkeypatch.setattr(native, "available_isas", lambda: ("scalar",))
    monkeypatch.setenv(native.FORCE_ISA, "avx2")
    with pytest.raises(RuntimeError, match=r"one this processor runs \(scalar\), got 'avx2'"):
        fquant_kernels.sparse_conv_int8(*case)
