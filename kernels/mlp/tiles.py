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
    """A program for each block of rows."""
    if target.backend == "interpreter":
        machine = "interpreter"
    elif itemsize == 4:
        machine = "float32"
    elif target.backend == "hip":
        machine = "hip"
    elif 90 <= target.arch < 120:
        machine = "sm_90" if target.arch < 100 else "sm_100"
    else:
        machine = "sm_80"
    tile = TILES[kernel][machine]
    block_d, block_d2 = head_tiles(dim)  # powers of two that hold a row: 256 + 32 for 288
    tiles = {"BLOCK_M": tile.block_m, "BLOCK_F": tile.block_f, "BLOCK_D": block_d, "BLOCK_D2": block_d2}
    return Launch((ceil_div(n_rows, tile.block_m),), tiles, tile.num_warps)
