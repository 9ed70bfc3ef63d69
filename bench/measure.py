"""Timing, and the environment that a figure is worth nothing without."""

import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from training.errors import UserError

FLUSH_BYTES = 2 << 30


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over repeats that came after the warm-up."""

    median: float
    minimum: float
    maximum: float
    repeats: int


def wall_clock() -> float:
    """Seconds, read when the GPU has done all that was asked of it: what a person waits for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class GpuInstant:
    """A reading of the GPU's own clock (a CUDA event). The difference of two is in seconds, and waits for the later one."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "GpuInstant") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


def gpu_flush(device: torch.device) -> Callable[[], object]:
    """A call that reads 2 GiB, to be made before each call that `GpuInstant` times.

    What the timed call reads is then in memory and not in the GPU's cache, and no written line is left there whose way
    back to memory would fall into its time. And the GPU is busy for about as long as the CPU takes to queue the call:
    what is timed is the GPU's work and not Python's.
    """
    other = torch.zeros(FLUSH_BYTES // 4, device=device)
    return other.sum


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after every call was timed at least once: `timings` holds what was measured until then."""

    def __init__(self, timings: dict[str, Timing]):
        super().__init__()
        self.timings = timings


def time_in_turn(
    calls: dict[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], Any] = wall_clock,
    before: Callable[[str], object] = lambda _: None,
    progress: Callable[[str], object] = lambda _: None,
) -> dict[str, Timing]:
    """Time calls A B C A B C ..., so that a machine whose speed drifts is as slow to one as to the other.

    The first `warmup` rounds are not counted. The difference of two readings of `clock` is in seconds; `before` is called
    with the name of a call ahead of each, outside of its time. Ctrl-C raises Interrupted once there is something to keep.
    """
    readings: dict[str, list[tuple]] = {name: [] for name in calls}
    try:
        for turn in range(warmup + repeats):
            for name, call in calls.items():
                progress(f"{name}, {'warm-up' if turn < warmup else f'run {turn - warmup + 1} of {repeats}'}")
                before(name)
                start = clock()
                call()
                readings[name].append((start, clock()))
    except KeyboardInterrupt:
        rounds = min(len(pairs) for pairs in readings.values())
        if rounds <= warmup:
            raise
        raise Interrupted(_timings({name: pairs[warmup:rounds] for name, pairs in readings.items()})) from None
    return _timings({name: pairs[warmup:] for name, pairs in readings.items()})


def _timings(readings: dict[str, list[tuple]]) -> dict[str, Timing]:
    seconds = {name: [end - start for start, end in pairs] for name, pairs in readings.items()}
    return {name: Timing(median(s), min(s), max(s), len(s)) for name, s in seconds.items()}


def environment() -> dict:
    """What a figure depends on: device, driver, clocks, power, versions, commit, date, command line."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command_line(),
        "commit": _output(["git", "describe", "--always", "--dirty"]),
        "device": gpu or f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": gpu,
        "gpu_state": _gpu_state() if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": version("triton"),
        "liger-kernel": version("liger-kernel"),
    }


def _command_line() -> str:
    """What was typed, but for the place of the result, which is one machine's own."""
    main = sys.modules["__main__"].__spec__  # None where a file was run, not a module
    program = f"python -m {main.name.removesuffix('.__main__')}" if main else Path(sys.argv[0]).name
    return re.sub(r" --(json|out)[ =]\S+", "", f"{program} {shlex.join(sys.argv[1:])}".strip())


def _gpu_state() -> dict[str, str] | None:
    """Driver, clocks and power at this moment, as nvidia-smi prints them with their units."""
    fields = ["uuid", "driver_version", "clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu"]
    lines = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]) or ""
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    states = [dict(zip(fields, line.split(", "), strict=True)) for line in lines.splitlines() if uuid in line]
    return states[0] if states else None


def version(package: str) -> str | None:
    """The installed version, None where the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def write_json(path: str | Path, result: dict) -> None:
    """Write a result, atomically. UserError where the path can't be written."""
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(result, indent=1) + "\n")
        draft.replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from None
