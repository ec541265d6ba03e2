"""The models of spconv's int8 guide in either package, and their int8 forms, for the walk through it."""

import warnings

import torch

import fquant as fq
from fquant.sparse import SparseTensor, nn, sparse_conv_int8, subm_map

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spconv.pytorch as peer

    from fquant.interop.spconv import spconv_ops, to_spconv
except ImportError:
    peer = None

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
