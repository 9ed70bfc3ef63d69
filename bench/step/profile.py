"""Where the time of a step goes on the GPU: every kernel that ran, by name, longest first."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity

SHOWN = 15
"""Kernels on the terminal; the JSON has them all."""


def profile(step: Callable[[], object]) -> dict:
    """Run a step under torch's profiler, which is told of the GPU's work only, and gather it."""
    # acc_events only keeps away a warning: there is one cycle of the profiler here
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        step()
        torch.cuda.synchronize()
    return gather(recorded.key_averages())


def gather(events: Iterable[Any]) -> dict:
    """`busy_ms`, `launches` and a row a kernel (name, launches, ms), longest first: copies and fills of memory are among them.

    events: as `key_averages` gives them, times in microseconds. busy_ms is the sum over kernels: of what ran at the same time as
    something else, both count.
    """
    kernels = [
        {"name": event.key, "launches": event.count, "ms": event.self_device_time_total / 1000}
        for event in events
        if event.self_device_time_total > 0
    ]
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {
        "busy_ms": sum(kernel["ms"] for kernel in kernels),
        "launches": sum(kernel["launches"] for kernel in kernels),
        "kernels": kernels,
    }


def table(variant: str, found: dict) -> Table:
    """The longest kernels of a variant's step as people read them."""
    kernels = found["kernels"]
    shown = Table(title=f"{variant}: {found['busy_ms']:.2f} ms of work for the GPU in {found['launches']} launches")
    for heading in ("ms", "share", "launches"):
        shown.add_column(heading, justify="right")
    shown.add_column("kernel", no_wrap=True)
    for kernel in kernels[:SHOWN]:
        share = kernel["ms"] / found["busy_ms"]
        shown.add_row(f"{kernel['ms']:.3f}", f"{share:.1%}", str(kernel["launches"]), kernel["name"])
    if rest := kernels[SHOWN:]:
        ms, launches = (sum(kernel[figure] for kernel in rest) for figure in ("ms", "launches"))
        shown.add_row(f"{ms:.3f}", f"{ms / found['busy_ms']:.1%}", str(launches), f"{len(rest)} more kernels")
    return shown
