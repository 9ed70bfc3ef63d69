"""Each op against its peers, forward and backward: `python -m bench.ops --op swiglu --preset reference 8192x4096`.

Variants: `eager` (the torch twin), `compiled` (the torch twin under torch.compile), `liger` (Liger-Kernel's op) and `triton`
(the kernel here), beside the ceiling: a copy of as many bytes as the op must move, timed in the same way in the same turns.
On a GPU the time is the GPU's own, with cold caches; what Python needs to launch an op is in `bench.step`'s figures.
`pytest bench/ --benchmark-only` measures the same cases, for pytest-benchmark's tools to compare and draw.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kernels
from bench import command, liger
from bench.measure import GpuInstant, Timing, environment, gpu_flush, time_in_turn, wall_clock, write_json
from bench.op_cases import CASES, SIZES, Case, cut, size
from kernels import grammar
from kernels.select import FIELDS
from training.config import TrainConfig
from training.device import resolve_device, resolve_dtype
from training.errors import UserError

Variant = Literal["eager", "compiled", "liger", "triton"]
OPS = [op for switch in grammar.TRITON_SWITCHES for op in FIELDS[switch]]
WARMUP = 5
CPU_TOKENS = 1024


@dataclass(kw_only=True)
class OpsBench:
    """Time the ops that have a Triton kernel."""

    op: str = ""
    """Only ops with this in their name."""
    preset: list[str] = field(default_factory=list)
    """Sizes: presets, 8192x2048, 8192x4096 or 8192x8192; empty: all of them on a GPU, smoke on a CPU."""
    variants: list[Variant] = field(default_factory=list)
    """What to time beside the copy; empty: all."""
    repeats: int = 50
    """Counted calls of each variant."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the activations; auto: as in train.py."""
    json: str = ""
    """File to write the result to; it grows as sizes are done."""


def measure(options: OpsBench, console: Console) -> dict:
    """Time what was asked for, print a table an op and return (and write, where asked) the result."""
    command.check_at_least(options, repeats=1)
    command.check_writable(options.json)
    ops = [op for op in OPS if options.op in op]
    if not ops:
        raise UserError(f"--op is {options.op!r}, which is in the name of no op that has a kernel: {', '.join(OPS)}")
    config = TrainConfig(device=options.device, dtype=options.dtype)
    config.check()
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    sizes = {name: size(name) for name in options.preset or (SIZES if device.type == "cuda" else ["smoke"])}
    variants = [v for v in get_args(Variant) if v in (options.variants or get_args(Variant))]
    absent = {v: reason for v in variants if (reason := why_absent(v, device))}
    if device.type != "cuda":
        sizes = {name: cut(config, CPU_TOKENS) for name, config in sizes.items()}
        console.print(
            f"no GPU here: the torch twins are timed on the CPU, {CPU_TOKENS} tokens at most; the kernels, Liger and whatever "
            "is true of a GPU are not measured"
        )
    result = {"bench": "ops", "dtype": str(dtype).removeprefix("torch."), "absent": absent, "rows": []}
    result["environment"] = environment()
    for op in ops:
        rows: list[dict] = []
        with console.status("") as status:
            for name, config in sizes.items():
                status.update(f"{op}, {name}")
                case = CASES[op](config, dtype, device)
                runnable = [v for v in variants if v not in absent]
                rows += [
                    {"op": op, "size": name} | row for row in measure_case(op, case, runnable, device, options.repeats)
                ]
                if options.json:
                    write_json(options.json, result | {"rows": result["rows"] + rows})
                torch.compiler.reset()  # or the ninth size would be one recompilation too many
        result["rows"] += rows
        console.print(table(op, rows, variants, result))
    if any("triton" in row["failed"] for row in result["rows"]):
        raise SystemExit(1)
    return result


# ----------------------------------------------------------------------------------------------------------- contenders


def why_absent(variant: str, device: torch.device) -> str | None:
    """Why a variant can't be timed here, if it can't."""
    if variant == "liger" and not liger.installed():
        return "not installed"
    return "no GPU" if variant in ("liger", "triton") and device.type != "cuda" else None


def implementation(op: str, variant: str) -> Callable:
    """The function that a variant calls."""
    if variant == "triton":
        return getattr(kernels.TRITON, op)
    if variant == "liger":
        if op not in liger.ops():
            raise LookupError(f"Liger-Kernel has no {op}")
        return liger.ops()[op]
    twin = getattr(kernels.TORCH, op)
    return torch.compile(twin, fullgraph=True, dynamic=False) if variant == "compiled" else twin


class Contender:
    """One variant of an op on the arguments of a case. Making it runs both passes once: what fails, fails here."""

    def __init__(self, op: str, variant: str, case: Case):
        arguments = case.liger_arguments if variant == "liger" and case.liger_arguments else case.arguments
        self._function = functools.partial(implementation(op, variant), *arguments)
        self._wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
        self.prepare_backward()
        self._upstream = [torch.randn_like(y) for y in self._outputs]  # of its own: Liger writes into them
        self.backward()

    def forward(self) -> Any:
        """The forward pass as in training, with what it saves."""
        return self._function()

    def prepare_backward(self) -> None:
        """A forward pass for `backward` to go back through: a fresh one for each, as some free or overwrite what they saved."""
        outputs = self._function()
        self._outputs = outputs if isinstance(outputs, tuple) else (outputs,)

    def backward(self) -> None:
        """The gradients of all inputs."""
        torch.autograd.grad(self._outputs, self._wanted, self._upstream)
        self._outputs = ()


def copy_of(n_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that moves so many bytes: it reads half of them and writes the other half."""
    source = torch.randint(256, (n_bytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


# --------------------------------------------------------------------------------------------------------------- timing


def measure_case(op: str, case: Case, variants: list[str], device: torch.device, repeats: int) -> list[dict]:
    """Rows of the forward pass, the backward pass and both, the last by the sums of the medians."""
    contenders, failed = {}, {}
    for variant in variants:
        try:
            contenders[variant] = Contender(op, variant, case)
        except Exception as error:  # of a peer's or of a kernel being written: the others are measured none the less
            failed[variant] = f"{type(error).__name__}: {error}".splitlines()[0]
    on_gpu = device.type == "cuda"
    flush = gpu_flush(device) if on_gpu else lambda: None
    clock = GpuInstant if on_gpu else wall_clock

    def forward_first(name: str) -> None:
        if name != "copy":
            contenders[name].prepare_backward()
        flush()

    time = functools.partial(time_in_turn, repeats=repeats, warmup=WARMUP, clock=clock)
    forward_calls = {"copy": copy_of(case.forward_bytes, device)} | {n: c.forward for n, c in contenders.items()}
    forward = time(forward_calls, before=lambda _: flush())
    backward_calls = {"copy": copy_of(case.backward_bytes, device)} | {n: c.backward for n, c in contenders.items()}
    backward = time(backward_calls, before=forward_first)
    both = {
        name: Timing(f.median + b.median, f.minimum + b.minimum, f.maximum + b.maximum, f.repeats)
        for (name, f), b in zip(forward.items(), backward.values(), strict=True)
    }
    return [
        {"shape": case.shape} | figures(direction, n_bytes, timings) | {"failed": failed}
        for direction, n_bytes, timings in (
            ("forward", case.forward_bytes, forward),
            ("backward", case.backward_bytes, backward),
            ("both", case.forward_bytes + case.backward_bytes, both),
        )
    ]


def figures(direction: str, n_bytes: int, timings: dict[str, Timing]) -> dict:
    """Figures of one pass: microseconds, GB/s of the bytes that must be moved, and the share of the copy's speed.

    `speedup`: how many times faster `triton` is than each other variant.
    """
    copy, triton = timings["copy"].median, timings.get("triton")
    return {
        "pass": direction,
        "bytes": n_bytes,
        "timings": {
            name: {
                "us": 1e6 * t.median,
                "us_min": 1e6 * t.minimum,
                "us_max": 1e6 * t.maximum,
                "gb_per_s": n_bytes / t.median / 1e9,
                "of_copy": copy / t.median,
            }
            for name, t in timings.items()
        },
        "speedup": {n: t.median / triton.median for n, t in timings.items() if n != "triton"} if triton else {},
    }


def table(op: str, rows: list[dict], variants: list[str], result: dict) -> Table:
    """The rows of an op as people read them: microseconds by variant, then how good the kernel's are."""
    env = result["environment"]
    title = f"{op}: {result['dtype']}, {env['device']}, torch {env['torch']}, microseconds (median)"
    shown = Table(title=title, caption="")
    for heading in ("size", "shape", "pass"):
        shown.add_column(heading)
    has_kernel = any("triton" in row["timings"] for row in rows)
    if has_kernel:
        shown.caption = (
            "GB/s, share of the copy's speed and speed against peers (above 1 is faster) are those of triton"
        )
    for heading in ("copy", *variants, *(["GB/s", "of copy", "vs compiled", "vs liger"] if has_kernel else [])):
        shown.add_column(heading, justify="right")
    for row in rows:
        timings, speedup = row["timings"], row["speedup"]
        missing = result["absent"] | dict.fromkeys(row["failed"], "failed")
        cells = [f"{timings[name]['us']:.1f}" if name in timings else missing[name] for name in ("copy", *variants)]
        if "triton" in timings:
            cells += [f"{timings['triton']['gb_per_s']:.0f}", f"{timings['triton']['of_copy']:.0%}"]
            cells += [f"{speedup[peer]:.2f}x" if peer in speedup else "n/a" for peer in ("compiled", "liger")]
        shown.add_row(row["size"], row["shape"], row["pass"], *cells, end_section=row["pass"] == "both")
    for reason in sorted({f"{name}: {reason}" for row in rows for name, reason in row["failed"].items()}):
        shown.caption += f"\nfailed: {reason}"
    return shown


if __name__ == "__main__":
    command.run(OpsBench, __doc__, measure)
