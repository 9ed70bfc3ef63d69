"""Everything worth knowing on a new GPU, what is worth most first: `python -m bench.all --minutes 9`.

Each case is a process of its own with a time limit, so that a crash or a hang costs that case alone. Its JSON and its output
lie in bench/results/<date>-<device>/ when it is done, and `all.json` there says what became of each. A second run goes on
where the first one stopped: it skips what is done, and tries last what failed. Ctrl-C keeps everything.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from bench import command
from bench.measure import environment, write_json
from kernels.grammar import SWITCHES
from training.errors import UserError

PROJECT = Path(__file__).parent.parent

Status = Literal["done", "failed", "timed out", "cut short"]


@dataclass(kw_only=True)
class AllBench:
    """Run the bench in order of value, until all is done or the time is up."""

    minutes: float = 60.0
    """How long to go on."""
    out: str = ""
    """Folder of the results; empty: bench/results/<date>-<device>."""


@dataclass(frozen=True)
class Case:
    """A command line of this project, and how long it may take."""

    name: str
    arguments: tuple[str, ...]
    """After `python -m`. The bench's own commands get `--json <folder>/<name>.json` added."""
    seconds: int

    def command(self, folder: Path) -> list[str]:
        """The whole command line."""
        is_bench = self.arguments[0].startswith("bench.")
        json_option = ["--json", str(folder / f"{self.name}.json")] if is_bench else []
        return [sys.executable, "-m", *self.arguments, *json_option]


KERNEL_TESTS = {
    "rms_norm": ("kernels/test_rms_norm",),
    "rope": ("kernels/test_rope",),
    "swiglu": ("kernels/test_swiglu",),
    "attention": ("kernels/test_attention",),
    "linear_cross_entropy": ("kernels/test_linear_cross_entropy", "kernels/test_linear_cross_entropy_kernels"),
    "adamw": ("kernels/test_adamw", "training/test_optimizer"),
    "capture": ("training/test_capture", "training/test_flat"),
}
"""Test files by what they prove."""


def gpu_cases() -> list[Case]:
    """What to run on a GPU, in order of value."""
    parallel = ("-n", "8") if importlib.util.find_spec("xdist") else ()  # most of the time goes into compiling

    def tests(*files: str) -> tuple[str, ...]:
        return ("pytest", "-q", "-m", "not slow", *parallel, *(f"tests/{file}.py" for file in files))

    def step(preset: str, *options: str) -> tuple[str, ...]:
        return ("bench.step", "--preset", preset, *options)

    large = ("--repeats", "3")
    others = ("--variants", "reference", "reference-compiled", "compiled", "fused-uncaptured", "unchunked")
    peers = ("liger-compiled", "transformers")
    return [
        *(Case(f"tests-{name}", tests(*files), 150) for name, files in KERNEL_TESTS.items()),
        Case("step-reference", step("reference"), 240),
        *(Case(f"ops-{op}", ("bench.ops", "--op", op), 600 if op == "attention" else 300) for op in SWITCHES),
        Case("step-124m", step("124m", *large), 300),
        Case("step-llama3.2-1b", step("llama3.2-1b", *large), 400),
        Case("parity-reference", ("bench.parity", "--preset", "reference", "--batch-size", "8", "--bisect"), 200),
        Case("loss-parity", ("bench.loss_parity",), 600),
        Case("step-reference-others", step("reference", *others, *peers), 300),
        Case("step-reference-per-op", step("reference", "--variants", "compiled", "--per-op"), 400),
        Case("step-reference-nondeterministic", step("reference", "--no-deterministic"), 240),
        Case("step-llama3.2-1b-unchunked", step("llama3.2-1b", *large, "--variants", "unchunked"), 300),
        Case("step-350m", step("350m", *large), 300),
        Case("tests-training", ("pytest", "-q", *parallel, "tests/training/test_kernels_in_training.py"), 300),
        Case("tests-slow", ("pytest", "-q", "-m", "slow", *tests(*sum(KERNEL_TESTS.values(), ()))[4:]), 400),
        *(Case(f"roofline-{p}", ("bench.roofline", "--preset", p), 60) for p in ("reference", "124m", "llama3.2-1b")),
    ]


def cpu_cases() -> list[Case]:
    """A tiny version, to try the command where there is no GPU: its figures say nothing."""
    step = ("bench.step", "--preset", "smoke", "--batch-size", "2", "--repeats", "1", "--variants", "plain")
    ops = ("bench.ops", "--preset", "smoke", "--repeats", "3", "--variants", "eager")
    return [Case("step-smoke", step, 60), Case("ops-smoke", ops, 60)]


def run_all(cases: list[Case], folder: Path, seconds: float, console: Console) -> dict:
    """Run the cases that `folder` does not have yet for at most so many seconds. Returns what `all.json` then holds."""
    result = _read(folder / "all.json")
    records: dict[str, dict] = result["cases"]
    status = {case.name: records.get(case.name, {}).get("status", "cut short") for case in cases}
    # Sorting is stable: what was never tried keeps its order, then comes what failed.
    to_do = sorted(
        (case for case in cases if status[case.name] != "done"), key=lambda case: status[case.name] != "cut short"
    )
    console.print(f"{len(cases) - len(to_do)} of {len(cases)} cases were done before; results are in {folder}")
    end = time.monotonic() + seconds
    try:
        for place, case in enumerate(to_do):
            left = end - time.monotonic()
            if left <= 0:
                break
            more = len(to_do) - place - 1
            console.print(f"{case.name}: {left:.0f} s left for it and {more} more", markup=False)
            records[case.name] = {"status": "cut short"}
            records[case.name] = _run(case, folder, left)
            write_json(folder / "all.json", result)
            _show(case, records[case.name], folder, console)
    finally:
        left_over = [case.name for case in to_do if records.get(case.name, {}).get("status") != "done"]
        console.print(f"left: {', '.join(left_over) or 'nothing'}", markup=False)
    return result


def _read(path: Path) -> dict:
    fresh = {"bench": "all", "environment": environment(), "cases": {}}
    try:
        return fresh | {"cases": json.loads(path.read_text())["cases"]}
    except FileNotFoundError:
        return fresh
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not what an earlier run left there ({error}); delete it, or give another --out"
        ) from None


def _run(case: Case, folder: Path, left: float) -> dict:
    """Run a case to its end, its limit or the end of the time, and say what became of it."""
    start = time.monotonic()
    with open(folder / f"{case.name}.log", "w") as log:
        process = subprocess.Popen(
            case.command(folder),
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own children end with it
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            code = process.wait(min(left, case.seconds))
            status: Status = "failed" if code else "done"
        except subprocess.TimeoutExpired:
            status = "timed out" if left >= case.seconds else "cut short"
        finally:
            _end(process)
    return {
        "status": status,
        "exit_status": process.returncode,
        "seconds": round(time.monotonic() - start, 1),
        "command": " ".join(["python", "-m", *case.arguments]),
        "last_line": (_lines(folder, case) or [""])[-1],
    }


def _end(process: subprocess.Popen) -> None:
    """End a process, if it still runs, and what it started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()


def _lines(folder: Path, case: Case) -> list[str]:
    return (folder / f"{case.name}.log").read_text(errors="replace").splitlines()


def _show(case: Case, record: dict, folder: Path, console: Console) -> None:
    """A bench's tables, or the end of the output of anything else."""
    lines = _lines(folder, case)
    whole = record["status"] == "done" and case.arguments[0].startswith("bench.")
    console.print(
        "\n".join(lines if whole else lines[-15:]), markup=False, highlight=False, overflow="ignore", crop=False
    )
    console.print(f"{case.name}: {record['status']} after {record['seconds']} s", markup=False)


def main(options: AllBench, console: Console) -> None:
    """Choose the cases and the folder, and run. Exit status 1 where a case failed or ran past its limit."""
    if not options.minutes > 0:
        raise UserError(f"--minutes is {options.minutes}; it must be more than 0")
    on_gpu = torch.cuda.is_available()
    cases = gpu_cases() if on_gpu else cpu_cases()
    if not on_gpu:
        left_out = ", ".join(case.name for case in gpu_cases())
        console.print(
            f"no GPU here: a tiny version runs on the CPU, to try this command; not run without one: {left_out}"
        )
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-") if on_gpu else "cpu"
    folder = Path(options.out or PROJECT / "bench" / "results" / f"{date.today()}-{device}").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out is {folder}, which can't be a folder: {error.strerror}") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops this stops the case that is running
    result = run_all(cases, folder, 60 * options.minutes, console)
    if any(result["cases"].get(case.name, {}).get("status") in ("failed", "timed out") for case in cases):
        raise SystemExit(1)


if __name__ == "__main__":
    command.run(AllBench, __doc__, main)
