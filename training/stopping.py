"""How a program ends: its exit statuses, and the signals that ask a run to stop."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TypeVar

from training import launcher
from training.errors import UserError, fail, refused
from training.log.console import open_closed_streams, silence_stdout

T = TypeVar("T")


@contextlib.contextmanager
def exit_statuses(*, speaks: bool = True) -> Iterator["StopSignal"]:
    """Put around a whole program: what the user or the system may cause ends it with an exit status and no traceback.

    2 and one line on stderr for a UserError and for what the system refuses, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP
    (unless it is ignored, as `nohup` has it), 141 where the reader of stdout has gone (`| head`). speaks: without it the line is
    left to another process.
    """
    open_closed_streams()
    try:
        with StopSignal() as stop:
            yield stop
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        silence_stdout()
        raise SystemExit(141) from None
    except (UserError, OSError) as error:
        told = error if isinstance(error, UserError) else refused(error)
        if told is None:
            raise
        if not speaks:
            raise SystemExit(2) from None
        fail(told)


def status_of(error: BaseException) -> int:
    """The exit status that a program ends with for this exception, as `exit_statuses` and Python have it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    statuses = {UserError: 2, KeyboardInterrupt: 130, BrokenPipeError: 141}
    return next((status for kind, status in statuses.items() if isinstance(error, kind)), 1)


def _heeded() -> list[signal.Signals]:
    """The signals that end a program: from a scheduler or `kill`, a connection that goes away, and Ctrl-C.

    Those that it was started to ignore are left out, as `nohup` has SIGHUP and a script's background job Ctrl-C.
    """
    names = [name for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]  # Windows has no SIGHUP
    return [number for name in names if signal.getsignal(number := getattr(signal, name)) is not signal.SIG_IGN]


@contextlib.contextmanager
def killed_by_signals() -> Iterator[None]:
    """While entered, a signal ends the process at once, also within a library's call: where there is nothing to clean up."""
    former = {number: signal.signal(number, signal.SIG_DFL) for number in _heeded()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def answering_signals(call: Callable[[], T]) -> T:
    """What `call` returns: made in a thread, so that signals are answered during a library's call that takes minutes.

    Python answers them between its own instructions, in the main thread. One that unwinds does not wait for the call, nor does
    the program's end.
    """
    result: list[T] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as raised:
            error.append(raised)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException as raised:
        atexit.register(os._exit, status_of(raised))
        raise
    if error:
        raise error[0]
    return result[0]


class Stopped(BaseException):
    """The run was asked to stop, and does. No Exception, so that no library takes it for one of its own errors."""


class StopSignal:
    """While entered, it answers SIGTERM, SIGHUP (unless that is ignored) and Ctrl-C: a run saves and stops.

    Until a run has `begun` there is nothing to save: the signals unwind as Ctrl-C does, so that half-made files are removed.
    From then on the first one sets `asked`. What comes after it changes nothing, as a launcher that passes signals on may make
    two of one; but where no torchrun does so a second Ctrl-C unwinds, unless that would cut off what is `finishing`.

    Python drops what is raised in a finalizer or the callback of a weak reference, and torch.compile spends long in those: a
    signal that met one is sent again.

    Attributes:
        asked: whether the run should stop.
        begun: to be set once a step has been done.
    """

    def __init__(self):
        self.asked = self.begun = False
        self._finishing = self._interrupting = self._dropped = False
        self._unwinding: BaseException | None = None
        self._number = 0

    def __enter__(self) -> "StopSignal":
        self._former = {number: signal.signal(number, self._answer) for number in _heeded()}
        self._former_hook, sys.unraisablehook = sys.unraisablehook, self._on_dropped
        return self

    def __exit__(self, *_) -> None:
        sys.unraisablehook = self._former_hook
        self._unwinding, self._dropped = None, False
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def heed(self, asked: int) -> None:
        """Raise Stopped where `asked`, added up over all processes, is not 0: all of them then have it set."""
        if asked:
            self.asked = True
            raise Stopped

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """What is begun in here is finished: a signal only asks."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    @contextlib.contextmanager
    def interrupting(self, *, wanted: bool = True) -> Iterator[None]:
        """What is done in here may be left at any point: a signal to this process raises Stopped at once, if `wanted`."""
        self._interrupting = wanted
        try:
            if wanted and self.asked:
                raise Stopped
            yield
        finally:
            self._interrupting = False

    def _answer(self, number: int, _: FrameType | None) -> None:
        again, dropped, self.asked, self._dropped = self.asked, self._dropped, True, False
        if self._finishing:
            return
        if self.begun and self._interrupting:
            self._unwind(Stopped(), number)
        if number == signal.SIGINT:
            if not self.begun or (again and not dropped and not launcher.by_torchrun()):
                self._unwind(KeyboardInterrupt(), number)
        elif not self.begun and (dropped or not again):
            self._unwind(SystemExit(128 + number), number)

    def _unwind(self, error: BaseException, number: int) -> NoReturn:
        self._unwinding, self._number = error, number
        raise error

    def _on_dropped(self, unraisable) -> None:
        """Answers, as `sys.unraisablehook`, what Python drops: of our own there is nothing to say."""
        if self._unwinding is None or unraisable.exc_value is not self._unwinding:
            return self._former_hook(unraisable)
        self._unwinding, self._dropped = None, True
        # A moment later, when the finalizer has returned: what is raised within this hook would be dropped too.
        timer = threading.Timer(0.01, self._send_again)
        timer.daemon = True
        timer.start()

    def _send_again(self) -> None:
        if self._dropped:
            signal.pthread_kill(threading.main_thread().ident, self._number)  # a sleep wakes up by it
