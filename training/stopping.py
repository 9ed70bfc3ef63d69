"""How a program ends: its exit statuses, and the signals that ask a run to stop."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from training.errors import UserError, fail
from training.log.console import silence_stdout


@contextlib.contextmanager
def exit_statuses() -> Iterator[None]:
    """Put around a whole program: what the user or the system may cause ends it with an exit status and no traceback.

    2 and one line on stderr for a UserError, 130 for Ctrl-C, 143 for SIGTERM, 141 where the reader of stdout has gone
    (`| head`). SIGTERM unwinds as Ctrl-C does, so that half-made files are removed.
    """
    former = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        silence_stdout()
        raise SystemExit(141) from None
    finally:
        signal.signal(signal.SIGTERM, former)


class StopSignal:
    """While entered, the first SIGTERM or Ctrl-C only sets `asked`; a second one acts as it did before."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "StopSignal":
        self._former = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self._former[number])
