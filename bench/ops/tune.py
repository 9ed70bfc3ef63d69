"""A better row for a table of tiles, searched on the GPU that is here: `python -m bench.ops --tune attention`.

Per size and kernel (forward, dq, dkdv) every tile of a grid is tried in place of the table's: it must fit the GPU's shared memory,
compile, spill no register and compute what the table's tile computes. The fastest is then timed against the table's in
turns, and kept if it is still ahead. What is printed is to be pasted into `TILES` of kernels/attention/tiles.py by whoever
believes it; nothing here runs when a model does.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.measure import GpuInstant, gpu_flush, time_in_turn
from bench.ops.catalogue import SHEETS
from bench.ops.contender import Contender
from bench.ops.sizes import HEADS, size
from kernels.attention.backward import _attention_dkdv_kernel, _attention_dq_kernel
from kernels.attention.forward import _attention_forward_kernel
from kernels.attention.tiles import TILES, Tile, head_tiles, tile_of
from kernels.launch import Target, target_of
from training.config import TrainConfig
from training.errors import UserError

KERNELS = {"forward": _attention_forward_kernel, "dq": _attention_dq_kernel, "dkdv": _attention_dkdv_kernel}
GRID = [Tile(*of) for of in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))]
"""Queries, keys, warps, stages."""
PADDED_WIDTHS = sorted({sum(head_tiles(head_dim)) for head_dim in range(16, 257, 4)})
QUICK_REPEATS = 10
TOLERANCE = 0.02
"""Relative RMS difference from the table's tile: other tiles sum in another order, wrong ones are far off."""


class Unfit(Exception):
    """Why a tile can't be used."""


@dataclass(frozen=True)
class Found:
    """What came of a search."""

    old: Tile
    new: Tile
    old_us: float
    new_us: float
    unfit: dict[str, str]
    """Tiles of the grid that can't be used, and why."""


# ----------------------------------------------------------------------------------------------------------------- table


@contextlib.contextmanager
def in_table(kernel: str, tile: Tile) -> Iterator[None]:
    """Inside, a kernel has this tile on every machine, at every head dim."""
    before = TILES[kernel]
    TILES[kernel] = {machine: {PADDED_WIDTHS[-1]: tile} for machine in before}
    try:
        yield
    finally:
        TILES[kernel] = before


def machine_of(itemsize: int, target: Target) -> str:
    """The machine whose rows a target reads, which `tile_of` knows: here by a table that has another tile for each."""
    machines = list(TILES["forward"])
    marks = {machine: {PADDED_WIDTHS[-1]: Tile(16, 16, i, 1)} for i, machine in enumerate(machines)}
    before, TILES["forward"] = TILES["forward"], marks
    try:
        return machines[tile_of("forward", 16, itemsize, target).num_warps]
    finally:
        TILES["forward"] = before


def row_with(row: dict[int, Tile], width: int, tile: Tile) -> dict[int, Tile]:
    """A machine's row with this tile at one padded width of a head, and what it had at all others."""
    every = {w: next(t for widest, t in row.items() if w <= widest) for w in PADDED_WIDTHS} | {width: tile}
    following = [*list(every.values())[1:], None]
    return {w: t for (w, t), after in zip(every.items(), following, strict=True) if t != after}


# ---------------------------------------------------------------------------------------------------------------- search


def search(old: Tile, grid: list[Tile], seconds_of: Callable[..., dict[Tile, float]]) -> Found:
    """The fastest tile of a grid, if it is faster than the old one.

    seconds_of(*tiles, repeats=None): seconds a call with each, timed in turns. Raises Unfit for a tile that can't be used.
    """
    quick, unfit = {}, {}
    for tile in grid:
        if tile == old:
            continue
        try:
            quick |= seconds_of(tile, repeats=QUICK_REPEATS)
        except Unfit as reason:
            unfit[str(tuple(tile))] = str(reason)
    best = min(quick, key=quick.get, default=old)
    final = seconds_of(old, best)
    new = best if final[best] < final[old] else old
    return Found(old, new, 1e6 * final[old], 1e6 * final[new], unfit)


class Trial:
    """A kernel of attention on one case, under any tile."""

    def __init__(self, kernel: str, config: TrainConfig, dtype: torch.dtype, device: torch.device, repeats: int):
        case = SHEETS["attention"].case(config, dtype, device)
        self.kernel = kernel
        self.head_dim, self.itemsize, self.target = config.head_dim, dtype.itemsize, target_of(case.arguments[0])
        self.machine = machine_of(self.itemsize, self.target)
        self.direction = "forward" if kernel == "forward" else "backward"
        self.repeats = repeats
        self.old = self._tile()
        self._contender = Contender("attention", "triton", case)
        self._flush = gpu_flush(device)
        self._expected = self._results()
        self._fit = {self.old}

    def seconds_of(self, *tiles: Tile, repeats: int | None = None) -> dict[Tile, float]:
        """Seconds of the pass that the kernel is part of, with each tile. Unfit for one that can't be used."""
        for tile in tiles:
            if tile not in self._fit:
                self._check(tile)

        def run(tile: Tile) -> None:
            with in_table(self.kernel, tile):
                self._contender.run(self.direction)

        def before(_: str) -> None:
            self._contender.prepare(self.direction)
            self._flush()

        calls = {str(tile): functools.partial(run, tile) for tile in tiles}
        timings = time_in_turn(calls, repeats=repeats or self.repeats, warmup=2, clock=GpuInstant, before=before)
        return {tile: timings[str(tile)].median for tile in tiles}

    def _check(self, tile: Tile) -> None:
        with in_table(self.kernel, tile):
            if self._tile() != tile:
                raise Unfit("wants more shared memory than there is")
            try:
                forget_compiled(self.kernel)
                results = self._results()
            except Exception as error:  # whatever the compiler or the launch says: such a tile is none
                raise Unfit(f"{type(error).__name__}: {error}".splitlines()[0]) from None
        if spills(self.kernel):
            raise Unfit("spills registers")
        for result, expected in zip(results, self._expected, strict=True):
            if not (result.float() - expected.float()).norm() <= TOLERANCE * expected.float().norm():
                raise Unfit("computes something else")
        self._fit.add(tile)

    def _tile(self) -> Tile:
        return tile_of(self.kernel, self.head_dim, self.itemsize, self.target)

    def _results(self) -> list[Tensor]:
        """What the pass computes."""
        if self.direction == "forward":
            return list(self._contender.forward())
        self._contender.prepare("backward")
        return list(self._contender.backward())


def forget_compiled(kernel: str) -> None:
    """Make Triton load a kernel again, from its cache on disk, at the next launch."""
    KERNELS[kernel].device_caches.clear()


def spills(kernel: str) -> bool:
    """Whether a kernel that was launched since it was last forgotten spills registers."""
    caches = KERNELS[kernel].device_caches.values()
    return any(compiled.n_spills for of_device, *_ in caches for compiled in of_device.values())


# ------------------------------------------------------------------------------------------------------------------ show


def search_and_show(
    op: str, sizes: dict[str, TrainConfig], dtype: torch.dtype, device: torch.device, repeats: int, console: Console
) -> dict:
    """Search at each size, and print times and rows to paste. UserError where there is no table or no GPU."""
    if op != "attention":
        raise UserError(f"--tune is {op!r}; allowed: attention, the op with a table of tiles")
    if device.type != "cuda":
        raise UserError(f"--tune {op} needs a GPU, and the device is {device}")
    rows = {kernel: dict(TILES[kernel]) for kernel in KERNELS}
    shown = Table(title=f"attention on {torch.cuda.get_device_name(device)}, microseconds (median)")
    for heading in ("size", "kernel", "pass", "old tile, us", "new tile, us", "faster", "unfit"):
        shown.add_column(heading)
    result: dict[str, Any] = {"bench": "tune", "op": op, "dtype": str(dtype).removeprefix("torch."), "rows": []}
    for name, config in (sizes or {name: size(name) for name in (*HEADS, "reference")}).items():
        width = sum(head_tiles(config.head_dim))
        with contextlib.ExitStack() as kept:  # a backward kernel is tuned beside the best of the other
            for kernel in KERNELS:
                with console.status(f"{name}: {kernel}, {len(GRID)} tiles"):
                    trial = Trial(kernel, config, dtype, device, repeats)
                    found = search(trial.old, GRID, trial.seconds_of)
                kept.enter_context(in_table(kernel, found.new))
                rows[kernel][trial.machine] = row_with(rows[kernel][trial.machine], width, found.new)
                result["rows"].append({"size": name, "kernel": kernel, "pass": trial.direction, **vars(found)})
                tiles = (f"{tuple(found.old)} {found.old_us:.1f}", f"{tuple(found.new)} {found.new_us:.1f}")
                faster, unfit = f"{found.old_us / found.new_us:.2f}x", f"{len(found.unfit)} of {len(GRID)}"
                shown.add_row(name, kernel, trial.direction, *tiles, faster, unfit)
    console.print(shown)
    console.print("For TILES in kernels/attention/tiles.py:")
    for kernel in KERNELS:
        console.print(
            f"{kernel:8} {as_source(trial.machine, rows[kernel][trial.machine])}", highlight=False, soft_wrap=True
        )
    return result


def as_source(machine: str, row: dict[int, Tile]) -> str:
    """A row as it stands in the table's source."""
    tiles = ", ".join(f"{width}: Tile({', '.join(map(str, tile))})" for width, tile in row.items())
    return f'"{machine}": {{{tiles}}},'
