"""Which tiles the feed-forward's kernels work on, by kernel and machine: what the host chooses before a launch."""

from typing import NamedTuple

from kernels.launch import Launch, Target, ceil_div, machine_of
from kernels.rows import row_tiles


class Tile(NamedTuple):
    """Rows of a program, hidden columns of one step of its loop, its warps, and the steps whose loads are under way at once."""

    block_m: int
    block_f: int
    num_warps: int
    num_stages: int


TILES = {
    "forward": {
        "sm_80": Tile(128, 16, 8, 2),
        "sm_90": Tile(128, 32, 8, 2),
        "sm_100": Tile(128, 32, 8, 2),
        "hip": Tile(64, 16, 4, 2),
        "float32": Tile(32, 16, 8, 2),
        "interpreter": Tile(64, 64, 4, 2),
    },
    "backward": {
        "sm_80": Tile(128, 16, 8, 2),
        "sm_90": Tile(128, 32, 8, 2),
        "sm_100": Tile(64, 32, 8, 2),
        "hip": Tile(64, 16, 4, 2),
        "float32": Tile(32, 16, 8, 2),
        "interpreter": Tile(64, 64, 4, 2),
    },
}
"""Chosen for machine code that spills nothing at the reference's width, among such for the fewest steps; no GPU has timed them."""


def multiplied_itemsize(itemsize: int, target: Target) -> int:
    """Bytes of an element as the products take it: before sm_80 Triton uses no tensor core, and multiplies in float32."""
    return 4 if target.backend == "cuda" and target.arch < 80 else itemsize


def tile_of(kernel: str, dim: int, itemsize: int, target: Target) -> Tile:
    """The table's tile, its rows halved until the target's shared memory holds them."""
    itemsize = multiplied_itemsize(itemsize, target)
    tile = TILES[kernel][machine_of(itemsize, target)]
    if target.backend == "cuda":
        while tile.block_m > 16 and _shared(tile, sum(row_tiles(dim)), itemsize) > target.shared_memory:
            tile = tile._replace(block_m=tile.block_m // 2)
    return tile


def launch_of(kernel: str, n_rows: int, dim: int, itemsize: int, target: Target) -> Launch:
    """A program for each block of rows."""
    tile = tile_of(kernel, dim, itemsize, target)
    block_d, block_d2 = row_tiles(dim)  # powers of two that hold a row: 256 + 32 for 288
    tiles = {"BLOCK_M": tile.block_m, "BLOCK_F": tile.block_f, "BLOCK_D": block_d, "BLOCK_D2": block_d2}
    return Launch((ceil_div(n_rows, tile.block_m),), tiles, tile.num_warps, tile.num_stages)


def _shared(tile: Tile, width: int, itemsize: int) -> int:
    """Bytes of shared memory that a program takes at most, where there is least of it: as machine code for sm_75 and sm_86 says.

    Its rows, and their hidden columns on the way to be stored; for each step that loads ahead three blocks of weights and those
    columns of gate and up; in some backward kernels one block more.
    """
    ahead = max(tile.num_stages - 1, 1)
    return (tile.block_m * (width + (2 * ahead + 1) * tile.block_f) + (3 * ahead + 1) * tile.block_f * width) * itemsize
