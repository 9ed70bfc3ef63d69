"""A row of `bench.ops`: an op at a size, a pass, and how fast each variant was. It writes itself as JSON and is read from it."""

from dataclasses import asdict, dataclass, fields

NOT_PEERS = ("copy", "matmul", "triton")
"""Names among the timings that are no peer's: the ceilings (older files have a matrix product's there) and the kernel itself."""


@dataclass
class Speed:
    """A variant's time, and how good that is. None: not measured, or it would say nothing of this variant."""

    us: float
    """Microseconds, the median."""
    gb_per_s: float
    """Of the bytes that must be moved."""
    of_copy: float
    """The share of the speed of a copy of as many bytes."""
    us_min: float | None = None
    us_max: float | None = None
    tflops: float | None = None
    """Where FLOPs are counted."""
    of_matmul: float | None = None
    """The share of a matrix product's FLOP/s."""
    peak_memory: int | None = None
    """Most bytes of GPU memory that a forward and a backward pass hold beyond their arguments."""


@dataclass
class OpRow:
    """What was measured of one pass of an op at one size."""

    op: str
    size: str
    shape: str
    direction: str
    """The pass: forward, backward, both, evaluation or update."""
    bytes: int
    flops: int
    timings: dict[str, Speed]
    """By variant, `copy` among them."""
    failed: dict[str, str]
    """Variants that failed, and how."""

    @property
    def speedup(self) -> dict[str, float]:
        """How many times faster `triton` is than each other variant; empty where it was not measured."""
        kernel = self.timings.get("triton")
        others = ((name, speed) for name, speed in self.timings.items() if name != "triton")
        return {name: speed.us / kernel.us for name, speed in others} if kernel else {}

    @property
    def best_peer(self) -> tuple[str, float] | None:
        """The fastest peer, and how many times faster `triton` is; None where there are not both."""
        peers = {name: ratio for name, ratio in self.speedup.items() if name not in NOT_PEERS}
        best = min(peers, key=peers.get, default=None)
        return None if best is None else (best, peers[best])

    def result(self) -> dict:
        """The row for JSON."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        row["pass"] = row.pop("direction")
        row["timings"] = {
            name: {figure: value for figure, value in asdict(speed).items() if value is not None}
            for name, speed in self.timings.items()
        }
        return row | {"speedup": self.speedup}

    @classmethod
    def read(cls, row: dict) -> "OpRow":
        """A row from JSON, of this or an older version. KeyError or TypeError for what is none."""
        figures = {field.name for field in fields(Speed)}
        timings = {
            name: Speed(**{figure: value for figure, value in speed.items() if figure in figures})
            for name, speed in row["timings"].items()
        }
        sizes = {name: row.get(name, missing) for name, missing in (("shape", ""), ("bytes", 0), ("flops", 0))}
        return cls(row["op"], row["size"], direction=row["pass"], timings=timings, failed=row["failed"], **sizes)
