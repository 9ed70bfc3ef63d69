"""Rotary position embedding of queries and keys (Su et al., 2021, arXiv:2104.09864), half-split as in Hugging Face.

It takes the packed product [queries, keys, values] as the model's one GEMM writes it. Forward, for each head of q and k and
i < D/2, with the row of the tables that belongs to the position; v is not touched:

    x'[i]       = x[i] · cos[i] − x[i + D/2] · sin[i]
    x'[i + D/2] = x[i + D/2] · cos[i] + x[i] · sin[i]

Backward: a rotation's transpose is the rotation back, so dq and dk are turned by −sin, and dv is copied beside them; nothing is
saved but the tables, which are constants and get no gradient. All arithmetic is float32, with one cast at the end.

Bytes for N = B · T positions in e bytes an element, each read and written once:

               read             written     together
    forward    q, k             q', k'      2 e N (H + Hkv) D       and 4 T D for the tables
    backward   dq', dk', dv     dqkv        2 e N (H + 2 Hkv) D     and 4 T D for the tables

The forward is one launch for q and k, read where they lie in qkv; v stays there, as a view. The backward is one launch that
writes the packed gradient once: autograd, of q, k and v apart, would concatenate three gradients afterwards and so read and
write them all again.
"""

import torch
from torch import Tensor

from kernels.launch import (
    KERNEL_DTYPES,
    REFERENCE_DTYPES,
    Launch,
    Target,
    bth_strides,
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

# ----------------------------------------------------------------------------------------------------------- torch twin


def rope_torch(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split the packed qkv, and rotate each position's queries and keys by the angles of its row of the tables.

    qkv: (B, T, (H + 2 Hkv) D), D even; cos and sin: (T, D/2), float32 (float64 beside a float64 qkv).
    Returns q' (B, T, H, D) and k' (B, T, Hkv, D), contiguous, and v (B, T, Hkv, D), a view of qkv.
    Raises ValueError on anything else.
    """
    _check(qkv, cos, sin, n_heads, n_kv_heads, REFERENCE_DTYPES)
    q, k, v = _split(qkv, n_heads, n_kv_heads)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _split(qkv: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of qkv, whatever its strides."""
    return qkv.unflatten(-1, (n_heads + 2 * n_kv_heads, -1)).split((n_heads, n_kv_heads, n_kv_heads), dim=2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos.to(low.dtype)[:, None], sin.to(low.dtype)[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    dtypes: tuple[torch.dtype, ...],
    op: str = "rope",
) -> None:
    check_tensor(op, "qkv", qkv, ("B", "T", "(H + 2 Hkv) D"), dtypes)
    for name, heads in (("n_heads", n_heads), ("n_kv_heads", n_kv_heads)):
        if heads < 1:
            raise ValueError(f"{op}: {name} is {heads}, wanted at least 1")
    time, heads = qkv.shape[1], n_heads + 2 * n_kv_heads
    width = qkv.shape[2] // heads
    if width * heads != qkv.shape[2] or width == 0 or width % 2:
        raise ValueError(
            f"{op}: qkv has shape {tuple(qkv.shape)}, wanted (B, T, ({n_heads} + 2 · {n_kv_heads}) D) with D even and at "
            "least 2"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        table_dtypes = (torch.float32, torch.float64) if qkv.dtype == torch.float64 else (torch.float32,)
        check_tensor(op, name, table, (time, width // 2), table_dtypes, qkv.device)
        if table.requires_grad:
            raise ValueError(f"{op}: {name} requires a gradient, wanted a constant table")


# --------------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _rotate_tile(
    x_ptr,
    out_ptr,
    cos,
    sin,
    batch,
    time,
    position,
    n_positions,
    first_head,
    stride_b,
    stride_t,
    stride_h,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEADS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTATE: tl.constexpr = True,
    INTERLEAVE: tl.constexpr = False,
):
    """Rotate BLOCK_H heads from `first_head` at [BLOCK_T, 1, 1] positions by cos and sin [BLOCK_T, 1, BLOCK_D], or copy them.

    They go where the same heads from `out_ptr` on lie among the OUT_HEADS of a position; with INTERLEAVE the two halves of a pair
    side by side.
    """
    HALF: tl.constexpr = WIDTH // 2
    head = first_head + tl.arange(0, BLOCK_H)[None, :, None]
    cols = tl.arange(0, BLOCK_D)[None, None, :]
    mask = (position < n_positions) & (head < HEADS) & (cols < HALF)
    low_ptr = x_ptr + (batch * stride_b + time * stride_t + head.to(tl.int64) * stride_h) * ALIGNMENT + cols
    low = tl.load(low_ptr, mask, other=0.0)
    high = tl.load(low_ptr + HALF, mask, other=0.0)
    out_low_ptr = out_ptr + (position * OUT_HEADS + head) * WIDTH + cols
    if ROTATE:
        x, y = low.to(tl.float32), high.to(tl.float32)
        low, high = x * cos - y * sin, y * cos + x * sin
    if INTERLEAVE:
        both = tl.arange(0, 2 * BLOCK_D)[None, None, :]
        both_mask = (position < n_positions) & (head < HEADS) & (both < WIDTH)
        pairs = tl.interleave(low, high).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (position * OUT_HEADS + head) * WIDTH + both, pairs, both_mask)
    else:
        tl.store(out_low_ptr, low.to(out_ptr.dtype.element_ty), mask)
        tl.store(out_low_ptr + HALF, high.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _rope_forward_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    n_positions,  # B · T
    n_times,  # T
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One grid axis: the tiles of q's heads and then of k's, at the same positions, follow each other.
    N_Q_TILES: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    N_TILES: tl.constexpr = N_Q_TILES + (K_HEADS + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0).to(tl.int64)
    tile = program % N_TILES
    position = program // N_TILES * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    batch, time = position // n_times, position % n_times
    cols = tl.arange(0, BLOCK_D)[None, None, :]
    table_mask = (position < n_positions) & (cols < WIDTH // 2)
    cos = tl.load(cos_ptr + time * (WIDTH // 2) + cols, table_mask, other=0.0)
    sin = tl.load(sin_ptr + time * (WIDTH // 2) + cols, table_mask, other=0.0)
    # fmt: off
    if tile < N_Q_TILES:
        _rotate_tile(q_ptr, q_out_ptr, cos, sin, batch, time, position, n_positions, tile * BLOCK_H,
                     q_stride_b, q_stride_t, q_stride_h, Q_HEADS, WIDTH, Q_HEADS, ALIGNMENT, BLOCK_H, BLOCK_D,
                     INTERLEAVE=INTERLEAVE)
    else:
        _rotate_tile(k_ptr, k_out_ptr, cos, sin, batch, time, position, n_positions, (tile - N_Q_TILES) * BLOCK_H,
                     k_stride_b, k_stride_t, k_stride_h, K_HEADS, WIDTH, K_HEADS, ALIGNMENT, BLOCK_H, BLOCK_D,
                     INTERLEAVE=INTERLEAVE)
    # fmt: on


@triton.jit
def _rope_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cos_ptr,
    sin_ptr,
    dqkv_ptr,
    n_positions,  # B · T
    n_times,  # T
    dq_stride_b,
    dq_stride_t,
    dq_stride_h,
    dk_stride_b,
    dk_stride_t,
    dk_stride_h,
    dv_stride_b,
    dv_stride_t,
    dv_stride_h,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # As above: the tiles of dq's heads, of dk's and of dv's follow each other.
    N_Q_TILES: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    N_K_TILES: tl.constexpr = (K_HEADS + BLOCK_H - 1) // BLOCK_H
    OUT_HEADS: tl.constexpr = Q_HEADS + 2 * K_HEADS
    program = tl.program_id(0).to(tl.int64)
    tile = program % (N_Q_TILES + 2 * N_K_TILES)
    position = program // (N_Q_TILES + 2 * N_K_TILES) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    batch, time = position // n_times, position % n_times
    cols = tl.arange(0, BLOCK_D)[None, None, :]
    table_mask = (position < n_positions) & (cols < WIDTH // 2) & (tile < N_Q_TILES + N_K_TILES)
    cos = tl.load(cos_ptr + time * (WIDTH // 2) + cols, table_mask, other=0.0)
    sin = -tl.load(sin_ptr + time * (WIDTH // 2) + cols, table_mask, other=0.0)
    # fmt: off
    if tile < N_Q_TILES:
        _rotate_tile(dq_ptr, dqkv_ptr, cos, sin, batch, time, position, n_positions, tile * BLOCK_H,
                     dq_stride_b, dq_stride_t, dq_stride_h, Q_HEADS, WIDTH, OUT_HEADS, ALIGNMENT, BLOCK_H, BLOCK_D)
    elif tile < N_Q_TILES + N_K_TILES:
        _rotate_tile(dk_ptr, dqkv_ptr + Q_HEADS * WIDTH, cos, sin, batch, time, position, n_positions,
                     (tile - N_Q_TILES) * BLOCK_H,
                     dk_stride_b, dk_stride_t, dk_stride_h, K_HEADS, WIDTH, OUT_HEADS, ALIGNMENT, BLOCK_H, BLOCK_D)
    else:
        _rotate_tile(dv_ptr, dqkv_ptr + (Q_HEADS + K_HEADS) * WIDTH, cos, sin, batch, time, position, n_positions,
                     (tile - N_Q_TILES - N_K_TILES) * BLOCK_H,
                     dv_stride_b, dv_stride_t, dv_stride_h, K_HEADS, WIDTH, OUT_HEADS, ALIGNMENT, BLOCK_H, BLOCK_D,
                     ROTATE=False)
    # fmt: on


# --------------------------------------------------------------------------------------------------------------- launch


def rope_launch(n_positions: int, q_heads: int, k_heads: int, width: int, target: Target, v_heads: int = 0) -> Launch:
    """Tiles of about 1024 pairs: as many heads of one position as there are (of k, if fewer), then more positions."""
    block_d = next_power_of_2(width // 2)
    block_h = max(1, min(next_power_of_2(min(q_heads, k_heads)), 1024 // block_d))
    block_t = max(1, 1024 // (block_d * block_h))
    n_tiles = ceil_div(q_heads, block_h) + ceil_div(k_heads, block_h) + ceil_div(v_heads, block_h)
    tiles = {"BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_D": block_d}
    return Launch((ceil_div(n_positions, block_t) * n_tiles,), tiles, warps_for(block_t * block_h * block_d, 8, target))


def _outputs(qkv, cos, sin, n_heads, n_kv_heads, interleave):
    batch, time, packed = qkv.shape
    shapes = ((batch, time, heads, packed // (n_heads + 2 * n_kv_heads)) for heads in (n_heads, n_kv_heads))
    q, k = (torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for shape in shapes)
    return q, k


@register_op(fake=_outputs)
def _rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, interleave: bool
) -> tuple[Tensor, Tensor]:
    """q' and k'; interleave: with the two halves of a pair side by side, as (x'[0], x'[D/2], x'[1], ...)."""
    q_out, k_out = _outputs(qkv, cos, sin, n_heads, n_kv_heads, interleave)
    q, k, _ = _split(qkv, n_heads, n_kv_heads)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, time, q_heads, width = q.shape
    q_heads, k_heads, width = int(q_heads), int(k.shape[2]), int(width)
    launch = rope_launch(batch * time, q_heads, k_heads, width, target_of(q))
    if batch * time:
        with device_of(q):
            wrap_triton(_rope_forward_kernel)[launch.grid](
                q_ptr=q,
                k_ptr=k,
                cos_ptr=cos.contiguous(),
                sin_ptr=sin.contiguous(),
                q_out_ptr=q_out,
                k_out_ptr=k_out,
                n_positions=batch * time,
                n_times=time,
                **bth_strides(q=q, k=k),
                Q_HEADS=q_heads,
                K_HEADS=k_heads,
                WIDTH=width,
                INTERLEAVE=interleave,
                **launch.options,
            )
    return q_out, k_out


def _packed_gradient(dq, dk, dv, cos, sin):
    batch, time, heads, width = dq.shape
    heads += dk.shape[2] + dv.shape[2]
    return torch.empty((batch, time, heads, width), dtype=dq.dtype, device=dq.device)


@register_op(fake=_packed_gradient)
def _rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dqkv = _packed_gradient(dq, dk, dv, cos, sin)
    dq, dk, dv = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv))
    batch, time, q_heads, width = dq.shape
    q_heads, k_heads, width = int(q_heads), int(dk.shape[2]), int(width)
    launch = rope_launch(batch * time, q_heads, k_heads, width, target_of(dq), v_heads=k_heads)
    if batch * time:
        with device_of(dq):
            wrap_triton(_rope_backward_kernel)[launch.grid](
                dq_ptr=dq,
                dk_ptr=dk,
                dv_ptr=dv,
                cos_ptr=cos.contiguous(),
                sin_ptr=sin.contiguous(),
                dqkv_ptr=dqkv,
                n_positions=batch * time,
                n_times=time,
                **bth_strides(dq=dq, dk=dk, dv=dv),
                Q_HEADS=q_heads,
                K_HEADS=k_heads,
                WIDTH=width,
                **launch.options,
            )
    return dqkv


# ------------------------------------------------------------------------------------------------------------- autograd


class _Rope(torch.autograd.Function):
    """Of qkv as a whole, so that one gradient is written. Not an op of PyTorch's: one may not return a view of its input."""

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int):
        ctx.save_for_backward(cos, sin)
        return *_rope(qkv, cos, sin, n_heads, n_kv_heads, False), _split(qkv, n_heads, n_kv_heads)[2]

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
        # An output that nobody uses comes back as zeros.
        return _rope_backward(dq, dk, dv, *ctx.saved_tensors).flatten(-2), None, None, None, None


def _save(ctx, inputs, output):
    dq, dk, _, cos, sin = inputs
    ctx.heads = dq.shape[2], dk.shape[2]
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, upstream):
    # What turns back is linear too, and its transpose turns forward again.
    return *rope_triton(upstream.flatten(-2), *ctx.saved_tensors, *ctx.heads), None, None


_rope_backward.register_autograd(_differentiate, setup_context=_save)


def rope_triton(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`rope_torch` by Triton kernels, but for float64."""
    _check(qkv, cos, sin, n_heads, n_kv_heads, KERNEL_DTYPES)
    check_usable("rope", qkv.device)
    return _Rope.apply(qkv, cos, sin, n_heads, n_kv_heads)
