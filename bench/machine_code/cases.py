"""What `bench.machine_code` builds: the launches of every op at the sizes of a preset, written down with no GPU.

A new kernel is one more line in `CASES`, after its entry in `bench.op_cases`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import bench.meta_addmm  # noqa: F401 - torch 2.11 cannot run the loss head's products on the meta device without it
import kernels
from bench.ops import cases as op_cases
from kernels.launch import Launched, Target, recorded
from model import Llama
from training.config import TrainConfig
from training.step.flat import FlatParameters
from training.step.optimizer import FusedAdamW

META = torch.device("meta")


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=dtype.is_floating_point)


def _measured(case: str, op: str | None = None) -> Callable[[TrainConfig], Any]:
    """An op on what `bench.ops` gives it."""

    def run(c: TrainConfig) -> Any:
        given = op_cases.CASES[case](c, torch.bfloat16, META)
        return getattr(kernels.TRITON, op or case)(*given.arguments, **given.keywords)

    return run


def _rope_attention(c: TrainConfig) -> Any:
    shape = c.shape()
    qkv = _tensor(c.batch_size, c.max_seq_len, (c.n_heads + 2 * c.n_kv_heads) * shape.head_dim)
    table = torch.empty(c.max_seq_len, shape.head_dim // 2, device=META)
    return kernels.TRITON.rope_attention(qkv, table, table, c.n_heads, c.n_kv_heads)


def _linear_cross_entropy(c: TrainConfig) -> Any:
    rows = c.batch_size * c.max_seq_len
    hidden, weight = _tensor(rows, c.dim), _tensor(c.vocab_size, c.dim, dtype=torch.float32)
    targets = _tensor(rows, dtype=torch.int64)
    known = {"gradient_sum": torch.empty_like(weight), "scale": torch.empty((), device=META)}
    return kernels.TRITON.linear_cross_entropy(hidden, weight, targets, compute_weight=weight.bfloat16(), **known)


def _update(c: TrainConfig) -> tuple:
    with META:
        model = Llama(c.shape(), kernels.select("none", c.n_layers), torch.bfloat16)
        FusedAdamW(FlatParameters(model), c).update(factor=torch.empty(()), skip=torch.empty(()))
    return ()


# What to run for a preset: the public op, on tensors as the model passes them. The backward pass of what it returns is
# run too, where that has one.
CASES: dict[str, Callable[[TrainConfig], Any]] = {
    "rms_norm": _measured("rms_norm"),
    "add_rms_norm": _measured("add_rms_norm"),
    "rope": _measured("rope"),
    "swiglu": _measured("swiglu"),
    "attention": _measured("attention"),
    "packed_attention": _measured("packed_attention", "attention"),
    "rope_attention": _rope_attention,
    "embedding": _measured("embedding"),
    "linear_cross_entropy": _linear_cross_entropy,
    "adamw": _update,
}


def launches(case: str, config: TrainConfig, target: Target) -> Iterator[tuple[str, Launched]]:
    """Each launch of a case at the sizes of a preset, with `forward` or `backward`."""
    with recorded(target) as found:
        outputs = CASES[case](config)
        n_forward = len(found)
        outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    for i, launched in enumerate(found):
        yield "forward" if i < n_forward else "backward", launched
