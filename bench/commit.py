"""The files of a commit in a folder of their own, where its own bench can run: git's index, branches and trees stay as they are."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from training.errors import UserError

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def laid_out(revision: str, root: Path = ROOT) -> Iterator[Path]:
    """A folder with the files of a commit of the repository at `root`, removed whatever happens.

    UserError where there is no such commit.
    """
    if _git(root, "rev-parse", "--git-dir") is None:
        raise UserError(f"--diff compares with a commit, and {root} is not a git checkout")
    commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        raise UserError(f"--diff is {revision!r}, which names no commit of {root}; a hash, a branch or a tag is wanted")
    files = _git(root, "archive", "--format=zip", commit.decode().strip())
    if files is None:
        raise UserError(f"--diff is {revision!r}, which has no files of {root}")
    with tempfile.TemporaryDirectory(prefix="commit-") as folder:
        zipfile.ZipFile(io.BytesIO(files)).extractall(folder)
        yield Path(folder)


def has(folder: Path, module: str) -> bool:
    """Whether a folder that `laid_out` gave has a module, as a file or as a package."""
    path = folder.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def run_there(folder: Path, module: str, arguments: list[str]) -> subprocess.CompletedProcess:
    """`python -m module arguments` in a folder that `laid_out` gave."""
    environ = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "1000"}  # no message is broken into lines
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=folder, env=environ, capture_output=True, text=True
    )


def last_words(stderr: str) -> str:
    """The last line with words in it, without the frame that tyro draws around its messages."""
    lines = [line.strip(" │╭╮╰╯─") for line in stderr.splitlines()]
    return next((line for line in reversed(lines) if line and "--help" not in line), "no reason given")


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True).stdout
    except subprocess.CalledProcessError:
        return None
    except OSError as error:
        raise UserError(f"--diff needs git, which can't be run: {error.strerror}") from None
