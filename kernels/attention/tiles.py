"""Which tiles attention's kernels work on, by kernel, machine and head dim: what the host chooses before a launch."""

from typing import NamedTuple

from torch import Tensor

from kernels.launch import Target, machine_of
from kernels.rows import row_tiles


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
        "sm_80": {48: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 2), 192: Tile(16, 32, 4, 1), 256: Tile(32, 32, 8, 1)},
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


def tile_of(kernel: str, head_dim: int, itemsize: int, target: Target) -> Tile:
    """The table's tile, with fewer stages and then half the rows in flight until the target's shared memory holds it."""
    machine = machine_of(itemsize, target)
    width = sum(row_tiles(head_dim))
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
