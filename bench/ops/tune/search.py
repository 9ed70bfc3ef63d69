"""The search for one kernel's tile at one size."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.measure import GpuInstant, gpu_flush, time_in_turn
from bench.ops.catalogue import SHEETS
from bench.ops.contender import Contender
from bench.ops.tune.tables import Tile, TileTable
from kernels.launch import target_of
from training.config import TrainConfig

QUICK_REPEATS = 10
TOLERANCE = 0.02
"""Relative RMS difference from the table's tile: other tiles sum in another order, wrong ones are far off."""
SPILL_LIMIT = 64
"""Bytes a thread. A few were fastest for dK and dV at head dim 128 (KERNELS.md)."""


class Unfit(Exception):
    """Why a tile can't be used."""


@dataclass(frozen=True)
class Found:
    """What came of a search."""

    old: Tile
    new: Tile
    old_us: float
    new_us: float
    tried_us: dict[str, float]
    """Every tile that can be used, the old one first, by a few calls each."""
    unfit: dict[str, str]
    """Tiles of the grid that can't be used, and why."""


def nearest_first(old: Tile, grid: list[Tile]) -> list[Tile]:
    """The old tile and then those of the grid, by how many times a number of it is doubled or halved."""

    def distance(tile: Tile) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(tile, old, strict=True))

    return [old, *sorted((tile for tile in grid if tile != old), key=distance)]


def search(
    old: Tile,
    grid: list[Tile],
    seconds_of: Callable[..., dict[Tile, float]],
    before: Callable[[Tile, dict[str, float], dict[str, str]], object] = lambda *_: None,
) -> Found:
    """The fastest tile of a grid, if it is faster than the old one.

    seconds_of(*tiles, repeats=None): seconds a call with each, timed in turns. Raises Unfit for a tile that can't be used.
    before(tile, tried_us, unfit) is called ahead of each tile with what was found until then.
    """
    quick: dict[Tile, float] = {}
    tried_us: dict[str, float] = {}
    unfit: dict[str, str] = {}
    for tile in nearest_first(old, grid):
        before(tile, tried_us, unfit)
        try:
            quick |= seconds_of(tile, repeats=QUICK_REPEATS)
        except Unfit as reason:
            unfit[str(tuple(tile))] = str(reason)
        else:
            tried_us[str(tuple(tile))] = 1e6 * quick[tile]
    best = min(quick, key=quick.__getitem__)
    final = seconds_of(*dict.fromkeys((old, best)))
    new = best if final[best] < final[old] else old
    return Found(old, new, 1e6 * final[old], 1e6 * final[new], tried_us, unfit)


class Trial:
    """A kernel on one case, under any tile."""

    def __init__(
        self,
        table: TileTable,
        kernel: str,
        config: TrainConfig,
        dtype: torch.dtype,
        device: torch.device,
        repeats: int,
    ):
        case = SHEETS[table.op].case(config, dtype, device)
        self.direction = "forward" if kernel == "forward" else "backward"
        target = target_of(case.arguments[0])
        self.arch = target.arch
        self.machine = table.machine_of(dtype.itemsize, target)
        self._table, self._kernel, self._repeats = table, kernel, repeats
        self._tile = functools.partial(table.tile_of, kernel, config, dtype.itemsize, target)
        self.old = self._tile()
        self._contender = Contender(table.op, "triton", case)
        self._flush = gpu_flush(device)
        self._expected, spilled = self._run_anew()
        self.spilled = {self.old: spilled}
        """Bytes a thread, of the tiles that can be used."""

    def seconds_of(self, *tiles: Tile, repeats: int | None = None) -> dict[Tile, float]:
        """Seconds of the pass that the kernel is part of, with each tile. Unfit for one that can't be used."""
        for tile in tiles:
            if tile not in self.spilled:
                self._check(tile)

        def run(tile: Tile) -> None:
            with self._table.holding(self._kernel, tile):
                self._contender.run(self.direction)

        def before(_: str) -> None:
            self._contender.prepare(self.direction)
            self._flush()

        calls = {str(tile): functools.partial(run, tile) for tile in tiles}
        timings = time_in_turn(calls, repeats=repeats or self._repeats, warmup=2, clock=GpuInstant, before=before)
        return {tile: timings[str(tile)].median for tile in tiles}

    def _check(self, tile: Tile) -> None:
        with self._table.holding(self._kernel, tile):
            if self._tile() != tile:
                raise Unfit("wants more shared memory than there is")
            try:
                results, spilled = self._run_anew()
            except Exception as error:  # whatever the compiler or the launch says: such a tile is none
                raise Unfit(f"{type(error).__name__}: {error}".splitlines()[0]) from None
        if spilled > SPILL_LIMIT:
            raise Unfit(f"spills {spilled} bytes a thread")
        for result, expected in zip(results, self._expected, strict=True):
            if not (result.float() - expected.float()).norm() <= TOLERANCE * expected.float().norm():
                raise Unfit("computes something else")
        self.spilled[tile] = spilled

    def _run_anew(self) -> tuple[list[Tensor], int]:
        """What both passes compute, and the bytes that the kernel spills as they launch it.

        Both, since what a forward kernel saves shows in the gradients alone.
        """
        kernel = self._table.kernels[self._kernel]
        forget_compiled(kernel)
        with unwritten_is_nan():
            outputs = [output.detach() for output in self._contender.forward()]
            self._contender.prepare("backward")
            return [*outputs, *self._contender.backward()], spilled_bytes(kernel)


@contextlib.contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Inside, while torch's deterministic algorithms are on, fresh memory holds NaN.

    A kernel that writes nothing would else be given memory in which an earlier call left the right result.
    """
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before


def forget_compiled(kernel: Any) -> None:
    """Make Triton load a kernel again, from its cache on disk, at the next launch."""
    kernel.device_caches.clear()


def spilled_bytes(kernel: Any) -> int:
    """Bytes of local memory a thread, the most of what a kernel was launched as since it was last forgotten.

    Triton's `n_spills` counts registers, of 4 bytes.
    """
    caches = kernel.device_caches.values()
    return max((4 * compiled.n_spills for of_device, *_ in caches for compiled in of_device.values()), default=0)
