"""What the loops of a kernel come to in time, counted in their machine code, beside what an H100 took.

    python -m bench.machine_code.counted                            some minutes: 240 tiles of attention, and the feed-forward
    python -m bench.machine_code.counted --only "heads of 128"      one shape
    python -m bench.machine_code.counted --only mlp

For each tile of attention that an H100 has timed (a search's JSON in bench/results/), today's kernel is built with it, and its
cycles are added up (`bench.machine_code.cycles`) over the passes that its loops make at that shape, all programs shared out evenly
among the multiprocessors. The last column is what was measured for each microsecond counted: how far such a count can be trusted,
and for what kind of kernel. The feed-forward in one kernel (`mlp`), which no GPU has timed, is counted in the same way.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
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
    """JSON of a search for attention's tiles on an H100."""
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
            return self._names() | {"why": f"{type(error).__name__}: {error}".splitlines()[0]}
        figures = {"registers": code.registers, "stack": code.stack, "warps": code.warps, "resident": code.programs}
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
    """Those that were measured, then the feed-forward. UserError where the JSON is none of such a search."""
    try:
        for row in measured["rows"]:
            if row["kernel"] in ATTENTION.kernels and row.get("us"):
                tile = ATTENTION.grid[0]._make(row[name] for name in ATTENTION.grid[0]._fields)
                config = _config(row["shape"])
                yield _case(ATTENTION, row["shape"], row["kernel"], config, tile, row["us"], attention_passes)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--measured is no search for attention's tiles: {error!r}") from None
    config = defaults("reference")
    shape = f"{config.batch_size * config.max_seq_len}x{config.dim}x{config.hidden_dim}"
    for kernel in MLP.kernels:
        tile = MLP.tile_of(kernel, config, 2, H100)
        yield _case(MLP, shape, kernel, config, tile, None, mlp_passes)


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
    """Each tile, then what was measured for each microsecond counted, by the kind of kernel."""
    shown = Table(title="H100, microseconds")
    for column in ("shape", "kernel", "tile"):
        shown.add_column(column)
    for column in ("stack", "resident", "matrix", "issue", "special", "counted", "measured", "measured/counted"):
        shown.add_column(column, justify="right")
    for row in rows:
        names = (row["shape"], row["kernel"], "×".join(map(str, row["tile"])))
        if "why" in row:
            shown.add_row(*names, row["why"])
            continue
        times = [f"{row[f'{what}_us']:.0f}" for what in ("matrix", "issue", "special", "counted")]
        measured = [f"{row['measured_us']:.0f}", f"{row['ratio']:.2f}"] if "ratio" in row else ["", ""]
        shown.add_row(*names, str(row["stack"]), f"{row['resident']} of {row['warps']} warps", *times, *measured)
    console.print(shown)
    if ratios := summary(rows):
        trusted = Table(title=f"measured/counted, of tiles that spill {SPILL_LIMIT} bytes at most")
        for column in ("shape", "stages", "resident"):
            trusted.add_column(column)
        for column in ("tiles", "least", "median", "most"):
            trusted.add_column(column, justify="right")
        for kind, found in ratios:
            figures = (f"{x:.2f}" for x in (min(found), median(found), max(found)))
            trusted.add_row(*kind, str(len(found)), *figures)
        console.print(trusted)


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
    measured = archive.read_one(options.measured).data
    found = [case for case in cases(measured) if options.only in case.shape or options.only in case.kernel]
    if not found:
        raise UserError(f"--only is {options.only!r}, which is in no shape and no kernel of {options.measured}")
    gigahertz = _gigahertz(measured)
    with ThreadPoolExecutor(options.jobs) as pool:
        counted = pool.map(lambda case: case.row(gigahertz), found)
        rows = list(track(counted, "building", len(found), console=console, disable=not console.is_terminal))
    show(rows, console)
    if options.json:
        result = {"bench": "counted", "measured": os.path.basename(options.measured), "gigahertz": gigahertz}
        write_json(options.json, result | {"rows": rows, "environment": environment()})


def _gigahertz(measured: dict[str, Any]) -> float:
    """The clock of the multiprocessors as the GPU gave it."""
    clock = measured["environment"].get("gpu_state", {}).get("clocks.sm", "")
    if not clock.endswith(" MHz"):
        raise UserError(f"--measured does not say its GPU's clock: gpu_state has clocks.sm {clock!r}")
    return float(clock.removesuffix(" MHz")) / 1000


if __name__ == "__main__":
    command.leave_interpreter()
    command.run(Counted, Counted.__doc__, run)
