"""What the tests of this folder share: programs to lower, and how two of them are compared."""

import torch
from hypothesis import strategies as st
from torch import nn

import fquant as fq
from fquant.graph import site_integers
from fquant.sparse import SparseTensor
from fquant.testing.models import EXAMPLES

SUMS = fq.OpRule(ops=("add",), inputs=fq.QuantSpec(), output=fq.QuantSpec())
JOINS = fq.OpRule(ops=("cat", "max_pool2d"), inputs=fq.QuantSpec())
SITES = fq.OpRule(ops=("site",), output=fq.QuantSpec())
EXTRA = {"residual": [SUMS], "unet": [JOINS]}


def exported(model, args, rules=None, batches=None, **options):
    model = model.eval()
    params = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    params = {n: p.detach() for n, p in params.items()}
    plan = fq.make_plan(model, rules or fq.w8a8(), args)
    stats = fq.calibrate_model(model, plan, params, batches or [args], progress=False)
    qstate = fq.finalize(plan, stats)
    return fq.export_qdq(model, plan, params, qstate, args, **options)


def zoo(name):
    model, inputs = EXAMPLES[name].model().float(), EXAMPLES[name].inputs()
    inputs = tuple(x.float() for x in inputs)
    if name == "sparse":
        model.cells = model.cells.with_features(model.cells.features.float())
    return exported(model, inputs, [*EXTRA.get(name, []), *fq.w8a8()]), inputs


def agreement(program, lowered, *args):
    """The share of integers that are equal, over all sites that both have; none two steps apart."""
    before, after = site_integers(program, *args), site_integers(lowered, *args)
    equal = total = 0
    for name, q in after.items():
        assert q.shape == before[name].shape, name
        steps = (q.int() - before[name].int()).abs()
        assert steps.max() <= 1, name
        equal, total = equal + (steps == 0).sum().item(), total + q.numel()
    return equal / total, set(after)


def kernels(report):
    return [layer.kernel for layer in report.layers]


class Mark(nn.Module):
    def forward(self, x):
        return fq.site("mark", x)


def dense(kind, cin, cout, kernel, groups, **options):
    return getattr(nn, kind)(cin, cout, kernel, groups=groups, **options)


@st.composite
def layers(draw):
    """A convolution of some kind with what may follow it, and an input that fits."""
    axes = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["Conv", "ConvTranspose"])) + f"{axes}d"
    groups = draw(st.sampled_from([1, 1, 2]))
    options = {
        name: draw(st.integers(low, 2))
        for name, low in (("stride", 1), ("padding", 0), ("dilation", 1))
    }
    kernel = draw(st.integers(1, 3))
    options["padding"] = min(options["padding"], options["dilation"] * (kernel - 1))
    if kind.startswith("ConvT"):
        options["output_padding"] = draw(st.integers(0, max(options["stride"], 1) - 1))
    cin, cout = (groups * draw(st.integers(1, 5)) for _ in range(2))
    conv = dense(kind, cin, cout, kernel, groups, bias=draw(st.booleans()), **options)
    follow = draw(st.sampled_from(["none", "relu", "norm", "norm+relu6", "clamp", "pool"]))
    size = draw(st.integers(5, 8))
    return conv, follow, torch.randn(draw(st.integers(1, 3)), cin, *[size] * axes)


class Layer(nn.Module):
    """A convolution between two marked sites."""

    def __init__(self, conv, follow, axes):
        super().__init__()
        self.conv, self.follow, self.axes = conv, follow, axes
        norm = getattr(nn, f"BatchNorm{axes}d")(conv.out_channels)
        with torch.no_grad():
            norm.weight.uniform_(-1, 1)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        self.norm = norm

    def forward(self, x):
        y = self.conv(x)
        if "norm" in self.follow:
            y = self.norm(y)
        if self.follow == "pool":
            y = getattr(nn.functional, f"max_pool{self.axes}d")(y, 2, 1).relu()
        if "relu6" in self.follow:
            y = nn.functional.relu6(y)
        elif "relu" in self.follow:
            y = y.relu()
        if self.follow == "clamp":
            y = y.clamp(-0.3, 0.2)
        if self.follow == "none":
            y = y.flatten(1)
        return fq.site("y", y)


def scene(seed, density):
    g = torch.Generator().manual_seed(seed)
    cells = SparseTensor.from_dense((torch.rand(2, 1, 12, 12, generator=g) < density).float())
    x = cells.with_features(torch.randn(len(cells.coords), 6, generator=g))
    down = fq.sparse.conv_map(x, 2, 2)
    return x, {
        "fine": fq.sparse.subm_map(x, 3),
        "down": down,
        "up": fq.sparse.transpose_map(down),
        "point": fq.sparse.subm_map(x, 1),
    }
