"""Causal attention with grouped queries (GQA, Ainslie et al., 2023, arXiv:2305.13245), without a matrix of scores in memory
(Dao, 2023, FlashAttention-2, arXiv:2307.08691).

Forward, for query i of a head and the keys j it sees, first_key[i] <= j <= i:

    s_ij = <q_i, k_j> / sqrt(D)
    p_ij = exp(s_ij − lse_i),  lse_i = log Σ_j exp(s_ij)
    o_i  = Σ_j p_ij v_j

Backward, with upstream gradient do:

    delta_i = <do_i, o_i>
    ds_ij   = p_ij (<do_i, v_j> − delta_i)
    dq_i    = Σ_j ds_ij k_j / sqrt(D)
    dk_j    = Σ_i ds_ij q_i / sqrt(D)       over the queries i, of all heads of the group, that see j
    dv_j    = Σ_i p_ij do_i

Query head h reads key and value head h // (H / Hkv). `first_key` states packed documents (the first token of the document
that token i is in) and sliding windows (max(0, i − window + 1)) in one tensor; without it every query sees all keys up to its own.
Since it does not decrease, a block of queries sees one range of keys, and a block of keys is seen by one range of
queries: no other block is loaded.

Dot products and sums are float32, exponentials base 2, the scale is folded in after the dot product; p and ds are
rounded to the input's dtype for the products that they enter. Saved: q, k, v as they came, o, and lse in base 2, one
float32 a row. Queries that see one key return its value to the bit.

For V visible pairs of query and key (B T (T + 1) / 2 without first_key) in e bytes an element, each tensor read and
written once, which is the case while the keys and values of the heads at work stay in the L2 cache:

                FLOPs                    bytes
    forward     4 V H D                  2 e B T (H + Hkv) D + 4 B T H
    backward    14 V H D                 e B T (6 H + 6 Hkv) D + 16 B T H

A backward that computed the weights once would take 10 V H D, and that is what benchmarks count: 2.5 forwards.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.backward import _attention_backward
from kernels.attention.forward import _attention
from kernels.grammar import attention_serves
from kernels.launch import KERNEL_DTYPES, REFERENCE_DTYPES, check_tensor, check_usable

# ----------------------------------------------------------------------------------------------------------- torch twin


def attention_torch(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None = None) -> Tensor:
    """Causal attention with scale 1/sqrt(D).

    q: (B, T, H, D), k and v: (B, T, Hkv, D) of q's dtype, H a multiple of Hkv; strided views are fine.
    first_key: (B, T) int32, non-decreasing along T with 0 <= first_key[b, i] <= i: query i sees keys first_key[b, i] .. i.
    Returns o (B, T, H, D), contiguous, of q's dtype. Raises ValueError on anything else; the values of first_key are not
    checked here, that would wait for the device.
    """
    _check(q, k, v, first_key, REFERENCE_DTYPES)
    if q.numel() == 0:
        return q + (k.sum() + v.sum())  # empty, and still a function of all three for autograd
    mask = None
    if first_key is not None:
        position = torch.arange(q.shape[1], device=q.device)
        mask = (position >= first_key.unsqueeze(-1)) & (position <= position.unsqueeze(-1))  # [B, query, key]
        mask = mask.unsqueeze(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is not None and q.device.type != "cpu":
        return _masked_on_a_gpu(q, k, v, mask).transpose(1, 2).contiguous()
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210 - a bool also where Dynamo traces the heads as symbols
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return o.transpose(1, 2).contiguous()


def _masked_on_a_gpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of (B, H, T, D) with a mask, by the one form on a GPU that takes a mask and writes no scores.

    PyTorch's memory-efficient form wants as many heads of keys as of queries, and head dims in multiples of 8. Where it cannot
    serve, PyTorch takes float32 scores without a word: 8.6 GB a layer at 4 x 4096 tokens and 32 heads.
    """
    head_dim, group = q.shape[3], q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    if head_dim % 8:
        q, k, v = (F.pad(x, (0, -head_dim % 8)) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1 / math.sqrt(head_dim))
    return o[..., :head_dim]


def _check(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError, naming the argument, unless shapes, dtypes and devices are those of `attention`."""
    check_tensor("attention", "q", q, ("B", "T", "H", "D"), dtypes)
    batch, time, heads, head_dim = q.shape
    check_tensor("attention", "k", k, (batch, time, "Hkv", head_dim), (q.dtype,), q.device)
    check_tensor("attention", "v", v, tuple(k.shape), (q.dtype,), q.device)
    if k.shape[2] == 0 or heads % k.shape[2] != 0:
        raise ValueError(f"attention: q has {heads} heads, wanted a multiple of the {k.shape[2]} heads of k and v")
    check_first_key("attention", first_key, batch, time, q.device)


def check_first_key(op: str, first_key: Tensor | None, batch: int, time: int, device: torch.device) -> None:
    """Raise ValueError unless first_key is None or int32 (B, T)."""
    if first_key is not None:
        check_tensor(op, "first_key", first_key, (batch, time), (torch.int32,), device)


def check_head_dim(op: str, argument: str, head_dim: int) -> None:
    """Raise ValueError unless the kernels have tiles for heads of so many elements."""
    if not attention_serves(head_dim):
        raise ValueError(f"{op}: {argument} has head dim {head_dim}, wanted a multiple of 4 from 16 to 256")


# ------------------------------------------------------------------------------------------------------------- autograd


def _save(ctx, inputs, output):
    q, k, v, first_key = inputs
    ctx.save_for_backward(q, k, v, *output, first_key)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, _):
    if do is None:
        return None, None, None, None
    gradients = _attention_backward(do, *ctx.saved_tensors, None, None)
    return *(dx if wanted else None for dx, wanted in zip(gradients, ctx.needs_input_grad, strict=False)), None


_attention.register_autograd(_differentiate, setup_context=_save)


def attention_triton(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None = None) -> Tensor:
    """`attention_torch` by Triton kernels, but for float64: head dims are the multiples of 4 from 16 to 256.

    A first_key that breaks its contract gives wrong numbers, never a read or write out of bounds.
    """
    _check(q, k, v, first_key, KERNEL_DTYPES)
    check_head_dim("attention", "q", q.shape[3])
    check_usable("attention", q.device)
    return _attention(q, k, v, first_key)[0]
