"""A file's weights as canonical tensors (the names of Hugging Face's Llama), and the other way."""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy
import torch
from torch import Tensor

from model import huggingface
from model.config import LlamaConfig
from model.llama2c.header import read_header, sections, write_header
from model.rope import rope_tables

_OF_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "wq",
    "self_attn.k_proj": "wk",
    "self_attn.v_proj": "wv",
    "self_attn.o_proj": "wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "w1",
    "mlp.down_proj": "w2",
    "mlp.up_proj": "w3",
}
_OF_REST = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "final_norm", "lm_head.weight": "head"}


class FileTensors(Mapping[str, Tensor]):
    """The tensors of a file by canonical name, float32, each read when it is asked for. ValueError as `read_header`."""

    def __init__(self, path: str | Path):
        header = read_header(path)
        self._config = LlamaConfig(**header.shape)
        self._shapes = huggingface.shapes(self._config)
        parts = sections(self._config, header.version)
        starts = accumulate((count for _, count in parts), initial=0)
        self._starts = {name: start for (name, _), start in zip(parts, starts, strict=False)}
        self._floats = numpy.memmap(path, "<f4", "r", offset=header.start)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        section, layer = _section(name)
        count = int(numpy.prod(shape))
        start = self._starts[section] + layer * count
        tensor = torch.from_numpy(self._floats[start : start + count].reshape(shape).copy())
        heads = _heads(self._config, section)
        return _halves_together(tensor, heads) if heads else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def save(path: str | Path, config: LlamaConfig, tensors: Mapping[str, Tensor], version: int = 0) -> None:
    """Write canonical tensors as a file of version 0 or 1. ValueError as `write_header`."""
    header = write_header(config, version)
    by_section: dict[str, list[str]] = {}
    for name in huggingface.shapes(config):
        by_section.setdefault(_section(name)[0], []).append(name)
    tables = dict(zip(("cos", "sin"), rope_tables(config), strict=True))
    with Path(path).open("wb") as file:
        file.write(header)
        for section, _ in sections(config, version):
            if section in tables:
                _write(file, tables[section])
                continue
            heads = _heads(config, section)
            for name in by_section[section]:
                tensor = tensors[name].detach().to("cpu", torch.float32)
                _write(file, _neighbours_together(tensor, heads) if heads else tensor)


def _section(name: str) -> tuple[str, int]:
    """The part of the file that holds a canonical tensor, and its layer (0 for what is not of a layer)."""
    if name in _OF_REST:
        return _OF_REST[name], 0
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return _OF_LAYER[rest.removesuffix(".weight")], int(layer)


def _heads(config: LlamaConfig, section: str) -> int:
    """How many heads' rows a matrix has in RoPE's order; 0 for the other matrices."""
    return {"wq": config.n_heads, "wk": config.n_kv_heads}.get(section, 0)


def _neighbours_together(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (i, i + D/2) to (2i, 2i + 1): (heads D, dim)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _halves_together(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `_neighbours_together`."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().numpy().astype("<f4", copy=False).data)
