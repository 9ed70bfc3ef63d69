"""SwiGLU of a packed projection (Shazeer, 2020, arXiv:2002.05202).

Forward, with the last dimension split into two halves of width F, gate first:

    y = silu(gate) · up,  silu(g) = g · σ(g)

Backward, with s = σ(gate):

    dgate = dy · up · s · (1 + gate · (1 − s))
    dup   = dy · gate · s

All arithmetic is float32, with one cast at the end. Saved: the packed input; the sigmoid is computed again, which costs
nothing in a kernel that waits for memory.

Bytes for M rows in e bytes an element, each read and written once:

                    read             written         together
    forward         gate, up         y               3 e M F
    backward        gate, up, dy     dgate, dup      5 e M F     the packed gradient, in one pass
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import (
    KERNEL_DTYPES,
    REFERENCE_DTYPES,
    Launch,
    Target,
    aligned_strides,
    ceil_div,
    check_tensor,
    check_usable,
    dense_rows,
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


def swiglu_torch(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of the two halves of the last dimension.

    gate_up: (..., 2F). Returns (..., F) in its dtype, contiguous. Raises ValueError on anything else.
    """
    _check(gate_up, REFERENCE_DTYPES)
    gate, up = (gate_up if gate_up.dtype == torch.float64 else gate_up.float()).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype).contiguous()


def _check(gate_up: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor("swiglu", "gate_up", gate_up, dtypes=dtypes)
    if gate_up.dim() == 0 or gate_up.shape[-1] == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate_up has shape {tuple(gate_up.shape)}, wanted (..., 2F) with F at least 1")


# -------------------------------------------------------------------------------------------------------------- kernels


# No pointer goes into this helper: PyTorch takes a pointer that is passed to a function for written where what the function
# returns becomes part of the address of a store, and then copies the tensor before the kernel runs.
@triton.jit
def _tile(n_rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr):
    """Rows [BLOCK_M, 1], columns [1, BLOCK_F] and mask of the program's tile."""
    # One grid axis, columns fastest: the other axes end at 65535 programs.
    n_col_tiles: tl.constexpr = (WIDTH + BLOCK_F - 1) // BLOCK_F
    program = tl.program_id(0).to(tl.int64)
    row = program // n_col_tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = program % n_col_tiles * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return row, cols, (row < n_rows) & (cols < WIDTH)


@triton.jit
def _load_gate_up(gate_ptr, mask, WIDTH: tl.constexpr):
    """Gate and up of a tile, in float32."""
    gate = tl.load(gate_ptr, mask, other=0.0).to(tl.float32)
    return gate, tl.load(gate_ptr + WIDTH, mask, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid(x):
    """As the hardware has it, by powers of two: `tl.sigmoid` takes two instructions an element more."""
    return 1 / (1 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _swiglu_forward_kernel(
    gate_up_ptr,
    y_ptr,
    n_rows,
    gate_up_stride,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row, cols, mask = _tile(n_rows, WIDTH, BLOCK_M, BLOCK_F)
    gate, up = _load_gate_up(gate_up_ptr + row * gate_up_stride * ALIGNMENT + cols, mask, WIDTH)
    y = gate * _sigmoid(gate) * up
    tl.store(y_ptr + row * WIDTH + cols, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _swiglu_backward_kernel(
    dy_ptr,
    gate_up_ptr,
    dgate_up_ptr,
    n_rows,
    dy_stride,
    gate_up_stride,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row, cols, mask = _tile(n_rows, WIDTH, BLOCK_M, BLOCK_F)
    gate, up = _load_gate_up(gate_up_ptr + row * gate_up_stride * ALIGNMENT + cols, mask, WIDTH)
    dy = tl.load(dy_ptr + row * dy_stride * ALIGNMENT + cols, mask, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dy * gate * sigmoid
    dgate_ptr = dgate_up_ptr + row * (2 * WIDTH) + cols
    tl.store(dgate_ptr, dgate.to(dgate_up_ptr.dtype.element_ty), mask)
    tl.store(dgate_ptr + WIDTH, dup.to(dgate_up_ptr.dtype.element_ty), mask)


# --------------------------------------------------------------------------------------------------------------- launch


def elementwise_launch(n_rows: int, width: int, target: Target) -> Launch:
    """Tiles of 2048 elements: blocks of up to 2048 columns, then as many rows as fill the tile.

    A width such as 768 = 3 · 256 is cut into three blocks of 256 rather than padded to 1024; one that no power of two
    from 64 on divides is padded.
    """
    divisor = width & -width
    block_f = min(divisor if divisor >= 64 else next_power_of_2(width), 2048)
    block_m = 2048 // block_f
    grid = (ceil_div(n_rows, block_m) * ceil_div(width, block_f),)
    return Launch(grid, {"BLOCK_M": block_m, "BLOCK_F": block_f}, warps_for(block_m * block_f, 16, target))


def _outputs(gate_up: Tensor) -> Tensor:
    return torch.empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=gate_up.dtype, device=gate_up.device)


@register_op(fake=_outputs)
def _swiglu(gate_up: Tensor) -> Tensor:
    y = _outputs(gate_up)
    rows = dense_rows(gate_up)
    n_rows, width = rows.shape[0], int(y.shape[-1])
    launch = elementwise_launch(n_rows, width, target_of(gate_up))
    if n_rows:
        with device_of(gate_up):
            wrap_triton(_swiglu_forward_kernel)[launch.grid](
                gate_up_ptr=rows,
                y_ptr=y,
                n_rows=n_rows,
                **aligned_strides(gate_up_stride=rows.stride(0)),
                WIDTH=width,
                **launch.options,
            )
    return y


def _fake_backward(dy, gate_up):
    return torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)


@register_op(fake=_fake_backward)
def _swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    dgate_up = _fake_backward(dy, gate_up)
    rows, dy_rows = dense_rows(gate_up), dense_rows(dy)
    n_rows, width = rows.shape[0], int(dy.shape[-1])
    launch = elementwise_launch(n_rows, width, target_of(gate_up))
    if n_rows:
        with device_of(gate_up):
            wrap_triton(_swiglu_backward_kernel)[launch.grid](
                dy_ptr=dy_rows,
                gate_up_ptr=rows,
                dgate_up_ptr=dgate_up,
                n_rows=n_rows,
                **aligned_strides(dy_stride=dy_rows.stride(0), gate_up_stride=rows.stride(0)),
                WIDTH=width,
                **launch.options,
            )
    return dgate_up


# ------------------------------------------------------------------------------------------------------------- autograd


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_differentiate, setup_context=_save)


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """`swiglu_torch` by Triton kernels, but for float64."""
    _check(gate_up, KERNEL_DTYPES)
    check_usable("swiglu", gate_up.device)
    return _swiglu(gate_up)
