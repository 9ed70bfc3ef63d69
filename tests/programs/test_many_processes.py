"""Many processes fail and stop as one: whatever happens to one of them, one line says so and all end, and soon."""

import os
import re
import signal
import subprocess
import time

import pytest

from tests.support.run_testing import (
    TINY,
    Result,
    arguments,
    finish,
    free_port,
    records,
    start,
    start_many,
    wait_until,
)
from training.checkpoint import files as checkpoint

LONG = {"max_iters": 10**6, "eval_interval": 10**6, "log_interval": 1000}


def words(tmp_path, text, **options) -> list[str]:
    micro_steps = {"gradient_accumulation_steps": 4, "out_dir": tmp_path / "out"}
    return arguments(**TINY | text | micro_steps | options)


def patched(tmp_path, patch: str) -> str:
    """Code of train.py with a patch, which has the process's `rank` and `hold`: it writes the file `held` and sleeps."""
    return f"""
import os, sys, time, train
from pathlib import Path
sys.argv[0] = "train.py"
rank = int(os.environ["RANK"])
def hold(seconds=60):
    Path({str(tmp_path / "held")!r}).touch()
    time.sleep(seconds)
{patch}
train.main()
"""


def finish_all(processes) -> list[Result]:
    return [finish(process) for process in processes]


# ------------------------------------------------------------------------------------------------------- one of them fails


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.fault(
    "one of many processes is killed", "its rank and the step are named; all end within seconds, with status 1"
)
def test_a_killed_process_is_named_and_ends_the_others(tmp_path, text, size, victim):
    processes = start_many(words(tmp_path, text, **LONG), size)
    wait_until(lambda: len(records(tmp_path / "out", "step")) > 3, processes[0])
    processes[victim].kill()
    began = time.monotonic()
    results = finish_all(processes)
    assert time.monotonic() - began < 20
    assert results.pop(victim).status == -signal.SIGKILL
    assert [result.status for result in results] == [1] * (size - 1), results
    line = (
        rf"train\.py: error: rank {victim} of {size} ended without a word \(killed\? out of memory\?\), at step \d+; "
        "--init-from resume goes on from the last checkpoint\n"
    )
    spoken = [result.err for result in results if result.err]
    assert all(re.fullmatch(line, err) for err in spoken), spoken
    # Rank 0 keeps the store by which the others agree who of them speaks, where no torchrun does.
    assert len(spoken) == 1 if victim else spoken


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.fault(
    "one of many processes hangs (SIGSTOP)",
    "after `--process-timeout` its rank and the step are named, and all end with status 1",
)
def test_a_process_that_hangs_is_named_after_the_time_limit(tmp_path, text, size, victim):
    processes = start_many(words(tmp_path, text, process_timeout=4, **LONG), size)
    wait_until(lambda: len(records(tmp_path / "out", "step")) > 3, processes[0])
    os.kill(processes[victim].pid, signal.SIGSTOP)
    others = [process for process in processes if process is not processes[victim]]
    results = finish_all(others)
    processes[victim].kill()
    finish(processes[victim])
    assert [result.status for result in results] == [1] * (size - 1), results
    line = (
        rf"train\.py: error: rank {victim} of {size} did not answer within 4 s \(--process-timeout\), at step \d+; "
        "--init-from resume goes on from the last checkpoint\n"
    )
    spoken = [result.err for result in results if result.err]
    assert all(re.fullmatch(line, err) for err in spoken), spoken
    assert len(spoken) == 1 if victim else spoken


ERROR_OF_ONE = """
from training.errors import UserError
from training.step.trainer import Trainer
step, calls = Trainer.step, iter(range(100))
def refuse(self, *batch):
    if rank == 1 and next(calls) == 3:
        raise UserError("only rank 1 has this")
    return step(self, *batch)
Trainer.step = refuse
"""

FULL_DISK = """
import training.checkpoint.parts as parts
def refuse(*a):
    raise OSError(28, "No space left on device")
parts.write_file = refuse
"""


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (ERROR_OF_ONE, "error: only rank 1 has this"),
        pytest.param(
            FULL_DISK,
            r"(.*could not be saved.*\n)+train\.py: error: .*step 12 could not be saved.*",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["rank 1", "the main process, saving"],
)
@pytest.mark.fault("a user's mistake that one of many processes finds", "one line; all end with status 2")
def test_a_users_mistake_in_one_process_is_one_line_and_ends_all(tmp_path, text, patch, message):
    results = finish_all(start_many(words(tmp_path, text), code=patched(tmp_path, patch)))
    assert [result.status for result in results] == [2, 2], results
    assert re.fullmatch(rf"train\.py: {message}\n", "".join(result.err for result in results)), results


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{"batch_size": 10**5}, {"gradient_accumulation_steps": 3}, {"preset": "huge"}])
def test_a_mistake_that_all_make_is_one_line(tmp_path, text, wrong):
    results = finish_all(start_many(words(tmp_path, text, **wrong)))
    assert [result.status for result in results] == [2, 2], results
    assert "".join(result.err for result in results).count("\n") == 1, results


BUG_OF_ONE = ERROR_OF_ONE.replace("UserError(", "ZeroDivisionError(")


@pytest.mark.slow
def test_a_bug_in_one_process_has_one_traceback_and_ends_all(tmp_path, text):
    results = finish_all(start_many(words(tmp_path, text), code=patched(tmp_path, BUG_OF_ONE)))
    assert [result.status for result in results] == [1, 1], results
    assert results[0].err == ""
    assert results[1].err.endswith("ZeroDivisionError: only rank 1 has this\n")


PREPARATION = """
from training.data import prepare
prepare_for = prepare.prepare_for
prepare.prepare_for = lambda config, show_progress: (
    (hold(SECONDS) if rank == 0 else None), prepare_for(config, show_progress=show_progress)
)[1]
"""


@pytest.mark.fault("preparing text takes longer than `--process-timeout`", "the other processes wait for it")
def test_a_preparation_longer_than_the_time_limit_is_waited_for(tmp_path, text):
    code = patched(tmp_path, PREPARATION.replace("SECONDS", "7"))
    results = finish_all(start_many(words(tmp_path, text, process_timeout=5), code=code))
    assert [(result.status, result.err) for result in results] == [(0, "")] * 2


@pytest.mark.slow
def test_a_signal_to_a_process_that_waits_for_a_preparation_is_answered(tmp_path, text):
    processes = start_many(words(tmp_path, text), code=patched(tmp_path, PREPARATION.replace("SECONDS", "60")))
    wait_until((tmp_path / "held").exists, processes[0])
    time.sleep(2)
    began = time.monotonic()
    processes[1].terminate()
    assert finish(processes[1]) == Result(143, "", "")
    assert time.monotonic() - began < 10
    processes[0].terminate()
    assert finish(processes[0]).status == 143


@pytest.mark.slow
@pytest.mark.parametrize("patch", [PREPARATION.replace("SECONDS", "60"), ""], ids=["preparing", "joining"])
def test_a_process_that_is_killed_before_the_first_step(tmp_path, text, patch):
    """While another waits for it without a limit, and before they have met."""
    processes = start_many(words(tmp_path, text, process_timeout=15), code=patched(tmp_path, patch))
    if patch:
        wait_until((tmp_path / "held").exists, processes[0])
        time.sleep(2)
    processes[0].kill()
    finish(processes[0])
    result = finish(processes[1])
    if patch:
        assert result.status == 1
        assert "error: rank 0 of 2 ended without a word" in result.err
        assert "at the preparation of the text" in result.err
    else:
        assert result.status == 2
        assert re.search(r"error: rank 1 of 2 could not join the others at localhost:\d+ within 15 s", result.err)


# --------------------------------------------------------------------------------------------------------------- signals

EVALUATION = """
from training.step.trainer import Trainer
evaluate, evaluations = Trainer.evaluate, iter(range(100))
def slow(self, batches):
    late = next(evaluations) >= 2  # the second
    return evaluate(self, (((hold(0.3) if late else None), batch)[1] for batch in batches))
Trainer.evaluate = slow
"""

SAVE = """
import training.checkpoint.parts as parts
write = parts.write_file
def slow(*a):
    hold(0.7)
    write(*a)
parts.write_file = slow
"""


@pytest.mark.parametrize("to", ["all", pytest.param("one", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("patch", "options"),
    [
        pytest.param(EVALUATION, {"eval_iters": 100}, id="evaluation"),
        pytest.param(SAVE, {"max_iters": 1000}, id="save", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault(
    "SIGTERM to one or all of many processes, in a step, an evaluation or a save",
    "they agree on the step, the run is saved, and all end with status 0",
)
def test_sigterm_in_an_evaluation_and_in_a_save(tmp_path, text, to, patch, options):
    out_dir = tmp_path / "out"
    processes = start_many(words(tmp_path, text, **options), code=patched(tmp_path, patch))
    wait_until((tmp_path / "held").exists, processes[0])
    for process in processes[0 if to == "all" else 1 :]:
        process.terminate()
    results = finish_all(processes)
    assert [(result.status, result.err) for result in results] == [(0, "")] * 2
    assert "stopping after step" in results[0].out
    assert checkpoint.load(out_dir).step == len(records(out_dir, "step"))
    assert len(records(out_dir, "eval")) == (1 if patch == EVALUATION else 2)


# -------------------------------------------------------------------------------------------------------------- torchrun


def torchrun(words: list[str], code_file, *options: str) -> subprocess.Popen:
    return start(
        "",
        [],
        code="import sys; from torch.distributed.run import main; sys.argv = sys.argv[:1] + "
        f"{['--nproc-per-node=2', *options, str(code_file), *words]!r}; main()",
    )


def children(process: subprocess.Popen) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("patch", ["", SAVE], ids=["step", "save"])
@pytest.mark.fault("SIGTERM to torchrun and to the processes it started", "the run is saved once, whole")
def test_sigterm_to_torchrun_and_its_processes(tmp_path, text, patch):
    (tmp_path / "program.py").write_text(patched(tmp_path, patch))
    out_dir = tmp_path / "out"
    options = {"max_iters": 1000} if patch else LONG
    process = torchrun(words(tmp_path, text, **options), tmp_path / "program.py")
    if patch:
        wait_until((tmp_path / "held").exists, process)
    else:
        wait_until(lambda: len(records(out_dir, "step")) > 3, process)
    os.killpg(process.pid, signal.SIGTERM)  # torchrun's group; each process that it starts is in it
    for child in children(process):
        os.kill(child, signal.SIGTERM)
    result = finish(process)
    assert "stopping after step" in result.out
    assert "done: " in result.out
    assert "Traceback" not in result.err.split("SignalException")[0] or "train" not in result.err
    assert checkpoint.load(out_dir).step == len(records(out_dir, "step"))
    assert not list(out_dir.glob(".tmp-*"))


KILLED = """
import signal
from training.step.trainer import Trainer
step, calls = Trainer.step, iter(range(100))
def step_until_killed(self, *batch):
    if rank == VICTIM and next(calls) == 4 and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *batch)
Trainer.step = step_until_killed
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--standalone",)], ids=["static", "standalone"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.fault(
    "a process is killed under `torchrun --max-restarts`", "the run goes on from its last checkpoint, again and again"
)
def test_a_run_that_torchrun_restarts_goes_on(tmp_path, text, victim, options):
    (tmp_path / "program.py").write_text(patched(tmp_path, KILLED.replace("VICTIM", str(victim))))
    out_dir = tmp_path / "out"
    run_options = {"eval_interval": 3, "always_save_checkpoint": True, "eval_iters": 1}
    extra = () if options else (f"--master-port={free_port()}",)
    process = torchrun(
        words(tmp_path, text, **run_options), tmp_path / "program.py", "--max-restarts=3", *options, *extra
    )
    result = finish(process)
    assert result.status == 0, result
    assert re.search("^done: 12 steps", result.out, re.M)
    resumed = re.findall(r"^resuming .*step-(\d+)$", result.out, re.M)
    assert [int(step) for step in resumed] == [3, 6, 9]
    assert not list(out_dir.glob("earlier-*"))
    assert checkpoint.load(out_dir).step == 12
