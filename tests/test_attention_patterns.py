"""Attention as it is written in OPT, BERT, DETR, Swin, CodeGen and for cross-attention, small.

Their operations are seen because they are operations; nothing here is known to the library.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fquant as fq

D, H = 8, 2
LOWEST = torch.finfo(torch.float32).min


class Projections(nn.Module):
    """Linear layers by name."""

    def __init__(self, **sizes):
        super().__init__()
        for name, (inputs, outputs) in sizes.items():
            setattr(self, name, nn.Linear(inputs, outputs))


def heads(x):
    return x.unflatten(-1, (H, D // H)).transpose(1, 2)


class Opt(Projections):
    """Scaled query, `bmm` over batch x heads, a mask that is added and bounded from below."""

    def __init__(self):
        super().__init__(q_proj=(D, D), k_proj=(D, D), v_proj=(D, D), out_proj=(D, D))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            heads(p).reshape(b * H, t, D // H)
            for p in (self.q_proj(x) * (D // H) ** -0.5, self.k_proj(x), self.v_proj(x))
        )
        scores = torch.bmm(q, k.transpose(1, 2)).view(b, H, t, t)
        scores = scores + torch.full((t, t), LOWEST).triu(1)
        scores = torch.max(scores, torch.tensor(LOWEST)).view(b * H, t, t)
        y = torch.bmm(F.softmax(scores, dim=-1), v).view(b, H, t, D // H)
        return self.out_proj(y.transpose(1, 2).reshape(b, t, D))


class Bert(Projections):
    """`matmul`, an additive padding mask of -1e9, a residual and LayerNorm, a GELU block."""

    def __init__(self):
        super().__init__(
            query=(D, D), key=(D, D), value=(D, D), dense=(D, D), up=(D, 16), down=(16, D)
        )
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D // H)
        keep = torch.ones(x.shape[:2])
        keep[0, -1] = 0
        scores = scores + (1.0 - keep)[:, None, None, :] * -1e9
        y = torch.matmul(nn.functional.softmax(scores, dim=-1), v)
        x = self.norm(self.dense(y.transpose(1, 2).flatten(2)) + x)
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Detr(nn.Module):
    """Positions are added to query and key only; learned object queries read the image."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(D, H, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(D, H, batch_first=True)
        self.queries = nn.Parameter(torch.randn(3, D))
        self.position = nn.Parameter(torch.randn(4, D))
        self.box = nn.Linear(D, 4)

    def forward(self, x):
        qk = x + self.position
        memory = x + self.self_attn(qk, qk, value=x)[0]
        targets = self.queries.expand(len(x), -1, -1)
        y = self.cross_attn(targets, memory + self.position, value=memory)[0]
        return self.box(y).sigmoid()


class Swin(Projections):
    """Windows of a rolled image, packed projection, relative position bias, a mask per window."""

    def __init__(self):
        super().__init__(qkv=(D, 3 * D), proj=(D, D))
        self.bias_table = nn.Parameter(torch.randn(9, H))
        cells = torch.stack(torch.meshgrid(*[torch.arange(2)] * 2, indexing="ij")).flatten(1)
        offset = (cells[:, :, None] - cells[:, None, :]).permute(1, 2, 0) + 1
        self.register_buffer("index", offset[..., 0] * 3 + offset[..., 1])

    def forward(self, x):
        x = x.unflatten(1, (4, 4)).roll((-1, -1), dims=(1, 2))  # 16 tokens: 4 x 4 cells
        b = len(x)
        w = x.view(b, 2, 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, D)
        q, k, v = self.qkv(w).reshape(-1, 4, 3, H, D // H).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (D // H) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.bias_table[self.index.view(-1)].view(4, 4, H).permute(2, 0, 1)
        mask = torch.zeros(4, 4, 4).masked_fill(torch.eye(4).bool().logical_not(), -100.0)
        mask[0] = 0.0
        scores = (scores.view(b, 4, H, 4, 4) + mask[None, :, None]).view(-1, H, 4, 4)
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, D))
        y = y.view(b, 2, 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(b, 4, 4, D)
        return y.roll((1, 1), dims=(1, 2)).flatten(1, 2)


class CodeGen(Projections):
    """One projection for query, value and key, rotary positions, `where` for the causal mask."""

    def __init__(self):
        super().__init__(qkv_proj=(D, 3 * D), out_proj=(D, D))

    def forward(self, x):
        t = x.shape[1]
        q, v, k = self.qkv_proj(x).chunk(3, dim=-1)
        angle = torch.arange(t)[:, None] * 100.0 ** -torch.arange(0, 1, 0.5)
        sin, cos = (f(angle).repeat_interleave(2, dim=-1) for f in (torch.sin, torch.cos))

        def rotated(y):
            y = heads(y)
            turned = torch.stack((-y[..., 1::2], y[..., ::2]), dim=-1).flatten(-2)
            return y * cos + turned * sin

        scores = rotated(q).float() @ rotated(k).float().mT
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        scores = torch.where(causal, scores, torch.tensor(LOWEST)) / math.sqrt(D // H)
        y = torch.matmul(F.softmax(scores, -1), heads(v))
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Cross(Projections):
    """Tokens read a context of another length and width, as in a text-to-image network."""

    def __init__(self):
        super().__init__(to_q=(D, D), to_k=(6, D), to_v=(6, D), to_out=(D, D))
        self.context = nn.Parameter(torch.randn(1, 5, 6))

    def forward(self, x):
        context = self.context.expand(len(x), -1, -1)
        q, k, v = heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * (D // H) ** -0.5
        y = torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)
        return self.to_out(y.transpose(1, 2).flatten(2))


PATTERNS = {
    Opt: (5, ["bmm#0", "bmm#1"], 4),
    Bert: (5, ["matmul#0", "matmul#1"], 6),
    Detr: (4, [f"{m}/matmul#{i}" for m in ("cross_attn", "self_attn") for i in (0, 1)], 9),
    Swin: (16, ["matmul#0", "matmul#1"], 2),
    CodeGen: (5, ["matmul#0", "matmul#1"], 2),
    Cross: (4, ["einsum#0", "einsum#1"], 4),
}  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(pattern):
    tokens, products, projections = PATTERNS[pattern]
    torch.manual_seed(0)
    model, x = pattern().eval(), torch.randn(2, tokens, D)
    params = {n: p.detach() for n, p in model.named_parameters()}
    residuals = fq.OpRule(ops=("add",), inputs=fq.QuantSpec())  # must never meet a mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # no residual in most patterns
        plan = fq.make_plan(model, [residuals, *fq.w8a8()], (x,))
    assert not plan.unquantized
    by_op = {op: [s for s in plan.sites if s.op == op] for op in {s.op for s in plan.sites}}
    assert len(by_op["linear"]) == projections
    found = [s for s in plan.sites if s.op in ("matmul", "bmm", "einsum")]
    assert sorted(s.name for s in found) == products
    assert all(len(s.operands) == 2 for s in found)
    for site in by_op.get("add", []):  # of features: scores and masks have other shapes
        assert all(o.shape[-1] in (D, D // H) for o in site.operands), site
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    qstate, forward = fq.finalize(plan, stats), fq.fake_quant(model, plan)
    assert max(float(s.max()) for s in qstate.values()) < 1  # no mask value is in a range
    exact, y = model(x), forward(params, qstate, x)
    assert 0 < ((y - exact).norm() / exact.norm()).item() < 0.05

    def loss(p):
        return forward(p, qstate, x).square().sum()

    assert all(bool(g.isfinite().all()) for g in torch.func.grad(loss)(params).values())
    if pattern in (Swin, CodeGen):  # rolls and masks, rotations and `where`
        torch._dynamo.reset()
        compiled = torch.compile(forward, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(params, qstate, x), y, rtol=0, atol=1e-5)
