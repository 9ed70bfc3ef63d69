"""Whose folder is it: two runs in one out_dir, two preparations in one data_dir."""

import re
import signal

import pytest

from tests.support.run_testing import TINY, arguments, finish, records, start, wait_until, write_text
from training.checkpoint import files as checkpoint
from training.folder_lock import held


@pytest.mark.fault(
    "two runs in one `--out-dir`", "the second is told who owns it (process, host, since when), and moves nothing"
)
def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(run, tmp_path, text):
    out_dir = tmp_path / "out"
    assert run(max_iters=1).status == 0
    long = {"out_dir": out_dir, "init_from": "resume", "max_iters": 10**6, "eval_interval": 10**6}
    first = start("train.py", arguments(**TINY | text | long))
    wait_until(lambda: len(records(out_dir, "step")) > 3, first)
    before = {path.name for path in out_dir.iterdir()}
    for options in ({}, {"init_from": "resume"}):
        second = run(**options)
        assert second.status == 2
        who = rf"pid {first.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.fullmatch(
            rf"train\.py: error: --out-dir {re.escape(str(out_dir))} is in use by another run: {who}; .*\n", second.err
        )
    assert {path.name for path in out_dir.iterdir()} == before
    first.send_signal(signal.SIGTERM)
    assert finish(first).status == 0
    assert checkpoint.load(out_dir).step == len(records(out_dir, "step"))
    assert not (out_dir / ".lock").exists()
    assert run(max_iters=1).status == 0  # who comes after it is not refused


def test_only_the_main_process_of_many_takes_the_folder(run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out" / ".lock"):
        assert run(max_iters=1).status == 2
        monkeypatch.setenv("RANK", "1")
        assert run(max_iters=1).status == 0


@pytest.mark.fault(
    "two runs that prepare one text at once", "the second waits, says so, and uses what the first has made"
)
def test_a_second_preparation_waits_and_uses_what_the_first_has_made(run, tmp_path):
    options = {"data": write_text(tmp_path / "text.txt", documents=25_000), "data_dir": tmp_path / "data"}
    first = start("train.py", arguments(**TINY | options | {"out_dir": tmp_path / "first", "max_iters": 1}))
    wait_until(lambda: list(tmp_path.glob("data/.tmp-*")), first)
    second = run(**options, max_iters=1)
    assert finish(first).status == second.status == 0
    assert re.fullmatch(r"waiting for another process, which prepares .*text\.txt-300-\w+: pid \d+ on .*\n", second.err)
    assert len(list((tmp_path / "data").iterdir())) == 1
