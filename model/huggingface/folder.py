"""Weights in a folder of safetensors as transformers lays them out: one file, or several and an index.

Read tensor by tensor, so that a model is loaded in the memory of one copy and its largest tensor; written file by file.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model import huggingface
from model.config import LlamaConfig
from model.loading import Tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
METADATA = {"format": "pt"}
"""What transformers asks of a file's header; versions before 4.46 read no file without it."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class FolderTensors(Mapping[str, Tensor]):
    """The tensors in a folder by name, each read when it is asked for, on the CPU and in the dtype of its file.

    ValueError for a folder without safetensors, and for files that are missing or damaged, named.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._files: dict[str, str] = {}
        for file in self._file_names():
            with self._open(file) as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self._files[name]) as opened:
            return opened.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header alone. ValueError for one of a type that is not read."""
        with self._open(self._files[name]) as opened:
            header = opened.get_slice(name)
            if (dtype := header.get_dtype()) not in _DTYPES:
                raise ValueError(f"{self._files[name]}: {name} is of type {dtype}; read are {', '.join(_DTYPES)}")
            return tuple(header.get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _file_names(self) -> list[str]:
        if (self._folder / INDEX).is_file():
            path = self._folder / INDEX
            try:
                files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path} is damaged: {error}") from None
            if any(not isinstance(file, str) or Path(file).name != file for file in files):
                raise ValueError(f"{path} is damaged: it names files outside its folder")
            return files
        if (self._folder / SINGLE).is_file():
            return [SINGLE]
        pickles = sorted(path.name for path in self._folder.glob("*.bin"))
        pickle = f"; {pickles[0]} is no safetensors file, and a pickle is not read" if pickles else ""
        raise ValueError(f"{self._folder} has no {SINGLE} and no {INDEX}{pickle}")

    def _open(self, file: str):
        path = self._folder / file
        try:
            return safetensors.safe_open(path, framework="pt")
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def save(folder: str | Path, config: LlamaConfig, tensors: Tensors, dtype: torch.dtype, max_file_bytes: int) -> None:
    """Write canonical tensors in `dtype`, in files of at most so many bytes (one tensor is never split), and an index."""
    folder = Path(folder)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in huggingface.shapes(config).items()}
    parts = split(sizes, max_file_bytes)
    weight_map = {}
    for i, part in enumerate(parts, start=1):
        file = SINGLE if len(parts) == 1 else f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        # Each has memory of its own, which the format asks for.
        held = {name: tensors[name].detach().to("cpu", dtype, copy=True).contiguous() for name in part}
        write_file(folder / file, held)
        weight_map |= dict.fromkeys(part, file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file; tensors: dense, on the CPU, none sharing memory. OSError where the system refuses."""
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(tensors, path, METADATA)
    except safetensors.SafetensorError as error:  # how the library reports what the system said
        raise OSError(f"{path.name}: {error}") from None
    path.chmod(mode)  # the library lets only the owner read what it writes


def split(sizes: dict[str, int], max_file_bytes: int) -> list[list[str]]:
    """Names in their order, cut into files by the bytes of each."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, n_bytes in sizes.items():
        if parts[-1] and size + n_bytes > max_file_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += n_bytes
    return parts
