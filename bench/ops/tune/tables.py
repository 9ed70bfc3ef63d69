"""The tables of tiles that can be searched: what the ops' tables have in common, and where they differ."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.ops.sizes import HEADS
from kernels.attention import tiles as attention
from kernels.attention.backward import _attention_dkdv_kernel, _attention_dq_kernel
from kernels.attention.forward import _attention_forward_kernel
from kernels.launch import Target, machine_of
from kernels.mlp import tiles as mlp
from kernels.mlp.backward import _mlp_backward_kernel
from kernels.mlp.forward import _mlp_forward_kernel
from kernels.rows import row_tiles
from training.config import TrainConfig

Tile = attention.Tile | mlp.Tile
Row = dict[int, attention.Tile] | mlp.Tile
"""What a machine has for a kernel: a tile for each width of a head, or one for all sizes."""


@dataclass(frozen=True)
class TileTable:
    """An op's table of tiles, as the search sees it."""

    op: str
    """The name of its sheet."""
    file: str
    """Where `TILES` stands."""
    tiles: dict[str, dict[str, Any]]
    """`TILES` itself: kernel, machine, row."""
    kernels: dict[str, Any]
    """Triton's kernels by their names in the table, what takes longest first: so they are searched."""
    grid: list[Any]
    """The tiles to try."""
    sizes: tuple[str, ...]
    """Those to search at when nothing else is said."""
    tile_of: Callable[[str, TrainConfig, int, Target], Any]
    """The tile that a kernel gets at a size, for elements of so many bytes."""
    machine_of: Callable[[int, Target], str]
    """The machine whose row such a launch reads."""
    row_of: Callable[[Any], Row]
    """The row that has this tile at every size."""
    row_with: Callable[[Any, TrainConfig, Any], Row]
    """A row with this tile at one size, and what it had at all others."""
    head_dim: Callable[[TrainConfig], int | None]
    """What `HEAD_DIM` the kernels are compiled for; None: they have none."""

    @property
    def has_one_size(self) -> bool:
        """Whether a row is one tile, so that a search at a second size would undo that at the first."""
        return not isinstance(self.row_of(self.grid[0]), dict)

    @contextlib.contextmanager
    def holding(self, kernel: str, tile: Tile) -> Iterator[None]:
        """Inside, a kernel has this tile on every machine, at every size."""
        before = self.tiles[kernel]
        self.tiles[kernel] = {machine: self.row_of(tile) for machine in before}
        try:
            yield
        finally:
            self.tiles[kernel] = before


# ------------------------------------------------------------------------------------------------------------- attention

PADDED_WIDTHS = sorted({sum(row_tiles(head_dim)) for head_dim in range(16, 257, 4)})


def row_with(row: dict[int, attention.Tile], width: int, tile: attention.Tile) -> dict[int, attention.Tile]:
    """A machine's row with this tile at one padded width of a head, and what it had at all others."""
    every = {w: next(t for widest, t in row.items() if w <= widest) for w in PADDED_WIDTHS} | {width: tile}
    following = [*list(every.values())[1:], None]
    return {w: t for (w, t), after in zip(every.items(), following, strict=True) if t != after}


ATTENTION = TileTable(
    op="attention",
    file="kernels/attention/tiles.py",
    tiles=attention.TILES,
    kernels={"dkdv": _attention_dkdv_kernel, "dq": _attention_dq_kernel, "forward": _attention_forward_kernel},
    grid=[attention.Tile(*of) for of in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))],
    sizes=(*HEADS, "reference"),
    tile_of=lambda kernel, config, itemsize, target: attention.tile_of(kernel, config.head_dim, itemsize, target),
    machine_of=machine_of,
    row_of=lambda tile: {PADDED_WIDTHS[-1]: tile},
    row_with=lambda row, config, tile: row_with(row, sum(row_tiles(config.head_dim)), tile),
    head_dim=lambda config: config.head_dim,
)

# ------------------------------------------------------------------------------------------------------------------- mlp

MLP = TileTable(
    op="mlp",
    file="kernels/mlp/tiles.py",
    tiles=mlp.TILES,
    kernels={"backward": _mlp_backward_kernel, "forward": _mlp_forward_kernel},
    grid=[mlp.Tile(*of) for of in itertools.product((64, 128), (16, 32, 64), (4, 8), (2, 3))],
    sizes=("reference",),
    tile_of=lambda kernel, config, itemsize, target: mlp.tile_of(kernel, config.dim, itemsize, target),
    machine_of=lambda itemsize, target: machine_of(mlp.multiplied_itemsize(itemsize, target), target),
    row_of=lambda tile: tile,
    row_with=lambda row, config, tile: tile,
    head_dim=lambda config: None,
)

TABLES = {table.op: table for table in (ATTENTION, MLP)}
