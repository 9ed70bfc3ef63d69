"""What a run shows on stdout: lines that scroll and, on a terminal, a progress bar below them."""

import atexit
import contextlib
import os
import sys
from pathlib import Path

from training.errors import UserError


class Console:
    """Prints lines. Where stdout is a file or a pipe that is all: no control character is ever written to one."""

    def __init__(self, total_steps: int, start_step: int):
        self._progress = None
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self._progress, self._task = _progress_bar(total_steps, start_step)

    def print(self, text: str) -> None:
        """One or more lines; characters that a terminal would obey, or that stdout cannot encode, are shown escaped."""
        if self._progress is None:
            say(text)
        else:
            self._progress.console.out(printable(text, sys.stdout.encoding or "utf-8"), highlight=False)

    def advance(self, step: int, loss: float) -> None:
        """Move the bar past `step`, which is done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step + 1, loss=f"{loss:.4f}")

    def close(self) -> None:
        """Leave the bar as it stands; lines can still be printed."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


_stdout_failed = False


def say(text: str) -> None:
    """Print on stdout. That it can't be written, once a run is under way, is no reason to stop: the run has its files."""
    global _stdout_failed
    try:
        print(printable(text, sys.stdout.encoding or "utf-8"), flush=True)
    except BrokenPipeError:  # a `tee` that Ctrl-C reached first, say
        silence_stdout()
    except OSError as error:  # a full disk behind `> log.txt`; later lines are tried again
        if not _stdout_failed:
            _stdout_failed = True
            atexit.register(_leave_stdout)
            complain(
                f"stdout could not be written: {error.strerror or error}; the run goes on without the lines it misses"
            )


def write(text: str, end: str = "\n") -> None:
    """Print on stdout what a program was called for. UserError where it can't be written, but for a reader that has gone."""
    try:
        print(printable(text, sys.stdout.encoding or "utf-8"), end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        silence_stdout()
        raise UserError(f"stdout could not be written: {error.strerror or error}") from None


def _leave_stdout() -> None:
    """At the end, drop what stdout still does not take: else Python reports it, and ends with a status of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        silence_stdout()


def complain(text: str) -> None:
    """Print one line on stderr, behind the program's name; where even that fails there is nobody to tell."""
    with contextlib.suppress(OSError):
        print(f"{Path(sys.argv[0]).name}: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _progress_bar(total_steps: int, start_step: int):
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
        console=Terminal(file=sys.stdout, force_terminal=True),
        refresh_per_second=2,
        speed_estimate_period=300,  # seconds; an evaluation in between should not throw the estimate off
    )
    task = progress.add_task("", total=total_steps, completed=start_step, loss="-")
    progress.start()
    return progress, task


def printable(text: str, encoding: str) -> str:
    """The text with what a terminal would obey, or `encoding` does not have, shown escaped: young models write anything."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def open_closed_streams() -> None:
    """Where a program was started without stdin, stdout or stderr (`>&-`): what it prints goes nowhere, and no file that it
    opens takes their numbers, on which libraries print.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(null if null == number else os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - stays open


def silence_stdout() -> None:
    """Let what is still written to stdout go nowhere: its reader has gone, and the flush at exit would say so again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
