"""Runs of train.py in processes that begin in a tenth of a second: forked from one that has imported everything."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.run_testing import ROOT

SERVER = """
import json, os, sys
import train
from training import distributed, evaluation, progress, void_options
from training.checkpoint import saves
from training.data import prepare
from training.log import plot, profiling
from training.step import trainer
for line in sys.stdin:
    words, log = json.loads(line)
    pid = os.fork()
    if not pid:
        sys.argv = ["train.py", *words]
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2), os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = 70
        try:
            train.main()
            status = 0
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class ForkedRun:
    """A run that was started; `log` has what it says on stdout and stderr."""

    pid: int
    log: Path
    _server: subprocess.Popen

    def kill(self) -> int:
        """SIGKILL, wherever it is; returns its exit status, which is another where it had ended."""
        os.kill(self.pid, signal.SIGKILL)  # it stays a process until the server has asked for its status
        return self.wait()

    def wait(self) -> int:
        """Its exit status, once it has ended; -9 where it was killed."""
        return int(self._server.stdout.readline())

    def open_files(self) -> int:
        """How many files it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident_bytes(self) -> int:
        """Its memory, without what it shares with files."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()
        return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


class RunServer:
    """Where they are forked, one at a time. Close it at the end."""

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def start(self, words: list[str]) -> ForkedRun:
        """Start a run with this command line; the one before it must have ended."""
        self._count += 1
        log = self._folder / f"run-{self._count}.log"
        print(json.dumps([words, str(log)]), file=self._process.stdin, flush=True)
        return ForkedRun(int(self._process.stdout.readline()), log, self._process)

    def close(self) -> None:
        """End the process that forks."""
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
