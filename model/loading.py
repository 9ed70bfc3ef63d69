"""Weights of any format into a model, tensor by tensor: the memory of one copy and of the largest tensor."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from model import huggingface
from model.llama import Llama


class Tensors(Protocol):
    """Canonical tensors by name, each read when it is asked for: `huggingface.folder.FolderTensors` and llama2c's."""

    def __getitem__(self, name: str) -> Tensor: ...
    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: object) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it. ValueError for one that can't be read."""


@torch.no_grad()
def load(model: Llama, tensors: Tensors, here: Callable[[Tensor], tuple[Tensor, int]] = lambda p: (p, 0)) -> None:
    """Copy canonical tensors into a model's parameters, whatever the dtype of the ones and the device of the others.

    here: what this process has of a parameter, and which row of it is the first of these; if not given, all.
    ValueError, before anything is copied, that names what is missing, of another shape, or does not belong; and then for a
    tensor whose values are not all finite, of which nothing can come but nonsense.
    """
    config = model.config
    shapes = huggingface.shapes(config)
    check(tensors, shapes)
    for ours, theirs in huggingface.names(config).items():
        part, first = here(model.get_parameter(ours))
        row = 0
        for name in theirs:
            rows = shapes[name][0]
            start, stop = max(first, row), min(first + len(part), row + rows)
            if start < stop:
                values = part[start - first : stop - first].copy_(tensors[name][start - row : stop - row])
                if bad := int((~values.isfinite()).sum()):
                    raise ValueError(f"{name} has {bad:,} values of {values.numel():,} that are not finite")
            row += rows
    model.refresh_compute_weights()


def check(tensors: Tensors, shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError, naming the tensors, unless these are the tensors of a model with those shapes, and can be read."""
    found = {
        name for name in tensors if not name.endswith(".rotary_emb.inv_freq")
    }  # a buffer that transformers once saved
    if "lm_head.weight" in found - shapes.keys():  # some save a tied head twice
        if not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
            raise ValueError(
                "lm_head.weight is another matrix than model.embed_tokens.weight, and the configuration ties them"
            )
        found.remove("lm_head.weight")
    huggingface.check_complete(shapes.keys(), found)
    for name, shape in shapes.items():
        if tensors.shape(name) != shape:
            raise ValueError(f"{name} has shape {tensors.shape(name)}, and the configuration makes it {shape}")
