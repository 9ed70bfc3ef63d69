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
from dataclasses import dataclass
from pathlib import Path

import numpy
import safetensors.torch
import torch
from torch import Tensor

from model.huggingface.folder import write_file
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
        part = re.compile(re.escape(group) + r"(-\d{5}-of-\d{5})?\.safetensors")
        names = sorted(name for name in self.files if part.fullmatch(name))
        if not names:
            raise UserError(f"checkpoint {self.path} has no {group}.safetensors; it holds {', '.join(self.files)}")
        tensors = {}
        for name in names:
            try:
                tensors |= safetensors.torch.load_file(self.path / name)
            # What the library says of a header that was made up; the hash that goes with it may have been, too.
            except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
                raise UserError(f"checkpoint {self.path}: {name} is no safetensors file: {error}") from error
        return tensors


def save(
    out_dir: str | Path,
    step: int,
    *,
    tensors: dict[str, dict[str, Tensor]],
    state: dict,
    config_toml: str,
    tokenizer: bytes,
    tokenizer_name: str = TOKENIZERS[0],
    best: bool,
    keep: int,
    max_file_bytes: int = 4 * 2**30,
) -> Path:
    """Write checkpoint `step`, point `last` at it (and `best`, where told), and drop the old ones. Returns its folder.

    tensors: by group, then by name; any dtype, device and strides. Tensors that share memory are written one by one.
    state: anything JSON can hold. keep: how many of the newest checkpoints stay; those that `last` and `best` name stay
    in any case. max_file_bytes: a group that is larger is split into files of at most this size (one tensor is never
    split). A checkpoint of the same step is replaced.

    One process may save into a folder at a time. Raises UserError where the system refuses (a full disk, a folder that
    cannot be written); the earlier checkpoints and the pointers are then as they were.
    """
    out_dir = Path(out_dir)
    folder = out_dir / f"step-{step:08d}"
    temporary = out_dir / f".tmp-{folder.name}"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        _settle(out_dir)  # before writing, for the disk space that a dead run may hold
        temporary.mkdir()
        for group, named in tensors.items():
            _write_tensors(temporary, group, named, max_file_bytes)
        (temporary / "state.json").write_bytes(_json({"step": step, "state": state}))
        (temporary / "config.toml").write_bytes(config_toml.encode())
        (temporary / tokenizer_name).write_bytes(tokenizer)
        files = {path.name: _seal(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_bytes(_json({"format_version": FORMAT_VERSION, "files": files}))
        _seal(temporary / MANIFEST)
        _sync_folder(temporary)
        if folder.exists():
            folder.rename(out_dir / f".old-{folder.name}")
        temporary.rename(folder)
        _sync_folder(out_dir)
        for pointer in ("best", "last") if best else ("last",):
            draft = out_dir / f".tmp-{pointer}"
            draft.write_bytes(f"{folder.name}\n".encode())
            _seal(draft)
            draft.replace(out_dir / pointer)
        _sync_folder(out_dir)
        _prune(out_dir, keep)
    except OSError as error:
        raise UserError(
            f"--out-dir {out_dir}: the checkpoint of step {step} could not be saved: {error.strerror or error}; "
            f"earlier checkpoints there are untouched"
        ) from error
    finally:
        _settle(out_dir)
    return folder


def load(path: str | Path, which: str = "last") -> Checkpoint:
    """Open the checkpoint folder `path`, or the one that `find(path, which)` names, and verify every file of it.

    Raises UserError where there is none, a file is missing or its bytes are not those that were saved, or the format is
    of another version; in a run's folder with the other checkpoints that there are.
    """
    path = Path(path)
    if (path / MANIFEST).is_file() or STEP_FOLDER.fullmatch(path.name):
        return _read(path)
    path = find(path, which)
    try:
        return _read(path)
    except UserError as error:
        raise UserError(f"{error}{others_than(path)}") from error


def _read(path: Path) -> Checkpoint:
    try:
        files = _verified_files(path)
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


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _seal(path: Path) -> dict[str, int | str]:
    """Flush a file to the disk; returns its entry in the manifest."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_tensors(folder: Path, group: str, named: dict[str, Tensor], max_file_bytes: int) -> None:
    parts, size = [[]], 0
    for name, tensor in named.items():
        if parts[-1] and size + tensor.nbytes > max_file_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.nbytes

    weight_map = {}
    for i, names in enumerate(parts, start=1):
        suffix = f"-{i:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        file_name = f"{group}{suffix}.safetensors"
        # The copy gives each tensor memory of its own, which the format asks for, and is made for one file at a time.
        copies = {name: named[name].detach().contiguous().to("cpu", copy=True) for name in names}
        write_file(folder / file_name, copies)
        weight_map |= dict.fromkeys(names, file_name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in named.values())}, "weight_map": weight_map}
        (folder / f"{group}.safetensors.index.json").write_bytes(_json(index))


def _verified_files(path: Path) -> tuple[str, ...]:
    """Names of the files in the manifest, all of which are as it says."""
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
    for name, (size, sha256) in expected.items():
        with open(path / name, "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise UserError(f"checkpoint {path}: {name} is damaged: it has {found} bytes and had {size} when saved")
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise UserError(f"checkpoint {path}: {name} is damaged: its SHA-256 is not the one in {MANIFEST}")
    return tuple(expected)


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
