"""The error of each op of a model by itself: what every call got in a run of the torch twins, computed again by others.

`record` keeps the arguments and the upstream gradients of each call; `measure_call` gives both to the torch twin in float64, to
the torch twin and to the kernel. All three start from the same numbers, so an error is that op's own: nothing that
happened earlier in the model is in it, and nothing later hides it.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import TORCH, Ops
from kernels.linear import linear
from kernels.ops import FIELDS, OUTPUTS
from model import Llama

# The relative error below which two results are equally good. In half precision: that of rounding the result once. In
# float32: that of a sum in another order. Twice these are the bounds that the tests hold the kernels to.
FLOOR = {torch.float32: 5e-7, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}


@dataclass(frozen=True)
class Call:
    """One call of an op in a forward pass, and what came back to it in the backward pass."""

    place: int
    """The layer, or n_layers for what follows the last one."""
    op: str
    """A field of `Ops`."""
    name: str
    """The op, or for a norm which one: attention_norm, ffn_norm or final_norm."""
    arguments: tuple
    """As the model passed them, strides and all, cut off from its graph."""
    keywords: dict[str, Any]
    upstream: list[Tensor | None]
    """Gradient of each output; None for one that nothing depends on."""

    @property
    def switch(self) -> str:
        """The word of `kernels.select` that turns this op."""
        return next(switch for switch, ops in FIELDS.items() if self.op in ops)


def record(model: Llama, step: Callable[[], object]) -> list[Call]:
    """Every call of an op, in order, while `step` runs a forward and a backward pass of `model` on the torch twins."""
    calls: list[Call] = []
    before = model.ops
    model.ops = tuple(_recording(place, len(before) - 1, calls) for place in range(len(before)))
    try:
        step()
    finally:
        model.ops = before
    return calls


def _recording(place: int, n_layers: int, calls: list[Call]) -> Ops:
    """The torch twins, which append what they are given to `calls`."""
    norms = iter(("attention_norm", "ffn_norm") if place < n_layers else ("final_norm",))

    def mlp(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, compute_weights, gradient_sums) -> Tensor:
        """The twin, to the bit, whose SwiGLU is recorded as well."""
        gate_up = linear(x, gate_up_weight, compute_weights[0], gradient_sums[0])
        return linear(ops.swiglu(gate_up), down_weight, compute_weights[1], gradient_sums[1])

    def recorded(op: str, *arguments, **keywords):
        name = next(norms) if op in FIELDS["rms_norm"] else op
        outputs = (mlp if op == "mlp" else getattr(TORCH, op))(*arguments, **keywords)
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        call = Call(place, op, name, tuple(map(_leaf, arguments)), keywords, [None] * len(several))
        calls.append(call)
        # Views: an output that the op itself reads (the sum of add_rms_norm) would show the op's own gradient as well.
        several = tuple(y.view_as(y) for y in several)
        for i, y in enumerate(several):
            y.register_hook(partial(call.upstream.__setitem__, i))
        return several if isinstance(outputs, tuple) else several[0]

    ops = Ops(**{name: partial(recorded, name) for names in FIELDS.values() for name in names})
    return ops


def _leaf(x: Any, dtype: torch.dtype | None = None) -> Any:
    """A tensor as one that starts a graph, floating-point numbers cast to `dtype`; a dtype as `dtype`; all else as it is.

    Of a tuple each.
    """
    if isinstance(x, tuple):
        return tuple(_leaf(item, dtype) for item in x)
    if isinstance(x, torch.dtype):
        return dtype or x
    if not isinstance(x, Tensor):
        return x
    cast = x.to(dtype) if dtype and x.is_floating_point() else x
    return cast.detach().requires_grad_(x.requires_grad)


def measure_call(call: Call, fused: Callable | None) -> Iterator[dict]:
    """A row for each output and each gradient of a call: `pass`, `tensor` and the figures of `figures`.

    fused: the kernel; None where there is none to measure.
    """
    twin = getattr(TORCH, call.op)
    # In this order: a kernel that overwrites what it was given can't spoil what it is held against.
    exact = _run(call, twin, torch.float64)
    plain = _run(call, twin)
    kernel = _run(call, fused) if fused else {}
    for key, value in exact.items():
        floor = FLOOR[plain[key].dtype]
        yield {"pass": key[0], "tensor": key[1]} | figures(value, plain[key], kernel.get(key), floor)


def _run(call: Call, function: Callable, dtype: torch.dtype | None = None) -> dict[tuple[str, str], Tensor]:
    """Outputs and gradients by (pass, name of the output or of the argument)."""
    names = inspect.signature(getattr(TORCH, call.op)).parameters
    arguments = {name: _leaf(x, dtype) for name, x in zip(names, call.arguments, strict=False)}
    keywords = {name: _leaf(x, dtype) for name, x in call.keywords.items()}
    outputs = function(*arguments.values(), **keywords)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    reached = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, call.upstream, strict=True) if dy is not None]
    gradients = torch.autograd.grad([y for y, _ in reached], list(wanted.values()), [dy for _, dy in reached])
    result = {("output", name): y.detach() for name, y in zip(OUTPUTS[call.op], outputs, strict=True)}
    return result | {("gradient", name): dx for name, dx in zip(wanted, gradients, strict=True)}


def figures(exact: Tensor, plain: Tensor, fused: Tensor | None, floor: float) -> dict[str, float | None]:
    """The relative errors `plain` and `fused`, their `ratio`, and the `excess`: fused over the larger of plain and `floor`.

    It is the excess that a tolerance bounds. Without `fused` all but `plain` are None.
    """
    errors: dict[str, float | None] = {
        "plain": relative_error(plain, exact),
        "fused": None,
        "ratio": None,
        "excess": None,
    }
    if fused is not None:
        errors["fused"] = relative_error(fused, exact)
        errors["ratio"] = _over(errors["fused"], errors["plain"])
        errors["excess"] = _over(errors["fused"], max(errors["plain"], floor))
    return errors


def _over(a: float, b: float) -> float:
    """The quotient; 1 of two that are both zero or both infinite."""
    return 1.0 if a == b else a / b if b else float("inf")


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Root mean square of x - exact over that of exact (float64); infinite for anything beside an exact zero."""
    error, scale = (x.double() - exact).norm().item(), exact.norm().item()
    return error / scale if scale else (0.0 if error == 0 else float("inf"))
