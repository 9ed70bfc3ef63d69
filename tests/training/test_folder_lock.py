"""One process at a time in a folder, whatever becomes of the one that holds it."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.support.run_testing import ROOT
from training import folder_lock
from training.folder_lock import HeldError, held

HOLD = """
import sys, time
from pathlib import Path
from training.folder_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / ".lock"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lock")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_who_holds_a_lock_is_told(tmp_path, holder):
    who = rf"pid {holder.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    with pytest.raises(HeldError, match=f"^{who}$"), held(tmp_path / ".lock"):
        pass


def test_a_killed_holder_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with held(tmp_path / ".lock"):
        assert (tmp_path / ".lock").read_text().startswith(f"pid {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_a_second_one_that_waits_is_told_once_and_then_has_it(tmp_path, holder, monkeypatch):
    told, slept = [], []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            holder.kill()
            holder.wait()

    monkeypatch.setattr(folder_lock.time, "sleep", sleep)
    with held(tmp_path / ".lock", wait=told.append):
        pass
    assert len(told) == 1
    assert f"pid {holder.pid} on " in told[0]
    assert len(slept) == 3


def test_a_lock_whose_file_its_last_holder_removes_is_taken_of_the_new_file(tmp_path, monkeypatch):
    """The file is opened, then removed by the one that held it, and only then locked: another may have made a new one."""
    lock, path, opened = folder_lock._lock, tmp_path / ".lock", []

    def lock_late(file):
        opened.append(file)
        if len(opened) == 1:
            path.unlink()
        return lock(file)

    monkeypatch.setattr(folder_lock, "_lock", lock_late)
    with held(path):
        assert len(opened) == 2
        with pytest.raises(HeldError), held(path):
            pass


def test_many_at_once_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "_POLL_SECONDS", 0.001)
    inside, most, turns = [0], [0], [0]

    def take_turns():
        for _ in range(20):
            with held(tmp_path / ".lock", wait=lambda holder: None):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                turns[0] += 1
                inside[0] -= 1

    threads = [threading.Thread(target=take_turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], turns[0]) == (1, 80)


def refuse(number):
    def lock(*_):
        raise OSError(number, os.strerror(number))

    return lock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_where_there_is_no_flock_lockf_is_taken(tmp_path, holder, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with held(tmp_path / "other"):
        assert capsys.readouterr().err == ""
        code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", code, tmp_path / "other"], capture_output=True, text=True)
        assert "BlockingIOError" in other.stderr


def test_where_there_are_no_locks_at_all_a_warning_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS))
    monkeypatch.setattr(fcntl, "lockf", refuse(errno.ENOLCK))
    with held(tmp_path / ".lock"):
        pass
    assert re.fullmatch(r"warning: .*\.lock: this file system has no locks; [^\n]*\n", capsys.readouterr().err)


def test_another_error_of_the_system_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), held(tmp_path / ".lock"):
        pass
