"""What a sheet says of an op: the sizes it is measured at, its arguments there, what it must move and compute, and its peers.

A file `bench/ops/<switch>.py` holds in `SHEETS` the sheet of each op of a kernel file, by name. Variants that many have:

    eager, compiled    the torch twin, as it is and under torch.compile
    liger, quack       the op of Liger-Kernel and of quack, where they are installed
    triton             the kernel here

Masks and whatever else a model makes once for all its layers are made outside of the time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.ops.sizes import ROWS
from bench.peers import liger
from model.flops import Cost
from training.config import TrainConfig

FLOAT32 = 4


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    shape: str
    """Of what is worked on, for people."""
    arguments: tuple
    """Of the op, laid out as the model passes them; the tensors that require a gradient are leaves."""
    costs: dict[str, Cost]
    """By pass, those that are timed: forward and backward (their sum is `both`); evaluation (forward with no gradient wanted)
    and both, for an op that may do the backward's work in the forward pass; or update. Bytes are those of the table in the op's
    module docstring; FLOPs are counted where arithmetic and not memory is the limit."""
    keywords: dict = field(default_factory=dict)
    """More arguments of the op."""

    @property
    def wanted(self) -> list[Tensor]:
        """The arguments that get a gradient."""
        return [x for x in self.arguments if isinstance(x, Tensor) and x.requires_grad]


@dataclass(frozen=True)
class Peer:
    """One way to compute an op."""

    make: Callable[[Case], Callable]
    """The function to be called with the arguments of a case."""
    needs_gpu: bool = False
    deterministic: bool = True
    """Whether it runs while torch's deterministic algorithms are on; if not, they are lifted for it alone."""
    half_only: bool = False
    """Whether it takes half precision only."""
    lacks: Callable[[], str] = lambda: ""
    """What it needs and does not find here: a package, or something that the installed torch has not yet; empty: nothing."""

    def why_absent(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it can't be timed here; empty where it can."""
        if lacking := self.lacks():
            return lacking
        if self.needs_gpu and device.type != "cuda":
            return "no GPU"
        return "half only" if self.half_only and dtype.itemsize != 2 else ""


def _every_layer(config: TrainConfig) -> int:
    return config.n_layers


@dataclass(frozen=True)
class Sheet:
    """An op as it is measured."""

    case: Callable[[TrainConfig, torch.dtype, torch.device], Case]
    """Its arguments at a size."""
    peers: dict[str, Peer]
    """By variant, in the order in which they are shown."""
    sizes: tuple[str, ...] = ROWS
    """What it is measured at when nothing else is said: names for `bench.ops.sizes.size`."""
    calls: Callable[[TrainConfig], int] = _every_layer
    """How often a micro-step calls it; 0 for what is a second case of an op, or no part of a micro-step."""
    serves: Callable[[TrainConfig], bool] = lambda config: True
    """Whether the kernel takes this size."""
    launched: Callable[[TrainConfig], Any] | None = None
    """What `bench.machine_code` runs on the meta device; the kernel on the arguments of the case, if not given."""


# ------------------------------------------------------------------------------------------------------- what many have


def leaf(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers that want a gradient."""
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_()


def moved(forward: int, backward: int) -> dict[str, Cost]:
    """The costs of an op whose limit is memory, by the bytes of its passes."""
    return {"forward": Cost(forward), "backward": Cost(backward)}


def always(function: Callable) -> Callable[[Case], Callable]:
    """A peer's `make` that has nothing to prepare."""
    return lambda case: function


def twins(function: Callable) -> dict[str, Peer]:
    """`eager` and `compiled`."""
    return {
        "eager": Peer(always(function)),
        "compiled": Peer(lambda case: torch.compile(function, fullgraph=True, dynamic=False)),
    }


def kernel(function: Callable) -> dict[str, Peer]:
    """`triton`."""
    return {"triton": Peer(always(function), needs_gpu=True)}


def packaged(variant: str, package: Any, op: str, **options: Any) -> dict[str, Peer]:
    """A variant of a module of `bench.peers`, by our name for the op. options: more of the peer's."""
    make, lacks = (lambda case: package.ops()[op]), (lambda: "" if package.installed() else "not installed")
    return {variant: Peer(make, needs_gpu=True, lacks=lacks, **options)}


def of_liger(op: str) -> dict[str, Peer]:
    """`liger`, by our name for the op."""
    return packaged("liger", liger, op)


def of_newer_torch(is_there: bool) -> Callable[[], str]:
    """A peer's `lacks`, of something that older versions of torch do not have."""
    return lambda: "" if is_there else f"not in torch {torch.__version__.split('+')[0]}"
