"""Chunks and launches of the loss head, what PyTorch asks of its op, and the memory that it holds."""

import weakref
from collections import defaultdict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.launch import TARGETS
from kernels.linear_cross_entropy import chunked as kernel_file
from kernels.linear_cross_entropy import op as op_file
from kernels.linear_cross_entropy.chunked import (
    CHUNK_BYTES,
    CHUNK_BYTES_WITHOUT_DWEIGHT,
    chunk_rows,
    softmax_launch,
    tiled_chunk_rows,
)
from kernels.linear_cross_entropy.op import linear_cross_entropy_triton
from tests.support import kernel_testing as kt

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("n", "v", "element_size", "rows"),
    [
        (32768, 4096, 2, 32768),  # reference: one chunk
        (65536, 50304, 2, 4480),  # 124m: fifteen chunks
        (8192, 128256, 2, 1664),  # five, not four of 1792 and one of 1024
        (8192, 128256, 4, 896),
        (8192, 50_000_000, 4, 128),  # past the budget
        (130, 100, 4, 256),
        (0, 100, 4, 128),
    ],
)
def test_chunks_are_few_even_and_whole_tiles(n, v, element_size, rows):
    assert chunk_rows(n, v, element_size) == rows


@pytest.mark.parametrize(
    ("n", "v", "d", "chunk_bytes", "rows"),
    [
        (32768, 4096, 288, CHUNK_BYTES, 32768),  # reference: one chunk
        (8192, 128256, 2048, CHUNK_BYTES, 1664),
        (16384, 128256, 2048, CHUNK_BYTES_WITHOUT_DWEIGHT, 4096),  # 256 tiles: two waves, hardly less than full
        (16384, 128256, 2048, 512 * 2**20, 2048),  # 128 tiles
        (65536, 50304, 768, CHUNK_BYTES_WITHOUT_DWEIGHT, 11008),  # 258 tiles
        (8192, 50_000_000, 64, CHUNK_BYTES, 128),  # past the budget
        (130, 100, 64, CHUNK_BYTES, 256),
        (0, 100, 64, CHUNK_BYTES, 128),
    ],
)
def test_chunks_fill_the_multiprocessors(n, v, d, chunk_bytes, rows):
    assert tiled_chunk_rows(n, v, d, 2, 132, chunk_bytes) == rows
    assert rows == 128 or 2 * rows * v <= chunk_bytes


def test_a_program_of_the_softmax_has_a_row_in_registers_or_in_blocks_that_fit_them():
    for v in (1, 101, 4096, 8192):
        launch = softmax_launch(300, v, TARGETS["sm_90"])
        assert launch.grid == (300,)
        assert v + 15 <= launch.tiles["BLOCK_V"] + 15 <= 16 * 32 * launch.num_warps + 15
    for v in (8193, 50257, 128256):
        launch = softmax_launch(300, v, TARGETS["sm_90"])
        assert launch.tiles["BLOCK_V"] == 8 * 32 * launch.num_warps
    assert softmax_launch(300, 128256, TARGETS["gfx942"]).num_warps == 8  # of 64 threads


def test_the_registered_op_keeps_pytorchs_rules():
    hidden, weight = kt.tensor(5, 24), kt.tensor(101, 24)
    targets = torch.tensor([0, 100, -100, 7, 50], device=kt.DEVICE)
    op = torch.ops.triton_llama.linear_cross_entropy.default
    torch.library.opcheck(op, (hidden, weight, targets, None, None, None, -100, True, True, True))
    torch.library.opcheck(op, (hidden.half(), weight, targets, weight.half(), None, None, -100, False, False, True))
    scale, total = torch.tensor(0.5, device=kt.DEVICE), torch.zeros_like(weight)
    torch.library.opcheck(op, (hidden, weight, targets, None, total, scale, -100, False, True, True))


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the storages that ops make, on any device: the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.alive += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata)
        self.peak = max(self.peak, self.alive)
        return out

    def freed(self, key):
        self.alive -= self.sizes.pop(key)


def peak_bytes(loss_of, *arguments):
    """Of the forward pass and of both, without the arguments."""
    with PeakBytes() as memory:
        memory.sizes = {x.untyped_storage()._cdata: 0 for x in arguments}
        loss = loss_of()
        forward = memory.peak
        gradients = torch.autograd.grad(loss, arguments[:2])
        assert len(gradients) == 2  # alive to the end
    return forward, memory.peak


def test_peak_memory_is_that_of_the_docstring_and_a_quarter_of_eagers(monkeypatch):
    n, d, v = 8192, 2048, 128256
    hidden, copy = (torch.empty(rows, d, dtype=BF16, device="meta", requires_grad=True) for rows in (n, v))
    weight, targets = (
        torch.empty_like(copy, dtype=FP32, requires_grad=True),
        torch.empty(n, dtype=torch.int64, device="meta"),
    )
    # The launcher itself, with nothing launched: on the meta device the registered op would only make its outputs.
    monkeypatch.setattr(op_file, "check_usable", lambda op, device: None)
    monkeypatch.setattr(kernel_file, "_loss_head", kernel_file._launch_loss_head)
    monkeypatch.setattr(kernel_file, "_untraced", lambda kernel, device: defaultdict(lambda: lambda **arguments: None))
    monkeypatch.setattr(kernel_file, "_multiply", lambda *args, **out: None)
    monkeypatch.setattr(kernel_file, "target_of", lambda tensor: TARGETS["sm_90"])
    eager = peak_bytes(lambda: F.cross_entropy(hidden @ copy.T, targets), hidden, copy, targets)[1]
    loss_of = partial(linear_cross_entropy_triton, hidden, weight, targets, compute_weight=copy)
    ours = peak_bytes(loss_of, hidden, weight, targets, copy)

    gradients = 4 * (n * d + v * d)
    forward, backward = gradients + 2 * 1664 * v + 4 * n, gradients + 2 * n * d
    assert ours == (pytest.approx(forward, abs=64), pytest.approx(max(forward, backward), abs=64))  # 64: the scalars
    assert eager == pytest.approx(3 * 2 * n * v, rel=1e-3)
    assert ours[1] <= 0.25 * eager

    scale, total = torch.empty((), device="meta"), torch.empty_like(weight)
    with PeakBytes() as memory:
        memory.sizes = {x.untyped_storage()._cdata: 0 for x in (hidden, weight, targets, copy, scale, total)}
        loss = loss_of(reduction="sum", scale=scale, gradient_sum=total)
    assert memory.peak == pytest.approx(2 * n * d + 2 * 4096 * v + 4 * n, abs=64)
    assert loss.shape == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_a_gpu_is_a_quarter_of_eagers():
    hidden, copy = (torch.randn(n, 2048, device="cuda", dtype=BF16, requires_grad=True) for n in (8192, 128256))
    weight, targets = copy.detach().float().requires_grad_(), torch.randint(128256, (8192,), device="cuda")

    def peak(loss_of, *wanted):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(loss_of(), wanted)
        return torch.cuda.max_memory_allocated() - before

    eager = peak(lambda: F.cross_entropy(hidden @ copy.T, targets), hidden, copy)
    ours = peak(lambda: linear_cross_entropy_triton(hidden, weight, targets, compute_weight=copy), hidden, weight)
    assert ours <= 0.25 * eager
