"""The bars of a waterfall: what a step takes, from its floor up, each cause for itself."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from bench.roofline.__main__ import Ceilings, floor
from kernels import grammar
from training.config import TrainConfig

PRODUCTS, INDUCTOR, COPIES, PYTORCH, GAPS = (
    "products of a library",
    "kernels that Inductor wrote",
    "copies and fills of memory",
    "PyTorch's own kernels",
    "between launches",
)
OPS = (*dict.fromkeys((*grammar.LAYER_SWITCHES, *grammar.OUT_SWITCHES)), "optimizer")
"""As `model.flops` names them. Products are a bar of their own: the linear maps', and those of the loss head."""


@dataclass(frozen=True)
class Work:
    """Something that the GPU did in a step: launches of one kind."""

    cause: str
    """One of `OPS`, or of the names above."""
    ms: float
    launches: int = 1


@dataclass(frozen=True)
class Bar:
    """One cause: the least that it can take, and what it takes."""

    cause: str
    floor_ms: float
    ms: float
    launches: int

    @property
    def above(self) -> float:
        """Milliseconds over the floor: how high the bar is."""
        return self.ms - self.floor_ms


def floors(config: TrainConfig, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds of a step that each cause takes at the least; what is not in it need not be at all."""
    least: dict[str, float] = {}
    for row in floor(config, ceilings)["rows"]:
        is_product = row["op"] == "linear" or row["part"] == "products"
        cause = PRODUCTS if is_product else row["op"]
        least[cause] = least.get(cause, 0.0) + row["ms"]
    return least


def gather(works: Iterable[Work], least: dict[str, float]) -> list[Bar]:
    """A bar a cause, those of ops first, then by height."""
    ms: dict[str, float] = dict.fromkeys(least, 0.0)
    launches: dict[str, int] = {}
    for work in works:
        ms[work.cause] = ms.get(work.cause, 0.0) + work.ms
        launches[work.cause] = launches.get(work.cause, 0) + work.launches
    bars = [Bar(cause, least.get(cause, 0.0), ms[cause], launches.get(cause, 0)) for cause in ms]
    return sorted(bars, key=lambda bar: (bar.cause == GAPS, bar.cause not in (PRODUCTS, *OPS), -bar.above))


def rows(bars: list[Bar]) -> list[dict]:
    """The bars with where each begins: at the floor of the whole step and the heights of those before it."""
    at, found = sum(bar.floor_ms for bar in bars), []
    for bar in bars:
        found.append(asdict(bar) | {"above_ms": bar.above, "from_ms": at})
        at += bar.above
    return found
