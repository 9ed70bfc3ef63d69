"""Which checkpoints a run's folder holds. Imports no torch, so that `--init-from resume` is checked with the other options."""

import re
from pathlib import Path

from training.errors import UserError

STEP_FOLDER = re.compile(r"step-\d{8,}")


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
    found = "" if name is None or name == which else f" (the file says {name!r})"
    raise UserError(
        f"--init-from resume: there is no checkpoint {which!r}{found} in --out-dir {out_dir}, which holds {held}"
    )


def step_folders(out_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first: by the time of writing, since a run may start again from an earlier step."""
    folders = [path for path in out_dir.glob("step-*") if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: (path.stat().st_mtime_ns, path.name))


def pointed_at(out_dir: Path, pointer: str) -> str | None:
    """The name in the file `last` or `best`; None where there is none."""
    try:
        return (out_dir / pointer).read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def claim(out_dir: str | Path, *, resume: bool) -> str:
    """Make a run's folder, and set aside what an earlier run left in it unless this one continues that. Says what it did.

    Nothing is deleted: it moves to `earlier-1`, `earlier-2` ... inside. UserError where the folder cannot be written.
    """
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        probe = out_dir / ".tmp-probe"
        probe.write_bytes(b"")
        probe.unlink()
        held = [path for path in out_dir.iterdir() if not path.name.startswith("earlier-")]
        if resume or not step_folders(out_dir):
            return ""
        count = sum(path.name.startswith("earlier-") for path in out_dir.iterdir())
        earlier = out_dir / f"earlier-{count + 1}"
        earlier.mkdir()
        for path in held:
            path.rename(earlier / path.name)
    except OSError as error:
        raise UserError(f"--out-dir {out_dir} cannot be written: {error.strerror or error}") from None
    return f"{out_dir} held an earlier run, which is now in {earlier}"
