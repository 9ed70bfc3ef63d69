"""What the loops of a kernel come to in time, counted in their machine code, beside what an H100 took.

    python -m bench.machine_code.counted                            some minutes: 244 tiles of attention, and the feed-forward
    python -m bench.machine_code.counted --only "heads of 128"      one shape
    python -m bench.machine_code.counted --only mlp

For each tile of attention that an H100 has timed (a search's JSON in bench/results/), today's kernel is built with it, and its
cycles are added up (`bench.machine_code.cycles`) over the passes that its loops make at that shape, all programs shared out evenly
among the multiprocessors as if the last wave were full. The last column is what was measured for each microsecond counted: how far
such a count can be trusted, and for what kind of kernel (the one that was measured may be an older one). The feed-forward in one
kernel (`mlp`), which no GPU has timed, is counted in the same way.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import archive, command
from bench.machine_code.build import MachineCode, Specialized, build, compile_specialized, disassemble, specialize
from bench.machine_code.cycles import Cycles, cycles, in_loops
from bench.machine_code.rows import launches
from bench.measure import environment, write_json
from bench.ops.tune.tables import ATTENTION, MLP, TileTable
from kernels.launch import HAVE_TRITON, TARGETS, ceil_div
from training.config import TrainConfig, defaults
from training.errors import UserError

H100 = TARGETS["sm_90"]
MEASURED = archive.RESULTS / "2026-11-26-nvidia-h100-80gb-hbm3" / "tiles-attention.json"
SPILL_LIMIT = 64
"""Bytes a thread: what spills more waits for memory, which no count of instructions shows."""

Passes = list[tuple[int, tuple[int, ...]]]
"""Programs that do the same, and how often each of them passes through each of its loops."""


@dataclass(kw_only=True)
class Counted:
    """Count the cycles of attention's and the feed-forward's kernels, and compare them with an H100's times."""

    measured: str = str(MEASURED)
    """JSON of a search in which an H100 has timed attention's kernels one by one: rows of a shape, a kernel, its tile and `us`."""
    only: str = ""
    """Only rows with this in the shape or the kernel, e.g. "heads of 128", dq or mlp."""
    jobs: int = os.cpu_count() or 1
    """Kernels to build at a time."""
    json: str = ""
    """File to write the result to."""


# --------------------------------------------------------------------------------------------------------------- passes


def attention_passes(kernel: str, config: TrainConfig, tile: Any) -> Passes:
    """Of the loop over blocks that are seen whole, and of that over those which the diagonal cuts."""
    length = config.max_seq_len
    if kernel in ("forward", "dq"):
        passes = []
        for first in range(0, length, tile.block_m):
            blocks, whole = ceil_div(min(first + tile.block_m, length), tile.block_n), (first + 1) // tile.block_n
            passes.append((config.batch_size * config.n_heads, (whole, blocks - whole)))
        return passes
    group, passes = config.n_heads // config.n_kv_heads, []
    for first in range(0, length, tile.block_n):
        blocks = ceil_div(length - first, tile.block_m)
        diagonal = min(ceil_div(tile.block_n - 1, tile.block_m), blocks)
        whole = max((length - first) // tile.block_m - diagonal, 0)
        passes.append((config.batch_size * config.n_kv_heads, (group * whole, group * (blocks - whole))))
    return passes


def mlp_passes(kernel: str, config: TrainConfig, tile: Any) -> Passes:
    """Of the loop over hidden columns."""
    rows = config.batch_size * config.max_seq_len
    return [(ceil_div(rows, tile.block_m), (ceil_div(config.hidden_dim, tile.block_f),))]


# ----------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Case:
    """A kernel with a tile at a shape."""

    shape: str
    kernel: str
    tile: Any
    measured_us: float | None
    specialized: Specialized
    passes: Passes

    def row(self, gigahertz: float) -> dict[str, Any]:
        """Build and count it. "why" says what is in the way of a count, where something is."""
        try:
            code = build(self.specialized)
            outside, loops = in_loops(disassemble(compile_specialized(self.specialized)))
        except Exception as error:  # whatever the compiler says: the search has such tiles too
            while error.__cause__ is not None:  # Triton's outer errors say where, the innermost what
                error = error.__cause__
            return self._names() | {"why": f"{type(error).__name__}: {error}".splitlines()[0]}
        figures = {"registers": code.registers, "stack": code.stack, "warps": code.warps, "resident": code.programs}
        if not code.programs:
            return self._names() | figures | {"why": "a multiprocessor has no room for one program"}
        if len(loops) != len(self.passes[0][1]):
            return self._names() | figures | {"why": f"{len(loops)} loops, {len(self.passes[0][1])} in the source"}
        return self._names() | figures | self._times(outside, loops, code, gigahertz)

    def _names(self) -> dict[str, Any]:
        names = {"shape": self.shape, "kernel": self.kernel, "tile": list(self.tile)}
        return names | ({} if self.measured_us is None else {"measured_us": self.measured_us})

    def _times(self, outside: list, loops: list[list], code: MachineCode, gigahertz: float) -> dict[str, Any]:
        once, each = cycles(outside, code.warps), [cycles(body, code.warps) for body in loops]
        busy = Cycles()
        for programs, passes in self.passes:
            busy += sum((loop * n for loop, n in zip(each, passes, strict=True)), once) * programs
        us = busy * (1 / (H100.multiprocessors * gigahertz * 1000))
        times = {"matrix_us": us.matrix, "issue_us": us.issue, "special_us": us.special, "counted_us": us.total}
        return times | ({} if self.measured_us is None else {"ratio": self.measured_us / us.total})


def cases(measured: dict[str, Any]) -> Iterator[Case]:
    """Those that were measured, then the feed-forward. UserError where a row is none of such a search."""
    for row in measured["rows"]:
        if row.get("kernel") in ATTENTION.kernels and row.get("us") is not None:
            try:
                config, tile = _config(row["shape"]), _tile(row)
                us = float(row["us"])
                if not 0 < us < math.inf:
                    raise ValueError(f"us is {us}")
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"--measured has a row that is no tile of attention: {row}: {error!r}") from None
            yield _case(ATTENTION, row["shape"], row["kernel"], config, tile, us, attention_passes)
    config = defaults("reference")
    shape = f"{config.batch_size * config.max_seq_len}x{config.dim}x{config.hidden_dim}"
    for kernel in MLP.kernels:
        tile = MLP.tile_of(kernel, config, 2, H100)
        yield _case(MLP, shape, kernel, config, tile, None, mlp_passes)


def _tile(row: dict[str, Any]) -> Any:
    tile = ATTENTION.grid[0]._make(row[name] for name in ATTENTION.grid[0]._fields)
    if not all(type(n) is int and n > 0 and n & (n - 1) == 0 for n in tile[:3]) or not tile.num_stages > 0:
        raise ValueError(f"{tile} is no tile")
    return tile


def _case(
    table: TileTable, shape: str, kernel: str, config: TrainConfig, tile: Any, us: float | None, passes: Callable
) -> Case:
    with table.holding(kernel, tile):
        launched = [launched for _, launched in launches(table.op, config, H100)]
    (wanted,) = (x for x in launched if x.kernel is table.kernels[kernel])
    name = f"{table.op} {kernel}"
    return Case(shape, name, tile, us, specialize(wanted, H100), passes(kernel, config, tile))


def _config(shape: str) -> TrainConfig:
    """Of a shape as the search wrote it: `128x256, 8 and 4 heads of 36`."""
    sizes, heads = shape.split(", ")
    batch, length = map(int, sizes.split("x"))
    n_heads, _, n_kv_heads, _, _, width = heads.split()
    return TrainConfig(
        batch_size=batch,
        max_seq_len=length,
        dim=int(n_heads) * int(width),
        n_heads=int(n_heads),
        n_kv_heads=int(n_kv_heads),
    )


# ----------------------------------------------------------------------------------------------------------------- show


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Each tile, a table a shape, then what was measured for each microsecond counted, by the kind of kernel."""
    for shape, these in groupby(rows, lambda row: row["shape"]):
        console.print(_shape_table(shape, list(these)))
    if ratios := summary(rows):
        shown = Table(title=f"measured/counted, of tiles that spill {SPILL_LIMIT} bytes at most")
        for column in ("shape", "stages", "resident"):
            shown.add_column(column)
        for column in ("tiles", "least", "median", "most"):
            shown.add_column(column, justify="right")
        for kind, found in ratios:
            shown.add_row(*kind, str(len(found)), *(f"{x:.2f}" for x in (min(found), median(found), max(found))))
        console.print(shown)


def _shape_table(shape: str, rows: list[dict[str, Any]]) -> Table:
    """The tiles of one shape; a tile that is not counted has its name alone."""
    shown = Table(
        title=f"{shape}: microseconds on an H100", caption="programs: resident together; ratio: measured/counted"
    )
    for column in ("kernel", "tile"):
        shown.add_column(column)
    for column in ("programs", "stack", "matrix", "issue", "special", "counted", "measured", "ratio"):
        shown.add_column(column, justify="right")
    for row in rows:
        names = (row["kernel"].removeprefix("attention "), "×".join(map(str, row["tile"])))
        if "why" in row:
            shown.add_row(*names)
            continue
        times = [f"{row[f'{what}_us']:.0f}" for what in ("matrix", "issue", "special", "counted")]
        measured = [f"{row['measured_us']:.0f}", f"{row['ratio']:.2f}"] if "ratio" in row else []
        shown.add_row(*names, str(row["resident"]), str(row["stack"]), *times, *measured)
    return shown


def summary(rows: list[dict[str, Any]]) -> list[tuple[tuple[str, str, str], list[float]]]:
    """Ratios by shape, by the steps whose loads are under way at once, and by whether one program or several are resident."""

    def kind(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["shape"], str(row["tile"][-1]), "one" if row["resident"] == 1 else "several"

    kept = sorted((row for row in rows if "ratio" in row and row["stack"] <= SPILL_LIMIT), key=kind)
    return [(found, [row["ratio"] for row in these]) for found, these in groupby(kept, kind)]


def run(options: Counted, console: Console) -> None:
    """Do what the options ask for. UserError for what can't be asked for, or not here."""
    command.check_at_least(options, jobs=1)
    command.check_writable(options.json)
    if not HAVE_TRITON:
        raise UserError("bench.machine_code.counted: Triton is not installed here (it has no build for this machine?)")
    measured, gigahertz = read(options.measured)
    found = [case for case in cases(measured) if options.only in case.shape or options.only in case.kernel]
    if not found:
        raise UserError(f"--only is {options.only!r}, which is in no shape and no kernel of {options.measured}")
    rows: list[dict[str, Any]] = []
    result = {"bench": "counted", "measured": Path(options.measured).name, "gigahertz": gigahertz, "rows": rows}
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            counted = pool.map(lambda case: case.row(gigahertz), found)
            for row in track(counted, "building", len(found), console=console, disable=not console.is_terminal):
                rows.append(row)
    finally:  # what was counted until a stop is kept
        show(rows, console)
        for row in rows:
            if "why" in row:
                console.print(
                    f"not counted: {row['shape']}, {row['kernel']} {row['tile']}: {row['why']}", highlight=False
                )
        if options.json:
            write_json(options.json, result | {"environment": environment()})


def read(path: str) -> tuple[dict[str, Any], float]:
    """A search's result, and the clock of its GPU's multiprocessors in GHz. UserError where the file is none of an H100's."""
    result = archive.read_one(path)
    for what, found, wanted in (
        ("bench", result.bench, "tiles"),
        ("GPU", result.gpu, "H100 SXM"),
        ("dtype", result.data.get("dtype"), "bfloat16"),
    ):
        if found != wanted:
            raise UserError(
                f"--measured {path} has the {what} {found!r}; it must be {wanted!r}: times of attention's tiles"
            )
    state = result.data["environment"].get("gpu_state") or {}
    clock = re.fullmatch(r"([1-9]\d*) MHz", str(state.get("clocks.sm")))
    if not clock:
        raise UserError(f"--measured {path} does not say its GPU's clock: clocks.sm is {state.get('clocks.sm')!r}")
    return result.data, int(clock[1]) / 1000


if __name__ == "__main__":
    command.leave_interpreter()
    command.run(Counted, Counted.__doc__, run)
