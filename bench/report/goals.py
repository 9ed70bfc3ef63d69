"""What the kernels should reach on a GPU, as data, and how a measured figure stands to it."""

from dataclasses import dataclass

GPU = "H100 SXM"
"""The GPU of all goals, by its name in training/hardware.py; bfloat16, deterministic."""

UNMEASURED = "*unmeasured*"


@dataclass(frozen=True)
class Goal:
    """A bound on a figure; `stretch` is the bound one would be proud of."""

    figure: str
    """Its key in the figures that the report gathers: ms, mfu, vs_baseline, of_copy, tflops, ..."""
    at_least: float | None = None
    at_most: float | None = None
    stretch: float | None = None

    @property
    def text(self) -> str:
        """The bound in words."""
        sign, bound = ("≥", self.at_least) if self.at_most is None else ("≤", self.at_most)
        words, unit = _FIGURES[self.figure]
        stretch = "" if self.stretch is None else f" (stretch {unit.format(self.stretch)})"
        return " ".join(f"{words} {sign} {unit.format(bound)}{stretch}".split())

    def verdict(self, value: float | None) -> str:
        """What became of it: unmeasured, met or missed, with the figure."""
        if value is None:
            return UNMEASURED
        met, stretched = self._holds(value, self.at_least, self.at_most), False
        if self.stretch is not None:
            is_floor = self.at_most is None
            stretched = self._holds(value, *((self.stretch, None) if is_floor else (None, self.stretch)))
        word = "stretch met" if stretched else "met" if met else "**missed**"
        return f"{word}: {_FIGURES[self.figure][1].format(value)}"

    @staticmethod
    def _holds(value: float, at_least: float | None, at_most: float | None) -> bool:
        return (at_least is None or value >= at_least) and (at_most is None or value <= at_most)


# What a figure is called, and its unit: {} takes the number.
_FIGURES = {
    "ms": ("", "{:.4g} ms"),
    "mfu": ("MFU", "{:.1%}"),
    "vs_baseline": ("", "{:.2f}x compiled, captured or not"),
    "of_copy": ("", "{:.0%} of a copy"),
    "tflops": ("", "{:.0f} TFLOP/s"),
    "vs_best": ("", "{:.2f}x the best peer"),
    "vs_mask": ("", "{:.2f}x a dense mask"),
    "memory_of_eager": ("memory", "{:.0%} of eager"),
    "memory_of_unchunked": ("activations", "{:.0%} of those with all logits"),
}


STEP: dict[str, tuple[Goal, ...]] = {
    "reference": (Goal("ms", at_most=34.0, stretch=28.0), Goal("vs_baseline", at_least=1.3)),
    "124m": (Goal("mfu", at_least=0.46, stretch=0.50),),
    "llama3.2-1b": (Goal("mfu", at_least=0.52, stretch=0.58), Goal("memory_of_unchunked", at_most=0.5)),
}
"""By preset, of the fused step."""

_NOT_BEHIND = Goal("vs_best", at_least=1.0)
_POINTWISE = {
    "forward": (Goal("of_copy", at_least=0.90), _NOT_BEHIND),
    "backward": (Goal("of_copy", at_least=0.85), _NOT_BEHIND),
    "both": (_NOT_BEHIND,),
}

OPS: dict[tuple[str, str, str], tuple[Goal, ...]] = {
    (op, "8192x2048", direction): goals
    for op in ("rms_norm", "add_rms_norm", "rope", "swiglu")
    for direction, goals in _POINTWISE.items()
} | {
    ("attention", "reference", "both"): (Goal("vs_best", at_least=1.5),),
    ("attention", "4x4096x128", "forward"): (Goal("tflops", at_least=380, stretch=450), _NOT_BEHIND),
    ("attention", "4x4096x128", "backward"): (Goal("tflops", at_least=280, stretch=400), _NOT_BEHIND),
    ("attention", "4x4096x64", "forward"): (_NOT_BEHIND,),
    ("attention", "4x4096x64", "backward"): (_NOT_BEHIND,),
    ("packed_attention", "4x4096x128", "both"): (Goal("vs_mask", at_least=4.0),),
    ("mlp", "reference", "both"): (Goal("vs_best", at_least=1.3),),
}
"""By op, size and pass, of the Triton kernel."""

LOSS_HEAD: tuple[Goal, ...] = (Goal("memory_of_eager", at_most=0.25), _NOT_BEHIND)
"""Of `linear_cross_entropy`, forward and backward together."""
LOSS_HEAD_SIZE = "8192x2048"


def verdicts(goals: tuple[Goal, ...], figures: dict, gpu: str) -> list[str]:
    """Each goal, and what became of it where there are figures: goals are those of one GPU."""
    if gpu != GPU:
        return []
    caveat = " (not all peers ran)" if figures.get("absent") else ""
    said = []
    for goal in goals:
        verdict = f": {goal.verdict(figures.get(goal.figure))}" if figures else ""
        said.append(goal.text + verdict + (caveat if verdict and goal.figure == "vs_best" else ""))
    return said
