"""What attention's forward and backward share: the tile tables, and how a program finds, loads and multiplies its tiles.

A head dim that is not a power of two is cut into two tiles, the second padded: 36 = 32 + 4 of 16, 80 = 64 + 16. In the
kernels a tile of rows is therefore a tuple of one or two tensors, [rows, BLOCK_D] and [rows, BLOCK_D2].
"""

from typing import NamedTuple

from torch import Tensor

from kernels.launch import INTERPRETED, Target, next_power_of_2, tl, triton

# ----------------------------------------------------------------------------------------------------------------- data


class Tile(NamedTuple):
    """Queries and keys of one step of a kernel's loop, its warps, and its loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


TILES = {
    "forward": {
        "sm_80": {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3), 192: Tile(64, 16, 4, 2), 256: Tile(64, 32, 8, 2)},
        "sm_90": {
            48: Tile(64, 64, 4, 2),
            64: Tile(64, 64, 4, 3),
            128: Tile(128, 64, 8, 3),
            160: Tile(128, 128, 8, 2),
            256: Tile(128, 32, 8, 2),
        },
        "sm_100": {
            48: Tile(128, 32, 4, 3),
            64: Tile(128, 64, 4, 3),
            128: Tile(128, 64, 8, 3),
            256: Tile(128, 32, 8, 2),
        },
        "hip": {128: Tile(64, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
        "float32": {64: Tile(64, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 4, 1)},
        "interpreter": {256: Tile(64, 64, 4, 1)},
    },
    "dq": {
        "sm_80": {64: Tile(64, 64, 4, 2), 96: Tile(64, 32, 4, 3), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
        "sm_90": {
            48: Tile(64, 64, 4, 1),
            128: Tile(64, 64, 4, 2),
            160: Tile(128, 64, 8, 2),
            256: Tile(128, 32, 8, 2),
        },
        "sm_100": {
            32: Tile(128, 32, 4, 2),
            48: Tile(128, 32, 8, 2),
            128: Tile(128, 64, 8, 2),
            256: Tile(128, 32, 8, 2),
        },
        "hip": {32: Tile(64, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
        "float32": {64: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
        "interpreter": {256: Tile(64, 64, 4, 1)},
    },
    "dkdv": {
        "sm_80": {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 2), 192: Tile(16, 32, 4, 1), 256: Tile(32, 32, 8, 1)},
        "sm_90": {
            64: Tile(32, 64, 4, 1),
            128: Tile(64, 64, 4, 2),
            160: Tile(32, 128, 8, 2),
            256: Tile(16, 64, 8, 2),
        },
        "sm_100": {
            48: Tile(32, 128, 4, 2),
            64: Tile(64, 128, 8, 2),
            128: Tile(32, 128, 8, 2),
            192: Tile(64, 64, 8, 1),
            256: Tile(32, 64, 8, 1),
        },
        "hip": {32: Tile(64, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
        "float32": {64: Tile(32, 32, 8, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
        "interpreter": {256: Tile(64, 64, 4, 1)},
    },
}
"""By kernel, by machine (or float32, which has no tensor core), by the widest padded head dim that a tile serves.

Those of sm_90 for head dims 36, 64 and 128 are the fastest of about 25 that an H100 timed (bfloat16; T 256, 1024 and 4096); the
others were chosen for machine code that spills nothing, and among such by occupancy and instructions a score, and no GPU has
timed them. KERNELS.md has what was tried instead ("Tried and left").
"""


def head_tiles(head_dim: int) -> tuple[int, int]:
    """BLOCK_D and BLOCK_D2 of a head dim from 16 to 256: a power of two of at least 16, and what is left (0 if nothing).

    Two tiles where they are together narrower than one padded tile: 32 + 16 for 36, one of 64 for 52.
    """
    whole = next_power_of_2(max(head_dim, 16))
    first = whole // 2
    second = max(next_power_of_2(head_dim - first), 16)
    return (first, second) if first > 16 and second < first else (whole, 0)


def tile_of(kernel: str, head_dim: int, itemsize: int, target: Target) -> Tile:
    """The table's tile, with fewer stages and then half the rows in flight until the target's shared memory holds it."""
    if target.backend == "interpreter":
        machine = "interpreter"
    elif itemsize == 4:
        machine = "float32"
    elif target.backend == "hip":
        machine = "hip"
    elif 90 <= target.arch < 120:
        machine = "sm_90" if target.arch < 100 else "sm_100"
    else:
        machine = "sm_80"  # and sm_120, which multiplies like it
    width = sum(head_tiles(head_dim))
    block_m, block_n, num_warps, num_stages = next(
        tile for widest, tile in TILES[kernel][machine].items() if width <= widest
    )
    # Two tiles are in flight, that many stages of each. q, or the two that a backward kernel keeps, lie there too, but
    # where the tensor cores read their operands from registers.
    kept, walked = (2 * block_n, block_m) if kernel == "dkdv" else (2 * block_m, block_n)
    if kernel == "forward":
        kept = block_m
    if machine in ("sm_80", "hip"):
        kept = 0
    if head_dim * itemsize % 16:
        # Such rows are loaded in smaller pieces, and for twice the addresses a block of 128 leaves no registers.
        walked = min(walked, 64)
    while (kept + 2 * num_stages * walked) * width * itemsize > target.shared_memory and walked > 16:
        if num_stages > 1:
            num_stages -= 1
        else:
            walked //= 2
    block_m, block_n = (walked, block_n) if kernel == "dkdv" else (block_m, walked)
    return Tile(block_m, block_n, num_warps, num_stages)


def heads_in_cache(bytes_a_head: int, n_heads: int) -> int:
    """How many heads to work on at once so that what their programs share, `bytes_a_head` each, stays in the L2 cache.

    Half of the smallest L2 among the machines of the tables, 40 MB of an A100, is counted on.
    """
    return max(1, min(20_000_000 // bytes_a_head, n_heads))


def dense_heads(*tensors: Tensor) -> list[Tensor]:
    """Each (B, T, heads, D) as it lies where its last dim is dense, else a copy."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


# -------------------------------------------------------------------------------------------------------------- kernels

# NumPy has no bfloat16 and the interpreter multiplies its bit patterns.
UPCAST_BFLOAT16 = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc=None):
    """A @ b + acc in float32, a rounded to b's dtype; float32 operands are multiplied as IEEE float32, not as tf32."""
    if UPCAST_BFLOAT16 and b.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")


@triton.jit
def dot_rows(a, b):
    """A @ b^T of two tiles of rows, contracted over the head dim: [rows of a, rows of b]."""
    product = dot(a[0], b[0].T)
    if len(a) == 2:
        product = dot(a[1], b[1].T, product)
    return product


@triton.jit
def add_weighted(acc, weights, rows):
    """Acc + weights @ rows, contracted over the rows."""
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
def inner_rows(a, b):
    """Inner product of each row of a with the same row of b, in float32: [rows]."""
    product = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) == 2:
        product += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return product


@triton.jit
def _load_columns(
    row_ptr, inside, START: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, CHECK_ROWS: tl.constexpr
):
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
    first = _load_columns(row_ptr, inside, 0, BLOCK_D, HEAD_DIM, CHECK_ROWS)
    if BLOCK_D2:
        return first, _load_columns(row_ptr, inside, BLOCK_D, BLOCK_D2, HEAD_DIM, CHECK_ROWS)
    else:
        return (first,)


@triton.jit
def _store_columns(row_ptr, x, inside, START: tl.constexpr, HEAD_DIM: tl.constexpr):
    cols = START + tl.arange(0, x.shape[1])[None, :]
    tl.store(row_ptr + cols, x.to(row_ptr.dtype.element_ty), inside & (cols < HEAD_DIM))


@triton.jit
def store_rows(ptr, rows, n_rows, x, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store the tile x as the given rows, but for those past n_rows, in the dtype of ptr."""
    row_ptr = ptr + rows.to(tl.int64)[:, None] * STRIDE
    inside = rows[:, None] < n_rows
    _store_columns(row_ptr, x[0], inside, 0, HEAD_DIM)
    if len(x) == 2:
        _store_columns(row_ptr, x[1], inside, x[0].shape[1], HEAD_DIM)


@triton.jit
def store_rotated_back(ptr, rows, n_rows, x, cos_ptr, sin_ptr, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store the tile x as `store_rows` does, turned back by the angles of its rows in tables of (T, HEAD_DIM / 2).

    Both halves of a pair lie in one row, but not in one thread: so the tile is stored, and turned where it then is.
    """
    store_rows(ptr, rows, n_rows, x, STRIDE, HEAD_DIM)
    tl.debug_barrier()  # every thread's part is stored before another one reads it
    HALF: tl.constexpr = HEAD_DIM // 2
    BLOCK_HALF: tl.constexpr = triton.next_power_of_2(HALF)
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (rows[:, None] < n_rows) & (cols < HALF)
    table = rows.to(tl.int64)[:, None] * HALF + cols
    cos = tl.load(cos_ptr + table, mask, other=0.0)
    sin = -tl.load(sin_ptr + table, mask, other=0.0)
    low_ptr = ptr + rows.to(tl.int64)[:, None] * STRIDE + cols
    low = tl.load(low_ptr, mask, other=0.0).to(tl.float32)
    high = tl.load(low_ptr + HALF, mask, other=0.0).to(tl.float32)
    tl.store(low_ptr, (low * cos - high * sin).to(ptr.dtype.element_ty), mask)
    tl.store(low_ptr + HALF, (high * cos + low * sin).to(ptr.dtype.element_ty), mask)


@triton.jit
def block_and_head(n_blocks, n_heads, heads_at_once):
    """Which block of which head a program does: `heads_at_once` heads together, the first block of all of them first."""
    program = tl.program_id(0)
    first_head = program // (heads_at_once * n_blocks) * heads_at_once
    heads = min(heads_at_once, n_heads - first_head)
    program -= first_head * n_blocks
    return program // heads, first_head + program % heads


@triton.jit
def key_blocks(first_key_ptr, first_row, n_times, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
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
