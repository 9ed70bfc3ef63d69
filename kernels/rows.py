"""Tiles of whole rows, as attention's and the feed-forward's programs hold them: how they load, multiply and store them.

A width that is not a power of two is cut into two tiles, the second padded: 36 = 32 + 4 of 16, 288 = 256 + 32 (`row_tiles`). So a
tile of rows is a tuple of one or two tensors, [rows, BLOCK_D] and [rows, BLOCK_D2].
"""

from kernels.launch import INTERPRETED, next_power_of_2, tl, triton

# NumPy has no bfloat16 and the interpreter multiplies its bit patterns.
UPCAST_BFLOAT16 = tl.constexpr(INTERPRETED)


def row_tiles(width: int) -> tuple[int, int]:
    """BLOCK_D and BLOCK_D2 of rows of so many columns: a power of two of at least 16, and what is left (0 if nothing).

    Two tiles where they are together narrower than one padded tile: 32 + 16 for 36, one of 64 for 52, 256 + 32 for 288.
    """
    whole = next_power_of_2(max(width, 16))
    first = whole // 2
    second = max(next_power_of_2(width - first), 16)
    return (first, second) if first > 16 and second < first else (whole, 0)


@triton.jit
def dot(a, b, acc=None):
    """a @ b + acc in float32, a rounded to b's dtype; float32 operands are multiplied as IEEE float32, not as tf32."""
    if UPCAST_BFLOAT16 and b.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")


@triton.jit
def dot_rows(a, b):
    """a @ b^T of two tiles of rows, contracted over their columns: [rows of a, rows of b]."""
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
def _load_columns(
    row_ptr, inside, START: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHECK_ROWS: tl.constexpr
):
    """BLOCK columns from START on of the rows that start at row_ptr [rows, 1], as in `load_rows_at`."""
    cols = START + tl.arange(0, BLOCK)[None, :]
    if CHECK_ROWS and START + BLOCK > WIDTH:
        return tl.load(row_ptr + cols, inside & (cols < WIDTH), other=0.0)
    elif CHECK_ROWS:
        return tl.load(row_ptr + cols, inside, other=0.0)
    elif START + BLOCK > WIDTH:
        return tl.load(row_ptr + cols, cols < WIDTH, other=0.0)
    else:
        return tl.load(row_ptr + cols)


@triton.jit
def load_rows_at(
    row_ptr, inside, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr, CHECK_ROWS: tl.constexpr = True
):
    """The rows of WIDTH that start at row_ptr [rows, 1]: zero past WIDTH and, with CHECK_ROWS, where not inside [rows, 1]."""
    first = _load_columns(row_ptr, inside, 0, BLOCK_D, WIDTH, CHECK_ROWS)
    if BLOCK_D2:
        return first, _load_columns(row_ptr, inside, BLOCK_D, BLOCK_D2, WIDTH, CHECK_ROWS)
    else:
        return (first,)


@triton.jit
def _store_columns(row_ptr, x, inside, START: tl.constexpr, WIDTH: tl.constexpr):
    """Store x as the columns from START on of the rows that start at row_ptr [rows, 1], where they are inside, in its dtype."""
    cols = START + tl.arange(0, x.shape[1])[None, :]
    tl.store(row_ptr + cols, x.to(row_ptr.dtype.element_ty), inside & (cols < WIDTH))


@triton.jit
def store_rows_at(row_ptr, inside, x, WIDTH: tl.constexpr):
    """Store the tile x as the rows of WIDTH that start at row_ptr [rows, 1], where they are inside, in the dtype of row_ptr."""
    _store_columns(row_ptr, x[0], inside, 0, WIDTH)
    if len(x) == 2:
        _store_columns(row_ptr, x[1], inside, x[0].shape[1], WIDTH)
