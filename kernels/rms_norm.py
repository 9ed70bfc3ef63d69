"""RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467), alone and with the residual addition before it.

Forward, over the last dimension of width D:

    s = x                       rms_norm
    s = x + residual            add_rms_norm; rounded to the residual's dtype, then normalized
    r = 1 / sqrt(mean(s²) + eps)
    y = s · r · weight

Backward, with ŝ = s · r and upstream gradients dy and, for add_rms_norm, dsummed:

    ds = r · (dy · weight − ŝ · mean(dy · weight · ŝ)) + dsummed        the gradient of x and of residual
    dweight = Σ_rows dy · ŝ

All arithmetic is float32, with one cast at the end. Saved: s (the input itself, or the sum that is an output anyway)
and r, one float32 a row.

Bytes for M rows of width D in e bytes an element, each read and written once; r adds 4 M either way:

                    read                        written                     together
    rms_norm        x                           y                           2 e M D
      backward      x, dy                       dx                          3 e M D
    add_rms_norm    x, residual                 summed, y                   4 e M D
      backward      summed, dy, dsummed         dx, which is dresidual too  4 e M D

Rows are independent but for dweight. There each of a fixed number of programs walks over the rows, adds up a float32
row of its own and writes it; PyTorch's sum adds those rows. It is deterministic, and its input is a few hundred to two thousand
rows. A training step keeps such rows (`gradient_rows`): programs add to them through all micro-steps, and one sum at its end does
for all norms what would be two launches and an addition for each of them every time.
Past 8192 columns a row no longer fits into registers: it is walked in blocks of columns, twice, the second time from the cache.
"""

import operator

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


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, gradient_rows: Tensor | None = None) -> Tensor:
    """RMSNorm of the last dimension.

    x: (..., D), weight: (D,) in x's dtype or float32. gradient_rows: (R, D) float32, dense, R from `gradient_row_count`, of which
    somebody adds the sum of all to `weight.grad`: an op may add its gradient to them and give autograd none. This twin does not.
    Returns y like x, contiguous. Raises ValueError on anything else.
    """
    _check("rms_norm", x, None, weight, gradient_rows, REFERENCE_DTYPES)
    return _normalized(x, weight, eps).to(x.dtype).contiguous()


def add_rms_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, gradient_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Residual addition and RMSNorm of the sum.

    x: (..., D), residual: like x, in x's dtype or float32, weight: (D,) in x's dtype or float32. gradient_rows: as in `rms_norm`.
    Returns y like x and summed = x + residual in residual's dtype, contiguous. Raises ValueError on anything else.
    """
    _check("add_rms_norm", x, residual, weight, gradient_rows, REFERENCE_DTYPES)
    summed = (_exact(x) + residual).to(residual.dtype).contiguous()
    return _normalized(summed, weight, eps).to(x.dtype), summed


def _normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    exact = _exact(x)
    # A number, where Dynamo would trace a symbol: on a GPU torch 2.11 takes the symbol's address for the width.
    width = operator.index(weight.shape[0])
    return F.rms_norm(exact, [width], weight.to(exact.dtype), eps)


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, rows: Tensor | None, dtypes: tuple) -> None:
    check_tensor(op, "x", x, dtypes=dtypes)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, wanted (..., D) with D at least 1")
    if residual is not None:
        check_tensor(op, "residual", residual, tuple(x.shape), (x.dtype, torch.float32), x.device)
    check_tensor(op, "weight", weight, (x.shape[-1],), (x.dtype, torch.float32), x.device)
    if rows is not None:
        check_tensor(op, "gradient_rows", rows, ("R", x.shape[-1]), (torch.float32,), x.device)
        if not rows.is_contiguous():
            raise ValueError(f"{op}: gradient_rows has strides {rows.stride()}, wanted a dense tensor")


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _load_sum(x_row, residual_row, cols, mask):
    """The sum s as it was rounded, in float32; x where there is no residual."""
    s = tl.load(x_row + cols, mask, other=0.0).to(tl.float32)
    if residual_row is not None:
        s += tl.load(residual_row + cols, mask, other=0.0).to(tl.float32)
        s = s.to(residual_row.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,  # None without a residual, and so is summed_ptr
    weight_ptr,
    y_ptr,
    summed_ptr,
    rstd_ptr,
    n_rows,
    x_stride,
    residual_stride,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    x_row = x_ptr + row * x_stride * ALIGNMENT
    residual_row = None
    if residual_ptr is not None:
        residual_row = residual_ptr + row * residual_stride * ALIGNMENT

    squares = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)[None, :]
        mask = (row < n_rows) & (cols < D)
        s = _load_sum(x_row, residual_row, cols, mask)
        squares += s * s
        if summed_ptr is not None:
            tl.store(summed_ptr + row * D + cols, s.to(summed_ptr.dtype.element_ty), mask)
    rstd = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / D + EPS)
    tl.store(rstd_ptr + row, rstd, row < n_rows)

    for start in tl.static_range(0, D, BLOCK_D):
        if BLOCK_D < D:  # otherwise the one block is still in registers
            cols = start + tl.arange(0, BLOCK_D)[None, :]
            mask = (row < n_rows) & (cols < D)
            s = _load_sum(x_row, residual_row, cols, mask)
        weight = tl.load(weight_ptr + cols, cols < D, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * D + cols, (s * rstd * weight).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _load_normalized(dy_row, summed_row, rstd, cols, mask):
    """ŝ and dy of a tile, in float32."""
    normalized = tl.load(summed_row + cols, mask, other=0.0).to(tl.float32) * rstd
    return normalized, tl.load(dy_row + cols, mask, other=0.0).to(tl.float32)


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr,
    dsummed_ptr,  # None where no gradient comes in for summed
    summed_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,  # None where it is not wanted, and so are dresidual_ptr and partial_ptr
    dresidual_ptr,  # in summed's dtype, where that is not dx's
    partial_ptr,  # float32 (programs, D): what each program has of dweight
    n_rows,
    dy_stride,
    dsummed_stride,
    summed_stride,
    D: tl.constexpr,
    ADD: tl.constexpr,  # to what is in partial, in the stead of writing it
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    dweight = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if BLOCK_D >= D:
        cols = tl.arange(0, BLOCK_D)[None, :]
        weight = tl.load(weight_ptr + cols, cols < D, other=0.0).to(tl.float32)
    # Loads of the next tiles may start early, but for those of partial, which this turn of the loop writes.
    STAGES: tl.constexpr = 3 if BLOCK_D >= D else 1
    for tile in tl.range(program, tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)[:, None]  # [BLOCK_M, 1]
        dy_row = dy_ptr + row * dy_stride * ALIGNMENT
        summed_row = summed_ptr + row * summed_stride * ALIGNMENT
        rstd = tl.load(rstd_ptr + row, row < n_rows, other=0.0)

        products = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in tl.static_range(0, D, BLOCK_D):
            if BLOCK_D < D:
                cols = start + tl.arange(0, BLOCK_D)[None, :]
                weight = tl.load(weight_ptr + cols, cols < D, other=0.0).to(tl.float32)
            mask = (row < n_rows) & (cols < D)
            normalized, dy = _load_normalized(dy_row, summed_row, rstd, cols, mask)
            dnormalized = dy * weight
            products += normalized * dnormalized
        mean = tl.sum(products, 1, keep_dims=True) / D

        for start in tl.static_range(0, D, BLOCK_D):
            if BLOCK_D < D:  # otherwise the one block is still in registers
                cols = start + tl.arange(0, BLOCK_D)[None, :]
                mask = (row < n_rows) & (cols < D)
                normalized, dy = _load_normalized(dy_row, summed_row, rstd, cols, mask)
                dnormalized = dy * tl.load(weight_ptr + cols, cols < D, other=0.0).to(tl.float32)
            ds = rstd * (dnormalized - normalized * mean)
            if dsummed_ptr is not None:
                dsummed_row = dsummed_ptr + row * dsummed_stride * ALIGNMENT
                ds += tl.load(dsummed_row + cols, mask, other=0.0).to(tl.float32)
            if dx_ptr is not None:
                tl.store(dx_ptr + row * D + cols, ds.to(dx_ptr.dtype.element_ty), mask)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + row * D + cols, ds.to(dresidual_ptr.dtype.element_ty), mask)
            if partial_ptr is not None:
                if BLOCK_D < D:
                    # No room for a whole row in registers: the sum is kept in the program's own row of partial. Between
                    # one tile's store and the next one's load, the reduction to `mean` is the barrier they need.
                    at = partial_ptr + program * D + cols
                    before = tl.load(at, (cols < D) & (ADD | (tile > program)), other=0.0)
                    tl.store(at, before + tl.sum(dy * normalized, 0, keep_dims=True), cols < D)
                else:
                    dweight += dy * normalized
    if partial_ptr is not None and BLOCK_D >= D:
        dweight = tl.sum(dweight, 0, keep_dims=True)
        if ADD:
            dweight += tl.load(partial_ptr + program * D + cols, cols < D, other=0.0)
        tl.store(partial_ptr + program * D + cols, dweight, cols < D)


# --------------------------------------------------------------------------------------------------------------- launch


def forward_launch(n_rows: int, width: int, target: Target) -> Launch:
    """One tile a program; 16 elements a thread, 32 in rows of 8192, 64 of them on sm_100 (where they spill on 16 warps, and with
    Triton 3.6 on 8).
    """
    block_m, block_d = _tile(width, 2048)
    is_sm_100 = target.backend == "cuda" and target.arch >= 100
    warps = warps_for(block_m * block_d, 16, target, most=4 if block_d == 8192 and is_sm_100 else 8)
    return Launch((ceil_div(n_rows, block_m),), {"BLOCK_M": block_m, "BLOCK_D": block_d}, warps)


def backward_launch(n_rows: int, width: int, target: Target) -> Launch:
    """A fixed number of programs, 32 elements a thread, whose loop has the next two tiles on their way while it computes.

    Few programs, since each writes a float32 row for dweight. On an H100 four on a multiprocessor are as fast as more at 288, 768
    and 2048 columns; wider rows leave registers for fewer.
    """
    block_m, block_d = _tile(width, 2048)
    grid = (min(ceil_div(n_rows, block_m), gradient_row_count(width, target)),)
    tiles = {"BLOCK_M": block_m, "BLOCK_D": block_d}
    return Launch(grid, tiles, warps_for(block_m * block_d, 32, target))


def gradient_row_count(width: int, target: Target) -> int:
    """The most programs that `backward_launch` asks for, whatever the number of rows: so many rows has `gradient_rows`."""
    waves = next(waves for most, waves in ((2048, 4), (4096, 2), (width, 1)) if width <= most)
    return waves * target.multiprocessors


def _tile(width: int, elements: int) -> tuple[int, int]:
    """Whole rows, as many as make up so many elements; past 8192 columns, 4096 columns of one row at a time."""
    block_d = next_power_of_2(width) if width <= 8192 else 4096
    return max(1, elements // block_d), block_d


def _forward_outputs(x, residual, weight, eps, gradient_rows):
    """Unwritten y, summed (empty without a residual) and rstd."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = y.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    return y, summed, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


@register_op(fake=_forward_outputs)
def _rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, gradient_rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    y, summed, rstd = _forward_outputs(x, residual, weight, eps, gradient_rows)
    rows = dense_rows(x)
    residual_rows = rows if residual is None else dense_rows(residual)
    n_rows, width = rows.shape[0], int(rows.shape[1])
    launch = forward_launch(n_rows, width, target_of(x))
    if n_rows:
        with device_of(x):
            wrap_triton(_rms_norm_forward_kernel)[launch.grid](
                x_ptr=rows,
                residual_ptr=None if residual is None else residual_rows,
                weight_ptr=weight.contiguous(),
                y_ptr=y,
                summed_ptr=None if residual is None else summed,
                rstd_ptr=rstd,
                n_rows=n_rows,
                **aligned_strides(x_stride=rows.stride(0), residual_stride=residual_rows.stride(0)),
                D=width,
                EPS=eps,
                **launch.options,
            )
    return y, summed, rstd


def _backward_outputs(dy, dsummed, summed, weight, rstd, gradient_rows, want_dx, want_dresidual, want_dweight):
    """Unwritten dx in y's dtype, dresidual in summed's, and dweight; without elements where not wanted."""
    dx = torch.empty(dy.shape if want_dx else 0, dtype=dy.dtype, device=dy.device)
    dresidual = torch.empty(dy.shape if want_dresidual else 0, dtype=summed.dtype, device=dy.device)
    to_rows = not want_dweight or gradient_rows is not None
    return dx, dresidual, torch.empty(0 if to_rows else weight.shape, dtype=weight.dtype, device=dy.device)


@register_op(fake=_backward_outputs, mutates=("gradient_rows",))
def _rms_norm_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    rstd: Tensor,
    gradient_rows: Tensor | None,
    want_dx: bool,
    want_dresidual: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dresidual, dweight = _backward_outputs(
        dy, dsummed, summed, weight, rstd, gradient_rows, want_dx, want_dresidual, want_dweight
    )
    rows, dy_rows = dense_rows(summed), dense_rows(dy)
    dsummed_rows = rows if dsummed is None else dense_rows(dsummed)
    n_rows, width = rows.shape[0], int(rows.shape[1])
    launch = backward_launch(n_rows, width, target_of(dy))
    partial = gradient_rows if want_dweight else None
    if want_dweight and partial is None:
        partial = dy.new_empty((*launch.grid, width), dtype=torch.float32)
    if n_rows:
        with device_of(dy):
            wrap_triton(_rms_norm_backward_kernel)[launch.grid](
                dy_ptr=dy_rows,
                dsummed_ptr=None if dsummed is None else dsummed_rows,
                summed_ptr=rows,
                weight_ptr=weight.contiguous(),
                rstd_ptr=rstd,
                dx_ptr=dx if want_dx else None,
                dresidual_ptr=dresidual if want_dresidual else None,
                partial_ptr=partial,
                n_rows=n_rows,
                **aligned_strides(
                    dy_stride=dy_rows.stride(0), dsummed_stride=dsummed_rows.stride(0), summed_stride=rows.stride(0)
                ),
                D=width,
                ADD=gradient_rows is not None,
                **launch.options,
            )
    if dweight.numel():
        dweight = partial.sum(0).to(weight.dtype)
    return dx, dresidual, dweight


# ------------------------------------------------------------------------------------------------------------- autograd


def _save(ctx, inputs, output):
    x, residual, weight, _, gradient_rows = inputs
    _, summed, rstd = output
    ctx.save_for_backward(x if residual is None else summed, weight, rstd)
    ctx.gradient_rows = gradient_rows  # not saved: autograd would refuse it for having changed since
    ctx.x_dtype, ctx.has_sum = x.dtype, residual is not None
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dsummed, _):
    summed, weight, rstd = ctx.saved_tensors
    want_dx, want_dresidual, want_dweight, *_ = ctx.needs_input_grad
    to_rows = want_dweight and ctx.gradient_rows is not None
    dsummed = dsummed if ctx.has_sum else None  # of no elements, where some tracer gives it
    dweight = None
    if dy is None:
        dx = dresidual = dsummed
        if want_dx and dsummed is not None:
            dx = dsummed.to(ctx.x_dtype)
    else:
        shared = summed.dtype == ctx.x_dtype  # then x and residual have one gradient
        dx, dresidual, dweight = _rms_norm_backward(
            dy,
            dsummed,
            summed,
            weight,
            rstd,
            ctx.gradient_rows if to_rows else None,
            want_dx or (shared and want_dresidual),
            want_dresidual and not shared,
            want_dweight,
        )
        if shared:
            dresidual = dx
    dweight = dweight if want_dweight and not to_rows else None
    return dx if want_dx else None, dresidual if want_dresidual else None, dweight, None, None


_rms_norm.register_autograd(_differentiate, setup_context=_save)


# --------------------------------------------------------------------------------------------------------------- public


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, gradient_rows: Tensor | None = None) -> Tensor:
    """`rms_norm_torch` by Triton kernels, but for float64. The gradient of weight is added to gradient_rows, if given."""
    _check_for_kernels("rms_norm", x, None, weight, gradient_rows)
    return _rms_norm(x, None, weight, float(eps), gradient_rows)[0]


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, gradient_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_torch` by Triton kernels, but for float64; gradient_rows as in `rms_norm_triton`."""
    _check_for_kernels("add_rms_norm", x, residual, weight, gradient_rows)
    y, summed, _ = _rms_norm(x, residual, weight, float(eps), gradient_rows)
    return y, summed


def _check_for_kernels(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, rows: Tensor | None) -> None:
    _check(op, x, residual, weight, rows, KERNEL_DTYPES)
    check_usable(op, x.device)
    if rows is not None:
        wanted = gradient_row_count(int(x.shape[-1]), target_of(x))
        if rows.shape[0] != wanted:
            raise ValueError(f"{op}: gradient_rows has {rows.shape[0]} rows, wanted {wanted} (gradient_row_count)")
