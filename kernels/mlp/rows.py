"""How the feed-forward's programs load, multiply and store: what the forward and the backward kernel share.

A row of D columns is a tuple of one or two tensors, BLOCK_D and BLOCK_D2 wide, as in attention: so are tiles of rows, and the
blocks of the weights. The block of W_gate or W_up of some hidden columns has a row for each of them, that of W_down a column.
"""

from kernels.launch import tl, triton
from kernels.rows import dot


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
    """The columns of W_down (DIM, WIDTH) from column_ptr [1, columns] on, as in `load_rows_at`: [BLOCK_D, columns], and more."""
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
