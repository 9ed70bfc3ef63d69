"""A signal is answered within two seconds, whatever a run is at, and what is begun to be saved is saved."""

import re
import signal
import time

import pytest

from tests.support.run_testing import TINY, Result, arguments, finish, records, start, wait_until
from training.checkpoint import files as checkpoint
from training.run_folder import step_folders

LONG = {"max_iters": 10**6, "eval_interval": 10**6, "log_interval": 1000}
SOON = 5  # seconds: one or two, and what a machine with other work adds; what is interrupted takes a minute


def begin(tmp_path, text, patch: str, **options):
    """train.py with a patch (Python that has `hold`, which writes the file `held` and then sleeps), waited for until held."""
    code = f"""
import sys, time, train
from pathlib import Path
def hold(seconds=60):
    Path({str(tmp_path / "held")!r}).touch()
    time.sleep(seconds)
{patch}
train.main()
"""
    options = TINY | text | {"out_dir": tmp_path / "out"} | options
    process = start("train.py", arguments(**options), code=code)
    wait_until((tmp_path / "held").exists, process)
    return process


def end(process, *numbers) -> tuple[Result, float]:
    """How a process ends after these signals, one after the other, and the seconds until it says so, or else has ended."""
    began, said, lines = time.monotonic(), None, []
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)
    for line in process.stdout:
        lines.append(line)
        if line.startswith("stopping after"):
            said = time.monotonic() - began
    result = finish(process)
    return Result(result.status, "".join(lines), result.err), said or time.monotonic() - began


EVALUATION = """
from training.step.trainer import Trainer
evaluate, calls = Trainer.evaluate, iter(range(100))
def held(self, batches):
    first, *rest = batches
    if next(calls) == 2:  # of the second evaluation
        hold()
    return evaluate(self, [first, *rest])
Trainer.evaluate = held
"""


@pytest.mark.fault(
    "a signal during an evaluation", "it is left at once; the run is saved, and evaluates when it is resumed"
)
def test_a_signal_during_an_evaluation_is_answered_at_once(run, tmp_path, text):
    result, seconds = end(begin(tmp_path, text, EVALUATION), signal.SIGTERM)
    assert (result.status, result.err) == (0, "")
    assert seconds < SOON
    out_dir = tmp_path / "out"
    assert "stopping after step 5, as asked\n" in result.out
    assert checkpoint.load(out_dir).step == 6
    assert [line["step"] for line in records(out_dir, "eval")] == [0]
    assert run(init_from="resume").status == 0
    assert [line["step"] for line in records(out_dir, "eval")] == [0, 6, 12]


SAMPLE = """
from model import generation
generate, calls = generation.generate, iter(range(100))
generation.generate = lambda *a, **b: (hold() if next(calls) == 1 else None, generate(*a, **b))[1]
"""


def test_a_signal_during_a_sample_keeps_the_losses_and_their_checkpoint(tmp_path, text):
    result, seconds = end(begin(tmp_path, text, SAMPLE), signal.SIGTERM)
    assert (result.status, result.err) == (0, "")
    assert seconds < SOON
    out_dir = tmp_path / "out"
    assert [line["step"] for line in records(out_dir, "eval")] == [0, 6]
    assert (out_dir / "best").read_text() == (out_dir / "last").read_text() == "step-00000006\n"


FIRST_STEP = """
from training.step.trainer import Trainer
Trainer.step = lambda self, *batch: hold()
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault(
    "a signal before the first step is done (`torch.compile` works for minutes)",
    "the run ends at once, by the signal's status",
)
def test_a_signal_in_the_first_step_ends_the_run_at_once(tmp_path, text, number, status):
    result, seconds = end(begin(tmp_path, text, FIRST_STEP), number)
    assert (result.status, result.err) == (status, "")
    assert seconds < SOON
    assert step_folders(tmp_path / "out") == []


FINALIZER = """
import weakref
class Held: pass
def callback(_):
    hold(2)
def in_a_callback():
    held = Held()
    reference = weakref.ref(held, callback)
    del held
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_meets_the_callback_of_a_weak_reference_ends_the_run_at_once(tmp_path, text, number, status):
    """Python drops what is raised in there; torch.compile's guards and caches have many."""
    patch = FINALIZER + FIRST_STEP.replace("hold()", "in_a_callback()")
    result, seconds = end(begin(tmp_path, text, patch), number)
    assert (result.status, result.err) == (status, "")
    assert seconds < SOON
    assert step_folders(tmp_path / "out") == []


def test_a_signal_that_meets_the_callback_of_a_weak_reference_leaves_an_evaluation(tmp_path, text):
    patch = FINALIZER + EVALUATION.replace("hold()", "in_a_callback()")
    result, seconds = end(begin(tmp_path, text, patch), signal.SIGTERM)
    assert (result.status, result.err) == (0, "")
    assert seconds < SOON
    assert checkpoint.load(tmp_path / "out").step == 6


@pytest.mark.slow
def test_a_signal_while_torch_compiles_ends_the_run_at_once(tmp_path, text):
    """It does for far more than three seconds, of the first evaluation, and each step after it takes a few milliseconds."""
    process = start("train.py", arguments(**TINY | text | LONG | {"out_dir": tmp_path / "out", "compile": True}))
    wait_until(lambda: records(tmp_path / "out", "note"), process)
    time.sleep(3)
    result, seconds = end(process, signal.SIGTERM)
    assert (result.status, result.err) == (143, "")
    assert not records(tmp_path / "out", "eval")
    assert seconds < SOON


SAVE = """
import training.checkpoint.parts as parts
write = parts.write_file
def held(*a):
    hold(0.7)
    write(*a)
parts.write_file = held
"""


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGHUP, signal.SIGTERM, signal.SIGTERM],
        pytest.param([signal.SIGINT] * 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault("signals during a save, once or more often", "the save is finished, and the run ends well")
def test_a_save_that_is_begun_is_finished(tmp_path, text, numbers):
    result, _ = end(begin(tmp_path, text, SAVE, max_iters=1000), *numbers)
    assert (result.status, result.err) == (0, "")
    assert "stopping after step 5, as asked\n" in result.out
    assert checkpoint.load(tmp_path / "out").step == 6
    assert not list((tmp_path / "out").glob(".tmp-*"))


def test_what_is_ignored_from_the_start_stays_ignored(tmp_path, text):
    """As nohup has SIGHUP."""
    patch = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + EVALUATION.replace("hold()", "hold(1)")
    process = begin(tmp_path, text, patch)
    process.send_signal(signal.SIGHUP)
    result = finish(process)
    assert (result.status, result.err) == (0, "")
    assert re.search("^done: 12 steps", result.out, re.M)


CLOSED = """
import os, sys
for number in map(int, sys.argv.pop()):
    os.close(number)
os.execv(sys.executable, [sys.executable, "-c", sys.argv.pop(), *sys.argv[1:]])
"""
STREAMS = """
import sys
from training.stopping import exit_statuses
with exit_statuses():
    print("out"), print("err", file=sys.stderr), sys.stdin.read()
    with open(sys.argv[1], "w") as file:
        file.write(str(file.fileno()))
    if len(sys.argv) > 2:
        open(sys.argv[2])
"""


@pytest.mark.parametrize("numbers", ["1", "2", "12", "012"])
def test_a_program_may_be_started_without_stdin_stdout_or_stderr(tmp_path, numbers):
    result = finish(start("", [str(tmp_path / "file"), STREAMS, numbers], code=CLOSED))
    assert result == Result(0, "" if "1" in numbers else "out\n", "" if "2" in numbers else "err\n")
    assert int((tmp_path / "file").read_text()) > 2  # where what libraries print would end up in it


def test_what_the_system_refuses_is_a_line_and_what_is_not_there_a_bug(tmp_path):
    words = [str(tmp_path / "file"), str(tmp_path / "file" / "x")]
    result = finish(start("", words, code=STREAMS))
    assert (result.status, result.err) == (2, f"err\n-c: error: {words[1]}: Not a directory\n")
    words[1] = str(tmp_path / "x")
    result = finish(start("", words, code=STREAMS))
    assert (result.status, "FileNotFoundError" in result.err) == (1, True)


LIBRARY_CALL = """
import hashlib, sys, time
from training.stopping import answering_signals, exit_statuses
with exit_statuses():
    print(answering_signals(lambda: 7), flush=True)
    try:
        answering_signals(lambda: [][1])
    except IndexError as error:
        print(error, flush=True)
    try:
        answering_signals(lambda: (print("called", flush=True), hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)))
    finally:
        print("removed", flush=True)
"""


def test_a_signal_is_answered_during_a_library_call_of_minutes():
    process = start("", [], code=LIBRARY_CALL)
    assert [process.stdout.readline() for _ in range(3)] == ["7\n", "list index out of range\n", "called\n"]
    result, seconds = end(process, signal.SIGTERM)
    assert result == Result(143, "removed\n", "")
    assert seconds < SOON
