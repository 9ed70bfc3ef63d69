"""What every op and product of a model is given and gives in a pass, forward and backward, seen as it happens.

The model computes as ever: its ops are wrapped, and each tensor that passes is looked at on its way. A gradient is seen through
a view of the tensor it belongs to, so that it is the one of this op alone, whoever else uses the tensor. A parameter that one op
alone reads is seen itself: of a matrix that FSDP gathered in half precision a view would round the float32 gradient.
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kernels import TORCH, Ops
from kernels.linear import linear
from kernels.ops import OUTPUTS, InTurn
from model import Llama

SUMS = {"gradient_sum": ("weight",), "gradient_rows": ("weight",), "gradient_sums": ("gate_up_weight", "down_weight")}
"""Arguments to which an op adds a gradient in autograd's stead, and of what; the last is a tuple of them."""
SHARE_A_WEIGHT = ("embedding", "linear_cross_entropy")
PRODUCTS = ("wqkv", "wo", "w_gate_up", "w_down")


@dataclass
class Call:
    """One call of an op or a product."""

    layer: int | str
    """The layer's number, or "out"."""
    op: str
    """A field of `kernels.Ops`, or the name of a product."""
    function: Callable
    arguments: dict[str, Any]
    """By name, as they were given."""
    norm: str = ""
    """The name of a norm's weight: a layer has two."""
    upstream: dict[str, Tensor] = field(default_factory=dict)
    """The gradients of the outputs, as far as they have come."""

    def __str__(self) -> str:
        where = "out" if self.layer == "out" else f"layer {self.layer}"
        return f"{where}, {self.op}" + (f" of {self.norm}" if self.norm else "")


@dataclass(frozen=True)
class Sight:
    """What was seen of a call: tensors by name."""

    call: Call
    backward: bool
    gives: bool
    """Whether these are results; else they are what it is given."""
    tensors: dict[str, Tensor]

    @property
    def direction(self) -> str:
        """The pass, in words."""
        return "backward" if self.backward else "forward"


See = Callable[[Sight], None]


@contextlib.contextmanager
def watching(model: Llama, see: See) -> Iterator[None]:
    """While entered, `see` is told of every op and product of the model's passes, as they come. Not under torch.compile."""
    norms = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters() if name.endswith("norm")}
    places = [*range(len(model.layers)), "out"]
    ops, taps = model.ops, _Taps()
    try:
        model.ops = tuple(_watched_ops(of, place, norms, see, taps) for of, place in zip(ops, places, strict=True))
        for i, layer in enumerate(model.layers):
            for name in PRODUCTS:
                module = getattr(layer, name)
                module.forward = _watched_product(module, i, name, see, taps)
        with warnings.catch_warnings():
            # FSDP warns of what would happen if somebody wrote into the view of a layer's result. Nobody does.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            yield
    finally:
        taps.remove()
        model.ops = ops
        for layer in model.layers:
            for name in PRODUCTS:
                vars(getattr(layer, name)).pop("forward", None)


class _Taps:
    """Show gradients on their way back."""

    def __init__(self):
        self._of_parameters: dict[Tensor, RemovableHandle] = {}

    def tapped(self, x: Tensor, hook: Callable[[Tensor | None], None], op: str = "", name: str = "") -> Tensor:
        """The same tensor, whose gradient `hook` is shown on its way back.

        Where autograd adds three gradients of one tensor a view would have it add them in another order. So the weight that the
        look-up and the head read is left alone, and of what the first norm reads, as the residual stream does, the sum is shown.
        """
        if not (torch.is_grad_enabled() and x.requires_grad) or (name == "weight" and op in SHARE_A_WEIGHT):
            return x
        if x.is_leaf:
            if x not in self._of_parameters:  # else it is computed again in a backward pass that is still to come by

                def once(gradient: Tensor | None) -> None:
                    self._of_parameters.pop(x).remove()
                    hook(gradient)

                self._of_parameters[x] = x.register_hook(once)
            return x
        tap = x if op == "rms_norm" and name == "x" else x.view_as(x)
        tap.register_hook(hook)
        return tap

    def remove(self) -> None:
        """Show no more, though a backward pass has not come by."""
        for handle in self._of_parameters.values():
            handle.remove()


def _watched_ops(ops: Ops, place: int | str, norms: dict[int, str], see: See, taps: _Taps) -> Ops:
    def watched(name: str, function: Callable) -> Callable:
        signature = inspect.signature(getattr(TORCH, name))

        def call(*positional, **named):
            arguments = signature.bind(*positional, **named)
            norm = norms.get(id(arguments.arguments.get("weight")), "") if "norm" in name else ""
            return _seen(Call(place, name, function, dict(arguments.arguments), norm), OUTPUTS[name], see, taps)

        return call

    chosen = {f.name: getattr(ops, f.name) for f in fields(Ops)}
    # What is done by several, each to be seen.
    if isinstance(ops.rope_attention, InTurn):
        del chosen["rope_attention"]
    if ops.mlp is TORCH.mlp:
        del chosen["mlp"]
    return replace(ops, **{name: watched(name, function) for name, function in chosen.items()})


def _watched_product(module: torch.nn.Module, layer: int, name: str, see: See, taps: _Taps) -> Callable:
    def forward(x: Tensor, to_sum: bool = False) -> Tensor:
        gradient_sum = module.gradient_sum if to_sum else None
        arguments = {
            "x": x,
            "weight": module.weight,
            "compute_weight": module.compute_weight,
            "gradient_sum": gradient_sum,
        }
        return _seen(Call(layer, name, linear, arguments), ("y",), see, taps)

    return forward


def _seen(call: Call, output_names: tuple[str, ...], see: See, taps: _Taps) -> Any:
    """Make the call, and tell of what it is given and gives."""
    floats = {name: x for name, x in call.arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
    given = {name: x for name, x in floats.items() if name not in SUMS}
    sums = _sums(call.arguments)
    see(Sight(call, backward=False, gives=False, tensors=given))

    def sees_gradient(name: str, gives: bool) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor | None) -> None:
            if gradient is None and gives:  # it went past autograd, to the memory of a step's sum
                gradient = sums.get(name)
            if gradient is None:
                return
            if not gives:
                call.upstream[name] = gradient
            see(Sight(call, backward=True, gives=gives, tensors={f"gradient of {name}": gradient}))

        return hook

    arguments = {
        name: taps.tapped(x, sees_gradient(name, gives=True), call.op, name) if name in given else x
        for name, x in call.arguments.items()
    }
    result = call.function(**arguments)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    gives = dict(zip(output_names, outputs, strict=True))
    if call.op == "linear_cross_entropy" and "gradient_sum" in floats:
        gives["gradient_sum"] = floats["gradient_sum"]  # which it adds to in its forward pass
    see(Sight(call, backward=False, gives=True, tensors=gives))
    outputs = tuple(
        taps.tapped(y, sees_gradient(name, gives=False)) for name, y in zip(output_names, outputs, strict=True)
    )
    return outputs[0] if isinstance(result, Tensor) else outputs


def _sums(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Where gradients are added in autograd's stead, by the names of what they are of."""
    sums = {}
    for name, weights in SUMS.items():
        given = arguments.get(name)
        for weight, x in zip(weights, given if isinstance(given, tuple) else [given], strict=False):
            if x is not None:
                sums[weight] = x
    return sums
