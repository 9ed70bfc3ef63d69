"""The cases of `bench.ops` under pytest-benchmark: `pytest bench/ --benchmark-only -k "swiglu and reference"`.

`make test` leaves this folder out. --benchmark-autosave, --benchmark-compare and --benchmark-histogram then do their work;
groups hold the variants of one op, size and pass. On a GPU the time is the GPU's own, as in `bench.ops`.
"""

import functools
import time

import pytest
import torch

from bench.measure import GpuInstant, gpu_flush
from bench.ops.__main__ import CPU_TOKENS, WARMUP, copy_of
from bench.ops.catalogue import SHEETS
from bench.ops.contender import Contender
from bench.ops.sizes import cut, size
from training.device import set_determinism

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def make_case(op, size_name, device=DEVICE):
    return SHEETS[op].case(size(size_name) if ON_GPU else cut(size(size_name), CPU_TOKENS), DTYPE, device)


BENCHMARKS = [
    (op, size_name, direction, variant)
    for op in SHEETS
    for size_name in (SHEETS[op].sizes if ON_GPU else ("smoke",))
    for direction in make_case(op, size_name, torch.device("meta")).costs
    for variant in ("copy", *SHEETS[op].peers)
]


@pytest.fixture(scope="module")
def flush():
    set_determinism(True)  # as bench.ops does
    return gpu_flush(DEVICE) if ON_GPU else lambda: None


@pytest.mark.benchmark(timer=GpuInstant if ON_GPU else time.perf_counter)
@pytest.mark.parametrize(("op", "size_name", "direction", "variant"), BENCHMARKS)
def test_op(benchmark, flush, op, size_name, direction, variant):
    benchmark.group = f"{op} {size_name} {direction}"
    if variant != "copy" and (reason := SHEETS[op].peers[variant].why_absent(DEVICE, DTYPE)):
        pytest.skip(f"{variant}: {reason}")
    case = make_case(op, size_name)
    cost = case.costs[direction]
    figures = {"bytes": cost.bytes, "flops": cost.flops, "device": str(DEVICE), "dtype": str(DTYPE)}
    benchmark.extra_info.update(shape=case.shape, **figures)

    torch.compiler.reset()
    contender = None if variant == "copy" else Contender(op, variant, case)

    def setup():
        if contender:
            contender.prepare(direction)
        flush()

    call = functools.partial(contender.run, direction) if contender else copy_of(cost.bytes, DEVICE)
    benchmark.pedantic(call, setup=setup, rounds=50 if ON_GPU else 10, warmup_rounds=WARMUP)
