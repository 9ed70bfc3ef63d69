"""Which tiles the feed-forward's kernels work on, by kernel and machine: what the host chooses before a launch."""

from typing import NamedTuple

from kernels.attention.tiles import head_tiles
from kernels.launch import Launch, Target, ceil_div


class Tile(NamedTuple):
    """Rows of a program, hidden columns of one step of its loop, and its warps."""

    block_m: int
    block_f: int
    num_warps: int


TILES = {
    "forward": {
        "sm_80": Tile(128, 16, 8),
        "sm_90": Tile(128, 32, 8),
        "sm_100": Tile(128, 32, 8),
        "hip": Tile(64, 16, 4),
        "float32": Tile(32, 16, 8),
        "interpreter": Tile(64, 64, 4),
    },
    "backward": {
        "sm_80": Tile(128, 16, 8),
        "sm_90": Tile(128, 16, 8),
        "sm_100": Tile(64, 32, 8),
        "hip": Tile(64, 16, 4),
        "float32": Tile(32, 16, 8),
        "interpreter": Tile(64, 64, 4),
    },
}
"""Chosen for machine code that spills nothing, and among such for the fewest steps; no GPU has timed them."""


def launch_of(kernel: str, n_rows: int, dim: int, itemsize: int, target: Target) -> Launch:
    """A program for each block of rows: as many as the table says, halved until the target's shared memory holds them."""
    if target.backend == "interpreter":
        machine = "interpreter"
    elif itemsize == 4 or (target.backend == "cuda" and target.arch < 80):
        itemsize = 4  # before sm_80 Triton uses no tensor core, and multiplies in float32
        machine = "float32"
    elif target.backend == "hip":
        machine = "hip"
    elif 90 <= target.arch < 120:
        machine = "sm_90" if target.arch < 100 else "sm_100"
    else:
        machine = "sm_80"  # and sm_86, sm_89 and sm_120, which multiply like it and have less shared memory
    block_m, block_f, num_warps = TILES[kernel][machine]
    block_d, block_d2 = head_tiles(dim)  # powers of two that hold a row: 256 + 32 for 288
    if target.backend == "cuda":
        while block_m > 16 and _shared(block_m, block_f, block_d + block_d2, itemsize) > target.shared_memory:
            block_m //= 2
    tiles = {"BLOCK_M": block_m, "BLOCK_F": block_f, "BLOCK_D": block_d, "BLOCK_D2": block_d2}
    return Launch((ceil_div(n_rows, block_m),), tiles, num_warps)


def _shared(block_m: int, block_f: int, width: int, itemsize: int) -> int:
    """Bytes of shared memory that a program takes at most, where there is least of it: as machine code for sm_75 and sm_86 says.

    Its rows, and their hidden columns on the way to be stored; three blocks of weights, and in some backward kernels one more.
    """
    return (block_m * (width + 3 * block_f) + 4 * block_f * width) * itemsize
