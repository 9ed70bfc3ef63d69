"""How a kernel is compared with its torch twin and with float64: the device and dtypes, poisoned outputs, error rules."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo import trace_rules

from kernels.launch import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Enough rows that the programs that add up a weight gradient take several turns each.
MANY_ROWS = 300 if INTERPRETED else 20_000

# Relative RMS errors against float64. Rounding the output alone gives 0.6 of the figure of each half precision, and the
# interpreter's bfloat16 stores truncate instead, at twice the error.
RELATIVE_RMS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers that depend on shape and seed alone, so that a failing case can be run by itself."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def strided(x: Tensor) -> Tensor:
    """The same values as a slice of a wider last dimension: dense rows that do not touch."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 16), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 8:-8] = x
    return wide[..., 8:-8]


def transposed(x: Tensor) -> Tensor:
    """The same values with the first dimension dense instead of the last."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def expanded(x: Tensor) -> Tensor:
    """One value everywhere, with every stride 0, as the gradient of `sum()` has."""
    return x.flatten()[:1].reshape([1] * x.dim()).expand(x.shape)


def far_apart(x: Tensor) -> Tensor:
    """The same values, three slices of the first dimension, at a stride that fits into int32 and whose double does not.

    In float16 they span 4 GiB of address space, of which only what is touched becomes memory on the CPU.
    """
    stride = 2**30 + 1
    assert x.shape[0] == 3
    memory = torch.empty(2 * stride + x[0].numel(), dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, (stride, *x[0].contiguous().stride())).copy_(x)


LAYOUTS = {"dense": torch.clone, "strided": strided, "transposed": transposed, "expanded": expanded}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, fresh memory is full of NaN, so that an element which a kernel forgets to write shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args, **kwargs) -> Tensor:
            fresh = make(*args, **kwargs)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        return made

    # Dynamo finds torch's functions by identity, in a table that it makes once: not while some are replaced.
    trace_rules.get_torch_obj_rule_map()
    with contextlib.ExitStack() as stack:
        for name in ("empty", "empty_like"):
            stack.enter_context(mock.patch.object(torch, name, poison(getattr(torch, name))))
        yield


def run(op: Callable, inputs: Sequence[Tensor], upstream: Sequence[Tensor | None] = ()) -> tuple[list, list]:
    """Outputs, and the gradients of the inputs, given the outputs' gradients (None: the output is not used).

    Inputs that require a gradient get one, None where nothing reaches them. Asserts that neither inputs nor upstream
    gradients are changed.
    """
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    before = [x.detach().clone() for x in inputs]
    outputs = op(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    pairs = zip(outputs, upstream, strict=True) if upstream else ()
    used = [(y, dy) for y, dy in pairs if dy is not None and y.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    gradients = [None] * len(wanted)
    if used and wanted:
        upstream_before = [dy.clone() for _, dy in used]
        gradients = torch.autograd.grad([y for y, _ in used], wanted, [dy for _, dy in used], allow_unused=True)
        for (_, dy), copy in zip(used, upstream_before, strict=True):
            assert torch.equal(dy.nan_to_num(), copy.nan_to_num()), "the upstream gradient was changed"
    for x, copy in zip(inputs, before, strict=True):
        assert torch.equal(x.detach().nan_to_num(), copy.nan_to_num()), "an input was changed"
    return [y.detach() for y in outputs], list(gradients)


def differentiable(*inputs: Tensor) -> list[Tensor]:
    """The inputs, as leaves that require a gradient."""
    return [x.detach().requires_grad_() for x in inputs]


def double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same values in float64, requiring a gradient where they did."""
    return [x if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def relative_rms(actual: Tensor, exact: Tensor) -> float:
    """RMS of the error over RMS of the exact values."""
    return ((actual.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def assert_as_good_as_torch(actual: Tensor, twin: Tensor, exact: Tensor, backward: bool) -> None:
    """Largest error at most twice (backward: three times) that of the torch twin, plus one ulp of the output's scale."""
    assert actual.shape == twin.shape
    assert actual.dtype == twin.dtype
    error, allowed = ((x.double() - exact).abs().amax().item() for x in (actual, twin))
    ulp = torch.finfo(actual.dtype).eps * exact.abs().amax().item()
    assert error <= (3 if backward else 2) * allowed + ulp, f"error {error:.3g}, torch's {allowed:.3g}, ulp {ulp:.3g}"


def assert_matches(actual: Tensor, twin: Tensor, exact: Tensor, backward: bool = False) -> None:
    """By both rules: as good as the torch twin, and within the dtype's relative RMS error."""
    assert_as_good_as_torch(actual, twin, exact, backward)
    assert actual.is_contiguous()
    assert relative_rms(actual, exact) <= RELATIVE_RMS[actual.dtype]


def assert_sum_matches(actual: Tensor, exact: Tensor, rows: int) -> None:
    """A float32 sum over rows of numbers around one: within 5e-6 sqrt(rows)."""
    assert (actual.double() - exact).abs().amax().item() <= 5e-6 * rows**0.5


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Equal to the last bit, NaN to NaN."""
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_compiles(op: Callable, cases: Sequence[Sequence[Tensor]], backend: str, dynamic: bool, exact: bool) -> None:
    """Forward and backward as one graph each, equal to eager; further cases of other sizes by the same graph if dynamic.

    exact: to the last bit, else as float32 arithmetic in another order is.
    """
    torch._dynamo.reset()
    compiled = torch.compile(op, backend=backend, fullgraph=True, dynamic=dynamic)
    for case, inputs in enumerate(cases):
        with torch.compiler.set_stance("fail_on_recompile" if case else "default"):
            upstream = [torch.ones_like(y) for y in run(op, inputs)[0]]
            eager, actual = run(op, inputs, upstream), run(compiled, inputs, upstream)
        for a, b in zip(eager[0] + eager[1], actual[0] + actual[1], strict=True):
            if exact:
                assert_same_bits([a], [b])
            else:
                torch.testing.assert_close(b, a)
