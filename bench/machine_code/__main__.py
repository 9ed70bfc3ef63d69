"""The machine code of every kernel at the sizes of the presets, and the faults in it, with no GPU.

    python -m bench.machine_code                                        all of it: some minutes at first, then cached
    python -m bench.machine_code --preset llama3.1-8b --arch sm_90      one size on one architecture
    python -m bench.machine_code --kernel rms_norm                      one kernel
    python -m bench.machine_code --diff HEAD --arch sm_90               what changed against another commit
    python -m bench.machine_code --show "attention forward"             where one kernel spends its instructions

Each op of `bench.ops` runs on tensors of the meta device, forward and backward in bfloat16, while
`kernels.launch.record_launches` writes down what its launcher would launch on an A100 (sm_80), H100 (sm_90), B200 (sm_100) or
MI300X (gfx942). That is compiled and the machine code is read; sizes that come to the same code share a row:

    warps      of one program, which the launcher chose beside the tile
    registers  of a thread. NVIDIA has 255 at most; fewer leave room for more programs
    stack      bytes a thread spills to memory when registers run out. Should be 0
    shared     bytes of shared memory of a program
    resident   programs on a multiprocessor at once by the three above, and their warps as a share of those it can hold.
               A kernel that waits for memory hides it with resident warps, or with many loads in flight in each
    load/store bytes of the widest access to global memory. 16 is the most before sm_100, and needs aligned rows
    narrow     arguments that are accessed in fewer than 16 bytes at a time somewhere, with the bytes (l: load, s: store);
               normal for statistics, one float32 a row, and for rows that are not aligned
    matrix     matrix instructions in the code. On sm_90 a product that is not HGMMA, on sm_100 not UTC*MMA, is slow

The gate: a kernel is at fault that spills, wants more shared memory than there is, or loads or stores half-precision
rows in fewer than 16 bytes (AMD: stores in fewer than 8) although they are aligned. Then the exit status is 1, with --diff
only where a fault is new; it is 2 for a mistake in the options.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import command
from bench.machine_code import diff as machine_code_diff
from bench.machine_code import show as machine_code_show
from bench.machine_code.build import MachineCode
from bench.machine_code.rows import WIDE, Row, record, sizes, tile
from bench.measure import environment, write_json
from kernels.launch import HAVE_TRITON, TARGETS
from model.config import PRESETS
from training.errors import UserError, fail


@dataclass(kw_only=True)
class MachineCodeOptions:
    """Build the kernels with no GPU and print what their machine code needs and does."""

    arch: list[str] = field(default_factory=list)
    """Architectures: sm_80, sm_90, sm_100, gfx942; empty: all (--show: sm_90)."""
    preset: list[str] = field(default_factory=list)
    """Presets whose sizes to build, as in train.py; empty: all (--show: reference)."""
    kernel: str = ""
    """Only rows with this in the kernel column, e.g. swiglu or backward."""
    jobs: int = os.cpu_count() or 1
    """Kernels to build at a time."""
    json: str = ""
    """File to write the result to."""
    diff: str = ""
    """A commit, branch or tag: build the same there, and print only what differs."""
    show: str = ""
    """A kernel, as in the kernel column: print its loops and, line by line, the instructions of the hottest one."""
    loop: int = 0
    """With --show, the loop to print, by its number in the table; 0: the hottest."""
    whole: bool = False
    """With --show, print the kernel's instructions one by one."""


def check(options: MachineCodeOptions) -> None:
    """UserError for what can't be asked for, or not here."""
    for option, given, allowed in (("--arch", options.arch, TARGETS), ("--preset", options.preset, PRESETS)):
        for name in given:
            if name not in allowed:
                raise UserError(f"{option} is {name!r}; allowed: {', '.join(allowed)}")
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; it must be at least 1")
    if options.show:
        for option in ("diff", "kernel", "json"):
            if getattr(options, option):
                raise UserError(f"--{option} is given with --show, which prints one kernel of this working tree")
        for option in ("arch", "preset"):
            if len(getattr(options, option)) > 1:
                raise UserError(f"--{option} names {len(getattr(options, option))}; --show takes one")
    elif options.loop or options.whole:
        raise UserError(f"--{'loop' if options.loop else 'whole'} is given without --show")
    if not HAVE_TRITON:
        raise UserError("bench.machine_code: Triton is not installed here (it has no build for this machine?)")


def sweep(options: MachineCodeOptions, console: Console) -> list[Row]:
    """Build what the options ask for. UserError for a kernel that is not there."""
    recorded = record(options.arch or list(TARGETS), options.preset or list(PRESETS))
    rows = [row for row in recorded if options.kernel in row.name]
    if not rows:
        names = ", ".join(dict.fromkeys(row.name for row in recorded))
        raise UserError(f"--kernel is {options.kernel!r}, which is in none of: {names}")
    with ThreadPoolExecutor(options.jobs) as pool:  # the time goes into LLVM and assemblers, outside Python's lock
        codes = track(
            pool.map(Row.build, rows), "building", len(rows), console=console, disable=not console.is_terminal
        )
        for row, code in zip(rows, codes, strict=True):
            row.code = code
    return rows


def table(rows: list[Row]) -> Table:
    """The rows of one architecture."""
    shown = Table(title=f"{rows[0].arch}, bfloat16")
    for column in ("kernel", "sizes", "tile", "presets"):
        shown.add_column(column, overflow="fold")
    for column in ("warps", "registers", "stack", "shared", "resident", "load/store"):
        shown.add_column(column, justify="right")
    shown.add_column("narrow", overflow="fold")
    shown.add_column("matrix")
    for row in rows:
        constants = row.specialized.constants
        names = (row.name, sizes(constants), tile(constants), " ".join(row.presets))
        shown.add_row(*names, *_figures(row.code), style="red" if row.faults else None)
    return shown


def _figures(code: MachineCode) -> tuple[str, ...]:
    narrow = [f"{name.removesuffix('_ptr')} l{width}" for name, width in code.loads.items() if width < WIDE]
    narrow += [f"{name.removesuffix('_ptr')} s{width}" for name, width in code.stores.items() if width < WIDE]
    return (
        str(code.warps),
        str(code.registers),
        str(code.stack),
        f"{code.shared:,}",
        f"{code.programs} ({code.occupancy:.0%})",
        f"{code.widest_load}/{code.widest_store}",
        ", ".join(narrow),
        " ".join(f"{kind} {count}" for kind, count in code.matrix.items()),
    )


def show(rows: list[Row], console: Console) -> None:
    """Print a table an architecture, and the faults in words."""
    for arch in dict.fromkeys(row.arch for row in rows):
        console.print(table([row for row in rows if row.arch == arch]))
    for row in rows:
        for fault in row.faults:
            console.print(f"[red]{row.arch} {row.name}[/red] of {', '.join(row.presets)}: {fault}")
    console.print(f"{len(rows)} kernels built, {sum(bool(row.faults) for row in rows)} at fault")


def run(options: MachineCodeOptions, console: Console) -> int:
    """Do what the options ask for; 1 where a kernel is at fault, or with --diff has a fault that it had not."""
    check(options)
    if options.show:
        arch, preset = (options.arch or ["sm_90"])[0], (options.preset or ["reference"])[0]
        row = machine_code_show.choose(options.show, record([arch], [preset]))
        machine_code_show.show(row, console, loop=options.loop, whole=options.whole)
        return 0
    result: dict[str, Any] = {"bench": "machine_code"}
    if options.diff:
        before = machine_code_diff.rows_at(options.diff, selection(options), console)
    rows = sweep(options, console)
    result["rows"] = [row.result() for row in rows]
    if options.diff:
        changes = machine_code_diff.difference(before, result["rows"])
        machine_code_diff.show(changes, options.diff, console)
        at_fault = any(change.new_faults for change in changes)
    else:
        show(rows, console)
        at_fault = any(row.faults for row in rows)
    if options.json:
        write_json(options.json, result | {"environment": environment()})
    return int(at_fault)


def selection(options: MachineCodeOptions) -> list[str]:
    """The options that choose what is built, as a command line."""
    chosen = [
        word for name in ("arch", "preset") if (given := getattr(options, name)) for word in (f"--{name}", *given)
    ]
    return [*chosen, *(["--kernel", options.kernel] if options.kernel else []), "--jobs", str(options.jobs)]


def main() -> int:
    """Parse the command line and run it; 2 for a user's mistake, 130 after Ctrl-C."""
    command.leave_interpreter()
    options = tyro.cli(MachineCodeOptions, description=MachineCodeOptions.__doc__, prog=command.program())
    try:
        return run(options, Console(width=None if sys.stdout.isatty() else 200))
    except UserError as error:
        fail(error, command.program())
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
