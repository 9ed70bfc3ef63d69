"""Attention's forward kernel: online softmax over the visible blocks of keys. The mathematics is in op.py."""

import math

import torch
from torch import Tensor

from kernels.attention.rows import block_and_head, load_rows, store_rows, visible_key_blocks
from kernels.attention.tiles import dense_heads, heads_in_cache, tile_of
from kernels.launch import (
    Launch,
    Target,
    bth_strides,
    ceil_div,
    device_of,
    register_op,
    target_of,
    tl,
    triton,
    wrap_triton,
)
from kernels.rows import add_weighted, dot_rows, row_tiles, scale_rows, zero_rows

# -------------------------------------------------------------------------------------------------------------- kernels

# Where the running maximum starts: finite, so that a row with nothing visible yet makes no -inf - -inf.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _attend(
    acc, total, peak, q, k_ptr, v_ptr, rows, first_keys, keys, n_times, k_stride_t, v_stride_t,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys more: new acc [BLOCK_M, ...], sum of the weights and largest dot product, both [BLOCK_M]."""
    k = load_rows(k_ptr, keys, n_times, k_stride_t, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2, MASKED)
    scores = dot_rows(q, k)  # [BLOCK_M, BLOCK_N], unscaled
    if MASKED:
        visible = keys[None, :] <= rows[:, None]
        if first_keys is not None:
            visible &= keys[None, :] >= first_keys[:, None]
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # One FMA scales and subtracts. But a query that sees one key, which it does in a masked block, returns its value: there
    # it is subtracted first, and the largest weight is 1 to the bit.
    exponents = (scores - new_peak[:, None]) * SCALE if MASKED else scores * SCALE - (new_peak * SCALE)[:, None]
    weights = tl.exp2(exponents)
    decay = tl.exp2((peak - new_peak) * SCALE)
    total = total * decay + tl.sum(weights, 1)
    v = load_rows(v_ptr, keys, n_times, v_stride_t, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2, MASKED)
    return add_weighted(scale_rows(acc, decay[:, None]), weights, v), total, new_peak


@triton.jit
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr,
    first_key_ptr,  # None where every key up to the query's own is visible
    o_ptr, lse_ptr, n_batches, n_times, heads_at_once,
    # Constant strides of time, so that a thread's loads differ by constants and it computes one address for all of them.
    q_stride_b, q_stride_t: tl.constexpr, q_stride_h,
    k_stride_b, k_stride_t: tl.constexpr, k_stride_h,
    v_stride_b, v_stride_t: tl.constexpr, v_stride_h,
    SCALE: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr,
):  # fmt: skip
    n_row_blocks = tl.cdiv(n_times, BLOCK_M)
    block, head = block_and_head(n_row_blocks, n_batches * Q_HEADS, heads_at_once)
    first_row = (n_row_blocks - 1 - block) * BLOCK_M  # the last rows see most keys: they go first
    batch = (head // Q_HEADS).to(tl.int64)
    q_head = (head % Q_HEADS).to(tl.int64)
    k_head = q_head // (Q_HEADS // K_HEADS)
    q_ptr += (batch * q_stride_b + q_head * q_stride_h) * ALIGNMENT
    k_ptr += (batch * k_stride_b + k_head * k_stride_h) * ALIGNMENT
    v_ptr += (batch * v_stride_b + k_head * v_stride_h) * ALIGNMENT
    if first_key_ptr is not None:
        first_key_ptr += batch * n_times

    rows = first_row + tl.arange(0, BLOCK_M)
    first_keys = None
    if first_key_ptr is not None:
        first_keys = tl.load(first_key_ptr + rows, rows < n_times, other=0)
    q = load_rows(q_ptr, rows, n_times, q_stride_t, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2)
    acc = zero_rows(BLOCK_M, BLOCK_D, BLOCK_D2)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)

    start, n_left, n_causal, n_blocks = visible_key_blocks(first_key_ptr, first_row, n_times, BLOCK_M, BLOCK_N)
    n_full = n_causal - n_left
    # fmt: off
    for i in range(n_left, n_causal):
        keys = start + i * BLOCK_N + tl.arange(0, BLOCK_N)
        acc, total, peak = _attend(acc, total, peak, q, k_ptr, v_ptr, rows, first_keys, keys, n_times, k_stride_t,
                                   v_stride_t, SCALE, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2, MASKED=False)
    for i in range(n_blocks - n_full):
        keys = start + (i if i < n_left else i + n_full) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc, total, peak = _attend(acc, total, peak, q, k_ptr, v_ptr, rows, first_keys, keys, n_times, k_stride_t,
                                   v_stride_t, SCALE, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2, MASKED=True)
    # fmt: on

    # A query that sees nothing, which takes a broken first_key, gets zeros, and weights of zero in the backward.
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    o = scale_rows(acc, (1.0 / total)[:, None])
    store_rows(o_ptr + (batch * n_times * Q_HEADS + q_head) * HEAD_DIM, rows, n_times, o, Q_HEADS * HEAD_DIM, HEAD_DIM)
    lse = tl.where(nothing, float("inf"), peak * SCALE + tl.log2(total))
    tl.store(lse_ptr + (batch * Q_HEADS + q_head) * n_times + rows, lse, rows < n_times)


# --------------------------------------------------------------------------------------------------------------- launch


def forward_launch(batch: int, time: int, heads: int, head_dim: int, itemsize: int, target: Target) -> Launch:
    """One program a block of queries and query head."""
    tile = tile_of("forward", head_dim, itemsize, target)
    block_d, block_d2 = row_tiles(head_dim)
    tiles = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": block_d, "BLOCK_D2": block_d2}
    return Launch((ceil_div(time, tile.block_m) * batch * heads,), tiles, tile.num_warps, tile.num_stages)


def _outputs(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, time, heads, _ = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return o, torch.empty((batch, heads, time), dtype=torch.float32, device=q.device)


@register_op(fake=_outputs)
def _attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None) -> tuple[Tensor, Tensor]:
    """O like q, and the base-2 log-sum-exp of the scaled scores, float32 (B, H, T)."""
    o, lse = _outputs(q, k, v, first_key)
    q, k, v = dense_heads(q, k, v)
    batch, time, q_heads, head_dim = q.shape
    q_heads, k_heads, head_dim = int(q_heads), int(k.shape[2]), int(head_dim)
    launch = forward_launch(batch, time, q_heads, head_dim, q.element_size(), target_of(q))
    if q.numel():
        keys_and_values = 2 * time * head_dim * q.element_size()
        with device_of(q):
            wrap_triton(_attention_forward_kernel)[launch.grid](
                q_ptr=q,
                k_ptr=k,
                v_ptr=v,
                first_key_ptr=None if first_key is None else first_key.contiguous(),
                o_ptr=o,
                lse_ptr=lse,
                n_batches=batch,
                n_times=time,
                heads_at_once=heads_in_cache(keys_and_values, batch * k_heads) * (q_heads // k_heads),
                **bth_strides(q=q, k=k, v=v),
                SCALE=math.log2(math.e) / math.sqrt(head_dim),
                Q_HEADS=q_heads,
                K_HEADS=k_heads,
                HEAD_DIM=head_dim,
                **launch.options,
            )
    return o, lse
