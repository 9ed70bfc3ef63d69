"""Processes that share work: results in order, little taken ahead, and a killed one told at once."""

import os
import signal
import time

import pytest

from training.data.workers import WorkerDied, in_processes
from training.errors import UserError


def squared(item):
    time.sleep(0.02 if item == 0 else 0)
    return item, item * item


def die(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def leave(item):
    os._exit(7)


def refuse(item):
    raise (UserError if item == "user" else ZeroDivisionError)(f"about {item}")


def test_results_come_in_the_order_of_the_items_and_few_are_taken_ahead():
    taken = []

    def items():
        for item in range(40):
            taken.append(item)
            yield item

    results = in_processes(squared, items(), 2)
    assert next(results) == (0, 0)
    assert len(taken) <= 5
    assert list(results) == [(i, i * i) for i in range(1, 40)]


@pytest.mark.parametrize(("work", "how"), [(die, "killed by SIGKILL, as the system does"), (leave, "exit status 7")])
def test_a_process_that_dies_is_told_at_once_with_what_it_worked_on(work, how):
    start = time.monotonic()
    with pytest.raises(WorkerDied, match=rf"process \d+ .*{how}.* while it worked on item 3"):
        list(in_processes(work, iter([3] if work is leave else range(10)), 2, "item {}".format))
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(("item", "kind"), [("user", UserError), ("bug", ZeroDivisionError)])
def test_what_the_work_raises_is_raised_here(item, kind):
    with pytest.raises(kind, match=f"about {item}") as error:
        list(in_processes(refuse, iter([item]), 1))
    assert "refuse" in error.value.__notes__[0]
