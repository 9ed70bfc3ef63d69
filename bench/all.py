"""Everything worth knowing on a new GPU, what is worth most first: `python -m bench.all --minutes 4`.

Four minutes give the checks and the kernels' tests, side by side, and the reference's step with its profile; what is left of them,
and every minute more, goes to the ops, larger models and the rest.

Each case is a process of its own with a time limit, so that a crash or a hang costs that case alone; those that take no times run
beside each other. The JSON and the output of a case lie in bench/results/<date>-<device>/ when it is done, and `all.json` there
says what became of each. A second run goes on where the first one stopped: it skips what is done, and tries last what failed.
Ctrl-C keeps everything. What is compiled is kept in one folder for temporary files, where the next case finds it.
"""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from bench import command
from bench.measure import environment, write_json
from bench.report.summary import summary
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
    side_by_side: bool = False
    """Whether it may run beside its neighbours that may too: what it finds does not depend on how fast it is."""
    json: bool = True
    """Whether a bench's result is kept."""

    def command(self, folder: Path) -> list[str]:
        """The whole command line."""
        keeps_json = self.json and self.arguments[0].startswith("bench.")
        json_option = ["--json", str(folder / f"{self.name}.json")] if keeps_json else []
        return [sys.executable, "-m", *self.arguments, *json_option]


KERNEL_TESTS = (
    "tests/kernels",
    "tests/model/test_generation.py",
    "tests/training/test_capture.py",
    "tests/training/test_flat.py",
    "tests/training/test_optimizer.py",
)
"""What the kernels, and the step that they are part of, are tested by."""


def gpu_cases() -> list[Case]:
    """What to run on a GPU, in order of value. Nothing runs for long without having written what it has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # most of the time of a test goes into compiling; two cores are for the cases beside them
    parallel = ("-n", str(max(1, cores - 2))) if importlib.util.find_spec("xdist") else ()

    def tests(*words: str) -> tuple[str, ...]:
        return ("pytest", "-q", "--tb=short", *parallel, *words)

    def step(preset: str, *options: str) -> tuple[str, ...]:
        return ("bench.step", "--preset", preset, *options)

    large = ("--repeats", "3")
    others = ("--variants", "reference", "reference-compiled", "compiled", "fused-uncaptured", "unchunked")
    peers = ("liger-compiled", "transformers")
    warm = step("reference", "--variants", "fused", "compiled-captured", "liger-compiled", "--repeats", "1")
    return [
        Case("check", ("bench.check",), 150, side_by_side=True),
        Case("compile-reference", warm, 150, side_by_side=True, json=False),
        Case("tests-kernels", tests("-m", "not slow", *KERNEL_TESTS), 150, side_by_side=True),
        Case("step-reference", step("reference", "--profile"), 150),
        Case("step-reference-mlp", step("reference", "--variants", "fused-uncaptured", "without-mlp"), 100),
        *(Case(f"ops-{op}", ("bench.ops", "--op", op), 600 if op == "attention" else 300) for op in SWITCHES),
        Case("step-124m", step("124m", *large, "--profile"), 300),
        Case("step-llama3.2-1b", step("llama3.2-1b", *large, "--profile"), 400),
        Case("parity-reference", ("bench.parity", "--preset", "reference", "--batch-size", "8", "--bisect"), 150),
        Case("generation-reference", ("bench.generation",), 300),
        Case("loss-parity", ("bench.loss_parity",), 600),
        Case("step-reference-others", step("reference", *others, *peers), 300),
        Case("step-reference-per-op", step("reference", "--variants", "compiled", "--per-op"), 400),
        Case("step-reference-nondeterministic", step("reference", "--no-deterministic"), 240),
        Case("step-llama3.2-1b-unchunked", step("llama3.2-1b", *large, "--variants", "unchunked"), 150),
        Case("step-350m", step("350m", *large), 300),
        Case("tests-training", tests("tests/training/test_kernels_in_training.py"), 300, side_by_side=True),
        Case("tests-slow", tests("-m", "slow", *KERNEL_TESTS), 400, side_by_side=True),
        *(Case(f"roofline-{p}", ("bench.roofline", "--preset", p), 60) for p in ("reference", "124m", "llama3.2-1b")),
    ]


def cpu_cases() -> list[Case]:
    """A tiny version, to try the command where there is no GPU: its figures say nothing."""
    step = ("bench.step", "--preset", "smoke", "--batch-size", "2", "--repeats", "1", "--variants", "plain")
    ops = ("bench.ops", "--preset", "smoke", "--repeats", "3", "--variants", "eager")
    return [Case("check", ("bench.check",), 120), Case("step-smoke", step, 60), Case("ops-smoke", ops, 60)]


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

    def done(case: Case, record: dict) -> None:
        records[case.name] = record
        write_json(folder / "all.json", result)
        _show(case, record, folder, console)

    left_after = len(to_do)
    try:
        for group in in_groups(to_do):
            left = end - time.monotonic()
            if left <= 0:
                break
            left_after -= len(group)
            records.update({case.name: {"status": "cut short"} for case in group})
            names = ", ".join(case.name for case in group)
            console.print(f"{names}: {left:.0f} s left for this and {left_after} more", markup=False)
            _run(group, folder, left, done)
    finally:
        left_over = [case.name for case in to_do if records.get(case.name, {}).get("status") != "done"]
        lines = [*summary(folder, result), f"left: {', '.join(left_over) or 'nothing'}"]
        console.print("\n".join(lines), markup=False, soft_wrap=True)
    return result


def in_groups(cases: list[Case]) -> list[list[Case]]:
    """Cases in their order, those that follow each other and may run side by side in one group, each other one alone."""
    groups: list[list[Case]] = []
    for case in cases:
        if case.side_by_side and groups and groups[-1][-1].side_by_side:
            groups[-1].append(case)
        else:
            groups.append([case])
    return groups


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


def _run(group: list[Case], folder: Path, left: float, done: Callable[[Case, dict], None]) -> None:
    """Run cases side by side, each to its end, its limit or the end of the time, and say of each what became of it."""
    start = time.monotonic()
    running: dict[Case, subprocess.Popen] = {}
    try:
        for case in group:
            running[case] = _start(case, folder)
        while running:
            for case, process in list(running.items()):
                seconds = time.monotonic() - start
                status: Status = "timed out" if left >= case.seconds else "cut short"
                if process.poll() is not None:
                    status = "failed" if process.returncode else "done"
                elif seconds < min(left, case.seconds):
                    continue
                _end(process)
                del running[case]
                record = {
                    "status": status,
                    "exit_status": process.returncode,
                    "seconds": round(seconds, 1),
                    "command": shlex.join(["python", "-m", *case.arguments]),
                    "last_line": (_lines(folder, case) or [""])[-1],
                }
                done(case, record)
            time.sleep(0.05)
    finally:
        for process in running.values():
            _end(process)


def _start(case: Case, folder: Path) -> subprocess.Popen:
    environment = os.environ | compile_caches() | {"PYTHONUNBUFFERED": "1"}
    if case.arguments[0] == "pytest":  # as many processes as cores compile already: none needs helpers of its own
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with open(folder / f"{case.name}.log", "w") as log:
        return subprocess.Popen(
            case.command(folder),
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own children end with it
            env=environment,
        )


def compile_caches() -> dict[str, str]:
    """One place for what all cases compile: that of the environment, or a folder of this user's among the temporary files."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"triton-llama-compiled-{user}"
    places = {"TORCHINDUCTOR_CACHE_DIR": folder / "inductor", "TRITON_CACHE_DIR": folder / "triton"}
    return {name: os.environ.get(name) or str(place) for name, place in places.items()}


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
    """A bench's tables, or the end of the output of anything else; nothing of what is only compiled."""
    lines = _lines(folder, case) if case.json or record["status"] != "done" else []
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
