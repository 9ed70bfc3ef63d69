"""The embedding: a row of a table for each token, and the table's gradient without atomics and without waiting in line.

Forward, for token t_n of position n, with a table W of V rows of width D:

    x_n = W[t_n]                          rounded to the dtype asked for, where that is not the table's

Backward, with upstream gradients dx:

    dW_v = Σ_{n: t_n = v} dx_n            summed in float32

Tokens of text repeat: in 32,768 of them one may occur a thousand times, and a sum that visits its positions one after another
takes as long as the most frequent token is frequent. Here the positions are sorted by their tokens (stable, so in one order
only) and cut after every SEGMENT = 32 of them and wherever the token changes. Each segment is summed by a program of its own. A
token that lies in one segment is then done: the sum is added to its row of the gradient. Of the others the segments' sums are kept,
two at most for each 32 positions, and a second launch adds those of each token in the order of the segments. So the
order of every sum is fixed, and no program ever has more than a handful of rows to itself. Saved: the tokens.

The gradient is added to a sum where a training step keeps one (`gradient_sum`), else to zeros.

Bytes for N tokens of width D, U distinct ones, e bytes an element of x and s of the table that is read:

                 read                                   written            together
    forward      tokens, rows of the table              x                  8 N + (s + e) N D
    backward     tokens, dx, rows of the gradient       these rows         8 N + e N D + 8 U D     the sorting aside: 16 bytes of
                                                                           key and index a position, read and written a pass
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import (
    INTERPRETED,
    KERNEL_DTYPES,
    NAMESPACE,
    REFERENCE_DTYPES,
    Launch,
    Target,
    aligned_strides,
    ceil_div,
    check_first_derivative,
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


def embedding_torch(
    tokens: Tensor,
    weight: Tensor,
    dtype: torch.dtype | None = None,
    compute_weight: Tensor | None = None,
    gradient_sum: Tensor | None = None,
) -> Tensor:
    """Rows of `weight` by token.

    tokens: int64 of any shape, each in [0, V). weight: (V, D). dtype: of the result, weight's if not given.
    compute_weight: (V, D) in that dtype, a copy of weight that may be read in its stead; weight gets the gradient.
    gradient_sum: (V, D) float32, dense, the memory of `weight.grad`: an op may add the gradient to it by itself and give autograd
    none. This twin does not, and reads weight. Returns (*tokens.shape, D).
    """
    dtype = _check(tokens, weight, dtype, compute_weight, gradient_sum, REFERENCE_DTYPES)
    return F.embedding(tokens, weight).to(dtype)


def _check(
    tokens: Tensor,
    weight: Tensor,
    dtype: torch.dtype | None,
    compute_weight: Tensor | None,
    gradient_sum: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> torch.dtype:
    """The result's dtype. Raises ValueError, naming the argument, unless all are as `embedding` wants them."""
    op = "embedding"
    check_tensor(op, "tokens", tokens, dtypes=(torch.int64,))
    check_tensor(op, "weight", weight, ("V", "D"), dtypes, tokens.device)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in dtypes:
        raise ValueError(f"{op}: dtype is {dtype}, wanted {' or '.join(map(str, dtypes))}")
    if compute_weight is not None:
        check_tensor(op, "compute_weight", compute_weight, tuple(weight.shape), (dtype,), tokens.device)
    if gradient_sum is not None:
        check_tensor(op, "gradient_sum", gradient_sum, tuple(weight.shape), (torch.float32,), tokens.device)
        if not gradient_sum.is_contiguous():
            raise ValueError(f"{op}: gradient_sum has strides {gradient_sum.stride()}, wanted a dense tensor")
    return dtype


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _embedding_forward_kernel(
    tokens_ptr,
    table_ptr,
    x_ptr,
    n_rows,
    table_stride,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n_col_tiles: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0).to(tl.int64)
    row = program // n_col_tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    cols = program % n_col_tiles * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    token = tl.load(tokens_ptr + row, row < n_rows, other=0)
    # A token past the table reads nothing, and makes its row NaN.
    known = (token >= 0) & (token < VOCAB)
    mask = (row < n_rows) & (cols < WIDTH)
    x = tl.load(table_ptr + token * table_stride * ALIGNMENT + cols, mask & known, other=float("nan"))
    tl.store(x_ptr + row * WIDTH + cols, x.to(x_ptr.dtype.element_ty), mask)


@triton.jit
def _embedding_key_kernel(tokens_ptr, keys_ptr, n_rows, VOCAB: tl.constexpr, BLOCK_M: tl.constexpr):
    """What positions are sorted by: their tokens, in few bytes; those past the table, as VOCAB, come last and are left out."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(tokens_ptr + row, row < n_rows, other=0)
    key = tl.where((token >= 0) & (token < VOCAB), token, VOCAB)
    tl.store(keys_ptr + row, key.to(keys_ptr.dtype.element_ty), row < n_rows)


# Both kernels load keys, VOCAB where there is none, without a helper: PyTorch takes a pointer that is passed to a function for
# written where what the function returns becomes part of the address of a store.
@triton.jit
def _embedding_segment_kernel(
    dx_ptr,
    keys_ptr,  # sorted
    order_ptr,  # the position of each key
    gradient_ptr,
    partial_ptr,  # float32 (blocks, 2, WIDTH): sums that other blocks have a part in; [0] of a run begun before the block
    n_rows,
    dx_stride,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of the segment that begins at the program's place, if one does. A block is SEGMENT places of the sorted order."""
    n_col_tiles: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0).to(tl.int64)
    first = program // n_col_tiles
    token = tl.load(keys_ptr + first).to(tl.int32)
    begins = tl.load(keys_ptr + first - 1, first > 0, other=VOCAB).to(tl.int32) != token
    if (token < VOCAB) & (begins | (first % SEGMENT == 0)):
        block = first // SEGMENT
        ahead = first + tl.arange(0, SEGMENT)
        same = (
            tl.load(keys_ptr + ahead, (ahead < (block + 1) * SEGMENT) & (ahead < n_rows), other=VOCAB).to(tl.int32)
            == token
        )
        stop = first + tl.sum(same.to(tl.int32))
        cols = program % n_col_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
        sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(first, stop, BLOCK_M):
            place = start + tl.arange(0, BLOCK_M)
            row = tl.load(order_ptr + place, place < stop, other=0)[:, None]
            mask = (place < stop)[:, None] & (cols < WIDTH)[None, :]
            dx = tl.load(dx_ptr + row * dx_stride * ALIGNMENT + cols[None, :], mask, other=0.0)
            sums += dx.to(tl.float32)
        total = tl.sum(sums, 0)
        ends = tl.load(keys_ptr + stop, stop < n_rows, other=VOCAB).to(tl.int32) != token
        if begins & ends:
            at = gradient_ptr + token.to(tl.int64) * WIDTH + cols
            tl.store(at, tl.load(at, cols < WIDTH, other=0.0) + total, cols < WIDTH)
        else:
            slot = block * 2 + begins.to(tl.int64)
            tl.store(partial_ptr + slot * WIDTH + cols, total, cols < WIDTH)


@triton.jit
def _embedding_join_kernel(
    keys_ptr,
    gradient_ptr,
    partial_ptr,
    n_rows,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of the segments of a token whose run begins in the program's block and goes on in the next, if one does."""
    n_col_tiles: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0).to(tl.int64)
    block = program // n_col_tiles
    after = (block + 1) * SEGMENT
    token = tl.load(keys_ptr + after - 1, after <= n_rows, other=VOCAB).to(tl.int32)
    goes_on = tl.load(keys_ptr + after, after < n_rows, other=VOCAB).to(tl.int32) == token
    begins = tl.load(keys_ptr + block * SEGMENT - 1, block > 0, other=VOCAB).to(tl.int32) != token
    if (token < VOCAB) & goes_on & begins:
        cols = program % n_col_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.load(partial_ptr + (block * 2 + 1) * WIDTH + cols, cols < WIDTH, other=0.0)
        sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        start = block + 1
        while goes_on:
            following = start + tl.arange(0, BLOCK_M)
            of_it = (
                tl.load(keys_ptr + following * SEGMENT, following * SEGMENT < n_rows, other=VOCAB).to(tl.int32) == token
            )
            mask = of_it[:, None] & (cols < WIDTH)[None, :]
            sums += tl.load(partial_ptr + following[:, None] * (2 * WIDTH) + cols[None, :], mask, other=0.0)
            start += BLOCK_M
            goes_on = tl.load(keys_ptr + start * SEGMENT, start * SEGMENT < n_rows, other=VOCAB).to(tl.int32) == token
        total += tl.sum(sums, 0)
        at = gradient_ptr + token.to(tl.int64) * WIDTH + cols
        tl.store(at, tl.load(at, cols < WIDTH, other=0.0) + total, cols < WIDTH)


# --------------------------------------------------------------------------------------------------------------- launch

SEGMENT = 32
"""Positions that one program sums: few enough that the most frequent token makes no program wait."""


def forward_launch(n_rows: int, width: int, target: Target) -> Launch:
    """Tiles of 2048 elements. A width such as 288 = 9 · 32 is cut into blocks of 32 columns rather than padded to 512."""
    divisor = width & -width
    block_d = min(divisor if divisor >= 32 else next_power_of_2(width), 2048)
    block_m = 2048 // block_d
    grid = (ceil_div(n_rows, block_m) * ceil_div(width, block_d),)
    return Launch(grid, {"BLOCK_M": block_m, "BLOCK_D": block_d}, warps_for(2048, 16, target))


def key_launch(n_rows: int, target: Target) -> Launch:
    """Tiles of 1024 tokens."""
    return Launch((ceil_div(n_rows, 1024),), {"BLOCK_M": 1024}, warps_for(1024, 8, target))


def segment_launch(n_rows: int, width: int, target: Target) -> Launch:
    """A program a place and up to 1024 columns, most of which find no beginning there and end: so they have few warps."""
    block_d = min(next_power_of_2(width), 1024)
    block_m = max(1, min(SEGMENT, 2048 // block_d))
    tiles = {"SEGMENT": SEGMENT, "BLOCK_M": block_m, "BLOCK_D": block_d}
    return Launch((n_rows * ceil_div(width, block_d),), tiles, warps_for(block_m * block_d, 16, target))


def join_launch(n_rows: int, width: int, target: Target) -> Launch:
    """Few columns and many segments at a time: were all tokens one, a program would add up all segments there are."""
    block_d = min(next_power_of_2(width), 64)
    tiles = {"SEGMENT": SEGMENT, "BLOCK_M": 4096 // block_d, "BLOCK_D": block_d}
    return Launch((ceil_div(n_rows, SEGMENT) * ceil_div(width, block_d),), tiles, warps_for(4096, 16, target))


def _outputs(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((*tokens.shape, table.shape[1]), dtype=dtype, device=tokens.device)


@register_op(fake=_outputs)
def _embedding(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    x = _outputs(tokens, table, dtype)
    rows, tokens = dense_rows(table), tokens.reshape(-1).contiguous()
    n_rows, width = tokens.shape[0], int(rows.shape[1])
    launch = forward_launch(n_rows, width, target_of(x))
    if n_rows and width:
        with device_of(x):
            wrap_triton(_embedding_forward_kernel)[launch.grid](
                tokens_ptr=tokens,
                table_ptr=rows,
                x_ptr=x,
                n_rows=n_rows,
                **aligned_strides(table_stride=rows.stride(0)),
                VOCAB=int(rows.shape[0]),
                WIDTH=width,
                **launch.options,
            )
    return x


def _untraced(kernel, device: torch.device):
    # The backward pass is not traced: a kernel is wrapped only to be recorded, which happens on the meta device.
    return wrap_triton(kernel) if device.type == "meta" else kernel


def _launch_backward(dx: Tensor, tokens: Tensor, gradient: Tensor) -> None:
    rows, tokens = dense_rows(dx), tokens.reshape(-1).contiguous()
    n_rows, (vocab_size, width) = tokens.shape[0], gradient.shape
    if not n_rows or not width:
        return
    device, target = dx.device, target_of(dx)
    # Two bytes of key are sorted in half the passes of four.
    keys = torch.empty(n_rows, dtype=torch.int16 if vocab_size < 2**15 else torch.int32, device=device)
    with device_of(dx):
        launch = key_launch(n_rows, target)
        _untraced(_embedding_key_kernel, device)[launch.grid](
            tokens_ptr=tokens, keys_ptr=keys, n_rows=n_rows, VOCAB=vocab_size, **launch.options
        )
        keys, order = torch.sort(keys, stable=True)
        keys = keys.unsqueeze(-1)  # as single elements: no program reads a row of them
        partial = torch.empty((ceil_div(n_rows, SEGMENT), 2, width), dtype=torch.float32, device=device)
        launch = segment_launch(n_rows, width, target)
        _untraced(_embedding_segment_kernel, device)[launch.grid](
            dx_ptr=rows,
            keys_ptr=keys,
            order_ptr=order,
            gradient_ptr=gradient,
            partial_ptr=partial,
            n_rows=n_rows,
            **aligned_strides(dx_stride=rows.stride(0)),
            VOCAB=vocab_size,
            WIDTH=width,
            **launch.options,
        )
        launch = join_launch(n_rows, width, target)
        _untraced(_embedding_join_kernel, device)[launch.grid](
            keys_ptr=keys,
            gradient_ptr=gradient,
            partial_ptr=partial,
            n_rows=n_rows,
            VOCAB=vocab_size,
            WIDTH=width,
            **launch.options,
        )


# Opaque to torch.compile also on a GPU: there is nothing to fuse into the sort, which Inductor would take apart.
_add_embedding_gradient = torch.library.custom_op(
    f"{NAMESPACE}::add_embedding_gradient", _launch_backward, mutates_args=("gradient",)
)


@_add_embedding_gradient.register_fake
def _fake_backward(dx: Tensor, tokens: Tensor, gradient: Tensor) -> None:
    if dx.device.type == "meta" and not INTERPRETED:  # launches are being recorded
        _launch_backward(dx, tokens, gradient)


# ------------------------------------------------------------------------------------------------------------- autograd


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, tokens: Tensor, weight: Tensor, table: Tensor, gradient_sum: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.gradient_sum = gradient_sum  # not saved: autograd would refuse it for having changed since
        return _embedding(tokens, table, dtype)

    @staticmethod
    def backward(ctx, dx: Tensor):
        check_first_derivative("embedding")
        (tokens,) = ctx.saved_tensors
        if ctx.gradient_sum is not None:
            _add_embedding_gradient(dx, tokens, ctx.gradient_sum)
            return None, None, None, None, None
        gradient = torch.zeros(ctx.weight_shape, dtype=torch.float32, device=dx.device)
        _add_embedding_gradient(dx, tokens, gradient)
        if ctx.weight_dtype != torch.float32:
            gradient = gradient.to(ctx.weight_dtype)
        return None, gradient, None, None, None


# --------------------------------------------------------------------------------------------------------------- public


def embedding_triton(
    tokens: Tensor,
    weight: Tensor,
    dtype: torch.dtype | None = None,
    compute_weight: Tensor | None = None,
    gradient_sum: Tensor | None = None,
) -> Tensor:
    """`embedding_torch` by Triton kernels, but for float64. It reads compute_weight, and adds the gradient to gradient_sum.

    A token outside of [0, V) makes its row NaN and adds to no gradient, without a sync and without a read or write out of bounds;
    the torch twin raises (on a GPU: ends the CUDA context).
    """
    dtype = _check(tokens, weight, dtype, compute_weight, gradient_sum, KERNEL_DTYPES)
    check_usable("embedding", tokens.device)
    table = weight.detach() if compute_weight is None else compute_weight
    return _Embedding.apply(tokens, weight, table, gradient_sum, dtype)
