"""Causal attention with grouped queries (GQA), https://arxiv.org/abs/2305.13245.

    s_ij = <q_i, k_j> / sqrt(D)        for first_key[i] <= j <= i
    p_i  = softmax_j(s_i)              float32
    o_i  = sum_j p_ij v_j

Query head h reads key and value head h // (H / Hkv). `first_key` states packed documents (the first token of the document
that token i is in) and sliding windows (max(0, i - window + 1)) in one tensor; without it every query sees all keys up to its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None, dtypes=DTYPES) -> None:
    """Raise ValueError, naming the argument, unless shapes, dtypes and devices are those of `attention`."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"attention: {name} must have 4 dimensions (batch, time, heads, head dim), got shape {tuple(x.shape)}"
            )
        if x.dtype not in dtypes:
            raise ValueError(f"attention: {name} has dtype {x.dtype}, wanted one of {', '.join(map(str, dtypes))}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"attention: {name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; they must be equal"
            )
    batch, time, heads, head_dim = q.shape
    if k.shape != v.shape:
        raise ValueError(f"attention: v has shape {tuple(v.shape)}, k has {tuple(k.shape)}; they must be equal")
    if k.shape[0] != batch or k.shape[1] != time or k.shape[3] != head_dim:
        raise ValueError(
            f"attention: k has shape {tuple(k.shape)}, wanted (B, T, Hkv, D) with B, T, D of q {tuple(q.shape)}"
        )
    if k.shape[2] == 0 or heads % k.shape[2] != 0:
        raise ValueError(
            f"attention: q has {heads} heads, which is not a multiple of the {k.shape[2]} heads of k and v"
        )
    if first_key is None:
        return
    if first_key.shape != (batch, time):
        raise ValueError(f"attention: first_key has shape {tuple(first_key.shape)}, wanted (B, T) = ({batch}, {time})")
    if first_key.dtype != torch.int32:
        raise ValueError(f"attention: first_key has dtype {first_key.dtype}, wanted torch.int32")
    if first_key.device != q.device:
        raise ValueError(f"attention: first_key is on {first_key.device}, q is on {q.device}")


def attention_torch(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None = None) -> Tensor:
    """Causal attention with scale 1/sqrt(D).

    q: (B, T, H, D), k and v: (B, T, Hkv, D) of q's dtype, H a multiple of Hkv; strided views are fine.
    first_key: (B, T) int32, non-decreasing along T with 0 <= first_key[b, i] <= i: query i sees keys first_key[b, i] .. i.
    Returns o (B, T, H, D), contiguous, of q's dtype. float64 is accepted as the reference of tests.
    """
    check_attention(q, k, v, first_key, dtypes=(*DTYPES, torch.float64))
    if q.numel() == 0:
        return q + (k.sum() + v.sum())  # empty, and still a function of all three for autograd
    mask = None
    if first_key is not None:
        position = torch.arange(q.shape[1], device=q.device)
        mask = (position >= first_key.unsqueeze(-1)) & (position <= position.unsqueeze(-1))  # [B, query, key]
        mask = mask.unsqueeze(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.transpose(1, 2).contiguous()
