"""Every operation of the table: found where it is, and what is written out equals what torch runs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fquant as fq

INT8 = fq.QuantSpec()
X1, X2, X3 = (torch.randn(2, 4, *[6] * n, dtype=torch.float64) for n in (1, 2, 3))
ROWS = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROW = ROWS[0]
TOKENS = torch.tensor([[0, 1, 2]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
PADDING = torch.tensor([[False, False, True], [False, False, False]])


def attention(**options):
    return nn.MultiheadAttention(4, 2, dtype=torch.float64, **options)


MODULES = {
    "linear": (nn.Linear(4, 3), (ROWS,), {}, ["linear#0"]),
    "conv1d": (nn.Conv1d(4, 2, 3, padding_mode="circular", padding=1), (X1,), {}, ["conv1d#0"]),
    "conv2d": (nn.Conv2d(4, 2, 3, groups=2), (X2,), {}, ["conv2d#0"]),
    "conv3d": (nn.Conv3d(4, 2, 3), (X3,), {}, ["conv3d#0"]),
    "transposed1": (nn.ConvTranspose1d(4, 2, 3), (X1,), {}, ["conv_transpose1d#0"]),
    "transposed2": (nn.ConvTranspose2d(4, 2, 3, groups=2), (X2,), {}, ["conv_transpose2d#0"]),
    "transposed3": (nn.ConvTranspose3d(4, 2, 3), (X3,), {}, ["conv_transpose3d#0"]),
    "bilinear": (nn.Bilinear(4, 4, 2), (ROWS, ROWS), {}, ["bilinear#0"]),
    "embedding": (nn.Embedding(4, 3), (TOKENS,), {}, ["embedding#0"]),
    "embedding_bag": (nn.EmbeddingBag(4, 3), (TOKENS,), {}, ["embedding_bag#0"]),
    "lstm": (nn.LSTM(4, 3, 2, bidirectional=True), (ROWS,), {}, [f"lstm#{i}" for i in range(4)]),
    "lstm_proj": (nn.LSTM(4, 3, proj_size=2, batch_first=True), (ROWS,), {}, ["lstm#0"]),
    "lstm_state": (
        nn.LSTM(4, 3, bias=False),
        (ROWS, (torch.ones(1, 3, 3).double(), torch.ones(1, 3, 3).double())),
        {},
        ["lstm#0"],
    ),
    "lstm_unbatched": (nn.LSTM(4, 3), (ROWS[0],), {}, ["lstm#0"]),
    "gru": (nn.GRU(4, 3, 2, batch_first=True), (ROWS,), {}, ["gru#0", "gru#1"]),
    "gru_unbatched": (nn.GRU(4, 3), (ROWS[0], torch.ones(1, 3).double()), {}, ["gru#0"]),
    "lstm_cell": (nn.LSTMCell(4, 3), (ROWS[0],), {}, ["lstm#0"]),
    "gru_cell": (nn.GRUCell(4, 3), (ROWS[0],), {}, ["gru#0"]),
    "self_attention": (
        attention(batch_first=True),
        (ROWS, ROWS, ROWS),
        {"need_weights": False},
        ["linear#0", "scaled_dot_product_attention#0", "linear#1"],
    ),
    "attention_weights": (
        attention(),
        (ROWS, ROWS, ROWS),
        {},
        ["linear#0", "matmul#0", "matmul#1", "linear#1"],
    ),
    "attention_masks": (
        attention(batch_first=True),
        (ROWS, ROWS, ROWS, PADDING),
        {"attn_mask": CAUSAL, "average_attn_weights": False},
        ["linear#0", "matmul#0", "matmul#1", "linear#1"],
    ),
    "cross_attention": (
        attention(batch_first=True, add_bias_kv=True, add_zero_attn=True),
        (ROWS[:, :2], ROWS, ROWS, PADDING),
        {"need_weights": False},
        [*(f"linear#{i}" for i in range(3)), "scaled_dot_product_attention#0", "linear#3"],
    ),
    "other_dimensions": (
        attention(kdim=4, vdim=3, bias=False),
        (ROWS, ROWS, ROWS[..., :3]),
        {},
        [*(f"linear#{i}" for i in range(3)), "matmul#0", "matmul#1", "linear#3"],
    ),
    "unbatched_attention": (
        attention(),
        (ROW, ROW, ROW),
        {"attn_mask": CAUSAL, "is_causal": True},
        ["linear#0", "matmul#0", "matmul#1", "linear#1"],
    ),
    "decoder": (
        nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        (ROWS, ROWS),
        {"tgt_mask": CAUSAL, "tgt_is_causal": True},
        [
            "self_attn/linear#0",
            "self_attn/scaled_dot_product_attention#0",
            "self_attn/linear#1",
            *(f"multihead_attn/linear#{i}" for i in range(3)),
            "multihead_attn/scaled_dot_product_attention#0",
            "multihead_attn/linear#3",
            "linear1/linear#0",
            "linear2/linear#0",
        ],
    ),
    "encoder": (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), 1
        ),
        (ROWS,),
        {"mask": CAUSAL, "src_key_padding_mask": PADDING, "is_causal": True},
        [
            "layers.0.self_attn/linear#0",
            "layers.0.self_attn/scaled_dot_product_attention#0",
            "layers.0.self_attn/linear#1",
            "layers.0.linear1/linear#0",
            "layers.0.linear2/linear#0",
        ],
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch's about its own fast paths and mask dtypes
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_seen_and_compute_what_they_are(name):
    model, args, kwargs, sites = MODULES[name]
    model = model.double().eval()
    params = {n: p.detach() for n, p in model.named_parameters()}
    plan = fq.make_plan(model, fq.w8a8(), args, kwargs)
    assert sorted(s.name for s in plan.sites) == sorted(sites)
    y, stats = fq.observe(model, plan)(params, fq.init_stats(plan), *args, **kwargs)
    torch.testing.assert_close(y, model(*args, **kwargs), rtol=0, atol=1e-12)
    rounded = fq.fake_quant(model, plan)(params, fq.finalize(plan, stats), *args, **kwargs)
    first, exact = (t if isinstance(t, torch.Tensor) else t[0] for t in (rounded, y))
    assert 0 < ((first - exact).norm() / exact.norm()).item() < 0.05


OPT_IN = {
    "add": lambda x: x + x,
    "sub": lambda x: torch.sub(x, x / 3),
    "mul": lambda x: x * x,
    "div": lambda x: x / (x + 3),
    "cat": lambda x: torch.cat([x, x]),
    "softmax": lambda x: x.softmax(-1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "layer_norm": nn.LayerNorm(6).double(),
    "instance_norm": nn.InstanceNorm2d(4).double(),
    "group_norm": nn.GroupNorm(2, 4).double(),
    "batch_norm": nn.BatchNorm2d(4).double().eval(),
    "rms_norm": nn.RMSNorm(6).double(),
    "max_pool2d": nn.MaxPool2d(2),
    "avg_pool2d": nn.AvgPool2d(2),
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d(2),
    "adaptive_max_pool2d": nn.AdaptiveMaxPool2d(2),
    "max_pool1d": lambda x: F.max_pool1d(x[0], 2),
    "avg_pool1d": lambda x: F.avg_pool1d(x[0], 2),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x[0], 2),
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 2),
}


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("op", OPT_IN)
def test_what_is_opt_in_is_quantized_when_named(op):
    model = Calls(OPT_IN[op])
    params = dict(model.named_parameters())
    with pytest.warns(fq.UnusedRuleWarning):
        assert fq.make_plan(model, fq.w8a8(), (X2,)).sites == ()
    plan = fq.make_plan(model, [fq.OpRule(ops=(op,), inputs=fq.QuantSpec(4))], (X2,))
    assert [site.op for site in plan.sites] == [op]
    stats = fq.calibrate_model(model, plan, params, [X2], progress=False)
    y = fq.fake_quant(model, plan)(params, fq.finalize(plan, stats), X2)
    assert not torch.equal(y, model(X2))


@pytest.mark.parametrize("op", ["matmul", "bmm", "mm", "addmm", "baddbmm", "einsum"])
def test_products_of_activations(op):
    functions = {
        "matmul": lambda x: x @ x.mT,
        "bmm": lambda x: x.bmm(x.mT),
        "mm": lambda x: x[0].mm(x[0].T),
        "addmm": lambda x: torch.addmm(x[0, :, :3], x[0], x[0].T),
        "baddbmm": lambda x: torch.baddbmm(x[..., :3], x, x.mT),
        "einsum": lambda x: torch.einsum("btd,bsd->bts", [x, x]),
    }
    plan = fq.make_plan(Calls(functions[op]), fq.w8a8(), (ROWS,))
    assert list(plan.quantizers) == [f"{op}#0.input0", f"{op}#0.input1"]


def test_packed_sequences_are_refused_by_name():
    packed = nn.utils.rnn.pack_padded_sequence(ROWS.float(), [3, 2], batch_first=True)
    with pytest.raises(TypeError, match=r"lstm: input must be a padded tensor .*PackedSequence"):
        fq.make_plan(nn.LSTM(4, 3), fq.w8a8(), (packed,))
