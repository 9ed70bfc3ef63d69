"""Attention of one query a sequence over a cache of keys and values: what a decoded token needs (split over keys as in Dao et
al., 2023, Flash-Decoding, https://pytorch.org/blog/flash-decoding). It has no backward.

For sequence b, its n = n_keys[b] keys in the cache, and query head h, whose keys and values are those of head h // (H / Hkv):

    s_j = <q, k_j> / sqrt(D),    j < n
    o   = Σ_j exp(s_j) v_j / Σ_j exp(s_j)

Keys and values are read for one query, so memory is the limit, and two things follow. The query heads of a group are the rows of
one tile: keys and values are read once for all of them. And the keys are split among programs, for one sequence has too few heads
to fill a GPU: program s adds up the keys from s · SPLIT_KEYS on,

    m_s = max_j s_j,   l_s = Σ_j exp(s_j − m_s),   a_s = Σ_j exp(s_j − m_s) v_j

and a second kernel combines them, with m = max_s m_s, in the order of s:

    o = Σ_s exp(m_s − m) a_s / Σ_s exp(m_s − m) l_s

SPLIT_KEYS is one number. The bits of a sequence's output therefore depend on nothing but its query and its n keys: not on the other
sequences, not on the room in the cache. And the launch depends on shapes alone: a CUDA graph of it serves for any n.

Dot products and sums are float32, exponentials base 2, the scale is folded in after the dot product; the weights are rounded to
the cache's dtype for the product that they enter. Bytes in e an element, for N = Σ_b n_keys[b]:

    2 e N Hkv D + 2 e B H D,    and, where the cache has room for more than SPLIT_KEYS keys, 8 (D + 2) H ⌈n / SPLIT_KEYS⌉ a sequence
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.forward import LOWEST, _attend
from kernels.attention.op import check_head_dim
from kernels.attention.rows import load_rows, store_rows
from kernels.launch import (
    KERNEL_DTYPES,
    REFERENCE_DTYPES,
    Launch,
    Target,
    aligned_strides,
    ceil_div,
    check_tensor,
    check_usable,
    device_of,
    next_power_of_2,
    register_op,
    target_of,
    tl,
    triton,
    warps_for,
    wrap_triton,
)
from kernels.rows import add_rows, row_tiles, scale_rows, zero_rows

SPLIT_KEYS = 128
"""Keys of one program. A multiple of every block of keys; 16 programs a head at 2048 keys."""

# ----------------------------------------------------------------------------------------------------------- torch twin


def decode_attention_torch(q: Tensor, k_cache: Tensor, v_cache: Tensor, n_keys: Tensor) -> Tensor:
    """Attention of one query a sequence over the first keys of its cache, with scale 1/sqrt(D).

    q: (B, H, D). k_cache and v_cache: (B, T, Hkv, D) of q's dtype, H a multiple of Hkv; strided views are fine.
    n_keys: (B,) int32, from 1 to T: sequence b sees keys 0 .. n_keys[b] - 1. What lies behind them counts for nothing, but must be
    finite here (the kernel does not read it).
    Returns o (B, H, D), contiguous, of q's dtype. Raises ValueError on anything else, and where a gradient is wanted, which there
    is not; the values of n_keys are not checked, that would wait for the device.
    """
    _check(q, k_cache, v_cache, n_keys, REFERENCE_DTYPES)
    if q.numel() == 0:
        return q.clone()
    batch, slots, k_heads, head_dim = k_cache.shape
    # The heads of a group are queries of one head: they see the same keys, and no key is repeated for them.
    grouped = q.reshape(batch, k_heads, -1, head_dim)
    visible = torch.arange(slots, device=q.device) < n_keys[:, None]
    k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    o = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible[:, None, None])
    return o.reshape(q.shape)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, n_keys: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError, naming the argument, unless shapes, dtypes and devices are those of `decode_attention`."""
    op = "decode_attention"
    check_tensor(op, "q", q, ("B", "H", "D"), dtypes)
    batch, heads, head_dim = q.shape
    check_tensor(op, "k_cache", k_cache, (batch, "T", "Hkv", head_dim), (q.dtype,), q.device)
    check_tensor(op, "v_cache", v_cache, tuple(k_cache.shape), (q.dtype,), q.device)
    if k_cache.shape[1] == 0:
        raise ValueError(f"{op}: k_cache has room for 0 keys, wanted at least 1")
    if k_cache.shape[2] == 0 or heads % k_cache.shape[2] != 0:
        raise ValueError(f"{op}: q has {heads} heads, wanted a multiple of the {k_cache.shape[2]} heads of k_cache")
    check_tensor(op, "n_keys", n_keys, (batch,), (torch.int32,), q.device)
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
            if x.requires_grad:
                raise ValueError(
                    f"{op}: {name} requires a gradient, and there is none; wrap the call in torch.no_grad()"
                )


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, n_keys_ptr,
    o_ptr,  # (B, H, D) where there is one split; else the sums of each, float32 (splits, B, H, D)
    peak_ptr, total_ptr,  # None where there is one split; else float32 (splits, B, H)
    n_batches, n_slots, n_splits,
    q_stride_b, q_stride_h,
    # Constant strides of time, so that a thread's loads differ by constants and it computes one address for all of them.
    k_stride_b, k_stride_t: tl.constexpr, k_stride_h,
    v_stride_b, v_stride_t: tl.constexpr, v_stride_h,
    SCALE: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = Q_HEADS // K_HEADS
    program = tl.program_id(0).to(tl.int64)
    split = (program % n_splits).to(tl.int32)
    k_head = program // n_splits % K_HEADS
    batch = program // (n_splits * K_HEADS)
    n_keys = min(max(tl.load(n_keys_ptr + batch), 0), n_slots)
    start = split * SPLIT
    count = max(min(n_keys - start, SPLIT), 0)

    row = tl.arange(0, BLOCK_M)  # of the group
    q_ptr += (batch * q_stride_b + k_head * GROUP * q_stride_h) * ALIGNMENT
    k_ptr += (batch * k_stride_b + k_head * k_stride_h) * ALIGNMENT
    v_ptr += (batch * v_stride_b + k_head * v_stride_h) * ALIGNMENT
    q = load_rows(q_ptr, row, GROUP, q_stride_h, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2)
    acc = zero_rows(BLOCK_M, BLOCK_D, BLOCK_D2)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    last_key = tl.zeros([BLOCK_M], tl.int32) + (n_keys - 1)
    # fmt: off
    for i in range(count // BLOCK_N):
        keys = start + i * BLOCK_N + tl.arange(0, BLOCK_N)
        acc, total, peak = _attend(acc, total, peak, q, k_ptr, v_ptr, last_key, None, keys, n_keys, k_stride_t,
                                   v_stride_t, SCALE, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2, MASKED=False)
    for i in range(count // BLOCK_N, tl.cdiv(count, BLOCK_N)):
        keys = start + i * BLOCK_N + tl.arange(0, BLOCK_N)
        acc, total, peak = _attend(acc, total, peak, q, k_ptr, v_ptr, last_key, None, keys, n_keys, k_stride_t,
                                   v_stride_t, SCALE, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2, MASKED=True)
    # fmt: on

    first_head = batch * Q_HEADS + k_head * GROUP
    if peak_ptr is None:
        # A sequence without a key, which takes a broken n_keys, gets zeros.
        o = scale_rows(acc, (1.0 / tl.where(total == 0.0, 1.0, total))[:, None])
        store_rows(o_ptr + first_head * HEAD_DIM, row, GROUP, o, HEAD_DIM, HEAD_DIM)
    else:
        first_head += split.to(tl.int64) * n_batches * Q_HEADS
        n_rows = tl.where(count > 0, GROUP, 0)  # a split without a key is not read
        store_rows(o_ptr + first_head * HEAD_DIM, row, n_rows, acc, HEAD_DIM, HEAD_DIM)
        tl.store(peak_ptr + first_head + row, peak, row < n_rows)
        tl.store(total_ptr + first_head + row, total, row < n_rows)


@triton.jit
def _attention_decode_combine_kernel(
    sums_ptr, peak_ptr, total_ptr,  # of the splits, as the kernel above stores them
    n_keys_ptr, o_ptr, n_batches, n_slots,
    SCALE: tl.constexpr, Q_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr,
):  # fmt: skip
    N_TILES: tl.constexpr = (Q_HEADS + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0).to(tl.int64)
    batch = program // N_TILES
    head = (program % N_TILES * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int32)
    inside = head < Q_HEADS
    n_keys = min(max(tl.load(n_keys_ptr + batch), 0), n_slots)
    n_splits = tl.cdiv(n_keys, SPLIT)
    stride = tl.cast(n_batches, tl.int64) * Q_HEADS  # heads of a split
    first_head = batch * Q_HEADS

    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    for split in range(n_splits):
        peak = tl.maximum(peak, tl.load(peak_ptr + first_head + split * stride + head, inside, other=LOWEST))
    acc = zero_rows(BLOCK_M, BLOCK_D, BLOCK_D2)
    total = tl.zeros([BLOCK_M], tl.float32)
    for split in range(n_splits):
        first = first_head + split * stride
        weight = tl.exp2((tl.load(peak_ptr + first + head, inside, other=LOWEST) - peak) * SCALE)
        total += weight * tl.load(total_ptr + first + head, inside, other=0.0)
        sums = load_rows(sums_ptr + first * HEAD_DIM, head, Q_HEADS, HEAD_DIM, HEAD_DIM, 1, BLOCK_D, BLOCK_D2)
        sums = scale_rows(sums, weight[:, None])
        acc = add_rows(acc, sums)
    o = scale_rows(acc, (1.0 / tl.where(total == 0.0, 1.0, total))[:, None])
    store_rows(o_ptr + first_head * HEAD_DIM, head, Q_HEADS, o, HEAD_DIM, HEAD_DIM)


# --------------------------------------------------------------------------------------------------------------- launch


def decode_launch(
    batch: int, q_heads: int, k_heads: int, head_dim: int, n_splits: int, itemsize: int, target: Target
) -> Launch:
    """One program a sequence, kv head and split. The group's queries fill up a tile of 16 rows, the least of a matrix product.

    So many warps that each thread loads 16 bytes of the queries at once.
    """
    block_d, block_d2 = row_tiles(head_dim)
    block_m = max(16, next_power_of_2(q_heads // k_heads))
    block_n = 64 if itemsize == 2 else 32
    # Two blocks of keys and two of values are in flight.
    while 4 * block_n * (block_d + block_d2) * itemsize > target.shared_memory and block_n > 16:
        block_n //= 2
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "BLOCK_D2": block_d2}
    num_warps = warps_for(block_m * block_d, 8, target, most=4)
    return Launch((batch * k_heads * n_splits,), tiles, num_warps, num_stages=2)


def combine_launch(batch: int, q_heads: int, head_dim: int, target: Target) -> Launch:
    """One program of one warp for so few heads of a sequence that each thread still loads 16 bytes at once."""
    block_d, block_d2 = row_tiles(head_dim)
    block_m = target.warp_size // 4
    tiles = {"BLOCK_M": block_m, "BLOCK_D": block_d, "BLOCK_D2": block_d2}
    return Launch((batch * ceil_div(q_heads, block_m),), tiles, num_warps=1)


def _output(q: Tensor, k_cache: Tensor, v_cache: Tensor, n_keys: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@register_op(fake=_output)
def _decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, n_keys: Tensor) -> Tensor:
    o = _output(q, k_cache, v_cache, n_keys)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache))
    n_keys = n_keys.contiguous()
    batch, slots, k_heads, head_dim = k.shape
    q_heads, k_heads, head_dim = int(q.shape[1]), int(k_heads), int(head_dim)
    n_splits = ceil_div(slots, SPLIT_KEYS)
    target = target_of(q)
    launch = decode_launch(batch, q_heads, k_heads, head_dim, n_splits, q.element_size(), target)
    scale = math.log2(math.e) / math.sqrt(head_dim)
    sums, peak, total = o, None, None
    if n_splits > 1:
        sums = torch.empty((n_splits, batch, q_heads, head_dim), dtype=torch.float32, device=q.device)
        peak, total = (torch.empty((n_splits, batch, q_heads), dtype=torch.float32, device=q.device) for _ in range(2))
    if q.numel():
        strides = {f"q_stride_{dim}": q.stride(i) for i, dim in enumerate("bh")}
        strides |= {
            f"{name}_stride_{dim}": x.stride(i) for name, x in (("k", k), ("v", v)) for i, dim in enumerate("bth")
        }
        with device_of(q):
            wrap_triton(_attention_decode_kernel)[launch.grid](
                q_ptr=q,
                k_ptr=k,
                v_ptr=v,
                n_keys_ptr=n_keys,
                o_ptr=sums,
                peak_ptr=peak,
                total_ptr=total,
                n_batches=batch,
                n_slots=slots,
                n_splits=n_splits,
                **aligned_strides(**strides),
                SCALE=scale,
                Q_HEADS=q_heads,
                K_HEADS=k_heads,
                HEAD_DIM=head_dim,
                SPLIT=SPLIT_KEYS,
                **launch.options,
            )
            if n_splits > 1:
                combine = combine_launch(batch, q_heads, head_dim, target)
                wrap_triton(_attention_decode_combine_kernel)[combine.grid](
                    sums_ptr=sums,
                    peak_ptr=peak,
                    total_ptr=total,
                    n_keys_ptr=n_keys,
                    o_ptr=o,
                    n_batches=batch,
                    n_slots=slots,
                    SCALE=scale,
                    Q_HEADS=q_heads,
                    HEAD_DIM=head_dim,
                    SPLIT=SPLIT_KEYS,
                    **combine.options,
                )
    return o


def decode_attention_triton(q: Tensor, k_cache: Tensor, v_cache: Tensor, n_keys: Tensor) -> Tensor:
    """`decode_attention_torch` by Triton kernels, but for float64: head dims are the multiples of 4 from 16 to 256.

    An n_keys out of its range counts as the nearest in 0 .. T; a sequence without a key gets zeros.
    """
    _check(q, k_cache, v_cache, n_keys, KERNEL_DTYPES)
    check_head_dim("decode_attention", "q", q.shape[2])
    check_usable("decode_attention", q.device)
    return _decode_attention(q, k_cache, v_cache, n_keys)
