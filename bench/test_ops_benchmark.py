"""The cases of `bench.ops` under pytest-benchmark: `pytest bench/ --benchmark-only -k "swiglu and reference"`.

`make test` leaves this folder out. --benchmark-autosave, --benchmark-compare and --benchmark-histogram then do their work;
groups hold the variants of one op, size and pass. On a GPU the time is the GPU's own, as in `bench.ops`.
"""

import time

import pytest
import torch

from bench.measure import GpuInstant, gpu_flush
from bench.op_cases import CASES, SIZES, cut, size
from bench.ops import CPU_TOKENS, OPS, WARMUP, Contender, copy_of, why_absent

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@pytest.fixture(scope="module")
def flush():
    return gpu_flush(DEVICE) if ON_GPU else lambda: None


@pytest.mark.benchmark(timer=GpuInstant if ON_GPU else time.perf_counter)
@pytest.mark.parametrize("variant", ["copy", "eager", "compiled", "liger", "triton"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("size_name", SIZES if ON_GPU else ["smoke"])
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark, flush, op, size_name, direction, variant):
    benchmark.group = f"{op} {size_name} {direction}"
    if reason := why_absent(variant, DEVICE):
        pytest.skip(f"{variant}: {reason}")
    config = size(size_name) if ON_GPU else cut(size(size_name), CPU_TOKENS)
    case = CASES[op](config, DTYPE, DEVICE)
    n_bytes = getattr(case, f"{direction}_bytes")
    benchmark.extra_info.update(shape=case.shape, bytes=n_bytes, device=str(DEVICE), dtype=str(DTYPE))

    torch.compiler.reset()
    contender = None if variant == "copy" else Contender(op, variant, case)

    def setup():
        if contender and direction == "backward":
            contender.prepare_backward()
        flush()

    call = getattr(contender, direction) if contender else copy_of(n_bytes, DEVICE)
    benchmark.pedantic(call, setup=setup, rounds=50 if ON_GPU else 10, warmup_rounds=WARMUP)
