"""What every command of the bench does at its edges: options in, a mistake in one line, a stop that keeps what was measured."""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from model.config import option
from training.errors import UserError, fail


def run(options_class: type, description: str, body: Callable[[Any, Console], object]) -> None:
    """Parse the command line into `options_class` and call `body`. Status 2 for a user's mistake, 130 after Ctrl-C."""
    options = tyro.cli(options_class, description=description, prog=program())
    try:
        body(options, terminal())
    except UserError as error:
        fail(error, program())
    except KeyboardInterrupt:
        print("stopped; what was measured so far is kept", file=sys.stderr)
        raise SystemExit(130) from None


def leave_interpreter() -> None:
    """Begin the command again in a process without Triton's interpreter, whose kernels can't be compiled, if this one has it."""
    if "TRITON_INTERPRET" in os.environ:
        environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, *program().split()[1:], *sys.argv[1:]], environ)


def program() -> str:
    """What to type to run this command: `python -m bench.step`."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def terminal() -> Console:
    """Where tables go: as wide as the terminal, or wide enough for any table where stdout is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def check_at_least(options: Any, **least: int) -> None:
    """UserError, naming the option, unless each of these is a finite number and at least so much."""
    for name, minimum in least.items():
        if not minimum <= getattr(options, name) < math.inf:  # so that no NaN passes, either
            raise UserError(f"{option(name)} is {getattr(options, name)}; it must be at least {minimum}")


def check_writable(path: str) -> None:
    """UserError unless `path`, if one is given, can be written: asked before an hour is spent on what goes there."""
    if not path:
        return
    probe = Path(path + ".tmp")
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if Path(path).is_dir():
            raise IsADirectoryError(None, "it is a folder")
    except OSError as error:
        raise UserError(f"--json is {path}, which can't be written: {error.strerror}") from None
