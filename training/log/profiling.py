"""A torch profiler trace of a few steps of a run."""

from pathlib import Path

import torch
from torch import profiler
from torch.profiler import ProfilerActivity

FIRST, COUNT = 3, 3
"""Steps before the first one recorded, of which the last warms the profiler up, and how many are recorded."""


def trace(path: Path) -> profiler.profile:
    """A profiler to enter, and to tell of each step with `step()`, that writes steps 3 to 5 to `path`.

    The file is read by chrome://tracing and https://ui.perfetto.dev. A shorter run leaves what it recorded, if anything.
    """
    # Asked for CUDA's where there is no GPU, as it is by default, the profiler of a build with CUDA (torch 2.11) crashes.
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    return profiler.profile(
        activities=activities,
        schedule=profiler.schedule(wait=FIRST - 1, warmup=1, active=COUNT, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(str(path)),
    )
