"""Work done by several processes, its results in the order of what was given, and the death of a process told at once."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from training.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class WorkerDied(UserError):
    """A process ended in the middle of its work, whatever ended it."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    item: object = None  # what it works on


def in_processes(work: Callable[[T], R], items: Iterable[T], count: int, name: Callable[[T], str] = str) -> Iterator[R]:
    """Yield work(item) for each item, in order, worked out by `count` processes.

    `work` and the items pickle. No more than 2 * count items are taken before their results are asked for, so that memory
    is bounded however long one of them takes. Leaving the iterator ends the processes.

    Raises:
        WorkerDied: a process was killed; the message says by what, and at which item (`name`).
        Exception: what `work` raised, where its result would have been.
    """
    # Spawned and not forked: torch and CUDA have threads, which a fork would leave half alive.
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        with _without_signals():
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, work), daemon=True)
                process.start()
                theirs.close()  # so that its end is the end of the pipe
                workers.append(_Worker(process, ours))
        yield from _in_order(workers, iter(items), 2 * count, name)
    finally:
        for worker in workers:
            worker.process.kill()  # there is nothing that it could leave half done
            worker.process.join()
            worker.connection.close()


def _in_order(workers: list[_Worker], items: Iterator, ahead: int, name: Callable) -> Iterator:
    idle = list(workers)
    busy: dict[object, tuple[_Worker, int]] = {}  # by connection
    results: dict[int, tuple[bool, object]] = {}
    taken = given = 0
    exhausted = False
    while busy or not exhausted or results:
        while idle and not exhausted and taken - given < ahead:
            try:
                item = next(items)
            except StopIteration:
                exhausted = True
                break
            worker = idle.pop()
            worker.item = item
            busy[worker.connection] = worker, taken
            taken += 1
            try:
                worker.connection.send(item)
            except OSError:  # it has died while idle
                raise _died(worker, name) from None
        for connection in wait(list(busy)) if busy else ():
            worker, index = busy.pop(connection)
            try:
                results[index] = worker.connection.recv()
            except (EOFError, OSError):  # the system closes the pipe of a process that dies
                raise _died(worker, name) from None
            worker.item = None
            idle.append(worker)
        while given in results:
            well, result = results.pop(given)
            if not well:
                raise result
            yield result
            given += 1


def _died(worker: _Worker, name: Callable) -> WorkerDied:
    worker.process.join(5)
    status = worker.process.exitcode
    how = f"ended with exit status {status}"
    if status is not None and status < 0:
        how = f"was killed by {signal.Signals(-status).name}"
        if -status == signal.SIGKILL:
            how += ", as the system does when memory runs out"
    return WorkerDied(f"process {worker.process.pid} {how} while it worked on {name(worker.item)}")


def _serve(connection: Connection, work: Callable) -> None:
    """What a process does: take an item, send (True, result) or (False, exception), until the pipe ends."""
    for name in _SIGNALS:  # whoever started it ends it, or dies, which ends the pipe
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        while True:
            item = connection.recv()
            try:
                answer = True, work(item)
            except Exception as error:
                error.add_note("".join(traceback.format_exception(error)))
                answer = False, error
            connection.send(answer)
    except (EOFError, OSError):
        return


@contextmanager
def _without_signals() -> Iterator[None]:
    """Blocks what asks a run to stop: processes started meanwhile never get them, and we do afterwards, and end the processes."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, name) for name in _SIGNALS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
