"""spconv's int8 guide (docs/INT8_GUIDE.md), heading by heading, with what stands here for each step.

Every step runs on this library's modules; where spconv is installed, on its modules as well.
"""

import copy
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import fquant as fq
from fquant.sparse import SparseTensor, max_pool, nn, sparse_conv_int8, subm_map
from tests.interop.int8_guide_models import (
    WEIGHTS,
    Case,
    int8_against_fake,
    int8_block,
    peer,
    residual_block,
    scene,
)

if peer is not None:
    from fquant.interop.spconv import convert_spconv

HEADINGS = [  # of the guide, as of 2024-12
    "Spconv Int8 Support",
    "Prepare model (Common)",
    "Prepare model (Spconv)",
    "Post Training Quantization (PTQ)",
    "Quantization Aware Training (QAT)",
    "Performance Guide",
]
ON_SPCONV = pytest.param(
    "spconv",
    marks=[
        pytest.mark.peer,
        pytest.mark.skipif(peer is None, reason="spconv is not installed"),
        pytest.mark.skipif(
            os.environ.get("OMP_NUM_THREADS") != "1", reason="spconv races with more threads"
        ),
    ],
)
cases = pytest.mark.parametrize("package", ["fquant", ON_SPCONV])
variants = pytest.mark.parametrize("fusable", [True, False], ids=["fusable", "unfusable"])


def test_every_heading_of_the_guide_is_here_in_its_order():
    lines = Path(__file__).read_text().splitlines()
    found = [i for i, line in enumerate(lines) if line.startswith("# ")]
    assert [lines[i][2:] for i in found] == HEADINGS
    for first, last in pairwise([*found, len(lines)]):
        assert any(line.startswith("def test_") for line in lines[first:last]), lines[first]


# Spconv Int8 Support


@pytest.mark.parametrize(("before", "after"), [(1, 3), (5, 32), (32, 64), (33, 7)])
def test_any_number_of_channels_and_pooling_on_any_device(before, after):
    x = scene(before)
    kernel_map = subm_map(x, 3)
    weight = torch.randn(after, 3, 3, before, generator=torch.Generator().manual_seed(1))
    q = fq.quantize_params({"w": weight}, {"w": WEIGHTS})["w"]
    step = torch.tensor(0.05)
    y = sparse_conv_int8(fq.quantize(x, 0.03), q, kernel_map=kernel_map, output_scale=step)
    assert y.features.q.shape == (len(x.coords), after)
    pooled = max_pool(y, 2)
    assert pooled.features.q.dtype == torch.int8
    expected = max_pool(fq.dequantize(y), 2)
    assert torch.equal(fq.dequantize(pooled).features, expected.features)


# Prepare model (Common)


@cases
def test_models_need_no_preparation(package):
    """Branches on arguments, *args and **kwargs, attributes and methods: all as they are."""
    case = Case(package, fusable=True)
    block = case.model

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, *tensors, **options):
            (x,) = tensors
            assert x.features.dim() == 2
            return self.block(x) if options.get("twice") is None else self.block(self.block(x))

    model = Model()
    fake = {} if case.ours else {"fake": False}
    plan = fq.make_plan(
        model, fq.w8a8(), (case.batches[0],), {"twice": True}, **fake, **case.options
    )
    names = [site.name for site in plan.sites]
    assert names == ["block.first.conv/subm_conv#0", "block.second.conv/subm_conv#0"]
    assert model.block.user_method() == "an attribute of the user's"
    assert type(model.block) is type(block)


# Prepare model (Spconv)


@cases
@variants
def test_both_residual_blocks_have_the_same_sites(package, fusable):
    case = Case(package, fusable)
    rules = [fq.OpRule(ops=("add",), inputs=fq.QuantSpec()), *fq.w8a8()]
    plan = case.plan(rules)
    names = [site.name for site in plan.sites]
    assert names == ["first.conv/subm_conv#0", "second.conv/subm_conv#0", "add#0"]
    x = case.batches[0]
    with torch.no_grad():
        exact = case.model(x).features
    noise = case.fake_quantized(plan, case.calibrated(plan), x).features - exact
    assert 0 < noise.square().mean() < 1e-3 * exact.square().mean()  # better than 30 dB


@variants
def test_residual_fusion(fusable):
    """SubMConv, batch norm, + x, ReLU are one integer op, whichever way the block is written."""
    case = Case("fquant", fusable)
    q, expected = int8_against_fake(case, case.state)
    difference = (q.int() - expected.int()).abs()
    # The float sums may fall on the other side of a tie.
    assert difference.max() <= 1
    assert (difference == 0).float().mean() > 0.999


# Post Training Quantization (PTQ)


@cases
def test_post_training_quantization(package):
    case = Case(package, fusable=True)
    before = copy.deepcopy(case.state)
    rules = [
        fq.OpRule("sec.*conv"),  # by regular expression: stays in float
        *fq.skip(torch.nn.BatchNorm1d),  # by type
        *fq.w8a8(),
    ]
    with pytest.warns(fq.UnusedRuleWarning):  # batch norms are no sites unless a rule names them
        plan = case.plan(rules)
    assert [site.name for site in plan.unquantized] == ["second.conv/subm_conv#0"]
    assert "first.conv/subm_conv#0" in str(plan)
    scales = case.calibrated(plan)
    assert set(scales) == {"first.conv/subm_conv#0.input", "first.conv/subm_conv#0.weight"}
    assert scales["first.conv/subm_conv#0.weight"].shape == (8, 1, 1, 1)
    y = case.fake_quantized(plan, scales, case.batches[0])
    assert torch.isfinite(y.features).all()
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


@cases
def test_operations_of_ones_own(package):
    """What the guide adds to its backend configuration is a decorator here."""
    case = Case(package, fusable=True)

    @fq.quantizable(inputs=("x",))
    def soft(x):
        return torch.nn.functional.softplus(x)

    class Soft(torch.nn.Module):
        def forward(self, x):
            return soft(x)

    case.model.relu = case.package.SparseSequential(Soft())
    plan = case.plan(fq.w8a8())
    assert plan.sites[-1].name == "relu.0/soft#0"
    assert len(case.calibrated(plan)) == 5


def test_linear_layers_per_channel():
    model = torch.nn.Linear(8, 3)
    plan = fq.make_plan(model, fq.w8a8(), (torch.ones(2, 8),))
    params = dict(model.named_parameters())
    scales = fq.finalize(plan, fq.calibrate_model(model, plan, params, [torch.ones(2, 8)]))
    assert scales["linear#0.weight"].shape == (3, 1)


@pytest.mark.peer
@pytest.mark.skipif(peer is None, reason="spconv is not installed")
@variants
def test_the_int8_block_of_an_spconv_model(fusable):
    case = Case("fquant", fusable)
    theirs = residual_block(peer, 8, fusable)
    case.model = convert_spconv(theirs)
    case.batches = [nn.with_maps(case.model, scene(8, seed)) for seed in range(3)]
    q, expected = int8_against_fake(case, dict(theirs.state_dict()))
    assert (q.int() - expected.int()).abs().max() <= 1


# Quantization Aware Training (QAT)


@variants
def test_quantization_aware_training(fusable):
    case = Case("fquant", fusable)
    teacher = case.model
    x = case.batches[0]
    with torch.no_grad():
        target = teacher(x).features
    rules = fq.w4a8()  # coarse enough for training to matter
    plan = case.plan(rules)
    scales = case.calibrated(plan)
    forward = fq.fake_quant(case.model, plan)
    start = {n: 1.3 * p.detach() for n, p in case.model.named_parameters()}  # something to learn
    trained = {n: p.clone().requires_grad_() for n, p in start.items()}
    buffers = dict(case.model.named_buffers())

    def loss(params):
        return (forward({**params, **buffers}, scales, x).features - target).square().mean()

    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        loss(trained).backward()
        optimizer.step()
    trained = {n: p.detach() for n, p in trained.items()}
    assert loss(trained) < 0.5 * loss(start)
    # The same conversion as after PTQ.
    q, expected = int8_against_fake(case, {**trained, **buffers})
    assert (q.int() - expected.int()).abs().max() <= 1


# Performance Guide


def test_the_order_of_rows_is_free():
    """There is no sort to disable: integers do not depend on the order of cells."""
    case = Case("fquant", fusable=True)
    x = fq.quantize(scene(8), 0.03)
    named, step = {"hidden": torch.tensor(0.04)}, torch.tensor(0.05)
    q = int8_block(case.state, x, named, step, subm_map(x, 3)).features.q
    order = torch.randperm(len(x.coords), generator=torch.Generator().manual_seed(0))
    features = fq.QTensor(x.features.q[order], x.features.scale, spec=x.features.spec)
    shuffled = SparseTensor(features, x.coords[order], x.spatial_shape, x.batch_size)
    again = int8_block(case.state, shuffled, named, step, subm_map(shuffled, 3)).features.q
    assert torch.equal(again, q[order])
