"""The feed-forward's backward kernel, up to the gradients of its weights. The mathematics is in op.py."""

import torch
from torch import Tensor

from kernels.launch import aligned_strides, dense_rows, device_of, register_op, target_of, tl, triton, wrap_triton
from kernels.mlp.rows import dot_down, hidden_mask, load_down
from kernels.mlp.tiles import launch_of
from kernels.rows import add_weighted, load_rows_at, store_rows_at, zero_rows
from kernels.swiglu import _sigmoid


@triton.jit
def _mlp_backward_kernel(
    dout_ptr, gate_up_weight_ptr, down_weight_ptr, gate_up_ptr, dgate_up_ptr, y_ptr, dx_ptr, n_rows, dout_stride,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)[:, None]
    inside = row < n_rows - first_row
    dout_ptr += first_row * dout_stride * ALIGNMENT
    dout = load_rows_at(dout_ptr + row.to(tl.int64) * dout_stride * ALIGNMENT, inside, DIM, BLOCK_D, BLOCK_D2)
    dx = zero_rows(BLOCK_M, BLOCK_D, BLOCK_D2)

    pair = tl.arange(0, 2 * BLOCK_F)[None, :]
    cols = tl.arange(0, BLOCK_F)[None, :]
    hidden = tl.arange(0, BLOCK_F)[:, None]
    CHECK: tl.constexpr = WIDTH % BLOCK_F != 0
    gate_up_ptr += first_row * (2 * WIDTH)
    dgate_up_ptr += first_row * (2 * WIDTH)
    y_ptr += first_row * WIDTH
    for start in range(0, WIDTH, BLOCK_F):
        left = WIDTH - start
        mask = hidden_mask(inside, pair, 2 * left, CHECK)
        gate_up = tl.load(gate_up_ptr + start * 2 + row * (2 * WIDTH) + pair, mask, other=0.0)
        down = load_down(down_weight_ptr + start + cols, cols < left, DIM, WIDTH, BLOCK_D, BLOCK_D2, CHECK)
        dy = dot_down(dout, down)  # [BLOCK_M, BLOCK_F]
        if CHECK:  # past WIDTH an infinite dout made NaN of zero weights
            dy = tl.where(cols < left, dy, 0.0)
        gate, up = tl.split(tl.reshape(gate_up.to(tl.float32), [BLOCK_M, BLOCK_F, 2]))
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        dgate = (up * (sigmoid + silu * (1 - sigmoid)) * dy).to(dout_ptr.dtype.element_ty)
        dup = (dy * silu).to(dout_ptr.dtype.element_ty)
        # The same number twice, so that y needs dup: else Triton makes y from another layout of gate and up (seen for sm_90), which
        # stores it without an exchange, and everything from the load up to here is computed twice.
        y = silu * up
        y = tl.where(dup == dup, y, y + 0.0).to(y_ptr.dtype.element_ty)
        weight_ptr = gate_up_weight_ptr + start * DIM + hidden * DIM
        dx = add_weighted(dx, dgate, load_rows_at(weight_ptr, hidden < left, DIM, BLOCK_D, BLOCK_D2, CHECK))
        dx = add_weighted(dx, dup, load_rows_at(weight_ptr + WIDTH * DIM, hidden < left, DIM, BLOCK_D, BLOCK_D2, CHECK))
        mask = hidden_mask(inside, cols, left, CHECK)
        dgate_ptr = dgate_up_ptr + start + row * (2 * WIDTH) + cols
        tl.store(dgate_ptr, dgate, mask)
        tl.store(dgate_ptr + WIDTH, dup, mask)
        tl.store(y_ptr + start + row * WIDTH + cols, y, mask)
    store_rows_at(dx_ptr + first_row * DIM + row * DIM, inside, dx, DIM)


def _outputs(
    dout: Tensor, gate_up_weight: Tensor, down_weight: Tensor, gate_up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def empty(width: int) -> Tensor:
        return torch.empty((*dout.shape[:-1], width), dtype=dout.dtype, device=dout.device)

    return empty(gate_up_weight.shape[0]), empty(down_weight.shape[1]), empty(dout.shape[-1])


@register_op(fake=_outputs)
def _mlp_backward(
    dout: Tensor, gate_up_weight: Tensor, down_weight: Tensor, gate_up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the first product, packed (..., 2F); y (..., F), made again; the gradient of x (..., D).

    gate_up: (..., 2F) in pairs, as `_mlp` keeps them. All in one dtype.
    """
    dgate_up, y, dx = _outputs(dout, gate_up_weight, down_weight, gate_up)
    rows = dense_rows(dout)
    n_rows, dim, width = rows.shape[0], int(rows.shape[1]), int(down_weight.shape[1])
    launch = launch_of("backward", n_rows, dim, dout.element_size(), target_of(dout))
    if n_rows:
        with device_of(dout):
            wrap_triton(_mlp_backward_kernel)[launch.grid](
                dout_ptr=rows,
                gate_up_weight_ptr=gate_up_weight.contiguous(),
                down_weight_ptr=down_weight.contiguous(),
                gate_up_ptr=gate_up,
                dgate_up_ptr=dgate_up,
                y_ptr=y,
                dx_ptr=dx,
                n_rows=n_rows,
                **aligned_strides(dout_stride=rows.stride(0)),
                DIM=dim,
                WIDTH=width,
                **launch.options,
            )
    return dgate_up, y, dx
