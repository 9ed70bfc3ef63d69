"""What a run's folder holds. Imports no torch, so that `--init-from resume` and `--out-dir` are checked with the other options."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from training import folder_lock
from training.errors import UserError

STEP_FOLDER = re.compile(r"step-\d{8,}")
LOCK = ".lock"
RUN_FILES = ("last", "best", "config.toml", "metrics.jsonl", "loss.png", "profile.json", "tensorboard")
"""What a run writes into its folder beside its checkpoints; and `wandb`, where wandb keeps each run by itself."""
CARD = "README.md"
CARD_MARK = "<!-- The model card of a run: train.py writes it anew when the run ends or stops. -->"
"""The first line of a card, by which a README.md that someone else wrote is told from it, and left alone."""


def find(out_dir: str | Path, which: str = "last") -> Path:
    """The folder of a checkpoint in `out_dir`: `which` is "last", "best" or a name such as "step-00000123".

    Raises UserError where there is none.
    """
    out_dir = Path(out_dir)
    present = step_folders(out_dir)
    name = which
    if which in ("last", "best"):
        name = pointed_at(out_dir, which)
        if name is None and which == "last" and present:
            name = present[-1].name  # the first save was cut off between the folder and its pointer
    if name is not None and STEP_FOLDER.fullmatch(name):
        # A save that replaces a checkpoint and is cut off between its two renames leaves the old one under this name.
        for folder in (out_dir / name, out_dir / f".old-{name}"):
            if folder.is_dir():
                return folder
    held = ", ".join(folder.name for folder in present) or "no checkpoint"
    holds = f"which holds {held}" if out_dir.is_dir() else "which is no folder"
    found = "" if name is None or name == which else f" (the file says {name!r})"
    raise UserError(f"there is no checkpoint {which!r}{found} in {out_dir}, {holds}")


def step_folders(out_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first: by the time of writing, since a run may start again from an earlier step."""
    folders = [path for path in out_dir.glob("step-*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: (path.stat().st_mtime_ns, path.name))


def others_than(checkpoint: Path) -> str:
    """How to take another checkpoint of the same run, newest first, in words to put behind what is wrong with this one."""
    names = [folder.name for folder in reversed(step_folders(checkpoint.parent)) if folder.name != checkpoint.name]
    return f"; take another with --which: {', '.join(names)}" if names else ""


def pointed_at(out_dir: Path, pointer: str) -> str | None:
    """The name in the file `last` or `best`; None where there is none."""
    try:
        return (out_dir / pointer).read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def refuse_weights(out_dir: str | Path) -> None:
    """UserError where a run's folder would be a checkpoint, whose files it would write over, or a Hugging Face folder.

    What reads weights would go on to take those of Hugging Face for the run's.
    """
    out_dir = Path(out_dir)
    for name, held in (("manifest.json", "a checkpoint"), ("config.json", "a model of Hugging Face")):
        try:
            is_there = (out_dir / name).is_file()
        except OSError as error:
            raise _cannot_write(out_dir, error) from None
        if is_there:
            raise UserError(f"--out-dir {out_dir} holds {held} itself ({name}); name another folder")


@contextlib.contextmanager
def owned(out_dir: str | Path) -> Iterator[None]:
    """Keep every other run out of a run's folder, which is made where there is none, while the block runs.

    UserError where another run owns it, or no files can be written there.
    """
    with contextlib.ExitStack() as stack:
        try:
            Path(out_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out_dir).close()
            stack.enter_context(folder_lock.held(Path(out_dir) / LOCK))
        except folder_lock.HeldError as error:
            raise UserError(
                f"--out-dir {out_dir} is in use by another run: {error}; name another folder, or stop it"
            ) from None
        except OSError as error:
            raise _cannot_write(out_dir, error) from None
        yield


def open_run(out_dir: str | Path, config_toml: str, *, resume: bool) -> str:
    """Write the configuration of a run that begins, or goes on, in its folder. Returns what there is to say, or nothing.

    What an earlier run left there is set aside unless this one continues it: moved to `earlier-1`, `earlier-2` ... inside.
    Nothing is deleted, and nothing is touched that no run wrote. UserError where the folder cannot be written.
    """
    out_dir = Path(out_dir)
    note = ""
    draft = out_dir / ".tmp-config.toml"
    try:
        draft.write_text(config_toml, encoding="utf-8")  # before anything is moved, for a disk may be full
        if not resume and step_folders(out_dir):
            note = f"{out_dir} held an earlier run, which is now in {_set_aside(out_dir)}"
        draft.replace(out_dir / "config.toml")
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise _cannot_write(out_dir, error) from None
    return note


def _set_aside(out_dir: Path) -> Path:
    """Move what an earlier run left into a folder of its own, all of it or, where the system refuses, nothing."""
    earlier = next(folder for n in count(1) if not (folder := out_dir / f"earlier-{n}").exists())
    earlier.mkdir()
    moved: list[Path] = []
    try:
        for path in (*step_folders(out_dir), *out_dir.glob(".old-step-*"), *map(out_dir.joinpath, (*RUN_FILES, CARD))):
            if path.exists() and (path.name != CARD or is_card(path)):
                path.rename(earlier / path.name)
                moved.append(path)
    except OSError:
        for path in moved:
            (earlier / path.name).rename(path)
        earlier.rmdir()
        raise
    return earlier


def is_card(path: Path) -> bool:
    """Whether a README.md is the model card of a run. OSError where it cannot be read."""
    with path.open("rb") as file:
        return file.readline().strip() == CARD_MARK.encode()


def _cannot_write(out_dir: str | Path, error: OSError) -> UserError:
    return UserError(f"--out-dir {out_dir} cannot be written: {error.strerror or error}")
