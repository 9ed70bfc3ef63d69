"""The machine code of every kernel at the sizes of the presets, and the faults in it, with no GPU.

    python -m bench.machine_code                                        all of it: some minutes at first, then cached
    python -m bench.machine_code --preset llama3.1-8b --arch sm_90      one size on one architecture
    python -m bench.machine_code --kernel rms_norm                      one kernel

Each op of `CASES` runs on tensors of the meta device, forward and backward in bfloat16, while `kernels.launch.recorded`
writes down what its launcher would launch on an A100 (sm_80), H100 (sm_90), B200 (sm_100) or MI300X (gfx942). That is
compiled and the machine code is read; sizes that come to the same code share a row:

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
rows in fewer than 16 bytes (AMD: stores in fewer than 8) although they are aligned. Then the exit status is 1; it is 2
for a mistake in the options.

A new kernel is one more line in `CASES`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import kernels
from bench.build import MachineCode, Specialized, build, specialize
from bench.measure import environment, write_json
from kernels.launch import HAVE_TRITON, TARGETS, Launched, Target, recorded
from kernels.rope import split_qkv
from model import Llama
from model.config import PRESETS
from training.config import TrainConfig, defaults, fail
from training.errors import UserError
from training.flat import FlatParameters
from training.optimizer import FusedAdamW

WIDE = 16
"""Bytes of the widest access that every architecture here has."""


@dataclass(kw_only=True)
class MachineCodeOptions:
    """Build the kernels with no GPU and print what their machine code needs and does."""

    arch: list[str] = field(default_factory=list)
    """Architectures: sm_80, sm_90, sm_100, gfx942; empty: all."""
    preset: list[str] = field(default_factory=list)
    """Presets whose sizes to build, as in train.py; empty: all."""
    kernel: str = ""
    """Only rows with this in the kernel column, e.g. swiglu or backward."""
    jobs: int = os.cpu_count() or 1
    """Kernels to build at a time."""
    json: str = ""
    """File to write the result to."""


# ---------------------------------------------------------------------------------------------------------------- cases


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _hidden(c: TrainConfig) -> Tensor:
    return _tensor(c.batch_size, c.max_seq_len, c.dim)


def _norm_weight(c: TrainConfig) -> Tensor:
    return _tensor(c.dim, dtype=torch.float32)


def _gate_up(c: TrainConfig) -> Tensor:
    return _tensor(c.batch_size, c.max_seq_len, 2 * c.hidden_dim)


def _packed(c: TrainConfig) -> Tensor:
    return _tensor(c.batch_size, c.max_seq_len, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim)


def _qkv(c: TrainConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one packed product, as in the model."""
    return split_qkv(_packed(c), c.n_heads, c.n_kv_heads)


def _first_key(c: TrainConfig) -> Tensor:
    return _tensor(c.batch_size, c.max_seq_len, dtype=torch.int32)


def _rope_tables(c: TrainConfig) -> tuple[Tensor, Tensor]:
    table = _tensor(c.max_seq_len, c.head_dim // 2, dtype=torch.float32).detach()
    return table, table.clone()


def _head(c: TrainConfig) -> Tensor:
    return _tensor(c.vocab_size, c.dim, dtype=torch.float32)


def _targets(c: TrainConfig) -> Tensor:
    return _tensor(c.batch_size * c.max_seq_len, dtype=torch.int64)


def _update(c: TrainConfig) -> tuple:
    with torch.device("meta"):
        model = Llama(c.shape(), kernels.select("none", c.n_layers), torch.bfloat16)
        FusedAdamW(FlatParameters(model), c).update(factor=torch.empty(()), skip=torch.empty(()))
    return ()


# What to run for a preset: the public op, on tensors as the model passes them. The backward pass of what it returns is
# run too, where that has one.
CASES: dict[str, Callable[[TrainConfig], Any]] = {
    "rms_norm": lambda c: kernels.TRITON.rms_norm(_hidden(c), _norm_weight(c), c.norm_eps),
    "add_rms_norm": lambda c: kernels.TRITON.add_rms_norm(_hidden(c), _hidden(c), _norm_weight(c), c.norm_eps),
    "rope": lambda c: kernels.TRITON.rope(*_qkv(c)[:2], *_rope_tables(c)),
    "rope_qkv": lambda c: kernels.TRITON.rope_qkv(_packed(c), *_rope_tables(c), c.n_heads, c.n_kv_heads),
    "swiglu": lambda c: kernels.TRITON.swiglu(_gate_up(c)),
    "attention": lambda c: kernels.TRITON.attention(*_qkv(c)),
    "packed_attention": lambda c: kernels.TRITON.attention(*_qkv(c), _first_key(c)),
    "linear_cross_entropy": lambda c: kernels.TRITON.linear_cross_entropy(
        _hidden(c).flatten(0, 1), _head(c), _targets(c), compute_weight=_head(c).bfloat16()
    ),
    "adamw": _update,
}


def launches(case: str, config: TrainConfig, target: Target) -> Iterator[tuple[str, Launched]]:
    """Each launch of a case at the sizes of a preset, with `forward` or `backward`."""
    with recorded(target) as found:
        outputs = CASES[case](config)
        n_forward = len(found)
        outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    for i, launched in enumerate(found):
        yield "forward" if i < n_forward else "backward", launched


# ----------------------------------------------------------------------------------------------------------------- gate


def faults(code: MachineCode, launched: Launched, target: Target) -> list[str]:
    """What is wrong with the machine code of a launch, in words; nothing where nothing is."""
    found = []
    if code.stack:
        found.append(f"spills: {code.stack} bytes a thread, at {code.registers} registers")
    if code.shared > target.shared_memory:
        found.append(f"wants {code.shared:,} bytes of shared memory; there are {target.shared_memory:,}")
    # AMD's backend stores a product as its lanes hold it, 8 bytes each: 64 of them write as much at once as 32 of 16.
    for verb, widths, least in (("loads", code.loads, WIDE), ("stores", code.stores, WIDE * 32 // target.warp_size)):
        for name, width in widths.items():
            if width < least and _has_aligned_rows(launched.arguments.get(name)):
                found.append(f"{verb} {name} {width} bytes at a time, although its rows are aligned to {WIDE}")
    return found


def _has_aligned_rows(argument: Any) -> bool:
    """Whether it is a half-precision tensor in which each row starts and ends at a multiple of 16 bytes."""
    if not isinstance(argument, Tensor) or argument.element_size() != 2 or argument.dim() == 0:
        return False
    *strides, last = argument.stride()
    elements = WIDE // argument.element_size()
    sizes = (argument.storage_offset(), argument.shape[-1], *strides)
    return last == 1 and all(size % elements == 0 for size in sizes)


# ---------------------------------------------------------------------------------------------------------------- sweep


@dataclass
class Row:
    """A kernel as one or more presets launch it on one architecture."""

    arch: str
    case: str
    direction: str
    launched: Launched
    specialized: Specialized
    presets: list[str] = field(default_factory=list)
    code: MachineCode | None = None

    @property
    def kernel(self) -> str:
        """File and function."""
        return f"{self.launched.kernel.__module__.rpartition('.')[2]}.{self.launched.kernel.__name__}"

    @property
    def name(self) -> str:
        """Op, direction, and the kernel's own name where it says more: `add_rms_norm backward`."""
        function = self.launched.kernel.__name__.strip("_").removesuffix("_kernel")
        return " ".join(dict.fromkeys((self.case, self.direction, function)))

    @property
    def faults(self) -> list[str]:
        """What the gate says."""
        return faults(self.code, self.launched, TARGETS[self.arch])

    def result(self) -> dict[str, Any]:
        """The row for JSON."""
        names = ("name", "arch", "case", "direction", "kernel", "presets", "faults")
        return {name: getattr(self, name) for name in names} | {
            "constants": self.specialized.constants,
            "code": asdict(self.code),
        }


def sweep(options: MachineCodeOptions, console: Console) -> list[Row]:
    """Build what the options ask for. UserError for what they cannot ask for."""
    _check("--arch", options.arch, TARGETS)
    _check("--preset", options.preset, PRESETS)
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; it must be at least 1")
    if not HAVE_TRITON:
        raise UserError("bench.machine_code: Triton is not installed here (it has no build for this machine?)")
    recorded_rows = _record(options)
    rows = [row for row in recorded_rows if options.kernel in row.name]
    if not rows:
        names = ", ".join(dict.fromkeys(row.name for row in recorded_rows))
        raise UserError(f"--kernel is {options.kernel!r}, which is in none of: {names}")
    with ThreadPoolExecutor(options.jobs) as pool:  # the time goes into LLVM and assemblers, outside Python's lock
        codes = track(pool.map(_build, rows), "building", len(rows), console=console, disable=not console.is_terminal)
        for row, code in zip(rows, codes, strict=True):
            row.code = code
    return rows


def _record(options: MachineCodeOptions) -> list[Row]:
    """Each code there is to build, once, forward before backward."""
    rows: dict[tuple[str, str, str, str], Row] = {}
    for arch in options.arch or TARGETS:
        for case in CASES:
            for preset in options.preset or PRESETS:
                for direction, launched in launches(case, defaults(preset), TARGETS[arch]):
                    specialized = specialize(launched, TARGETS[arch])
                    new = Row(arch, case, direction, launched, specialized)
                    row = rows.setdefault((arch, case, direction, specialized.key), new)
                    if preset not in row.presets:
                        row.presets.append(preset)
    archs, cases = list(TARGETS), list(CASES)
    return sorted(
        rows.values(), key=lambda row: (archs.index(row.arch), cases.index(row.case), row.direction != "forward")
    )


def _build(row: Row) -> MachineCode:
    try:
        return build(row.specialized)
    except Exception as error:
        error.add_note(f"while building {row.name} of {', '.join(row.presets)} for {row.arch}")
        raise


def _check(option: str, given: list[str], allowed: Any) -> None:
    for name in given:
        if name not in allowed:
            raise UserError(f"{option} is {name!r}; allowed: {', '.join(allowed)}")


# ---------------------------------------------------------------------------------------------------------------- print


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
        code = row.code
        constants = row.specialized.constants.items()
        sizes = {name: n for name, n in constants if type(n) is int and name.isupper() and name != "ALIGNMENT"}
        narrow = [f"{name.removesuffix('_ptr')} l{width}" for name, width in code.loads.items() if width < WIDE]
        narrow += [f"{name.removesuffix('_ptr')} s{width}" for name, width in code.stores.items() if width < WIDE]
        shown.add_row(
            row.name,
            " ".join(f"{name}={size}" for name, size in sizes.items() if not name.startswith("BLOCK_")),
            "×".join(str(size) for name, size in sizes.items() if name.startswith("BLOCK_")),
            " ".join(row.presets),
            str(code.warps),
            str(code.registers),
            str(code.stack),
            f"{code.shared:,}",
            f"{code.programs} ({code.occupancy:.0%})",
            f"{code.widest_load}/{code.widest_store}",
            ", ".join(narrow),
            " ".join(f"{kind} {count}" for kind, count in code.matrix.items()),
            style="red" if row.faults else None,
        )
    return shown


def show(rows: list[Row], console: Console) -> None:
    """Print a table an architecture, and the faults in words."""
    for arch in dict.fromkeys(row.arch for row in rows):
        console.print(table([row for row in rows if row.arch == arch]))
    for row in rows:
        for fault in row.faults:
            console.print(f"[red]{row.arch} {row.name}[/red] of {', '.join(row.presets)}: {fault}")
    console.print(f"{len(rows)} kernels built, {sum(bool(row.faults) for row in rows)} at fault")


def main() -> int:
    """Parse the command line, build, print; 1 where a kernel is at fault."""
    if "TRITON_INTERPRET" in os.environ:  # kernels that were defined in the interpreter cannot be compiled
        environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "bench.machine_code", *sys.argv[1:]], environ)
    options = tyro.cli(MachineCodeOptions, description=MachineCodeOptions.__doc__)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        rows = sweep(options, console)
        show(rows, console)
        if options.json:
            rows_json = [row.result() for row in rows]
            write_json(options.json, {"bench": "machine_code", "rows": rows_json, "environment": environment()})
    except UserError as error:
        fail(error)
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
