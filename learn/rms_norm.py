"""RMSNorm in five steps, from one kernel an operation to the one in `kernels/rms_norm.py`, and its backward in two.

    r = 1 / sqrt(mean(x²) + eps)
    y = x · r · weight

Every step takes x (rows, D) with a dense last dimension and weight (D,) in float32, and returns y like x, contiguous.
LEARN.md tells the steps. Left out of all of them: the residual, rows past 8192 columns, the r that the backward reads.
"""

import torch
from torch import Tensor

from kernels.launch import aligned_strides, ceil_div, next_power_of_2, target_of, tl, triton, warps_for, wrap_triton

# ------------------------------------------------------------------------------------------- 1: one kernel an operation


@triton.jit
def _mean_square_kernel(x_ptr, mean_ptr, x_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * x_stride + cols, cols < D, other=0.0).to(tl.float32)
    tl.store(mean_ptr + row, tl.sum(x * x) / D)


@triton.jit
def _normalize_kernel(
    x_ptr, mean_ptr, normalized_ptr, x_stride, EPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * x_stride + cols, cols < D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.load(mean_ptr + row) + EPS)
    tl.store(normalized_ptr + row * D + cols, x * rstd, cols < D)


@triton.jit
def _weigh_kernel(normalized_ptr, weight_ptr, y_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    normalized = tl.load(normalized_ptr + row * D + cols, cols < D, other=0.0)
    weight = tl.load(weight_ptr + cols, cols < D, other=0.0)
    tl.store(y_ptr + row * D + cols, (normalized * weight).to(y_ptr.dtype.element_ty), cols < D)


def step1(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One kernel an operation, as PyTorch without a compiler runs it: each reads and writes the whole tensor."""
    n_rows, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    normalized = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    options = {"D": width, "BLOCK_D": next_power_of_2(width), "num_warps": 4, "num_stages": 2}
    wrap_triton(_mean_square_kernel)[(n_rows,)](x_ptr=x, mean_ptr=mean, x_stride=x.stride(0), **options)
    wrap_triton(_normalize_kernel)[(n_rows,)](
        x_ptr=x, mean_ptr=mean, normalized_ptr=normalized, x_stride=x.stride(0), EPS=eps, **options
    )
    wrap_triton(_weigh_kernel)[(n_rows,)](normalized_ptr=normalized, weight_ptr=weight, y_ptr=y, **options)
    return y


# ----------------------------------------------------------------------------------------- 2: the row stays in registers


@triton.jit
def _row_kernel(x_ptr, weight_ptr, y_ptr, x_stride, EPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * x_stride + cols, cols < D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x) / D + EPS)
    weight = tl.load(weight_ptr + cols, cols < D, other=0.0)
    tl.store(y_ptr + row * D + cols, (x * rstd * weight).to(y_ptr.dtype.element_ty), cols < D)


def step2(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One kernel: a program loads a row once and keeps it in registers until it is stored."""
    return _launch_rows(x, weight, eps, num_warps=4)


def _launch_rows(x: Tensor, weight: Tensor, eps: float, num_warps: int) -> Tensor:
    n_rows, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    wrap_triton(_row_kernel)[(n_rows,)](
        x_ptr=x,
        weight_ptr=weight,
        y_ptr=y,
        x_stride=x.stride(0),
        EPS=eps,
        D=width,
        BLOCK_D=next_power_of_2(width),
        num_warps=num_warps,
        num_stages=2,
    )
    return y


# -------------------------------------------------------------------------------------- 3: as many threads as a row needs


def step3(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """16 elements a thread, so that a row of 512 is one warp's, and its sum never leaves the warp."""
    return _launch_rows(x, weight, eps, num_warps=warps_for(next_power_of_2(x.shape[1]), 16, target_of(x), most=8))


# ----------------------------------------------------------------------------------------------- 4: several rows a program


@triton.jit
def _rows_kernel(
    x_ptr, weight_ptr, y_ptr, n_rows, x_stride,
    EPS: tl.constexpr, D: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < n_rows) & (cols < D)
    x = tl.load(x_ptr + row * x_stride * ALIGNMENT + cols, mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + EPS)
    weight = tl.load(weight_ptr + cols, cols < D, other=0.0)
    tl.store(y_ptr + row * D + cols, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask)


def step4(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As many rows a program as make up 2048 elements."""
    return _launch_tiles(x, weight, eps, x_stride=x.stride(0), ALIGNMENT=1)


def _launch_tiles(x: Tensor, weight: Tensor, eps: float, **stride: int) -> Tensor:
    n_rows, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_d = next_power_of_2(width)
    block_m = max(1, 2048 // block_d)
    wrap_triton(_rows_kernel)[(ceil_div(n_rows, block_m),)](
        x_ptr=x,
        weight_ptr=weight,
        y_ptr=y,
        n_rows=n_rows,
        **stride,
        EPS=eps,
        D=width,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=warps_for(block_m * block_d, 16, target_of(x), most=8),
        num_stages=2,
    )
    return y


# ------------------------------------------------------------------------------------------------------- 5: aligned strides


def step5(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The kernel knows the largest power of two that divides the stride, and loads 16 bytes at a time."""
    return _launch_tiles(x, weight, eps, **aligned_strides(x_stride=x.stride(0)))


# ------------------------------------------------------------------------------------------------------ the way back


@triton.jit
def _row_dx_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, x_stride, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    rstd = tl.load(rstd_ptr + row)
    normalized = tl.load(x_ptr + row * x_stride + cols, cols < D, other=0.0).to(tl.float32) * rstd
    dy = tl.load(dy_ptr + row * D + cols, cols < D, other=0.0).to(tl.float32)
    dnormalized = dy * tl.load(weight_ptr + cols, cols < D, other=0.0)
    dx = rstd * (dnormalized - normalized * (tl.sum(dnormalized * normalized) / D))
    tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), cols < D)


@triton.jit
def _column_dweight_kernel(
    dy_ptr, x_ptr, rstd_ptr, dweight_ptr, n_rows, x_stride, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    dweight = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, n_rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M).to(tl.int64)[:, None]  # [BLOCK_M, 1]
        mask = (row < n_rows) & (cols < D)
        rstd = tl.load(rstd_ptr + row, row < n_rows, other=0.0)
        normalized = tl.load(x_ptr + row * x_stride + cols, mask, other=0.0).to(tl.float32) * rstd
        dweight += tl.load(dy_ptr + row * D + cols, mask, other=0.0).to(tl.float32) * normalized
    tl.store(dweight_ptr + cols, tl.sum(dweight, 0, keep_dims=True), cols < D)


def backward1(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x row by row, then that of weight column by column, since it is a sum over rows.

    dy (rows, D) contiguous, rstd (rows,) float32. Returns dx like x, and dweight (D,) float32.
    """
    n_rows, width = x.shape
    dx = torch.empty_like(dy)
    dweight = torch.empty(width, dtype=torch.float32, device=x.device)
    block_d = min(64, next_power_of_2(width))
    wrap_triton(_row_dx_kernel)[(n_rows,)](
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=weight,
        rstd_ptr=rstd,
        dx_ptr=dx,
        x_stride=x.stride(0),
        D=width,
        BLOCK_D=next_power_of_2(width),
        num_warps=warps_for(next_power_of_2(width), 16, target_of(x), most=8),
        num_stages=2,
    )
    wrap_triton(_column_dweight_kernel)[(ceil_div(width, block_d),)](
        dy_ptr=dy,
        x_ptr=x,
        rstd_ptr=rstd,
        dweight_ptr=dweight,
        n_rows=n_rows,
        x_stride=x.stride(0),
        D=width,
        BLOCK_M=32,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=2,
    )
    return dx, dweight


@triton.jit
def _rows_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, n_rows, dy_stride, x_stride,
    D: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + cols, cols < D, other=0.0)
    dweight = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(program, tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)[:, None]  # [BLOCK_M, 1]
        mask = (row < n_rows) & (cols < D)
        rstd = tl.load(rstd_ptr + row, row < n_rows, other=0.0)
        normalized = tl.load(x_ptr + row * x_stride * ALIGNMENT + cols, mask, other=0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + row * dy_stride * ALIGNMENT + cols, mask, other=0.0).to(tl.float32)
        mean = tl.sum(dy * weight * normalized, 1, keep_dims=True) / D
        dx = rstd * (dy * weight - normalized * mean)
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask)
        dweight += dy * normalized
    tl.store(partial_ptr + program * D + cols, tl.sum(dweight, 0, keep_dims=True), cols < D)


def backward2(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Both at once: a fixed number of programs walk over the rows and each adds up a float32 row for weight.

    As `backward1`. PyTorch adds the programs' rows, always in the same order, so that the bits are always the same.
    """
    n_rows, width = x.shape
    dx = torch.empty_like(dy)
    block_d = next_power_of_2(width)
    block_m = max(1, 1024 // block_d)
    target = target_of(x)
    n_programs = min(ceil_div(n_rows, block_m), 8 * target.multiprocessors)
    partial = torch.empty((n_programs, width), dtype=torch.float32, device=x.device)
    wrap_triton(_rows_backward_kernel)[(n_programs,)](
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=weight,
        rstd_ptr=rstd,
        dx_ptr=dx,
        partial_ptr=partial,
        n_rows=n_rows,
        **aligned_strides(dy_stride=dy.stride(0), x_stride=x.stride(0)),
        D=width,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=warps_for(block_m * block_d, 8, target),
        num_stages=2,
    )
    return dx, partial.sum(0)
