"""The feed-forward's forward kernel. The mathematics is in op.py."""

import torch
from torch import Tensor

from kernels.launch import aligned_strides, dense_rows, device_of, register_op, target_of, tl, triton, wrap_triton
from kernels.mlp.rows import add_through_down, hidden_mask, load_down
from kernels.mlp.tiles import launch_of
from kernels.rows import dot_rows, load_rows_at, store_rows_at, zero_rows
from kernels.swiglu import _sigmoid


@triton.jit
def _mlp_forward_kernel(
    x_ptr, gate_up_weight_ptr, down_weight_ptr,
    gate_up_ptr,  # None where no backward pass will ask for them
    out_ptr, n_rows, x_stride,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr,
):  # fmt: skip
    # The base of a program's rows is one 64-bit number; within them 32 bits do, of which a thread has many.
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)[:, None]
    inside = row < n_rows - first_row
    x_ptr += first_row * x_stride * ALIGNMENT
    x = load_rows_at(x_ptr + row.to(tl.int64) * x_stride * ALIGNMENT, inside, DIM, BLOCK_D, BLOCK_D2)
    out = zero_rows(BLOCK_M, BLOCK_D, BLOCK_D2)

    # Gate and up of a hidden column side by side: a thread then has both in its part of the accumulator.
    pair = tl.arange(0, 2 * BLOCK_F)
    weight_row = (pair // 2 + pair % 2 * WIDTH)[:, None]
    cols = tl.arange(0, BLOCK_F)[None, :]
    CHECK: tl.constexpr = WIDTH % BLOCK_F != 0
    if gate_up_ptr is not None:
        gate_up_ptr += first_row * (2 * WIDTH)
    for start in range(0, WIDTH, BLOCK_F):
        left = WIDTH - start
        # fmt: off
        weight = load_rows_at(gate_up_weight_ptr + start * DIM + weight_row * DIM, (pair // 2)[:, None] < left,
                              DIM, BLOCK_D, BLOCK_D2, CHECK)
        # fmt: on
        gate_up = dot_rows(x, weight)  # [BLOCK_M, 2 BLOCK_F]
        if gate_up_ptr is not None:
            mask = hidden_mask(inside, pair[None, :], 2 * left, CHECK)
            tl.store(
                gate_up_ptr + start * 2 + row * (2 * WIDTH) + pair[None, :],
                gate_up.to(gate_up_ptr.dtype.element_ty),
                mask,
            )
        gate, up = tl.split(tl.reshape(gate_up, [BLOCK_M, BLOCK_F, 2]))
        y = (gate * _sigmoid(gate) * up).to(x_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_F]
        if CHECK:  # past WIDTH an infinite x made NaN of zero weights
            y = tl.where(cols < left, y, 0.0)
        down = load_down(down_weight_ptr + start + cols, cols < left, DIM, WIDTH, BLOCK_D, BLOCK_D2, CHECK)
        out = add_through_down(out, y, down)
    store_rows_at(out_ptr + first_row * DIM + row * DIM, inside, out, DIM)


def _outputs(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    kept = (*x.shape[:-1], gate_up_weight.shape[0]) if keep else (0,)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(kept, dtype=x.dtype, device=x.device)


@register_op(fake=_outputs)
def _mlp(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Out like x, and gate and up in pairs (..., 2F): empty where they are not to be kept. All in one dtype."""
    out, gate_up = _outputs(x, gate_up_weight, down_weight, keep)
    rows = dense_rows(x)
    n_rows, dim, width = rows.shape[0], int(rows.shape[1]), int(down_weight.shape[1])
    launch = launch_of("forward", n_rows, dim, x.element_size(), target_of(x))
    if n_rows:
        with device_of(x):
            wrap_triton(_mlp_forward_kernel)[launch.grid](
                x_ptr=rows,
                gate_up_weight_ptr=gate_up_weight.contiguous(),
                down_weight_ptr=down_weight.contiguous(),
                gate_up_ptr=gate_up if keep else None,
                out_ptr=out,
                n_rows=n_rows,
                **aligned_strides(x_stride=rows.stride(0)),
                DIM=dim,
                WIDTH=width,
                **launch.options,
            )
    return out, gate_up
