"""The ladders: their steps in order, the figure in which each is seen to pay, and the sizes that LEARN.md shows."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention.op import attention_triton
from kernels.launch import ceil_div
from kernels.rms_norm import rms_norm_triton
from learn import attention, rms_norm
from learn.figures import Figures, measure

META = torch.device("meta")


@dataclass(frozen=True)
class Step:
    """One idea more than the step before."""

    title: str
    run: Callable
    pays: str = ""
    """The field of Figures that is better than the step before's at the ladder's first size; "" where none need be."""


# --------------------------------------------------------------------------------------------------------------- RMSNorm

RMS_NORM = (
    Step("1. a kernel an operation", rms_norm.step1),
    Step("2. the row in registers", rms_norm.step2, "bytes"),
    Step("3. as many threads as a row needs", rms_norm.step3, "instructions"),
    Step("4. several rows a program", rms_norm.step4, "occupancy"),
    Step("5. aligned strides", rms_norm.step5, "load"),
    Step("`kernels/rms_norm.py`", rms_norm_triton),
)
RMS_NORM_BACKWARD = (
    Step("rows, then columns", rms_norm.backward1),
    Step("a fixed number of programs", rms_norm.backward2, "programs"),
)
ROWS = 32_768
WIDTHS = {72: "narrow rows, as of a norm of each head", 288: "preset `reference`", 2048: "preset `llama3.2-1b`"}


def _rows(width: int) -> Tensor:
    return torch.empty(ROWS, width, dtype=torch.bfloat16, device=META)


@functools.cache
def rms_norm_figures(step: Step, width: int) -> Figures:
    """Of a step of RMS_NORM on ROWS rows in bfloat16; instructions are those for an element."""
    x, weight = _rows(width), torch.empty(width, device=META)
    return measure(lambda: step.run(x, weight, 1e-5), ("x_ptr",), x.numel())


@functools.cache
def rms_norm_backward_figures(step: Step, width: int) -> Figures:
    """Of a step of RMS_NORM_BACKWARD on ROWS rows in bfloat16."""
    inputs = _rows(width), _rows(width), torch.empty(width, device=META), torch.empty(ROWS, device=META)
    return measure(lambda: step.run(*inputs), ("dy_ptr", "x_ptr"))


# ------------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class AttentionSize:
    """Of q, k and v."""

    name: str
    batch: int
    time: int
    q_heads: int
    k_heads: int
    head_dim: int


ATTENTION = (
    Step("1. scores in memory", attention.step1),
    Step("2. online softmax", attention.step2, "bytes"),
    Step("3. two loops", attention.step3, "instructions"),
    Step("4. groups, constant strides", attention.step4, "bytes"),
    Step("5. base 2, one FMA a score", attention.step5, "instructions"),
    Step("`kernels/attention/`", attention_triton),
)
ATTENTION_SIZES = (
    AttentionSize("preset `llama3.2-1b`, 4096 tokens", 1, 4096, 32, 8, 64),
    AttentionSize("preset `reference`", 128, 256, 8, 4, 36),
)
ABOVE_THE_DIAGONAL = {attention.step1, attention.step2}
"""Steps that compute the scores that no query sees, too."""


@functools.cache
def attention_figures(step: Step, size: AttentionSize) -> Figures:
    """Of a step of ATTENTION in bfloat16, on q, k and v split from one packed tensor; instructions are those for a score."""
    heads = [size.q_heads, size.k_heads, size.k_heads]
    qkv = torch.empty((size.batch, size.time, sum(heads), size.head_dim), dtype=torch.bfloat16, device=META)
    q, k, v = qkv.split(heads, 2)
    return measure(lambda: step.run(q, k, v), ("q_ptr", "k_ptr", "v_ptr"), size.batch * size.q_heads * size.time**2)


def scores_computed(step: Step, size: AttentionSize, tile: dict[str, int]) -> float:
    """Scores that a step computes, by blocks of its tile, for each one that a query sees."""
    time, block_m, block_n = size.time, tile["BLOCK_M"], tile["BLOCK_N"]
    if step.run in ABOVE_THE_DIAGONAL:
        computed = time**2
    else:
        last_keys = (min(row + block_m, time) for row in range(0, time, block_m))
        computed = sum(block_m * ceil_div(keys, block_n) * block_n for keys in last_keys)
    return computed / (time * (time + 1) / 2)
