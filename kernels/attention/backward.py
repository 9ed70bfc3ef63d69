"""Attention's backward kernels: dQ and delta in one launch, dK and dV in the next. The mathematics is in op.py.

Each program adds up a gradient of its own in registers and stores it once, so there are no atomics. That costs two matrix
products of seven: both kernels compute the weights and their gradients. One launch for both would need the registers of
the larger one for all programs, and delta, which dK and dV read, comes for free where dQ holds the tiles of do anyway.
"""

import math

import torch
from torch import Tensor

from kernels.attention.rows import block_and_head, load_rows, store_rotated_back, store_rows, visible_key_blocks
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
from kernels.rows import add_weighted, dot_rows, inner_rows, row_tiles, scale_rows, zero_rows

LN_2 = tl.constexpr(math.log(2))

# ------------------------------------------------------------------------------------------------------------------- dQ


@triton.jit
def _step_dq(
    dq, q, do, lse, delta, k_ptr, v_ptr, rows, first_keys, keys, n_times, k_stride_t, v_stride_t,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to dq [BLOCK_M, ...]."""
    k = load_rows(k_ptr, keys, n_times, k_stride_t, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2, MASKED)
    v = load_rows(v_ptr, keys, n_times, v_stride_t, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2, MASKED)
    weights = tl.exp2(dot_rows(q, k) * SCALE - lse[:, None])  # [BLOCK_M, BLOCK_N]
    if MASKED:
        visible = keys[None, :] <= rows[:, None]
        if first_keys is not None:
            visible &= keys[None, :] >= first_keys[:, None]
        weights = tl.where(visible, weights, 0.0)
    dscores = weights * (dot_rows(do, v) - delta[:, None])
    return add_weighted(dq, dscores, k)


@triton.jit
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr,
    first_key_ptr,  # None where every key up to the query's own is visible
    cos_ptr, sin_ptr,  # None, or the tables by which q and k came rotated: dq_ptr is then that of qkv
    dq_ptr, delta_ptr, n_batches, n_times, heads_at_once,
    # Constant strides of time, so that a thread's loads differ by constants and it computes one address for all of them.
    q_stride_b, q_stride_t: tl.constexpr, q_stride_h,
    k_stride_b, k_stride_t: tl.constexpr, k_stride_h,
    v_stride_b, v_stride_t: tl.constexpr, v_stride_h,
    do_stride_b, do_stride_t: tl.constexpr, do_stride_h,
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
    do_ptr += (batch * do_stride_b + q_head * do_stride_h) * ALIGNMENT
    if first_key_ptr is not None:
        first_key_ptr += batch * n_times
    lse_ptr += (batch * Q_HEADS + q_head) * n_times
    delta_ptr += (batch * Q_HEADS + q_head) * n_times
    dense = (batch * n_times * Q_HEADS + q_head) * HEAD_DIM  # where o and dq of this head begin

    rows = first_row + tl.arange(0, BLOCK_M)
    first_keys = None
    if first_key_ptr is not None:
        first_keys = tl.load(first_key_ptr + rows, rows < n_times, other=0)
    q = load_rows(q_ptr, rows, n_times, q_stride_t, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2)
    do = load_rows(do_ptr, rows, n_times, do_stride_t, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2)
    o = load_rows(o_ptr + dense, rows, n_times, Q_HEADS * HEAD_DIM, HEAD_DIM, 1, BLOCK_D, BLOCK_D2)
    delta = inner_rows(o, do)
    tl.store(delta_ptr + rows, delta, rows < n_times)
    lse = tl.load(lse_ptr + rows, rows < n_times, other=0.0)
    dq = zero_rows(BLOCK_M, BLOCK_D, BLOCK_D2)

    start, n_left, n_causal, n_blocks = visible_key_blocks(first_key_ptr, first_row, n_times, BLOCK_M, BLOCK_N)
    n_full = n_causal - n_left
    # fmt: off
    for i in range(n_left, n_causal):
        keys = start + i * BLOCK_N + tl.arange(0, BLOCK_N)
        dq = _step_dq(dq, q, do, lse, delta, k_ptr, v_ptr, rows, first_keys, keys, n_times, k_stride_t, v_stride_t,
                      SCALE, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2, MASKED=False)
    for i in range(n_blocks - n_full):
        keys = start + (i if i < n_left else i + n_full) * BLOCK_N + tl.arange(0, BLOCK_N)
        dq = _step_dq(dq, q, do, lse, delta, k_ptr, v_ptr, rows, first_keys, keys, n_times, k_stride_t, v_stride_t,
                      SCALE, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2, MASKED=True)
    # fmt: on
    dq = scale_rows(dq, SCALE * LN_2)
    if cos_ptr is None:
        store_rows(dq_ptr + dense, rows, n_times, dq, Q_HEADS * HEAD_DIM, HEAD_DIM)
    else:
        HEADS: tl.constexpr = Q_HEADS + 2 * K_HEADS
        dq_ptr += (batch * n_times * HEADS + q_head) * HEAD_DIM
        store_rotated_back(dq_ptr, rows, n_times, dq, cos_ptr, sin_ptr, HEADS * HEAD_DIM, HEAD_DIM)


# ------------------------------------------------------------------------------------------------------------ dK and dV


@triton.jit
def _attention_count_queries_kernel(
    first_key_ptr,
    ends_ptr,  # int32 (2, B, blocks of keys)
    n_batches, n_times,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """How many queries have a first_key up to the first, and up to the last, key of a block: there its queries end."""
    n_key_blocks = tl.cdiv(n_times, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    first_key_ptr += program // n_key_blocks * n_times
    first = (program % n_key_blocks * BLOCK_N).to(tl.int32)
    # Queries before the block see no key past themselves, so they all count.
    see_first = tl.zeros([BLOCK_T], tl.int32)
    see_last = tl.zeros([BLOCK_T], tl.int32)
    for start in range(first, n_times, BLOCK_T):
        query = start + tl.arange(0, BLOCK_T)
        first_key = tl.load(first_key_ptr + query, query < n_times, other=n_times)
        see_first += (first_key <= first).to(tl.int32)
        see_last += (first_key < min(first + BLOCK_N, n_times)).to(tl.int32)
    tl.store(ends_ptr + program, first + tl.sum(see_first))
    tl.store(ends_ptr + n_batches * n_key_blocks + program, first + tl.sum(see_last))


@triton.jit
def _step_dkdv(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, first_key_ptr, keys, head, rows, n_times,
    q_stride_t, q_stride_h, do_stride_t, do_stride_h,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block of queries of one head to dk and dv [BLOCK_N, ...]. Scores are transposed: [BLOCK_N, BLOCK_M]."""
    q_ptr += head * q_stride_h * ALIGNMENT
    do_ptr += head * do_stride_h * ALIGNMENT
    lse_ptr += head * n_times
    delta_ptr += head * n_times
    q = load_rows(q_ptr, rows, n_times, q_stride_t, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2, MASKED)
    do = load_rows(do_ptr, rows, n_times, do_stride_t, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2, MASKED)
    if MASKED:
        inside = rows < n_times
        lse = tl.load(lse_ptr + rows, inside, other=0.0)
        delta = tl.load(delta_ptr + rows, inside, other=0.0)
        visible = keys[:, None] <= rows[None, :]  # past the end q and do are zero, and so is what they add
        if first_key_ptr is not None:
            visible &= keys[:, None] >= tl.load(first_key_ptr + rows, inside, other=0)[None, :]
        weights = tl.exp2(dot_rows(k, q) * SCALE - lse[None, :])
        weights = tl.where(visible, weights, 0.0)
    else:
        lse = tl.load(lse_ptr + rows)
        delta = tl.load(delta_ptr + rows)
        weights = tl.exp2(dot_rows(k, q) * SCALE - lse[None, :])
    dv = add_weighted(dv, weights, do)
    dscores = weights * (dot_rows(v, do) - delta[None, :])
    return add_weighted(dk, dscores, q), dv


@triton.jit
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr,
    first_key_ptr,  # None where every key up to the query's own is visible, and then so is ends_ptr
    ends_ptr,
    cos_ptr, sin_ptr,  # None, or the tables by which q and k came rotated: dk_ptr is then that of qkv, and dv_ptr None
    dk_ptr,  # (SPLITS, B, T, Hkv, D), and so is dv
    dv_ptr, n_batches, n_times, heads_at_once,
    q_stride_b, q_stride_t: tl.constexpr, q_stride_h,
    k_stride_b, k_stride_t: tl.constexpr, k_stride_h,
    v_stride_b, v_stride_t: tl.constexpr, v_stride_h,
    do_stride_b, do_stride_t: tl.constexpr, do_stride_h,
    SCALE: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ALIGNMENT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr,
):  # fmt: skip
    # A kv head is done by SPLITS programs, each with its share of the group: HEADS query heads.
    HEADS: tl.constexpr = Q_HEADS // (K_HEADS * SPLITS)
    n_key_blocks = tl.cdiv(n_times, BLOCK_N)
    # The first keys are seen by most queries: they go first.
    block, share = block_and_head(n_key_blocks, n_batches * K_HEADS * SPLITS, heads_at_once)
    batch = (share // (K_HEADS * SPLITS)).to(tl.int64)
    share = (share % (K_HEADS * SPLITS)).to(tl.int64)
    k_head = share // SPLITS
    q_ptr += batch * q_stride_b * ALIGNMENT
    k_ptr += (batch * k_stride_b + k_head * k_stride_h) * ALIGNMENT
    v_ptr += (batch * v_stride_b + k_head * v_stride_h) * ALIGNMENT
    do_ptr += batch * do_stride_b * ALIGNMENT
    lse_ptr += batch * Q_HEADS * n_times
    delta_ptr += batch * Q_HEADS * n_times

    # Queries from the block's first key on, in blocks: those from n_diagonal up to n_whole see all its keys, those before
    # are cut off by the diagonal, those after, up to n_blocks, by first_key or the end.
    start = block * BLOCK_N
    end_of_whole = n_times
    end = n_times
    if first_key_ptr is not None:
        first_key_ptr += batch * n_times
        end_of_whole = tl.load(ends_ptr + batch * n_key_blocks + block)
        end = tl.load(ends_ptr + (n_batches + batch) * n_key_blocks + block)
    n_blocks = tl.cdiv(end - start, BLOCK_M)
    n_diagonal = min(tl.cdiv(BLOCK_N - 1, BLOCK_M), n_blocks)
    n_whole = max((end_of_whole - start) // BLOCK_M, n_diagonal)
    n_full = n_whole - n_diagonal

    keys = start + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, keys, n_times, k_stride_t, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2)
    v = load_rows(v_ptr, keys, n_times, v_stride_t, HEAD_DIM, ALIGNMENT, BLOCK_D, BLOCK_D2)
    dk = zero_rows(BLOCK_N, BLOCK_D, BLOCK_D2)
    dv = zero_rows(BLOCK_N, BLOCK_D, BLOCK_D2)
    # The walk over blocks and, within a block, heads is one loop, so that loads of the next head start during this one.
    # fmt: off
    for i in range(n_diagonal * HEADS, n_whole * HEADS):
        head = share * HEADS + i % HEADS
        rows = start + i // HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
        dk, dv = _step_dkdv(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, first_key_ptr, keys, head, rows, n_times,
                            q_stride_t, q_stride_h, do_stride_t, do_stride_h, SCALE, HEAD_DIM, ALIGNMENT,
                            BLOCK_D, BLOCK_D2, MASKED=False)
    for i in tl.range((n_blocks - n_full) * HEADS, num_stages=1):
        head = share * HEADS + i % HEADS
        index = i // HEADS
        rows = start + (index if index < n_diagonal else index + n_full) * BLOCK_M + tl.arange(0, BLOCK_M)
        dk, dv = _step_dkdv(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, first_key_ptr, keys, head, rows, n_times,
                            q_stride_t, q_stride_h, do_stride_t, do_stride_h, SCALE, HEAD_DIM, ALIGNMENT,
                            BLOCK_D, BLOCK_D2, MASKED=True)
    # fmt: on
    dk = scale_rows(dk, SCALE * LN_2)
    if cos_ptr is None:
        dense = (((share % SPLITS * n_batches + batch) * n_times) * K_HEADS + k_head) * HEAD_DIM
        store_rows(dk_ptr + dense, keys, n_times, dk, K_HEADS * HEAD_DIM, HEAD_DIM)
        store_rows(dv_ptr + dense, keys, n_times, dv, K_HEADS * HEAD_DIM, HEAD_DIM)
    else:
        PACKED: tl.constexpr = Q_HEADS + 2 * K_HEADS
        dk_ptr += (batch * n_times * PACKED + Q_HEADS + k_head) * HEAD_DIM
        store_rows(dk_ptr + K_HEADS * HEAD_DIM, keys, n_times, dv, PACKED * HEAD_DIM, HEAD_DIM)
        store_rotated_back(dk_ptr, keys, n_times, dk, cos_ptr, sin_ptr, PACKED * HEAD_DIM, HEAD_DIM)


# --------------------------------------------------------------------------------------------------------------- launch


def dq_launch(batch: int, time: int, heads: int, head_dim: int, itemsize: int, target: Target) -> Launch:
    """One program a block of queries and query head."""
    tile = tile_of("dq", head_dim, itemsize, target)
    block_d, block_d2 = row_tiles(head_dim)
    tiles = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": block_d, "BLOCK_D2": block_d2}
    return Launch((ceil_div(time, tile.block_m) * batch * heads,), tiles, tile.num_warps, tile.num_stages)


def dkdv_launch(
    batch: int,
    time: int,
    q_heads: int,
    k_heads: int,
    head_dim: int,
    itemsize: int,
    target: Target,
    packed: bool = False,
) -> Launch:
    """One program a block of keys and kv head; where they are fewer than the multiprocessors, SPLITS of them.

    Each then walks a share of the group's query heads, and the float32 sums are added up after the launch. Smaller blocks
    would keep as many multiprocessors busy, but with less arithmetic to each byte and, under 64 keys, without wgmma. A
    group of one is not split, and neither is a packed gradient, whose sums are rotated back as they are stored.
    """
    tile = tile_of("dkdv", head_dim, itemsize, target)
    block_d, block_d2 = row_tiles(head_dim)
    programs = ceil_div(time, tile.block_n) * batch * k_heads
    group = 1 if packed else q_heads // k_heads
    enough = [n for n in range(1, group) if group % n == 0 and programs * n >= target.multiprocessors]
    splits = enough[0] if enough else group
    tiles = {
        "SPLITS": splits,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "BLOCK_D2": block_d2,
    }
    return Launch((programs * splits,), tiles, tile.num_warps, tile.num_stages)


def _outputs(do, q, k, v, o, lse, first_key, cos, sin):
    if cos is None:
        return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    batch, time, heads, head_dim = q.shape
    shapes = ((batch, time, heads + k.shape[2] + v.shape[2], head_dim), 0, 0)
    return tuple(torch.empty(shape, dtype=q.dtype, device=q.device) for shape in shapes)


@register_op(fake=_outputs)
def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    first_key: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v.

    With the tables by which q and k came rotated: the packed gradient of what they and v were (B, T, H + 2 Hkv, D), and two
    tensors without elements.
    """
    dq, dk, dv = _outputs(do, q, k, v, o, lse, first_key, cos, sin)
    if not q.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    do, q, k, v = dense_heads(do, q, k, v)
    first_key = None if first_key is None else first_key.contiguous()
    batch, time, q_heads, head_dim = q.shape
    q_heads, k_heads, head_dim = int(q_heads), int(k.shape[2]), int(head_dim)
    itemsize, target = q.element_size(), target_of(q)
    dq_tiles = dq_launch(batch, time, q_heads, head_dim, itemsize, target)
    dkdv_tiles = dkdv_launch(batch, time, q_heads, k_heads, head_dim, itemsize, target, packed=cos is not None)
    splits = dkdv_tiles.tiles["SPLITS"]
    delta = torch.empty_like(lse)
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "do_ptr": do,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "first_key_ptr": first_key,
        "cos_ptr": None if cos is None else cos.contiguous(),
        "sin_ptr": None if sin is None else sin.contiguous(),
        "n_batches": batch,
        "n_times": time,
        **bth_strides(q=q, k=k, v=v, do=do),
        "SCALE": math.log2(math.e) / math.sqrt(head_dim),
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HEAD_DIM": head_dim,
    }
    bytes_of_two = 2 * time * head_dim * itemsize
    with device_of(q):
        wrap_triton(_attention_dq_kernel)[dq_tiles.grid](
            o_ptr=o,
            dq_ptr=dq,
            heads_at_once=heads_in_cache(bytes_of_two, batch * k_heads) * (q_heads // k_heads),
            **shared,
            **dq_tiles.options,
        )
        ends = None
        if first_key is not None:
            block_n = dkdv_tiles.tiles["BLOCK_N"]
            n_key_blocks = ceil_div(time, block_n)
            ends = torch.empty((2, batch, n_key_blocks), dtype=torch.int32, device=q.device)
            wrap_triton(_attention_count_queries_kernel)[(batch * n_key_blocks,)](
                first_key_ptr=first_key,
                ends_ptr=ends,
                n_batches=batch,
                n_times=time,
                BLOCK_N=block_n,
                BLOCK_T=1024,
                num_warps=4,
                num_stages=1,
            )
        parts_of_dk, parts_of_dv = (dk, dv) if cos is None else (dq, None)
        if splits > 1:
            parts_of_dk, parts_of_dv = (
                torch.empty((splits, *k.shape), dtype=torch.float32, device=q.device) for _ in range(2)
            )
        wrap_triton(_attention_dkdv_kernel)[dkdv_tiles.grid](
            ends_ptr=ends,
            dk_ptr=parts_of_dk,
            dv_ptr=parts_of_dv,
            heads_at_once=heads_in_cache(bytes_of_two * (q_heads // k_heads // splits), batch * k_heads * splits),
            **shared,
            **dkdv_tiles.options,
        )
        if splits > 1:
            dk, dv = parts_of_dk.sum(0).to(dk.dtype), parts_of_dv.sum(0).to(dv.dtype)
    return dq, dk, dv
