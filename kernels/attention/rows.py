"""How attention's programs find their rows in time, load and store them, and turn them back: beside what `kernels.rows` has."""

from kernels.launch import tl, triton
from kernels.rows import load_rows_at, store_rows_at


@triton.jit
def load_rows(
    ptr, rows, n_rows, stride,
    HEAD_DIM: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr,
    CHECK_ROWS: tl.constexpr = True,
):  # fmt: skip
    """A tile of the given rows, zero past the head dim and, with CHECK_ROWS, past n_rows."""
    row_ptr = ptr + rows.to(tl.int64)[:, None] * stride * ALIGNMENT
    return load_rows_at(row_ptr, rows[:, None] < n_rows, HEAD_DIM, BLOCK_D, BLOCK_D2, CHECK_ROWS)


@triton.jit
def store_rows(ptr, rows, n_rows, x, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store the tile x as the given rows, but for those past n_rows, in the dtype of ptr."""
    store_rows_at(ptr + rows.to(tl.int64)[:, None] * STRIDE, rows[:, None] < n_rows, x, HEAD_DIM)


@triton.jit
def _store_columns_rotated_back(
    ptr, rows, inside, x, cos_ptr, sin_ptr, START: tl.constexpr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr
):
    HALF: tl.constexpr = HEAD_DIM // 2
    PAIRS: tl.constexpr = x.shape[1] // 2
    cols = START // 2 + tl.arange(0, PAIRS)[None, :]
    mask = inside & (cols < HALF)
    table = rows.to(tl.int64)[:, None] * HALF + cols
    cos = tl.load(cos_ptr + table, mask, other=0.0)
    sin = -tl.load(sin_ptr + table, mask, other=0.0)
    # Rounded before it is turned, as it is where rope is an op of its own. A thread holds both columns of a pair.
    low, high = tl.split(tl.reshape(x.to(ptr.dtype.element_ty), [x.shape[0], PAIRS, 2]))
    low, high = low.to(tl.float32), high.to(tl.float32)
    low_ptr = ptr + rows.to(tl.int64)[:, None] * STRIDE + cols
    tl.store(low_ptr, (low * cos - high * sin).to(ptr.dtype.element_ty), mask)
    tl.store(low_ptr + HALF, (high * cos + low * sin).to(ptr.dtype.element_ty), mask)


@triton.jit
def store_rotated_back(ptr, rows, n_rows, x, cos_ptr, sin_ptr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store the tile x, whose pairs are side by side, as the given rows of half-split pairs, turned back.

    By the angles of the rows in tables of (T, HEAD_DIM / 2); but for rows past n_rows, and in the dtype of ptr.
    """
    inside = rows[:, None] < n_rows
    _store_columns_rotated_back(ptr, rows, inside, x[0], cos_ptr, sin_ptr, 0, STRIDE, HEAD_DIM)
    if len(x) == 2:
        _store_columns_rotated_back(ptr, rows, inside, x[1], cos_ptr, sin_ptr, x[0].shape[1], STRIDE, HEAD_DIM)


@triton.jit
def block_and_head(n_blocks, n_heads, heads_at_once):
    """Which block of which head a program does: `heads_at_once` heads together, the first block of all of them first."""
    program = tl.program_id(0)
    first_head = program // (heads_at_once * n_blocks) * heads_at_once
    heads = min(heads_at_once, n_heads - first_head)
    program -= first_head * n_blocks
    return program // heads, first_head + program % heads


@triton.jit
def visible_key_blocks(first_key_ptr, first_row, n_times, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys that BLOCK_M queries from first_row on see, in blocks of BLOCK_N: first key, and three block counts.

    Blocks from n_left up to n_causal are seen by every query; those before are cut off by first_key, those after, up to
    n_blocks, by the diagonal. first_key is kept within its contract here, for the sake of loads out of bounds.
    """
    start = 0
    n_left = 0
    if first_key_ptr is not None:
        last_row = min(first_row + BLOCK_M, n_times) - 1
        start = min(max(tl.load(first_key_ptr + first_row), 0), first_row)
        last_start = min(max(tl.load(first_key_ptr + last_row), start), last_row)
        n_left = tl.cdiv(last_start - start, BLOCK_N)
    n_causal = (first_row + 1 - start) // BLOCK_N
    n_blocks = tl.cdiv(min(first_row + BLOCK_M, n_times) - start, BLOCK_N)
    return start, min(n_left, n_causal), n_causal, n_blocks
