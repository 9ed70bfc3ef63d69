"""Checkpoints: folders, files and hashes. What the tensors mean is the caller's business.

```
out_dir/
  step-00000123/
    model.safetensors        one group of tensors; a larger one is split: model-00001-of-00003.safetensors ... and
                             model.safetensors.index.json, as Hugging Face names and reads them
    optimizer.safetensors    another group, and so on
    state.json               the step, and what the caller keeps in JSON
    config.toml              the configuration of the run
    tokenizer.model          or tokenizer.json
    manifest.json            format version; size and SHA-256 of every other file
  last, best                 text files that name a folder
```

A folder is written as `.tmp-*`, its files and itself flushed to the disk, and renamed; pointers are replaced atomically
after that. So a reader sees a whole checkpoint or none, and a run killed at any moment leaves the earlier ones as they
were. Nothing is a pickle: reading a checkpoint of a stranger runs no code of theirs.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from training.checkpoint import parts
from training.distributed import World
from training.errors import UserError
from training.run_folder import STEP_FOLDER, find, others_than, pointed_at, step_folders

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZERS = ("tokenizer.model", "tokenizer.json")
"""What the file of a checkpoint's tokenizer may be called."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been verified; the tensors are read when asked for."""

    path: Path
    step: int
    state: dict
    config_toml: str
    tokenizer_name: str  # one of TOKENIZERS
    tokenizer: bytes
    files: tuple[str, ...]  # names of all files but the manifest

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors saved under `group`, on the CPU, by name. UserError where the checkpoint has no such group."""
        reader = self.reader(group)
        return {name: reader.tensor(name) for name in reader.files}

    def reader(self, group: str) -> parts.Reader:
        """The same tensors, of which nothing is read yet."""
        return parts.Reader(self._paths(group), f"checkpoint {self.path}")

    def _paths(self, group: str) -> list[Path]:
        part = re.compile(re.escape(group) + r"(-\d{5}-of-\d{5})?\.safetensors")
        names = sorted(name for name in self.files if part.fullmatch(name))
        if not names:
            raise UserError(f"checkpoint {self.path} has no {group}.safetensors; it holds {', '.join(self.files)}")
        return [self.path / name for name in names]


def save(
    out_dir: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor | parts.Shared]],
    state: dict,
    config_toml: str,
    tokenizer: bytes,
    tokenizer_name: str = TOKENIZERS[0],
    best: bool,
    keep: int,
    max_file_bytes: int = 4 * 2**30,
    world: World | None = None,
) -> Path:
    """Write checkpoint `step`, point `last` at it (and `best`, where told), and drop the old ones. Returns its folder.

    tensors: by group, then by name; any dtype, device and strides. Tensors that share memory are written one by one.
    state: anything JSON can hold. keep: how many of the newest checkpoints stay; those that `last` and `best` name stay
    in any case. max_file_bytes: a group that is larger is split into files of at most this size (one tensor is never
    split). A checkpoint of the same step is replaced. world: the processes, each of which calls this and writes its share of the
    files (parts.py); the first file, of the first group, and all that is no tensor are the main process's.

    One run may save into a folder at a time. Raises UserError, in every process, where the system refuses one of them (a full
    disk, a folder that cannot be written); the earlier checkpoints and the pointers are then as they were.
    """
    out_dir, world = Path(out_dir), world or World()
    folder = out_dir / f"step-{step:08d}"
    temporary = out_dir / f".tmp-{folder.name}"

    def agree(refusal: str, entries: dict | None = None) -> dict:
        """The entries of all processes. UserError in each where one was refused."""
        found = world.gather((refusal, entries or {}), patiently=True)
        for rank, (reason, _) in enumerate(found):
            if reason:
                who = f", by rank {rank} of {world.size}, which must see that folder as the others do" if rank else ""
                raise UserError(
                    f"--out-dir {out_dir}: the checkpoint of step {step} could not be saved{who}: {reason}; "
                    f"earlier checkpoints there are untouched"
                )
        return {name: entry for _, of_one in found for name, entry in of_one.items()}

    files, indices = [], {}
    for group, named in tensors.items():
        of_group, index = parts.files_of(group, named, max_file_bytes)
        files += of_group
        if index:
            indices[f"{group}.safetensors.index.json"] = index
    others = indices | {
        "state.json": parts.as_json({"step": step, "state": state}),
        "config.toml": config_toml.encode(),
        tokenizer_name: tokenizer,
    }
    try:
        agree(_refused(lambda: _make_folder(out_dir, temporary)) if world.is_main else "")
        entries = agree(*reversed(parts.write(temporary, files, world)))
        agree(_refused(lambda: _finish(out_dir, temporary, others, entries, best, keep)) if world.is_main else "")
    finally:
        if world.is_main:
            _settle(out_dir)
    return folder


def _refused(work: Callable[[], None]) -> str:
    """Do it. Returns why the system refused, or nothing."""
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _make_folder(out_dir: Path, temporary: Path) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    _settle(out_dir)  # before writing, for the disk space that a dead run may hold
    temporary.mkdir()


def _finish(out_dir: Path, temporary: Path, others: dict[str, bytes], entries: dict, best: bool, keep: int) -> None:
    """Write what is no tensor, and put the folder, whose tensors are written, in its place."""
    folder = out_dir / temporary.name.removeprefix(".tmp-")
    for name, content in others.items():
        (temporary / name).write_bytes(content)
        entries[name] = parts.seal(temporary / name)
    (temporary / MANIFEST).write_bytes(
        parts.as_json({"format_version": FORMAT_VERSION, "files": dict(sorted(entries.items()))})
    )
    parts.seal(temporary / MANIFEST)
    _sync_folder(temporary)
    if folder.exists():
        folder.rename(out_dir / f".old-{folder.name}")
    temporary.rename(folder)
    _sync_folder(out_dir)
    for pointer in ("best", "last") if best else ("last",):
        draft = out_dir / f".tmp-{pointer}"
        draft.write_bytes(f"{folder.name}\n".encode())
        parts.seal(draft)
        draft.replace(out_dir / pointer)
    _sync_folder(out_dir)
    _prune(out_dir, keep)


def load(path: str | Path, which: str = "last", world: World | None = None) -> Checkpoint:
    """Open the checkpoint folder `path`, or the one that `find(path, which)` names, and verify every file of it.

    Raises UserError where there is none, a file is missing or its bytes are not those that were saved, or the format is
    of another version; in a run's folder with the other checkpoints that there are. world: the processes, each of which calls
    this and verifies its share of the files: what one of them finds is raised in all.
    """
    path = Path(path)
    if (path / MANIFEST).is_file() or STEP_FOLDER.fullmatch(path.name):
        return _read(path, world)
    path = find(path, which)
    try:
        return _read(path, world)
    except UserError as error:
        raise UserError(f"{error}{others_than(path)}") from error


def _read(path: Path, world: World | None) -> Checkpoint:
    try:
        files = _verified_files(path, world or World())
        state = _state(path)
        tokenizer_name = next(name for name in TOKENIZERS if name in files)
        return Checkpoint(
            path=path,
            step=state["step"],
            state=state["state"],
            config_toml=(path / "config.toml").read_bytes().decode(errors="replace"),
            tokenizer_name=tokenizer_name,
            tokenizer=(path / tokenizer_name).read_bytes(),
            files=files,
        )
    except OSError as error:
        name = Path(error.filename or path).name
        raise UserError(f"checkpoint {path}: {name} cannot be read: {error.strerror or error}") from error


def _state(path: Path) -> dict:
    """What state.json holds: the step, and a table of the caller's."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        if type(state["step"]) is int and state["step"] >= 0 and isinstance(state["state"], dict):
            return state
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"checkpoint {path}: state.json is damaged: it holds no step with a state")


def rng_state() -> tuple[dict, dict[str, Tensor]]:
    """State of every global random generator of this process: what fits JSON, and tensors for a group of `save`.

    Covers torch on the CPU and on every CUDA device, Python's `random` and NumPy's global generator.
    """
    version, words, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached_gauss = numpy.random.get_state()
    tensors = {
        "torch.cpu": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(numpy.int64)),
    }
    if torch.cuda.is_available():
        tensors |= {f"torch.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    state = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "algorithm": algorithm,
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gauss": float(cached_gauss),
        },
    }
    return state, tensors


def set_rng_state(state: dict, tensors: dict[str, Tensor]) -> None:
    """Put every generator back to where `rng_state` found it; CUDA devices that only one side has are left alone."""
    python, array = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    keys = tensors["numpy"].numpy().astype(numpy.uint32)
    numpy.random.set_state(
        (array["algorithm"], keys, array["position"], array["has_gauss"], array["cached_gauss"]),
    )
    torch.set_rng_state(tensors["torch.cpu"])
    for i in range(torch.cuda.device_count()):
        if f"torch.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"torch.cuda.{i}"], i)


def _verified_files(path: Path, world: World) -> tuple[str, ...]:
    """Names of the files in the manifest, all of which are as it says. Each process reads some of them."""
    refusals = []
    expected: dict[str, tuple] = {}
    try:
        expected = _expected_files(path)
        for name in list(expected)[world.rank :: world.size]:
            _verify(path, name, *expected[name])
    except OSError as error:
        name = Path(error.filename or path).name
        refusals.append(f"checkpoint {path}: {name} cannot be read: {error.strerror or error}")
    except UserError as error:
        refusals.append(str(error))
    for found in world.gather(refusals, patiently=True):
        for refusal in found:
            raise UserError(refusal)
    return tuple(expected)


def _expected_files(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of the files by name, as the manifest has them."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"checkpoint {path} has format version {version!r}; this program reads {FORMAT_VERSION}")
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"checkpoint {path}: {MANIFEST} is damaged") from error
    tokenizer = next((name for name in TOKENIZERS if name in expected), TOKENIZERS[0])
    for name in {*expected, "state.json", "config.toml", tokenizer}:
        if name not in expected or Path(name).name != name or not name.isprintable():
            raise UserError(f"checkpoint {path}: {MANIFEST} is damaged at {name!r}")
    return expected


def _verify(path: Path, name: str, size: int, sha256: str) -> None:
    with open(path / name, "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise UserError(f"checkpoint {path}: {name} is damaged: it has {found} bytes and had {size} when saved")
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise UserError(f"checkpoint {path}: {name} is damaged: its SHA-256 is not the one in {MANIFEST}")


def _prune(out_dir: Path, keep: int) -> None:
    folders = step_folders(out_dir)
    wanted = {folder.name for folder in folders[max(len(folders) - keep, 0) :]}
    wanted |= {pointed_at(out_dir, "last"), pointed_at(out_dir, "best")}
    for folder in folders:
        if folder.name not in wanted:
            # Renamed first: half a folder must not look like a checkpoint. `_settle` removes it.
            folder.rename(out_dir / f".tmp-{folder.name}")


def _settle(out_dir: Path) -> None:
    """Undo or finish what a save left behind, be it this one or that of a dead run."""
    for old in out_dir.glob(".old-step-*"):
        folder = out_dir / old.name.removeprefix(".old-")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                old.rename(folder)
    for leftover in out_dir.glob(".tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, without which a rename may be lost at a power cut."""
    if os.name == "nt":  # cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
