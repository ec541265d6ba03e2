"""The int8 convolution's definition: exact sums, the epilogue to the last bit, no derivative."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fquant_kernels
from fquant.sparse import conv_map
from fquant.testing import strategies
from fquant.testing.dense import conv_dense, read_cells
from fquant_kernels.conv_int8 import reference


def arguments(seed=0, num_inputs=20, num_outputs=15, taps=9, cin=5, cout=7, magnitude=128):
    g = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randint(
            -magnitude, 128, (num_inputs, cin), dtype=torch.int8, generator=g
        ),
        "weight": torch.randint(-128, 128, (cout, taps, cin), dtype=torch.int8, generator=g),
        "neighbors": torch.randint(
            -1, num_inputs, (taps, num_outputs), dtype=torch.int32, generator=g
        ),
        "scale": torch.rand(cout, generator=g) * 1e-3,
        "bias": torch.randn(cout, generator=g) * 10,
        "residual": torch.randint(-128, 128, (num_outputs, cout), dtype=torch.int8, generator=g),
        "residual_scale": torch.tensor(0.37),
        "relu": False,
    }


@given(st.data())
def test_sums_are_exactly_the_dense_int32_convolution(data):
    x = data.draw(strategies.sparse_tensors(num_axes=st.integers(1, 3)))
    geometry = data.draw(strategies.conv_geometries(x.spatial_shape))
    kernel_map = conv_map(x, *geometry)
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    features = torch.randint(-128, 128, x.features.shape, dtype=torch.int8, generator=g)
    shape = (4, *geometry.kernel_size, x.features.shape[1])
    weight = torch.randint(-128, 128, shape, dtype=torch.int8, generator=g)
    acc = reference.accumulate(features, weight.flatten(1, -2), kernel_map.neighbors)
    assert acc.dtype == torch.int32
    # float64 holds every int32 exactly.
    dense = conv_dense(
        x.with_features(features.double()).to_dense(), weight.double(), None, *geometry[1:]
    )
    out = type(x)(acc, kernel_map.out_coords, kernel_map.out_shape, x.batch_size)
    assert torch.equal(acc.double(), read_cells(dense, out))


@given(st.integers(0, 2**16), st.booleans(), st.booleans(), st.booleans())
def test_epilogue_is_numpy_float32_step_by_step(seed, with_bias, with_residual, relu):
    rng = np.random.default_rng(seed)
    # Ties (scale 0.5), saturation and sums beyond 2^24, which float32 rounds.
    acc = rng.integers(-(2**31), 2**31, (6, 5)) >> rng.integers(0, 32, (6, 5))
    scale = rng.choice([0.5, 1.0, 0.013, 3e-7], 5).astype(np.float32)
    bias = rng.normal(0, 20, 5).astype(np.float32)
    residual = rng.integers(-128, 128, (6, 5)).astype(np.int8)
    beta = np.float32(rng.choice([0.5, 1.7]))
    t = acc.astype(np.int32).astype(np.float32) * scale
    if with_bias:
        t = t + bias
    if with_residual:
        t = t + beta * residual.astype(np.float32)
    if relu:
        t = np.maximum(t, np.float32(0))
    assert t.dtype == np.float32
    args = (
        torch.from_numpy(acc.astype(np.int32)),
        torch.from_numpy(scale),
        torch.from_numpy(bias) if with_bias else None,
        torch.from_numpy(residual) if with_residual else None,
        torch.tensor(beta) if with_residual else None,
        relu,
    )
    integers = reference.requantize(*args, torch.int8)
    assert np.array_equal(integers.numpy(), np.clip(np.rint(t), -128, 127).astype(np.int8))
    assert np.array_equal(reference.requantize(*args, torch.float32).numpy(), t)
    half = reference.requantize(*args, torch.float16).numpy()
    with np.errstate(over="ignore"):
        assert np.array_equal(half, t.astype(np.float16))


def test_opcheck():
    a = arguments()
    op = torch.ops.fquant.sparse_conv_int8.default
    for call in (
        tuple(a.values())[:4],
        (*tuple(a.values())[:7], True),
        (*tuple(a.values())[:7], True, torch.float32),
    ):
        results = torch.library.opcheck(op, call)
        assert set(results.values()) == {"SUCCESS"}


def test_compiled_and_exported_and_mapped():
    a = tuple(arguments().values())
    expected = fquant_kernels.sparse_conv_int8(*a)

    def conv(*args):
        return fquant_kernels.sparse_conv_int8(*args)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(conv, fullgraph=True)(*a), expected)

    class Conv(torch.nn.Module):
        def forward(self, *args):
            return fquant_kernels.sparse_conv_int8(*args)

    assert torch.equal(torch.export.export(Conv(), a).module()(*a), expected)
    stacked = torch.stack([a[0], -a[0].clamp(min=-127)])
    mapped = torch.func.vmap(conv, (0, *[None] * 7))(stacked, *a[1:])
    assert torch.equal(mapped[0], expected)
    assert torch.equal(mapped[1], fquant_kernels.sparse_conv_int8(stacked[1], *a[1:]))


def _float_output(a):
    def loss(scale, bias):
        arguments = {**a, "scale": scale, "bias": bias, "out_dtype": torch.float32}
        return fquant_kernels.sparse_conv_int8(**arguments).sum()

    return loss


@pytest.mark.parametrize("which", ["scale", "bias", "residual_scale"])
@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: f(x.clone().requires_grad_()).backward(),
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x])),
        lambda f, x: torch.func.hessian(f)(x),
        lambda f, x: torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager")(x),
        lambda f, x: torch.compile(f, fullgraph=True, backend="aot_eager")(
            x.clone().requires_grad_()
        ).backward(),
    ],
    ids=["backward", "grad", "jvp", "vmap_grad", "hessian", "compile_grad", "compile_backward"],
)
def test_derivatives_raise_and_name_the_way_out(which, differentiate):
    a = arguments()

    def f(value):
        return fquant_kernels.sparse_conv_int8(
            **{**a, which: value, "out_dtype": torch.float32}
        ).sum()

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"no derivative: it computes in integers.*fake quant"):
        differentiate(f, a[which])


@pytest.mark.parametrize(("rows", "outputs"), [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_no_rows(rows, outputs):
    a = arguments(num_inputs=max(rows, 1), num_outputs=outputs)
    a["features"] = a["features"][:rows]
    if rows == 0:
        a["neighbors"] = torch.full_like(a["neighbors"], -1)
    y = fquant_kernels.sparse_conv_int8(**a)
    assert y.shape == (outputs, 7)
    if rows == 0 and outputs:
        nothing = fquant_kernels.sparse_conv_int8(**{**a, "scale": torch.zeros(7)})
        assert torch.equal(y, nothing)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"features": torch.ones(20, 5)},
            TypeError,
            "features must be torch.int8, got torch.float32",
        ),
        ({"weight": torch.ones(7, 9, 4, dtype=torch.int8)}, ValueError, r"\('Cout', 'K', 5\), got"),
        ({"neighbors": torch.zeros(9, 15).long()}, TypeError, "neighbors must be torch.int32"),
        (
            {"neighbors": torch.zeros(8, 15).int()},
            ValueError,
            r"neighbors must have shape \(9, 'M'\)",
        ),
        ({"scale": torch.ones(6)}, ValueError, r"scale must have shape \(7,\), got \(6,\)"),
        ({"bias": torch.ones(7).double()}, TypeError, "bias must be torch.float32"),
        ({"residual": None}, ValueError, "residual and residual_scale must be given together"),
        ({"residual": torch.ones(1, 7, dtype=torch.int8)}, ValueError, r"residual must have shape"),
        ({"residual_scale": torch.ones(1)}, ValueError, r"residual_scale must have shape \(\)"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be one of"),
        ({"scale": torch.ones(7, device="meta")}, ValueError, "scale must be on cpu"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=f"fquant::sparse_conv_int8: .*{message}"):
        fquant_kernels.sparse_conv_int8(**{**arguments(), **change})


def test_sums_that_could_overflow_are_refused():
    a = arguments(taps=27, cin=1, num_inputs=2, num_outputs=2, cout=1)
    wide = {
        **a,
        "features": a["features"].expand(-1, 4855).contiguous(),
        "weight": a["weight"].expand(-1, -1, 4855).contiguous(),
    }
    with pytest.raises(ValueError, match=r"K \* Cin must be at most 131071.*27 \* 4855 = 131085"):
        fquant_kernels.sparse_conv_int8(**wide)
