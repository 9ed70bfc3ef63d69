"""A torch profiler trace of a few steps of a run, and the lines of it that matter."""

import contextlib
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

from torch import profiler

from training.log.console import complain

FIRST, COUNT = 3, 3
"""Steps before the first one recorded, of which the last warms the profiler up, and how many are recorded."""


SHOWN = 10
"""Lines of `summary`."""
WAITING = "waiting for data"


def trace(path: Path, steps: int, say: Callable[[str], object]) -> profiler.profile | None:
    """A profiler to enter, and to tell of each step with `step()`: steps 3 to 5 go to `path`, and their `summary` to `say`.

    The file is read by chrome://tracing and https://ui.perfetto.dev. steps: that this call makes. Where they end before the last
    of those the trace has what was recorded; where they end before the first there is no profiler, and that is said.
    """
    if steps <= FIRST:
        say(f"--profile has no effect: it records from step {FIRST} of a call on, and this one makes {max(steps, 0)}")
        return None
    return profiler.profile(
        acc_events=True,  # there is one cycle, and torch 2.11 warns of losing others
        schedule=profiler.schedule(wait=FIRST - 1, warmup=1, active=COUNT, repeat=1),
        on_trace_ready=lambda p: _report(p, path, say),
    )


def watched(steps: Generator) -> Generator:
    """The same batches; the time in which the run waits for one has a name of its own in the trace."""
    with contextlib.closing(steps):
        while True:
            with profiler.record_function(WAITING):
                batch = next(steps, None)
            if batch is None:
                return
            yield batch


def summary(events: Iterable[Any]) -> list[str]:
    """What took most of the recorded steps, longest first, and how much of a step that is.

    events: as `key_averages` gives them, times in microseconds. Of a GPU its kernels are shown, else PyTorch's calls
    by the time that they themselves took; and the waiting for data, whatever its place.
    """
    events = list(events)
    steps = [event for event in events if event.key.startswith("ProfilerStep")]
    if not steps:
        return []
    count, wall = sum(event.count for event in steps), sum(event.cpu_time_total for event in steps)
    on_gpu = any(event.self_device_time_total for event in events)
    took = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in events
        if event not in steps and event.key != WAITING
    }
    waited = sum(event.cpu_time_total for event in events if event.key == WAITING and not event.self_device_time_total)
    longest = sorted(((us, n, key) for key, (us, n) in took.items() if us), reverse=True)[: SHOWN - 1]
    lines = [f"profile: {wall / count / 1000:.1f} ms a step, of which"]
    for us, n, key in [*longest, (waited, count, WAITING)]:
        lines.append(f"{us / wall:7.1%} {us / count / 1000:9.2f} ms in {n // count:5d}: {key[:80]}")
    return lines


def _report(recorded: profiler.profile, path: Path, say: Callable[[str], object]) -> None:
    for line in summary(recorded.key_averages()):
        say(line)
    _export(recorded, path)


def _export(recorded: profiler.profile, path: Path) -> None:
    try:
        recorded.export_chrome_trace(str(path))
        reason = "" if path.is_file() and path.stat().st_size else "the profiler does not say why"
    except (OSError, RuntimeError) as error:
        reason = str(error)
    if reason:  # a full disk, say: the run needs no trace to go on
        complain(f"{path} could not be written: {reason}")
