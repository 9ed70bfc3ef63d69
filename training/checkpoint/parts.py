"""The tensors of a checkpoint as files: which file holds which, who writes it, and what is read of it.

Files are numbered through, and file i is written by process i mod N, whoever holds the tensors: every layout gives the same files,
byte for byte. Several are written and hashed at once; a process holds one of them at a time in the CPU's memory.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors
import torch
from torch import Tensor

from model.huggingface.folder import split, write_file
from training.distributed import World
from training.errors import UserError


class Shared(Protocol):
    """A tensor of which processes hold parts."""

    nbytes: int

    def whole(self) -> Tensor:
        """All of it; every process must call this."""


@dataclass(frozen=True)
class File:
    """A file of tensors that is to be written."""

    name: str
    tensors: dict[str, "Tensor | Shared"]


def files_of(
    group: str, named: Mapping[str, "Tensor | Shared"], max_file_bytes: int
) -> tuple[list[File], bytes | None]:
    """A group of tensors cut into files of at most so many bytes; one tensor is never cut. With several, their index too."""
    parts = split({name: tensor.nbytes for name, tensor in named.items()}, max_file_bytes)
    several = len(parts) > 1
    suffixes = [f"-{i:05d}-of-{len(parts):05d}" if several else "" for i in range(1, len(parts) + 1)]
    files = [
        File(f"{group}{suffix}.safetensors", {name: named[name] for name in names})
        for suffix, names in zip(suffixes, parts, strict=True)
    ]
    if not several:
        return files, None
    total = sum(tensor.nbytes for tensor in named.values())
    weight_map = {name: file.name for file in files for name in file.tensors}
    return files, as_json({"metadata": {"total_size": total}, "weight_map": weight_map})


def write(folder: Path, files: list[File], world: World) -> tuple[dict[str, dict], str]:
    """Write this process's files and flush them to the disk; every process must call it.

    Returns their entries in the manifest, and why the system refused one, or nothing. Then the others are written all the same.
    """
    entries: dict[str, dict] = {}
    refusal = ""
    for start in range(0, len(files), world.size):
        mine, copies = None, {}
        for owner, file in enumerate(files[start : start + world.size]):
            for name, tensor in file.tensors.items():
                whole = tensor if isinstance(tensor, Tensor) else tensor.whole()
                if owner == world.rank:
                    mine = file.name
                    # The copy gives each tensor memory of its own, which the format asks for.
                    copies[name] = whole.detach().contiguous().to("cpu", copy=True)
                del whole
        if mine and not refusal:
            try:
                write_file(folder / mine, copies)
                entries[mine] = seal(folder / mine)
            except OSError as error:
                refusal = error.strerror or str(error)
        world.wait(patiently=True)  # a disk may be slow, and the next tensors are gathered together
    return entries, refusal


def seal(path: Path) -> dict[str, int | str]:
    """Flush a file to the disk; returns its entry in the manifest."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def as_json(value: dict) -> bytes:
    """As all JSON of a checkpoint is written."""
    return (json.dumps(value, indent=1) + "\n").encode()


class Reader:
    """The tensors of some files by name, read row by row as they are asked for. UserError for files that are damaged.

    where: what they belong to, for errors.

    Attributes:
        files: the path of each tensor's file.
    """

    def __init__(self, paths: list[Path], where: str):
        self.files: dict[str, Path] = {}
        self._open: dict[Path, safetensors.safe_open] = {}
        self._where = where
        for path in paths:
            with self._told(path.name):
                self._open[path] = safetensors.safe_open(path, "pt")
                self.files |= dict.fromkeys(self._open[path].keys(), path)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        with self._told(self.files[name].name):
            return self._open[self.files[name]].get_tensor(name)

    def rows(self, names: tuple[str, ...], wanted: slice) -> Tensor:
        """Rows of the tensors laid one below the other, on the CPU; maybe none."""
        parts, start = [], 0
        for name in names:
            if name not in self.files:
                raise UserError(f"{self._where} has no tensor {name}")
            with self._told(self.files[name].name):
                tensor = self._open[self.files[name]].get_slice(name)
                n = tensor.get_shape()[0]
                first, last = max(wanted.start - start, 0), min(wanted.stop - start, n)
                if first < last or (name == names[-1] and not parts):
                    parts.append(tensor[first : max(first, last)])
                start += n
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @contextlib.contextmanager
    def _told(self, file: str) -> Iterator[None]:
        try:
            yield
        # What the library says of a header that was made up; the hash that goes with it may have been, too.
        except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, LookupError) as error:
            raise UserError(f"{self._where}: {file} is no safetensors file: {error}") from error
