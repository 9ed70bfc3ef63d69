"""Each op against its peers, forward and backward: `python -m bench.ops --op swiglu --preset reference 8192x4096`.

Variants are those of the op's sheet, `bench/ops/<switch>.py`: the torch twin (`eager`), the same compiled, Liger's op, SDPA's
backends, FlexAttention, and so on, and the kernel here (`triton`). Beside them stand the ceilings, measured in the
same run: a copy of as many bytes as the op must move, timed in turns with the variants; and a matrix product, right after a
rest (burst) and after a second of nothing else (sustained, when a GPU is at its power limit).
On a GPU the time is the GPU's own, with cold caches; what Python needs to launch an op is in `bench.step`'s figures.
Algorithms are deterministic as in training, but for variants that have none such.

`--tune attention` and `--tune mlp` search better tiles for this GPU instead (`bench/ops/tune/`). `pytest bench/ --benchmark-only`
measures the same cases, for pytest-benchmark's tools to compare and draw.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import command
from bench.measure import GpuInstant, Timing, environment, gpu_flush, time_in_turn, wall_clock, write_json
from bench.ops.catalogue import SHEETS, VARIANTS
from bench.ops.contender import Contender
from bench.ops.rows import OpRow, Speed
from bench.ops.sheet import Case
from bench.ops.sizes import cut, size
from bench.ops.tune.report import search_and_show
from model.flops import Cost
from training.config import TrainConfig
from training.device import resolve_device, resolve_dtype, set_determinism
from training.errors import UserError

OPS = tuple(SHEETS)
WARMUP = 5
CPU_TOKENS = 1024


@dataclass(kw_only=True)
class OpsBench:
    """Time the ops that have a Triton kernel."""

    op: str = ""
    """Only ops with this in their name."""
    preset: list[str] = field(default_factory=list)
    """Sizes: presets, 8192x2048, 8192x4096, 8192x8192, 4x4096x128 or 4x4096x64 (batch, sequence, head dim); empty: those worth
    knowing of each op on a GPU, smoke on a CPU."""
    variants: list[str] = field(default_factory=list)
    """What to time beside the copy; empty: all."""
    repeats: int = 50
    """Counted calls of each variant."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the activations; auto: as in train.py."""
    deterministic: bool = True
    """Deterministic algorithms, as in training."""
    tune: str = ""
    """An op with a table of tiles, attention or mlp: search a better row for this GPU, and print it."""
    json: str = ""
    """File to write the result to; it grows as sizes, or tiles, are done."""


def measure(options: OpsBench, console: Console) -> dict:
    """Time what was asked for, print a table an op and return (and write, where asked) the result."""
    command.check_at_least(options, repeats=1)
    command.check_writable(options.json)
    ops = [op for op in OPS if options.op in op]
    if not ops:
        raise UserError(f"--op is {options.op!r}, which is in the name of no op that has a kernel: {', '.join(OPS)}")
    for variant in options.variants:
        if variant not in VARIANTS:
            raise UserError(f"--variants is {variant!r}; allowed: {', '.join(VARIANTS)}")
    config = TrainConfig(device=options.device, dtype=options.dtype)
    config.check()
    set_determinism(options.deterministic)
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    on_gpu = device.type == "cuda"
    asked = {name: size(name) for name in options.preset}
    if options.tune:
        return search_and_show(options.tune, list(asked), dtype, device, options.repeats, options.json, console)
    if not on_gpu:
        console.print(
            f"no GPU here: what runs on the CPU is timed there, {CPU_TOKENS} tokens at most; the kernels, the peers that need "
            "a GPU and whatever is true of one are not measured"
        )
    variants = {op: [v for v in SHEETS[op].peers if not options.variants or v in options.variants] for op in ops}
    peers = {v: SHEETS[op].peers[v] for op in ops for v in variants[op]}
    absent = {v: reason for v, peer in peers.items() if (reason := peer.why_absent(device, dtype))}
    result: dict[str, Any] = {"bench": "ops", "dtype": str(dtype).removeprefix("torch.")}
    result |= {"deterministic": options.deterministic, "absent": absent, "rows": [], "environment": environment()}
    ceiling = 0.0
    for op in ops:
        sizes = asked or {name: size(name) for name in (SHEETS[op].sizes if on_gpu else ("smoke",))}
        rows: list[OpRow] = []
        with console.status("") as status:
            for name, config in sizes.items():
                if not SHEETS[op].serves(config):
                    console.print(f"{op}: no kernel for the size {name}")
                    continue
                status.update(f"{op}, {name}")
                case = SHEETS[op].case(config if on_gpu else cut(config, CPU_TOKENS), dtype, device)
                if not ceiling and any(cost.flops for cost in case.costs.values()):
                    result["ceilings"] = matmul_ceilings(dtype, device)
                    ceiling = 1e12 * result["ceilings"]["matmul_tflops"]
                runnable = [v for v in variants[op] if v not in absent]
                rows += measure_case(op, name, case, runnable, device, options.repeats, ceiling)
                if options.json:
                    write_json(options.json, result | {"rows": result["rows"] + [row.result() for row in rows]})
                torch.compiler.reset()  # or the ninth size would be one recompilation too many
        result["rows"] += [row.result() for row in rows]
        console.print(table(op, rows, variants[op], result))
    if any("triton" in row["failed"] for row in result["rows"]):
        raise SystemExit(1)
    return result


# ------------------------------------------------------------------------------------------------------------- ceilings


def copy_of(n_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that moves so many bytes: it reads half of them and writes the other half."""
    source = torch.randint(256, (n_bytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def matmul_ceilings(
    dtype: torch.dtype, device: torch.device, clock: Callable | None = None, rest: float = 1.0, seconds: float = 1.5
) -> dict[str, float]:
    """TFLOP/s of a matrix product, 8192^3 on a GPU: of the best call after a rest, and the median when `seconds` (s) of calls
    have gone before. Of normal numbers: zeros take less power, and a GPU at its power limit is faster with them.
    """
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    timed = functools.partial(time_in_turn, {"matmul": lambda: a @ b}, clock=clock or clock_of(device))
    timed(repeats=1)  # what happens once, happens here
    time.sleep(rest)
    burst = timed(repeats=5, warmup=2)["matmul"].minimum
    before = math.ceil(seconds / burst)
    sustained = timed(repeats=max(5, before // 10), warmup=before)["matmul"].median
    flops = 2 * n**3 / 1e12
    return {"matmul_tflops": flops / burst, "sustained_matmul_tflops": flops / sustained}


# --------------------------------------------------------------------------------------------------------------- timing


def clock_of(device: torch.device) -> Callable:
    """The clock that calls on a device are timed by."""
    return GpuInstant if device.type == "cuda" else wall_clock


def measure_case(
    op: str, size: str, case: Case, variants: list[str], device: torch.device, repeats: int, ceiling: float = 0.0
) -> list[OpRow]:
    """A row a pass; where there is a forward and a backward, a third of both, by the sums of the medians.

    ceiling: FLOP/s of a matrix product, 0 where it was not measured.
    """
    contenders, failed = {}, {}
    for variant in variants:
        try:
            contenders[variant] = Contender(op, variant, case)
        except Exception as error:  # of a peer's or of a kernel being written: the others are measured none the less
            failed[variant] = f"{type(error).__name__}: {error}".splitlines()[0]
    flush = gpu_flush(device) if device.type == "cuda" else lambda: None
    costs = dict(case.costs)
    timed: dict[str, dict[str, Timing]] = {}
    for direction, cost in costs.items():
        calls = {"copy": copy_of(cost.bytes, device)}
        calls |= {name: functools.partial(contender.run, direction) for name, contender in contenders.items()}

        def before(name: str, direction: str = direction) -> None:
            if name in contenders:
                contenders[name].prepare(direction)
            flush()

        timed[direction] = time_in_turn(calls, repeats=repeats, warmup=WARMUP, clock=clock_of(device), before=before)
    if "backward" in costs:
        costs["both"] = costs["forward"] + costs["backward"]
        pairs = ((name, forward, timed["backward"][name]) for name, forward in timed["forward"].items())
        timed["both"] = {
            name: Timing(f.median + b.median, f.minimum + b.minimum, f.maximum + b.maximum, f.repeats)
            for name, f, b in pairs
        }
    rows = [
        OpRow(op, size, case.shape, name, cost.bytes, cost.flops, speeds(timed[name], cost, ceiling), failed)
        for name, cost in costs.items()
    ]
    if device.type == "cuda" and "both" in costs:
        for name, contender in contenders.items():
            rows[-1].timings[name].peak_memory = peak_memory(contender)
    return rows


def peak_memory(contender: Contender) -> int:
    """Most bytes of GPU memory that a forward and a backward pass hold beyond their arguments."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender.run("both")
    return torch.cuda.max_memory_allocated() - before


def speeds(timings: dict[str, Timing], cost: Cost, ceiling: float = 0.0) -> dict[str, Speed]:
    """The figures of one pass, by variant. ceiling: FLOP/s of a matrix product, 0 where it was not measured."""
    copy = timings["copy"].median
    found = {}
    for name, t in timings.items():
        speed = Speed(1e6 * t.median, cost.bytes / t.median / 1e9, copy / t.median, 1e6 * t.minimum, 1e6 * t.maximum)
        if cost.flops and name != "copy":
            speed.tflops = cost.flops / t.median / 1e12
            speed.of_matmul = cost.flops / t.median / ceiling if ceiling else None
        found[name] = speed
    return found


# ---------------------------------------------------------------------------------------------------------------- table


def table(op: str, rows: list[OpRow], variants: list[str], result: dict) -> Table:
    """The rows of an op as people read them: microseconds by variant, then how good the kernel's are, then memory."""
    env = result["environment"]
    title = f"{op}: {result['dtype']}, {env['device']}, torch {env['torch']}, microseconds (median)"
    shown = Table(title=title, caption="")
    for heading in ("size", "shape", "pass"):
        shown.add_column(heading)
    notes = []
    if has_flops := any(row.flops for row in rows):
        speeds = {"TFLOP/s": ("tflops", "{:.0f}"), "of matmul": ("of_matmul", "{:.0%}")}
        burst, sustained = (result["ceilings"][f"{name}matmul_tflops"] for name in ("", "sustained_"))
        notes.append(f"a matmul in this run: {burst:.3g} TFLOP/s in a burst, {sustained:.3g} sustained")
    else:
        speeds = {"GB/s": ("gb_per_s", "{:.0f}"), "of copy": ("of_copy", "{:.0%}")}
    has_kernel = any("triton" in row.timings for row in rows)
    if has_kernel:
        notes.insert(0, f"{', '.join(speeds)} and speed against the best peer (above 1 is faster) are those of triton")
    for heading in ("copy", *variants, *((*speeds, "vs best peer") if has_kernel else ())):
        shown.add_column(heading, justify="right")
    for row in rows:
        timings = row.timings
        missing = result["absent"] | dict.fromkeys(row.failed, "failed")
        cells = [f"{timings[name].us:.1f}" if name in timings else missing[name] for name in ("copy", *variants)]
        if "triton" in timings:
            cells += [form.format(getattr(timings["triton"], figure)) for figure, form in speeds.values()]
            cells.append("n/a" if row.best_peer is None else "{1:.2f}x {0}".format(*row.best_peer))
        memory = {name: speed.peak_memory for name, speed in timings.items() if speed.peak_memory is not None}
        is_last = row.direction in ("both", "update")
        shows_memory = has_flops and memory
        shown.add_row(row.size, row.shape, row.direction, *cells, end_section=is_last and not shows_memory)
        if shows_memory:
            cells = [f"{memory[name] / 2**30:.2f}" if name in memory else "" for name in variants]
            shown.add_row(row.size, row.shape, "peak GiB", "", *cells, end_section=True)
    notes += sorted({f"failed: {name}: {reason}" for row in rows for name, reason in row.failed.items()})
    shown.caption = "\n".join(notes)
    return shown


if __name__ == "__main__":
    command.run(OpsBench, __doc__, measure)
