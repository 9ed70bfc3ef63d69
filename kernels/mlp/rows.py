"""How the feed-forward's programs load, multiply and store: what the forward and the backward kernel share.

A row of D columns is a tuple of one or two tensors, BLOCK_D and BLOCK_D2 wide, as in attention: so are tiles of rows, and the
blocks of the weights. The block of W_gate or W_up of some hidden columns has a row for each of them, that of W_down a column.
"""

from kernels.attention.rows import dot, load_columns, store_columns
from kernels.launch import tl, triton


@triton.jit
def load_rows(
    row_ptr, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr, CHECK_ROWS: tl.constexpr = True
):  # fmt: skip
    """The rows that start at row_ptr [rows, 1], zero past DIM and, with CHECK_ROWS, where they are not inside [rows, 1]."""
    first = load_columns(row_ptr, inside, 0, BLOCK_D, DIM, CHECK_ROWS)
    if BLOCK_D2:
        return first, load_columns(row_ptr, inside, BLOCK_D, BLOCK_D2, DIM, CHECK_ROWS)
    else:
        return (first,)


@triton.jit
def _load_rows_of_down(
    column_ptr, inside, START: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = START + tl.arange(0, BLOCK)[:, None]
    if CHECK_COLUMNS and START + BLOCK > DIM:
        return tl.load(column_ptr + rows * WIDTH, inside & (rows < DIM), other=0.0)
    elif CHECK_COLUMNS:
        return tl.load(column_ptr + rows * WIDTH, inside, other=0.0)
    elif START + BLOCK > DIM:
        return tl.load(column_ptr + rows * WIDTH, rows < DIM, other=0.0)
    else:
        return tl.load(column_ptr + rows * WIDTH)


@triton.jit
def load_down(
    column_ptr, inside, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D2: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The columns of W_down (DIM, WIDTH) that start at column_ptr [1, columns], as in `load_rows`: [BLOCK_D, columns] and more."""
    first = _load_rows_of_down(column_ptr, inside, 0, BLOCK_D, DIM, WIDTH, CHECK_COLUMNS)
    if BLOCK_D2:
        return first, _load_rows_of_down(column_ptr, inside, BLOCK_D, BLOCK_D2, DIM, WIDTH, CHECK_COLUMNS)
    else:
        return (first,)


@triton.jit
def dot_down(rows, down):
    """rows @ down, contracted over the D columns of the rows: [rows, columns of down]."""
    product = dot(rows[0], down[0])
    if len(rows) == 2:
        product = dot(rows[1], down[1], product)
    return product


@triton.jit
def add_through_down(acc, y, down):
    """acc + y @ down^T, contracted over the hidden columns: rows of D columns."""
    first = dot(y, down[0].T, acc[0])
    if len(down) == 2:
        return first, dot(y, down[1].T, acc[1])
    else:
        return (first,)


@triton.jit
def hidden_mask(inside, cols, left, CHECK: tl.constexpr):
    """Of the rows inside [rows, 1] the columns [1, columns] of which `left` are there: no comparison unless CHECK."""
    if CHECK:
        return inside & (cols < left)
    else:
        return inside


@triton.jit
def store_rows(row_ptr, inside, x, DIM: tl.constexpr):
    """Store the tile x as the rows that start at row_ptr [rows, 1], but for those not inside, in the dtype of row_ptr."""
    store_columns(row_ptr, x[0], inside, 0, DIM)
    if len(x) == 2:
        store_columns(row_ptr, x[1], inside, x[0].shape[1], DIM)
