"""One process or many: who this one is, sums over all of them, and how they start, wait, fail and end together.

Imports torch only where there are many: what is wrong with the options of one process is told before.
"""

import atexit
import contextlib
import gc
import os
import pickle
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from training import launcher
from training.config import TrainConfig
from training.errors import UserError, fail, refused
from training.launcher import Launch
from training.notices import Notices
from training.stopping import killed_by_signals, status_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store, Work

_SLICE = timedelta(seconds=0.5)  # of a wait: between two of them signals are answered, and notices read
_UNLIMITED = timedelta(days=7)
_SIGN_SECONDS = 3.0  # for the others to notice a failure: a few slices
_BEGUN = "begun"


class LostError(Exception):
    """Another process does not answer: it is gone, or `overdue`."""

    def __init__(self, reason: str, *, overdue: bool = False):
        super().__init__(reason)
        self.overdue = overdue


@dataclass
class World:
    """One process among all: rank in [0, size), local_rank on its machine.

    Every process calls the same methods in the same order. In a wait signals are answered.

    Attributes:
        patience: seconds to wait for another process.
        at: where this process is, for what is said when another one fails.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    patience: float = field(default=600.0, compare=False)
    at: str = field(default="the start", compare=False)
    _links: "_Links | None" = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the logs and the checkpoints."""
        return self.rank == 0

    def sum(self, tensor: "Tensor") -> None:
        """Replace the tensor, in place, by its sum over all processes, on its own device. The order of the sum is fixed."""
        if self.size > 1:
            import torch.distributed as dist

            if tensor.is_cuda:  # queued behind what the GPU does, and nothing waits for it
                dist.all_reduce(tensor)
            else:
                self._finish(dist.all_reduce(tensor, async_op=True))

    def totals(self, *counts: int, at: str = "", patiently: bool = False) -> list[int]:
        """The sums of some counts over all processes: one small reduction between CPUs, for which no GPU waits.

        at: what is being done. patiently: however long the others take for it, as long as all of them live.
        """
        self.at = at or self.at
        if self.size == 1:
            return [int(count) for count in counts]
        import torch
        import torch.distributed as dist

        sums = torch.tensor(counts, dtype=torch.int64)
        self._finish(dist.all_reduce(sums, group=self._links.control, async_op=True), patiently)
        return sums.tolist()

    def gather(self, value: Any, *, patiently: bool = False) -> list[Any]:
        """The values that the processes give, anything that can be pickled, by rank. patiently: as in `totals`."""
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        pickled = pickle.dumps(value)
        sizes = self.totals(
            *(len(pickled) if rank == self.rank else 0 for rank in range(self.size)), patiently=patiently
        )
        mine = torch.frombuffer(bytearray(pickled.ljust(max(sizes))), dtype=torch.uint8)
        all_of_them = [torch.empty_like(mine) for _ in sizes]
        self._finish(dist.all_gather(all_of_them, mine, group=self._links.control, async_op=True))
        return [pickle.loads(bytes(x[:size].tolist())) for x, size in zip(all_of_them, sizes, strict=True)]

    def wait(self, at: str = "", *, patiently: bool = False) -> None:
        """Wait until every process is here. at, patiently: as in `totals`."""
        self.at = at or self.at
        if self.size > 1:
            import torch.distributed as dist

            self._finish(dist.barrier(group=self._links.control, async_op=True), patiently)

    @contextlib.contextmanager
    def main_first(self, at: str = "") -> Iterator[None]:
        """The main process runs the block first, the others after it: they find on the disk what it has made there."""
        if not self.is_main:
            self.wait(at, patiently=True)
        yield
        if self.is_main:
            self.wait(at, patiently=True)

    def mark_begun(self) -> None:
        """Say that the run is now in its folder: processes that torchrun starts anew (--max-restarts) shall go on with it."""
        if self._links:
            self._links.launch_store.set(_BEGUN, "")

    @property
    def goes_on(self) -> bool:
        """Whether torchrun has started these processes anew, after others that had begun the run."""
        return bool(self._links) and self._links.attempt > 0 and self._links.launch_store.check([_BEGUN])

    def _finish(self, work: "Work", patiently: bool = False) -> None:
        """Wait for a reduction of the CPU, in slices. LostError where another process fails, or takes longer than `patience`."""
        end = time.monotonic() + self.patience
        while True:
            with contextlib.suppress(RuntimeError):  # the slice is over, or the work has failed: then it is completed
                work.wait(_SLICE)
                return
            if work.is_completed():
                try:
                    work.wait()
                except RuntimeError as error:
                    raise LostError(_first_line(error)) from error
                return
            if self._links.notices.failure():
                raise LostError("another process failed")
            if time.monotonic() > end and not patiently:
                raise LostError(f"no answer within {self.patience:g} s", overdue=True)


@dataclass(frozen=True)
class _Links:
    """What joins a process to the others."""

    control: "ProcessGroup"
    """Between CPUs, without a time limit of its own."""
    launch_store: "Store"
    """Of the launch: what is set there outlives a restart."""
    notices: Notices
    attempt: int


@contextlib.contextmanager
def joined(config: TrainConfig) -> Iterator[World]:
    """The world that the launcher describes, while the block runs: all processes leave it together.

    Where one of them fails, it says so in its own words and all end with its exit status; where one is killed or takes longer
    than --process-timeout, another says which, and all end with status 1.

    Raises UserError where the launcher's variables are not whole, the processes do not all come, or the micro-steps of a step
    do not divide evenly among them.
    """
    launch = launcher.launch()
    if launch.size == 1:
        yield World()
        return
    try:
        world = _join(launch, config)
    except UserError as error:  # of this process alone, for all it knows
        fail(error)
    try:
        _check(config, world)
        yield world
        gc.collect()  # what has gone out of use may hold on to the group, and then the program aborts at its end
        world.wait("the end", patiently=True)
    except BaseException as error:
        _fail_together(world, error)
    _leave()


def _join(launch: Launch, config: TrainConfig) -> World:
    """Meet the other processes. Until then nothing is lost where a signal ends this one at once."""
    with killed_by_signals():
        os.environ.setdefault(
            "TORCH_CPP_LOG_LEVEL", "ERROR"
        )  # of a process that is gone torch warns by a page of addresses
        import torch
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        limit = timedelta(seconds=config.process_timeout)
        on_gpus = config.device != "cpu" and torch.cuda.is_available()
        try:
            launch_store, rank, size = next(rendezvous("env://", timeout=limit))
            # A store that outlives a restart still has the addresses of the processes that are gone.
            store = dist.PrefixStore(f"attempt-{launch.attempt}", launch_store)
            # It is in our own waits that a process is to be missed, once a step between CPUs at the latest, and not in those of
            # a backend: NCCL's watch would abort this process without a word.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=2 * limit,
            )
            control = dist.new_group(backend="gloo", timeout=_UNLIMITED)
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"rank {launch.rank} of {launch.size} could not join the others at {address} within "
                f"{config.process_timeout} s (--process-timeout): {_first_line(error)}"
            ) from None
    links = _Links(control, launch_store, Notices(store, rank, size), launch.attempt)
    return World(rank, size, launch.local_rank, config.process_timeout, _links=links)


def _check(config: TrainConfig, world: World) -> None:
    if config.gradient_accumulation_steps % world.size:
        raise UserError(
            f"--gradient-accumulation-steps {config.gradient_accumulation_steps} is not divisible by the {world.size} "
            "processes that share them"
        )


def _fail_together(world: World, error: BaseException) -> None:
    """Tell the others, and end as the first that failed: that one speaks, here or above; the others are silent."""
    error = refused(error) or error
    notices, status = world._links.notices, status_of(error)
    lost = _as_lost(error)
    first = notices.fail(status)
    speaks = first.rank == world.rank
    keeps_store = world.is_main and not launcher.by_torchrun()
    absent = notices.absent(_SIGN_SECONDS) if keeps_store or (lost and speaks) else []
    if speaks:
        notices.have_spoken()
    elif keeps_store:
        notices.stay_for_the_speaker(2 * _SIGN_SECONDS)
    # The group can't be left in order any more: its destructors would wait for what never comes.
    atexit.register(_exit_now, first.status)
    if not speaks:
        raise SystemExit(first.status) from None
    if lost:
        raise SystemExit(f"train.py: error: {_who_is_lost(lost, absent, world)}") from None
    if isinstance(error, UserError):
        fail(error)
    raise error


def _as_lost(error: BaseException) -> LostError | None:
    """The error as one of another process, if it is: gloo and NCCL give it no type of its own."""
    if isinstance(error, LostError):
        return error
    text = str(error)
    if isinstance(error, RuntimeError) and ("gloo/" in text or "NCCL" in text):
        return LostError(_first_line(error), overdue="timed out" in text.lower() or "timeout" in text)
    return None


def _who_is_lost(lost: LostError, absent: list[int], world: World) -> str:
    if not world._links.notices.store_answers and not launcher.by_torchrun():
        absent = [0]  # which keeps the store
    if not absent:
        return (
            f"the processes lost each other at {world.at}: {lost}; --init-from resume goes on from the last checkpoint"
        )
    ranks = f"rank {absent[0]}" if len(absent) == 1 else f"ranks {', '.join(map(str, absent))}"
    did = f"did not answer within {world.patience:g} s (--process-timeout)"
    if not lost.overdue:
        did = "ended without a word (killed? out of memory?)"
    return f"{ranks} of {world.size} {did}, at {world.at}; --init-from resume goes on from the last checkpoint"


def _leave() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


def _exit_now(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
