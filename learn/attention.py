"""Attention's forward in five steps, from a matrix of scores in memory to the kernel in `kernels/attention/forward.py`.

    s_ij = <q_i, k_j> / sqrt(D)        for the keys j <= i
    o_i  = Σ_j exp(s_ij) v_j / Σ_j exp(s_ij)

Every step takes q (B, T, H, D) and k and v (B, T, Hkv, D) with a dense last dimension, H a multiple of Hkv, and returns
o like q, contiguous. LEARN.md tells the steps. Left out of all of them: packed documents, the log-sum-exp for the
backward pass, head dims in two tiles, a tile for each machine.
"""

import math

import torch
from torch import Tensor

from kernels.launch import ceil_div, next_power_of_2, tl, triton, wrap_triton
from kernels.rows import dot

# One tile for all steps, so that they differ by their idea alone. Ours at this head dim is smaller: an H100 timed it 8% faster.
BLOCK_M, BLOCK_N, WARPS, STAGES = 128, 64, 8, 3

# Where a running maximum starts: finite, so that no -inf - -inf is computed.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _load_rows(
    ptr, rows, n_rows, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr = True
):
    """The given rows of a head, [rows, BLOCK_D], zero past the head dim and, with CHECK_ROWS, past n_rows."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + cols
    if CHECK_ROWS:
        return tl.load(at, (rows[:, None] < n_rows) & (cols < HEAD_DIM), other=0.0)
    elif BLOCK_D > HEAD_DIM:
        return tl.load(at, cols < HEAD_DIM, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store_rows(ptr, rows, n_rows, stride, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + cols
    tl.store(at, x.to(ptr.dtype.element_ty), (rows[:, None] < n_rows) & (cols < HEAD_DIM))


# --------------------------------------------------------------------------------------------------- 1: scores in memory


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, scores_ptr, n_times, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    SCALE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr += head // HEADS * q_stride_b + head % HEADS * q_stride_h
    k_ptr += head // HEADS * k_stride_b + head % HEADS * k_stride_h
    q = _load_rows(q_ptr, rows, n_times, q_stride_t, HEAD_DIM, BLOCK_D)
    k = _load_rows(k_ptr, keys, n_times, k_stride_t, HEAD_DIM, BLOCK_D)
    scores = tl.where(keys[None, :] <= rows[:, None], dot(q, k.T) * SCALE, float("-inf"))
    at = scores_ptr + (head * n_times + rows[:, None]) * n_times + keys[None, :]
    tl.store(at, scores, (rows[:, None] < n_times) & (keys[None, :] < n_times))


@triton.jit
def _softmax_kernel(scores_ptr, weights_ptr, n_times, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    keys = tl.arange(0, BLOCK_N)
    scores = tl.load(scores_ptr + row * n_times + keys, keys < n_times, other=float("-inf"))
    weights = tl.exp(scores - tl.max(scores))
    tl.store(
        weights_ptr + row * n_times + keys, (weights / tl.sum(weights)).to(weights_ptr.dtype.element_ty), keys < n_times
    )


@triton.jit
def _weighted_values_kernel(
    weights_ptr, v_ptr, o_ptr, n_times, v_stride_b, v_stride_t, v_stride_h, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch, head_in_batch = head // HEADS, head % HEADS
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    v_ptr += batch * v_stride_b + head_in_batch * v_stride_h
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, n_times, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        at = weights_ptr + (head * n_times + rows[:, None]) * n_times + keys[None, :]
        weights = tl.load(at, (rows[:, None] < n_times) & (keys[None, :] < n_times), other=0.0)
        acc = dot(weights, _load_rows(v_ptr, keys, n_times, v_stride_t, HEAD_DIM, BLOCK_D), acc)
    o_ptr += (batch * n_times * HEADS + head_in_batch) * HEAD_DIM
    _store_rows(o_ptr, rows, n_times, HEADS * HEAD_DIM, acc, HEAD_DIM, BLOCK_D)


def step1(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores, their softmax, and the weighted sum of values: three kernels, with T × T numbers a head between them."""
    k, v = _for_every_head(q, k, v)
    batch, time, heads, head_dim = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scores = torch.empty((batch, heads, time, time), dtype=torch.float32, device=q.device)
    weights = torch.empty(scores.shape, dtype=q.dtype, device=q.device)
    n_blocks = ceil_div(time, BLOCK_M)
    wrap_triton(_scores_kernel)[n_blocks, ceil_div(time, BLOCK_N), batch * heads](
        q_ptr=q,
        k_ptr=k,
        scores_ptr=scores,
        n_times=time,
        **_strides(q=q, k=k),
        SCALE=1 / math.sqrt(head_dim),
        HEADS=heads,
        **_tiles(head_dim),
    )
    wrap_triton(_softmax_kernel)[batch * heads * time,](
        scores_ptr=scores,
        weights_ptr=weights,
        n_times=time,
        BLOCK_N=next_power_of_2(time),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    wrap_triton(_weighted_values_kernel)[n_blocks, batch * heads](
        weights_ptr=weights, v_ptr=v, o_ptr=o, n_times=time, **_strides(v=v), HEADS=heads, **_tiles(head_dim)
    )
    return o


def _for_every_head(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Keys and values copied for each query head that reads them."""
    return [x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v)]


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"{name}_stride_{dim}": x.stride(i) for name, x in tensors.items() for i, dim in enumerate("bth")}


def _tiles(head_dim: int) -> dict[str, int]:
    block_d = max(next_power_of_2(head_dim), 16)
    tiles = {"HEAD_DIM": head_dim, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": block_d}
    return tiles | {"num_warps": WARPS, "num_stages": STAGES}


# ----------------------------------------------------------------------------------------------------- 2: online softmax


@triton.jit
def _attend(
    acc, total, peak, q, k_ptr, v_ptr, rows, keys, n_times, k_stride_t, v_stride_t,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys more: new acc [BLOCK_M, BLOCK_D], sum of the weights and largest score, both [BLOCK_M]."""
    k = _load_rows(k_ptr, keys, n_times, k_stride_t, HEAD_DIM, BLOCK_D, MASKED)
    scores = dot(q, k.T) * SCALE  # [BLOCK_M, BLOCK_N]
    if MASKED:
        scores = tl.where(keys[None, :] <= rows[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp(scores - new_peak[:, None])
    decay = tl.exp(peak - new_peak)
    v = _load_rows(v_ptr, keys, n_times, v_stride_t, HEAD_DIM, BLOCK_D, MASKED)
    return dot(weights, v, acc * decay[:, None]), total * decay + tl.sum(weights, 1), new_peak


@triton.jit
def _online_softmax_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, n_times, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, SCALE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    q = _load_rows(q_ptr + batch * q_stride_b + head * q_stride_h, rows, n_times, q_stride_t, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    for start in range(0, n_times, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        acc, total, peak = _attend(
            acc, total, peak, q, k_ptr, v_ptr, rows, keys, n_times, k_stride_t, v_stride_t, SCALE, HEAD_DIM, BLOCK_D, True
        )  # fmt: skip
    o_ptr += (batch * n_times * HEADS + head) * HEAD_DIM
    _store_rows(o_ptr, rows, n_times, HEADS * HEAD_DIM, acc / total[:, None], HEAD_DIM, BLOCK_D)


def step2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One kernel: the scores of a block live in registers, and what was added up before is scaled to the new maximum."""
    return _launch_every_head(_online_softmax_kernel, q, k, v)


def _launch_every_head(kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = _for_every_head(q, k, v)
    batch, time, heads, head_dim = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wrap_triton(kernel)[ceil_div(time, BLOCK_M), batch * heads](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        o_ptr=o,
        n_times=time,
        **_strides(q=q, k=k, v=v),
        SCALE=1 / math.sqrt(head_dim),
        HEADS=heads,
        **_tiles(head_dim),
    )
    return o


# ---------------------------------------------------------------------- 3: stop at the diagonal, and mask only there


@triton.jit
def _two_loops_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, n_times, q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h,
    v_stride_b, v_stride_t, v_stride_h, SCALE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the last rows see most keys: they go first
    rows = first_row + tl.arange(0, BLOCK_M)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    q = _load_rows(q_ptr + batch * q_stride_b + head * q_stride_h, rows, n_times, q_stride_t, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    diagonal = first_row // BLOCK_N * BLOCK_N
    for start in range(0, diagonal, BLOCK_N):  # keys that every row sees
        keys = start + tl.arange(0, BLOCK_N)
        acc, total, peak = _attend(
            acc, total, peak, q, k_ptr, v_ptr, rows, keys, n_times, k_stride_t, v_stride_t, SCALE, HEAD_DIM, BLOCK_D, False
        )  # fmt: skip
    for start in range(diagonal, min(first_row + BLOCK_M, n_times), BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        acc, total, peak = _attend(
            acc, total, peak, q, k_ptr, v_ptr, rows, keys, n_times, k_stride_t, v_stride_t, SCALE, HEAD_DIM, BLOCK_D, True
        )  # fmt: skip
    o_ptr += (batch * n_times * HEADS + head) * HEAD_DIM
    _store_rows(o_ptr, rows, n_times, HEADS * HEAD_DIM, acc / total[:, None], HEAD_DIM, BLOCK_D)


def step3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Blocks above the diagonal are not visited, those below it need no mask, and the longest programs start first."""
    return _launch_every_head(_two_loops_kernel, q, k, v)


# ---------------------------------------------------------------- 4: one copy of keys and values, at constant strides


@triton.jit
def _grouped_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, n_times,
    q_stride_b, q_stride_t: tl.constexpr, q_stride_h,
    k_stride_b, k_stride_t: tl.constexpr, k_stride_h,
    v_stride_b, v_stride_t: tl.constexpr, v_stride_h,
    SCALE: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BASE_2: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(
        0
    )  # the heads of a group next to each other: they read the same keys and values from the cache
    batch, q_head = (head // Q_HEADS).to(tl.int64), (head % Q_HEADS).to(tl.int64)
    k_head = q_head // (Q_HEADS // K_HEADS)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    k_ptr += batch * k_stride_b + k_head * k_stride_h
    v_ptr += batch * v_stride_b + k_head * v_stride_h
    q = _load_rows(q_ptr + batch * q_stride_b + q_head * q_stride_h, rows, n_times, q_stride_t, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    attend: tl.constexpr = _attend_base_2 if BASE_2 else _attend
    diagonal = first_row // BLOCK_N * BLOCK_N
    for start in range(0, diagonal, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        acc, total, peak = attend(
            acc, total, peak, q, k_ptr, v_ptr, rows, keys, n_times, k_stride_t, v_stride_t, SCALE, HEAD_DIM, BLOCK_D, False
        )  # fmt: skip
    for start in range(diagonal, min(first_row + BLOCK_M, n_times), BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        acc, total, peak = attend(
            acc, total, peak, q, k_ptr, v_ptr, rows, keys, n_times, k_stride_t, v_stride_t, SCALE, HEAD_DIM, BLOCK_D, True
        )  # fmt: skip
    o_ptr += (batch * n_times * Q_HEADS + q_head) * HEAD_DIM
    _store_rows(o_ptr, rows, n_times, Q_HEADS * HEAD_DIM, acc / total[:, None], HEAD_DIM, BLOCK_D)


def step4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A head finds the keys and values of its group; strides are constants, so that one address serves many loads."""
    return _launch_grouped(q, k, v, SCALE=1 / math.sqrt(q.shape[3]), BASE_2=False)


def _launch_grouped(q: Tensor, k: Tensor, v: Tensor, **exponent) -> Tensor:
    batch, time, heads, head_dim = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    wrap_triton(_grouped_kernel)[batch * heads, ceil_div(time, BLOCK_M)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        o_ptr=o,
        n_times=time,
        **_strides(q=q, k=k, v=v),
        **exponent,
        Q_HEADS=heads,
        K_HEADS=k.shape[2],
        **_tiles(head_dim),
    )
    return o


# ----------------------------------------------------------------------- 5: exponentials base 2, one FMA a score


@triton.jit
def _attend_base_2(
    acc, total, peak, q, k_ptr, v_ptr, rows, keys, n_times, k_stride_t, v_stride_t,
    SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`_attend` with unscaled scores and peak; SCALE has log2(e) in it."""
    k = _load_rows(k_ptr, keys, n_times, k_stride_t, HEAD_DIM, BLOCK_D, MASKED)
    scores = dot(q, k.T)
    if MASKED:
        scores = tl.where(keys[None, :] <= rows[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores * SCALE - (new_peak * SCALE)[:, None])
    decay = tl.exp2((peak - new_peak) * SCALE)
    v = _load_rows(v_ptr, keys, n_times, v_stride_t, HEAD_DIM, BLOCK_D, MASKED)
    return dot(weights, v, acc * decay[:, None]), total * decay + tl.sum(weights, 1), new_peak


def step5(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scale is folded into the exponent, whose base the hardware has: a multiply-add and an exponential a score."""
    return _launch_grouped(q, k, v, SCALE=math.log2(math.e) / math.sqrt(q.shape[3]), BASE_2=True)
