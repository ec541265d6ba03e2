"""`nn.MultiheadAttention` written out, so that its products are operations of their own.

torch runs the module as one function, or as one fused kernel in eval mode; inside either, nothing can
be seen. The sites are the same in eager code and under Dynamo:

    path/linear#0                         the packed projection of self-attention; else #0, #1, #2
    path/scaled_dot_product_attention#0   or matmul#0 and #1 when attention weights are returned
    path/linear#1                         (or #3) the output projection
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def multi_head_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns what `nn.MultiheadAttention.forward` returns, by plain operations."""
    batched = query.dim() == 3
    self_attention = query is key and key is value
    if not batched:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
    elif not module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    q, k, v = _project(module, query, key, value, self_attention)
    mask = _merged_mask(module, q, k, attn_mask, key_padding_mask)
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(k.shape[0], -1, -1)], dim=1)
        v = torch.cat([v, module.bias_v.expand(v.shape[0], -1, -1)], dim=1)
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[1] - mask.shape[-1]))
    heads = (module.num_heads, module.head_dim)
    q, k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in (q, k, v))
    dropout = module.dropout if module.training else 0.0
    y, weights = _attend(q, k, v, mask, dropout, need_weights)
    y = y.transpose(1, 2).flatten(2)
    y = F.linear(y, module.out_proj.weight, module.out_proj.bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    if not batched:
        return y.squeeze(0), None if weights is None else weights.squeeze(0)
    return y if module.batch_first else y.transpose(0, 1), weights


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
    scores = torch.matmul(q * math.sqrt(1.0 / q.shape[-1]), k.transpose(-2, -1))
    weights = F.softmax(scores if mask is None else _sum(scores, mask), dim=-1)
    if dropout > 0.0:
        weights = F.dropout(weights, p=dropout)
    return torch.matmul(weights, v), weights


def _project(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, packed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if module._qkv_same_embed_dim and packed:
        q, k, v = F.linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
        return q, k, v
    weights: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.chunk(3)
    bias = module.in_proj_bias
    biases: Any = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    return q, k, v


def _merged_mask(
    module: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor | None:
    """One additive mask that broadcasts to (batch, heads, queries, keys), or None."""
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        if mask.dim() == 3 and mask.shape[0] != 1:
            mask = mask.view(q.shape[0], module.num_heads, q.shape[1], k.shape[1])
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype)
        padding = (padding if padding.dim() == 2 else padding.unsqueeze(0))[:, None, None]
        mask = padding if mask is None else _sum(mask, padding)
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """A + b in a spelling that no rule for residual sums can meet: masks must stay exact."""
    return torch.stack(torch.broadcast_tensors(a, b)).sum(dim=0)
