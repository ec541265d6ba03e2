"""spconv's int8 guide (docs/INT8_GUIDE.md), heading by heading, with what stands here for each step.

Every step runs on this library's modules; where spconv is installed, on its modules as well.
"""

import copy
import os
import warnings

import pytest
import torch

import fquant as fq
from fquant.sparse import SparseTensor, max_pool, nn, sparse_conv_int8, subm_map

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spconv.pytorch as peer

    from fquant.interop.spconv import convert_spconv, spconv_ops, to_spconv
except ImportError:
    peer = None

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
WEIGHTS = fq.QuantSpec(narrow_range=True, axis=0)


def residual_block(package, channels, fusable):
    """conv, bn, relu, conv, bn, + x, relu: with records throughout, or with features taken out."""

    class Block(package.SparseModule):
        def __init__(self):
            super().__init__()
            conv1 = package.SubMConv2d(channels, channels, 3, 1, 1, bias=False, indice_key="key")
            conv2 = package.SubMConv2d(channels, channels, 3, 1, 1, bias=False, indice_key="key")
            norm1, norm2 = (torch.nn.BatchNorm1d(channels, momentum=0.1) for _ in range(2))
            self.first = package.SparseSequential(conv=conv1, bn=norm1, relu=torch.nn.ReLU())
            self.second = package.SparseSequential(conv=conv2, bn=norm2)
            self.relu = package.SparseReLU() if fusable else torch.nn.ReLU()
            self.note = "an attribute of the user's"

        def forward(self, x):
            y = self.second(self.first(x))
            if fusable:
                return self.relu(y + x)
            return y.replace_feature(self.relu(y.features + x.features))

        def user_method(self):
            return self.note

    torch.manual_seed(0)
    block = Block()
    with torch.no_grad():
        for conv in (block.first.conv, block.second.conv):
            conv.weight.mul_(5)  # so that x is a part of the sum, not most of it
    for name, buffer in block.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return block.eval()


def scene(channels, seed=0):
    g = torch.Generator().manual_seed(seed)
    cells = SparseTensor.from_dense((torch.rand(2, 1, 12, 12, generator=g) < 0.4).float())
    return cells.with_features(torch.randn(len(cells.coords), channels, generator=g))


class Case:
    """A model of one package, with what its calls need."""

    def __init__(self, package, fusable, channels=8):
        self.package = nn if package == "fquant" else peer
        self.model = residual_block(self.package, channels, fusable)
        self.state = dict(self.model.state_dict())
        self.ours = package == "fquant"
        self.options = {} if self.ours else {"ops": spconv_ops()}
        self.batches = [self.tensor(scene(channels, seed)) for seed in range(3)]

    def tensor(self, x):
        return nn.with_maps(self.model, x) if self.ours else to_spconv(x)

    def plan(self, rules):
        fake = {} if self.ours else {"fake": False}
        return fq.make_plan(self.model, rules, (self.batches[0],), **fake, **self.options)

    def calibrated(self, plan):
        stats = fq.calibrate_model(
            self.model, plan, self.state, self.batches, progress=False, **self.options
        )
        return fq.finalize(plan, stats)

    def fake_quantized(self, plan, scales, x, state=None):
        call = fq.fake_quant(self.model, plan, **self.options)
        with torch.no_grad():
            return call(self.state if state is None else state, scales, x)


cases = pytest.mark.parametrize("package", ["fquant", ON_SPCONV])
variants = pytest.mark.parametrize("fusable", [True, False], ids=["fusable", "unfusable"])


def int8_block(state, x, scales, output_scale, kernel_map):
    """The guide's fusion: two integer convolutions, batch norm folded, sum and ReLU in the second."""
    params = {}
    for layer in ("first", "second"):
        gain = state[f"{layer}.bn.weight"] / (state[f"{layer}.bn.running_var"] + 1e-5).sqrt()
        params[layer] = (
            fq.quantize_params(
                {"w": state[f"{layer}.conv.weight"] * gain.view(-1, 1, 1, 1)}, {"w": WEIGHTS}
            )["w"],
            state[f"{layer}.bn.bias"] - state[f"{layer}.bn.running_mean"] * gain,
        )
    hidden = sparse_conv_int8(
        x, *params["first"], kernel_map=kernel_map, output_scale=scales["hidden"], relu=True
    )
    return sparse_conv_int8(
        hidden,
        *params["second"],
        kernel_map=kernel_map,
        output_scale=output_scale,
        residual=x,
        relu=True,
    )


def int8_against_fake(case, state):
    """Returns the int8 block's integers and those of the fake-quantized one with folded batch norm."""
    pairs = {"first.conv": "first.bn", "second.conv": "second.bn"}
    folded = fq.fold_batch_norm(case.model, state, pairs)
    plan = case.plan(fq.w8a8())
    scales = fq.finalize(
        plan, fq.calibrate_model(case.model, plan, folded, case.batches, progress=False)
    )
    x = fq.fake_quantize(scene(8), scales["first.conv/subm_conv#0.input"])
    y = case.fake_quantized(plan, scales, case.tensor(x), folded)
    output_scale = y.features.amax() / 127
    named = {"hidden": scales["second.conv/subm_conv#0.input"]}
    quantized = fq.quantize(x, scales["first.conv/subm_conv#0.input"])
    q = int8_block(state, quantized, named, output_scale, subm_map(x, 3)).features.q
    return q, fq.quantize(y.features, output_scale).q


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
