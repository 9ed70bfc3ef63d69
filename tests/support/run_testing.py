"""Whole runs of the programs, small enough for a second each: what the tests of the command line share."""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the cat sat on a mat while old dogs ran far away from home and birds sang loud songs over green hills"

# 12 steps of 4 x 16 tokens; every option that decides what a run costs is as small as it goes.
TINY = {
    "preset": "smoke",
    "vocab_size": 300,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "max_seq_len": 16,
    "batch_size": 4,
    "max_iters": 12,
    "warmup_iters": 2,
    "eval_interval": 6,
    "eval_iters": 2,
    "sample_tokens": 8,
    "log_interval": 3,
    "device": "cpu",
    "tensorboard": False,
}


def write_text(path: Path, documents: int = 200) -> Path:
    """A file of short documents, split at blank lines; the same words each time."""
    draw = random.Random(0)
    path.write_text("\n\n".join(" ".join(draw.choices(WORDS.split(), k=draw.randint(8, 40))) for _ in range(documents)))
    return path


def arguments(**options) -> list[str]:
    """A command line: values as --name=value, True and False as --name and --no-name."""
    words = []
    for name, value in options.items():
        name = name.replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}")
    return words


@dataclass
class Result:
    """How a program ended."""

    status: int
    out: str
    err: str


def call(program: ModuleType, words: list[str]) -> Result:
    """The `main` of train.py or generate.py in this process, its effects on torch undone."""
    import torch

    out, err, status = io.StringIO(), io.StringIO(), 0
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(1)
    name = f"{program.__name__}.py"
    with (
        mock.patch.object(sys, "argv", [name, *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            program.main()
        except SystemExit as exit:  # as the interpreter does with it
            status = exit.code if isinstance(exit.code, int) else 1
            if isinstance(exit.code, str):
                print(exit.code, file=sys.stderr)
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = fill
            torch.set_num_threads(threads)
    return Result(status, out.getvalue(), err.getvalue())


def start(program: str, words: list[str], code: str = "", **environment: str) -> subprocess.Popen:
    """The program in a process, and a process group, of its own. code: Python that is run in its place."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, *(["-c", code] if code else [str(ROOT / program)]), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, those of nohup SIGHUP, and what they start inherits that.
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
    )


def free_port() -> int:
    """A port of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_many(words: list[str], size: int = 2, code: str = "", **environment: str) -> list[subprocess.Popen]:
    """train.py in so many processes that find each other, as a launcher starts them; code as in `start`."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())} | environment
    return [start("train.py", words, code, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(size)]


def finish(process: subprocess.Popen) -> Result:
    """Wait for a process that was started."""
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait for a condition, which the process should bring about before it ends."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def records(out_dir: Path, kind: str) -> list[dict]:
    """The lines of one kind in a run's metrics.jsonl; one that is still being written is passed over."""
    path = out_dir / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if line["kind"] == kind]


def edit_config(checkpoint: Path, **options: str) -> None:
    """Give options other values, as TOML spells them, in a checkpoint's config.toml, as if it had been saved so."""
    path, manifest = checkpoint / "config.toml", checkpoint / "manifest.json"
    lines = [line.partition(" = ") for line in path.read_text().splitlines()]
    assert set(options) <= {name for name, _, _ in lines}
    path.write_text("".join(f"{name} = {options.get(name, value)}\n" for name, _, value in lines))
    sealed = json.loads(manifest.read_text())
    content = path.read_bytes()
    sealed["files"]["config.toml"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(sealed))


def state(checkpoint: Path) -> dict:
    """What a checkpoint's state.json says of the run."""
    return json.loads((checkpoint / "state.json").read_text())["state"]


def pointers(out_dir: Path) -> tuple[str, str]:
    """The checkpoints that `best` and `last` name."""
    return tuple((out_dir / name).read_text().strip() for name in ("best", "last"))
