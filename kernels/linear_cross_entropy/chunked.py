"""The chunked loss head of `kernels.linear_cross_entropy.op`, whose docstring has the mathematics: kernels, chunks, autograd."""

import functools

import torch
from torch import Tensor

from kernels.launch import (
    INTERPRETED,
    NAMESPACE,
    Launch,
    Target,
    ceil_div,
    check_first_derivative,
    dense_rows,
    device_of,
    next_power_of_2,
    target_of,
    tl,
    triton,
    warps_for,
    wrap_triton,
)

# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _linear_cross_entropy_softmax_kernel(
    logits_ptr,
    logit_ptr,  # the same logits, as the single elements that targets choose
    targets_ptr,
    losses_ptr,
    scale_ptr,  # None where the gradient is scaled later
    ignore_index,
    VOCAB: tl.constexpr,
    ROW_STRIDE: tl.constexpr,  # a multiple of 16 elements: all masks end there, so that every access is wide
    GRADIENT_SCALE: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The loss of one row of logits; with the gradient, scale · GRADIENT_SCALE · dz is written over the row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * ROW_STRIDE
    block = tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if WITH_GRADIENT:
            zeros = tl.zeros([BLOCK_V], row_ptr.dtype.element_ty)
            for start in range(0, VOCAB, BLOCK_V):
                tl.store(row_ptr + start + block, zeros, start + block < ROW_STRIDE)
        return

    # A target past the vocabulary reads nothing, and makes the loss and the row's gradient NaN.
    known = (target >= 0) & (target < VOCAB)
    target_logit = tl.load(logit_ptr + row * ROW_STRIDE + target, known, other=float("nan")).to(tl.float32)

    if BLOCK_V >= ROW_STRIDE:  # the row stays in registers
        z = tl.load(row_ptr + block, block < ROW_STRIDE, other=0.0).to(tl.float32)
        z = tl.where(block < VOCAB, z, float("-inf"))
        row_largest = tl.max(z)
        exponentials = tl.exp(z - row_largest)
        row_total = tl.sum(exponentials)
    else:
        # Each lane keeps the maximum of its own columns and the sum of exponentials relative to it. One exponential a step:
        # of exp(largest - new) and exp(z - new), with new the larger of both, one is 1.
        largest = tl.full([BLOCK_V], -3.0e38, tl.float32)
        total = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, VOCAB, BLOCK_V):
            cols = start + block
            z = tl.load(row_ptr + cols, cols < ROW_STRIDE, other=0.0, eviction_policy="evict_last").to(tl.float32)
            z = tl.where(cols < VOCAB, z, float("-inf"))
            smaller = tl.exp(-tl.abs(z - largest))
            total = tl.where(z > largest, total * smaller + 1.0, total + smaller)
            largest = tl.maximum(largest, z)
        row_largest = tl.max(largest)
        row_total = tl.sum(total * tl.exp(largest - row_largest))
    tl.store(losses_ptr + row, tl.log(row_total) + (row_largest - target_logit))

    if WITH_GRADIENT:
        scale = tl.full((), GRADIENT_SCALE, tl.float32)
        if scale_ptr is not None:
            scale *= tl.load(scale_ptr)
        inverse = tl.where(known, scale / row_total, float("nan"))
        if BLOCK_V >= ROW_STRIDE:
            dz = tl.where(block == target, exponentials * inverse - scale, exponentials * inverse)
            tl.store(row_ptr + block, dz.to(row_ptr.dtype.element_ty), block < ROW_STRIDE)
        else:
            for start in range(0, VOCAB, BLOCK_V):
                cols = start + block
                mask = cols < ROW_STRIDE
                z = tl.load(row_ptr + cols, mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
                dz = tl.exp(z - row_largest) * inverse
                dz = tl.where(cols == target, dz - scale, dz)
                tl.store(row_ptr + cols, dz.to(row_ptr.dtype.element_ty), mask)


@triton.jit
def _linear_cross_entropy_reduce_kernel(
    losses_ptr,
    targets_ptr,
    loss_ptr,
    factor_ptr,
    ignore_index,
    n_rows,
    GRADIENT_SCALE: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum or mean of the rows' losses, and what the saved gradients lack: 1 / GRADIENT_SCALE [ / rows that count ]."""
    block = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, n_rows, BLOCK_N):
        row = start + block
        total += tl.load(losses_ptr + row, row < n_rows, other=0.0)
        target = tl.load(targets_ptr + row, row < n_rows, other=ignore_index)
        count += (target != ignore_index).to(tl.int32)
    divisor = tl.maximum(tl.sum(count), 1).to(tl.float32) if MEAN else 1.0
    tl.store(loss_ptr, tl.sum(total) / divisor)
    tl.store(factor_ptr, 1.0 / (divisor * GRADIENT_SCALE))


@triton.jit
def _linear_cross_entropy_scale_kernel(x_ptr, y_ptr, upstream_ptr, factor_ptr, n_elements, BLOCK: tl.constexpr):
    """y = upstream · factor · x, of one element each; y may be x."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n_elements
    x = tl.load(x_ptr + index, mask, other=0.0)
    y = x * (tl.load(upstream_ptr) * tl.load(factor_ptr))
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask)


# --------------------------------------------------------------------------------------------------------------- launch

CHUNK_BYTES = 448 * 2**20
"""Logits held at a time. Each chunk reads and writes dW once more, 8 V D bytes, so the fewer the better; with these the memory
of 8192 rows of 2048 and a vocabulary of 128256 stays below a quarter of eager's."""

CHUNK_BYTES_WITHOUT_DWEIGHT = 1152 * 2**20
"""The same where dW is not held beside them, because it is added to a sum of gradients that is there anyway."""

ROW_TILE = 128
"""Rows of a chunk are a multiple of the tile of a matrix product."""
COLUMN_TILE = 256


def chunk_rows(n_rows: int, vocab_size: int, element_size: int) -> int:
    """Rows of a chunk: the fewest chunks whose logits fit CHUNK_BYTES, all about as large, in multiples of ROW_TILE."""
    most = max(1, CHUNK_BYTES // (element_size * max(1, vocab_size)) // ROW_TILE) * ROW_TILE
    chunks = max(1, ceil_div(n_rows, most))
    return max(1, ceil_div(ceil_div(n_rows, chunks), ROW_TILE)) * ROW_TILE


@functools.cache
def tiled_chunk_rows(
    n_rows: int, vocab_size: int, width: int, element_size: int, multiprocessors: int, chunk_bytes: int
) -> int:
    """Rows of a chunk, of logits that fit chunk_bytes: those at which the products with W take the least time.

    W^T dz of a chunk has few tiles, each a sum over the whole vocabulary, and takes as long as a last wave that is nearly empty
    makes it: 1664 rows of 2048 are 104 tiles for 132 multiprocessors, 2048 rows are 128. A chunk also reads and writes dW, which at
    800 TFLOP/s and 3 TB/s takes as long as width / 4096 waves.
    """

    def cost(rows: int) -> float:
        tiles = rows // ROW_TILE * ceil_div(width, COLUMN_TILE)
        return ceil_div(n_rows, rows) * (ceil_div(tiles, multiprocessors) + width / 4096)

    most = max(1, chunk_bytes // (element_size * max(1, vocab_size)) // ROW_TILE)
    tiles = range(1, min(most, max(1, ceil_div(n_rows, ROW_TILE))) + 1)
    return min((ROW_TILE * n for n in tiles), key=cost)  # of equals the smallest: it holds the least


IN_REGISTERS = 8192
"""The largest vocabulary of which a program holds a row of logits in registers: read once, written once."""


def softmax_launch(n_rows: int, vocab_size: int, target: Target) -> Launch:
    """One program a row: all of it where it fits into registers, 16 columns a thread, else in blocks of 4096, 8 a thread.

    8 columns a thread are one wide load. With 16 in a loop, maxima, sums and logits take 64 to 92 registers a thread, which leaves
    room for one program on a multiprocessor of sm_100 and spills in float32 on sm_90.
    """
    if vocab_size <= IN_REGISTERS:
        block_v = max(16, next_power_of_2(vocab_size))  # rows are padded to a multiple of 16
        return Launch((n_rows,), {"BLOCK_V": block_v}, warps_for(block_v, 16, target))
    return Launch((n_rows,), {"BLOCK_V": 4096}, warps_for(4096, 8, target))


def reduce_launch(n_rows: int, target: Target) -> Launch:
    """One program over all rows, so that the order of the sum is fixed."""
    block_n = min(next_power_of_2(n_rows), 8192)
    return Launch((1,), {"BLOCK_N": block_n}, warps_for(block_n, 8, target))


def scale_launch(n_elements: int, target: Target) -> Launch:
    """Tiles of 4096 elements."""
    return Launch((ceil_div(n_elements, 4096),), {"BLOCK": 4096}, warps_for(4096, 16, target))


def _untraced(kernel, device: torch.device):
    # No launch of this file is traced: a kernel is wrapped only to be recorded, which happens on the meta device.
    return wrap_triton(kernel) if device.type == "meta" else kernel


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b. A float32 `out` of half-precision operands gets sums that were never rounded to theirs."""
    out_dtype = {}
    if a.dtype != out.dtype and a.device.type != "cpu":
        out_dtype = {"out_dtype": out.dtype}
    elif a.dtype != out.dtype:
        a, b = a.to(out.dtype), b.to(out.dtype)
    torch.addmm(out, a, b, beta=int(add), out=out, **out_dtype)


def _outputs(hidden, weight, gradient_sum, scale, want_dhidden, want_dweight):
    """Unwritten loss, factor, W^T dz and Σ dz h^T; the last two without elements where not wanted.

    All are float32; but where dz is scaled from the start W^T dz is the gradient of hidden, in its dtype.
    """
    dhidden_dtype = torch.float32 if scale is None else hidden.dtype
    return (
        torch.empty((), dtype=torch.float32, device=hidden.device),
        torch.empty((), dtype=torch.float32, device=hidden.device),
        torch.empty(hidden.shape if want_dhidden else 0, dtype=dhidden_dtype, device=hidden.device),
        torch.empty(
            weight.shape if want_dweight and gradient_sum is None else 0, dtype=torch.float32, device=hidden.device
        ),
    )


def _launch_loss_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    compute_weight: Tensor | None,
    gradient_sum: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    mean: bool,
    want_dhidden: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, factor, dhidden, dweight = _outputs(hidden, weight, gradient_sum, scale, want_dhidden, want_dweight)
    n_rows, vocab_size = hidden.shape[0], weight.shape[0]
    device, target = hidden.device, target_of(hidden)
    hidden, targets = dense_rows(hidden), targets.contiguous()
    used_weight = dense_rows(weight.to(hidden.dtype) if compute_weight is None else compute_weight)
    gradient_scale = 2.0**14 if hidden.dtype == torch.float16 else 1.0
    if scale is not None and mean:
        scale = scale / (targets != ignore_index).sum().clamp(min=1)
    sums, fresh = (dweight, True) if gradient_sum is None else (gradient_sum, False)

    chunk_bytes = CHUNK_BYTES if want_dweight and gradient_sum is None else CHUNK_BYTES_WITHOUT_DWEIGHT
    sizes = (n_rows, vocab_size, hidden.shape[1], hidden.element_size())
    rows = max(1, min(tiled_chunk_rows(*sizes, target.multiprocessors, chunk_bytes), n_rows))
    row_stride = ceil_div(vocab_size, 16) * 16
    logits = torch.empty((rows, row_stride), dtype=hidden.dtype, device=device)
    losses = torch.empty(n_rows, dtype=torch.float32, device=device)
    with device_of(hidden):
        for start in range(0, n_rows, rows):
            h = hidden[start : start + rows]
            z = logits[: h.shape[0], :vocab_size]
            _multiply(h, used_weight.T, out=z)
            launch = softmax_launch(h.shape[0], vocab_size, target)
            _untraced(_linear_cross_entropy_softmax_kernel, device)[launch.grid](
                logits_ptr=logits,
                logit_ptr=logits.unsqueeze(-1),
                targets_ptr=targets[start:],
                losses_ptr=losses[start:],
                scale_ptr=scale,
                ignore_index=ignore_index,
                VOCAB=vocab_size,
                ROW_STRIDE=row_stride,
                GRADIENT_SCALE=gradient_scale,
                WITH_GRADIENT=want_dhidden or want_dweight,
                **launch.options,
            )
            if want_dhidden:
                _multiply(z, used_weight, out=dhidden[start : start + rows])
            if want_dweight:
                _multiply(z.T, h, out=sums, add=start > 0 or not fresh)
        launch = reduce_launch(n_rows, target)
        _untraced(_linear_cross_entropy_reduce_kernel, device)[launch.grid](
            losses_ptr=losses,
            targets_ptr=targets,
            loss_ptr=loss,
            factor_ptr=factor,
            ignore_index=ignore_index,
            n_rows=n_rows,
            GRADIENT_SCALE=gradient_scale,
            MEAN=mean,
            **launch.options,
        )
    if n_rows == 0:
        dweight.zero_()
    return loss, factor, dhidden, dweight


# --------------------------------------------------------------------------------------------------------- registration

# Opaque to torch.compile also on a GPU: there is nothing to fuse into cuBLAS's products, and Inductor would take the sum over
# chunks apart into a product and an addition, with a second dW between them.
_loss_head = torch.library.custom_op(
    f"{NAMESPACE}::linear_cross_entropy", _launch_loss_head, mutates_args=("gradient_sum",)
)


@_loss_head.register_fake
def _fake_loss_head(
    hidden,
    weight,
    targets,
    compute_weight,
    gradient_sum,
    scale,
    ignore_index,
    mean,
    want_dhidden,
    want_dweight,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = (want_dhidden, want_dweight)
    if hidden.device.type == "meta" and not INTERPRETED:  # launches are being recorded
        tensors = (hidden, weight, targets, compute_weight, gradient_sum, scale)
        return _launch_loss_head(*tensors, ignore_index, mean, *wanted)
    return _outputs(hidden, weight, gradient_sum, scale, *wanted)


def _confirm(upstream: Tensor, scale: Tensor) -> None:
    """Raise unless the gradient that came is the tensor that was said to come. It looks at no number, so it waits for nothing."""
    if upstream.data_ptr() != scale.data_ptr():
        raise RuntimeError(
            "linear_cross_entropy: backward came with another gradient than `scale`, by which the gradients were scaled when "
            "they were made; call loss.backward(scale) with that very tensor, or leave scale out"
        )


# A compiled graph has no place for a look at an address: there the gradient passes through an op that takes one.
@torch.library.custom_op(f"{NAMESPACE}::confirmed", mutates_args=())
def _confirmed(dhidden: Tensor, upstream: Tensor, scale: Tensor) -> Tensor:
    _confirm(upstream, scale)
    return dhidden.clone()


@_confirmed.register_fake
def _fake_confirmed(dhidden, upstream, scale) -> Tensor:
    return torch.empty_like(dhidden)


# ------------------------------------------------------------------------------------------------------------- autograd


class TritonLossHead(torch.autograd.Function):
    """The loss by `_loss_head`, with gradients for hidden and weight where wanted."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        compute_weight: Tensor | None,
        gradient_sum: Tensor | None,
        scale: Tensor | None,
        ignore_index: int,
        mean: bool,
        want_dhidden: bool,
        want_dweight: bool,
    ) -> Tensor:
        """gradient_sum without scale is not for here: what is added in the forward pass must have its scale by then."""
        tensors = (hidden, weight, targets, compute_weight, gradient_sum, scale)
        loss, *saved = _loss_head(*tensors, ignore_index, mean, want_dhidden, want_dweight)
        ctx.save_for_backward(*saved, scale)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.added = gradient_sum is not None
        ctx.spent = False
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        check_first_derivative("linear_cross_entropy")
        factor, dhidden, dweight, scale = ctx.saved_tensors
        want_dhidden, want_dweight, *others = ctx.needs_input_grad
        hidden_dtype, weight_dtype = ctx.dtypes
        if scale is None:
            dhidden = _scaled(dhidden, upstream, factor, hidden_dtype) if want_dhidden else None
            dweight = _scaled(dweight, upstream, factor, weight_dtype) if want_dweight else None
            return dhidden, dweight, *(None for _ in others)
        if torch.compiler.is_compiling():
            dhidden = _confirmed(dhidden, upstream, scale)
        else:
            _confirm(upstream, scale)
            if ctx.spent:
                raise RuntimeError(
                    "linear_cross_entropy: with `scale` given there is one backward pass, and it was made"
                )
            ctx.spent = True
        if not want_dweight or ctx.added:
            dweight = None
        elif weight_dtype != torch.float32:
            dweight = dweight.to(weight_dtype)
        return dhidden, dweight, *(None for _ in others)


def _scaled(x: Tensor, upstream: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` times both scalars, rounded once; x itself, overwritten, where it has the dtype and its graph is being freed."""
    if torch.compiler.is_compiling():  # Inductor makes one kernel of both gradients, and writes over what is freed
        return (x * (upstream * factor)).to(dtype)
    freed = not torch._C._autograd._get_current_graph_task_keep_graph()
    y = x if freed and x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        launch = scale_launch(x.numel(), target_of(x))
        with device_of(x):
            _untraced(_linear_cross_entropy_scale_kernel, x.device)[launch.grid](
                x_ptr=x,
                y_ptr=y,
                upstream_ptr=upstream,
                factor_ptr=factor,
                n_elements=x.numel(),
                **launch.options,
            )
    return y
