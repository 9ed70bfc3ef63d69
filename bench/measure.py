"""Timing, and the environment that a figure is worth nothing without."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over repeats that came after the warm-up."""

    median: float
    minimum: float
    maximum: float
    repeats: int


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_in_turn(
    calls: dict[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Timing]:
    """Time calls A B C A B C ..., so that a machine whose speed drifts is as slow to one as to the other.

    The wall clock around each call and the wait for the device: what a person waits for. Warm-up rounds are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            progress(f"{name}, {'warm-up' if turn < warmup else f'run {turn - warmup + 1} of {repeats}'}")
            synchronize()
            start = clock()
            call()
            synchronize()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return {name: Timing(median(s), min(s), max(s), len(s)) for name, s in seconds.items()}


def environment() -> dict:
    """What a figure depends on: device, driver, versions, commit, date, command line."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _output(["git", "describe", "--always", "--dirty"]),
        "device": gpu or f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": gpu,
        "driver_clocks_power": _output(query) if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: str | Path, result: dict) -> None:
    """Write a result beside its environment, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(path)
