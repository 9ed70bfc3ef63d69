"""How attention's programs find, load, multiply and store their tiles of rows: what the forward and the backward kernels share.

A head dim that is not a power of two is cut into two tiles, the second padded: 36 = 32 + 4 of 16, 80 = 64 + 16 (`head_tiles`).
So a tile of rows is a tuple of one or two tensors, [rows, BLOCK_D] and [rows, BLOCK_D2]. The feed-forward cuts its rows so too.
"""

from kernels.launch import INTERPRETED, tl, triton

# NumPy has no bfloat16 and the interpreter multiplies its bit patterns.
UPCAST_BFLOAT16 = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc=None):
    """a @ b + acc in float32, a rounded to b's dtype; float32 operands are multiplied as IEEE float32, not as tf32."""
    if UPCAST_BFLOAT16 and b.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")


@triton.jit
def dot_rows(a, b):
    """a @ b^T of two tiles of rows, contracted over the head dim: [rows of a, rows of b]."""
    product = dot(a[0], b[0].T)
    if len(a) == 2:
        product = dot(a[1], b[1].T, product)
    return product


@triton.jit
def add_weighted(acc, weights, rows):
    """acc + weights @ rows, contracted over the rows."""
    first = dot(weights, rows[0], acc[0])
    if len(rows) == 2:
        return first, dot(weights, rows[1], acc[1])
    else:
        return (first,)


@triton.jit
def zero_rows(BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr):
    """A float32 tile of rows of zeros."""
    if BLOCK_D2:
        return tl.zeros([BLOCK, BLOCK_D], tl.float32), tl.zeros([BLOCK, BLOCK_D2], tl.float32)
    else:
        return (tl.zeros([BLOCK, BLOCK_D], tl.float32),)


@triton.jit
def scale_rows(x, factor):
    """The tile x times a factor, a number or [rows, 1]."""
    if len(x) == 2:
        return x[0] * factor, x[1] * factor
    else:
        return (x[0] * factor,)


@triton.jit
def add_rows(a, b):
    """The sum of two tiles."""
    if len(a) == 2:
        return a[0] + b[0], a[1] + b[1]
    else:
        return (a[0] + b[0],)


@triton.jit
def inner_rows(a, b):
    """Inner product of each row of a with the same row of b, in float32: [rows]."""
    product = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) == 2:
        product += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return product


@triton.jit
def load_columns(
    row_ptr, inside, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, CHECK_ROWS: tl.constexpr
):
    """WIDTH columns from START on of the rows that start at row_ptr [rows, 1], as in `load_rows`; inside: [rows, 1]."""
    cols = START + tl.arange(0, WIDTH)[None, :]
    if CHECK_ROWS and START + WIDTH > HEAD_DIM:
        return tl.load(row_ptr + cols, inside & (cols < HEAD_DIM), other=0.0)
    elif CHECK_ROWS:
        return tl.load(row_ptr + cols, inside, other=0.0)
    elif START + WIDTH > HEAD_DIM:
        return tl.load(row_ptr + cols, cols < HEAD_DIM, other=0.0)
    else:
        return tl.load(row_ptr + cols)


@triton.jit
def load_rows(
    ptr, rows, n_rows, stride,
    HEAD_DIM: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr,
    CHECK_ROWS: tl.constexpr = True,
):  # fmt: skip
    """A tile of the given rows, zero past the head dim and, with CHECK_ROWS, past n_rows."""
    row_ptr = ptr + rows.to(tl.int64)[:, None] * stride * ALIGNMENT
    inside = rows[:, None] < n_rows
    first = load_columns(row_ptr, inside, 0, BLOCK_D, HEAD_DIM, CHECK_ROWS)
    if BLOCK_D2:
        return first, load_columns(row_ptr, inside, BLOCK_D, BLOCK_D2, HEAD_DIM, CHECK_ROWS)
    else:
        return (first,)


@triton.jit
def store_columns(row_ptr, x, inside, START: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store x as the columns from START on of the rows that start at row_ptr [rows, 1], where they are inside, in its dtype."""
    cols = START + tl.arange(0, x.shape[1])[None, :]
    tl.store(row_ptr + cols, x.to(row_ptr.dtype.element_ty), inside & (cols < HEAD_DIM))


@triton.jit
def store_rows(ptr, rows, n_rows, x, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store the tile x as the given rows, but for those past n_rows, in the dtype of ptr."""
    row_ptr = ptr + rows.to(tl.int64)[:, None] * STRIDE
    inside = rows[:, None] < n_rows
    store_columns(row_ptr, x[0], inside, 0, HEAD_DIM)
    if len(x) == 2:
        store_columns(row_ptr, x[1], inside, x[0].shape[1], HEAD_DIM)


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
