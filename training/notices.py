"""How processes whose sums come to no end any more still reach each other: by notices in the launcher's store.

The first process that fails says so there, with its exit status; the others find it, sign, and end with the same status. So one
of them speaks, and who has not signed after a while is the one that was killed, or hangs.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

_ANSWER_SECONDS = 5.0  # in which a store that is there answers
_FAILED, _SPOKEN = "failed", "spoken"


@dataclass(frozen=True)
class Failure:
    """The first one of a run."""

    rank: int
    status: int
    """The exit status that all processes end with."""


class Notices:
    """The notices of one process among `size`, in a store that all of them reach.

    The store may be kept by a process that is gone or stopped, and a stopped one never answers: each question has a time limit,
    and after the first that ran out no more are asked.
    """

    def __init__(self, store: "Store", rank: int, size: int):
        self._store, self._rank, self._size = store, rank, size
        self.store_answers = True

    def failure(self) -> Failure | None:
        """The first failure, if any process has said so."""
        return self._ask(lambda store: _read(store.get(_FAILED)) if store.check([_FAILED]) else None)

    def fail(self, status: int) -> Failure:
        """Sign, and say that this process ends with `status`, unless another has failed before. Returns the first failure."""
        mine = Failure(self._rank, status)

        def say(store: "Store") -> Failure:
            store.set(f"signed/{self._rank}", "")
            return _read(store.compare_set(_FAILED, "", f"{self._rank} {status}"))

        return self._ask(say) or mine

    def have_spoken(self) -> None:
        """Say that the first one that failed, which this is, needs the store no more."""
        self._ask(lambda store: store.set(_SPOKEN, ""))

    def stay_for_the_speaker(self, seconds: float) -> None:
        """Where this process keeps the store: stay until the one that speaks needs it no more, so many seconds at most."""
        end = time.monotonic() + seconds
        while not self._ask(lambda store: store.check([_SPOKEN])) and self.store_answers and time.monotonic() < end:
            time.sleep(0.05)

    def absent(self, seconds: float) -> list[int]:
        """The ranks that have not signed, once all have or so many seconds have gone by."""
        missing = [rank for rank in range(self._size) if rank != self._rank]
        end = time.monotonic() + seconds
        while True:
            for rank in list(missing):
                if self._ask(lambda store, key=f"signed/{rank}": store.check([key])):
                    missing.remove(rank)
            if not missing or not self.store_answers or time.monotonic() > end:
                return missing
            time.sleep(0.05)

    def _ask(self, question: Callable[["Store"], T]) -> T | None:
        """What the store answers; None where it does not."""
        answers: list[T] = []

        def ask() -> None:
            try:
                answers.append(question(self._store))
            except RuntimeError:  # it is gone
                self.store_answers = False

        if self.store_answers:
            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            thread.join(_ANSWER_SECONDS)
            self.store_answers = self.store_answers and not thread.is_alive()
        return answers[0] if answers and self.store_answers else None


def _read(notice: bytes) -> Failure:
    rank, status = notice.split()
    return Failure(int(rank), int(status))
