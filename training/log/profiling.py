"""A torch profiler trace of a few steps of a run."""

from pathlib import Path

from torch import profiler

from training.log.console import complain

FIRST, COUNT = 3, 3
"""Steps before the first one recorded, of which the last warms the profiler up, and how many are recorded."""


def trace(path: Path) -> profiler.profile:
    """A profiler to enter, and to tell of each step with `step()`, that writes steps 3 to 5 to `path`.

    The file is read by chrome://tracing and https://ui.perfetto.dev. A shorter run leaves what it recorded, if anything.
    """
    return profiler.profile(
        acc_events=True,  # there is one cycle, and torch 2.11 warns of losing others
        schedule=profiler.schedule(wait=FIRST - 1, warmup=1, active=COUNT, repeat=1),
        on_trace_ready=lambda p: _export(p, path),
    )


def _export(recorded: profiler.profile, path: Path) -> None:
    try:
        recorded.export_chrome_trace(str(path))
        reason = "" if path.is_file() and path.stat().st_size else "the profiler does not say why"
    except (OSError, RuntimeError) as error:
        reason = str(error)
    if reason:  # a full disk, say: the run needs no trace to go on
        complain(f"{path} could not be written: {reason}")
