"""The bars of a step that no GPU has run: from the launches that `bench.compiled` lists, by a model of three lines.

    a launch       max(bytes / bandwidth, FLOPs / matrix peak, LEAST)
    between two    GAP
    the step       their sum

Bytes are those of the tensors that the launch reads and writes, each once; FLOPs are counted for products, those inside of the
feed-forward's kernels too, and for attention as the floor counts them. What a kernel loses to its instructions, to waiting and to
an uneven last wave is not in the model: a measured step stands above the predicted one by that.
"""

import re
from math import prod

from bench.roofline.__main__ import NEEDED, Ceilings
from bench.waterfall.bars import COPIES, GAPS, INDUCTOR, OPS, PRODUCTS, PYTORCH, Work
from model.flops import step_costs
from training.config import TrainConfig

LEAST = 0.0012
"""Milliseconds of a launch that does next to nothing, and between two launches of one CUDA graph (GAP), both as an H100 had them in
the captured reference step: bench/results/2026-11-26-nvidia-h100-80gb-hbm3/second-step-reference.json."""
GAP = 0.0007

_KINDS = {"product": PRODUCTS, "generated": INDUCTOR, "copy": COPIES, "attention": "attention"}
ONCE = ("start", "update")
"""Parts of a step that come once; the others come once a micro-step."""


def works(compiled: dict, config: TrainConfig, ceilings: Ceilings) -> list[Work]:
    """What a result of `bench.compiled` comes to on a GPU with these ceilings. config: of the step that was compiled."""
    attention = _attention_flops(compiled["launches"], config)
    found = []
    for launch in compiled["launches"]:
        times = 1 if launch["part"] in ONCE else compiled["micro_steps"]
        flops = attention.get(_direction(launch), 0) + _mlp_flops(launch)
        if launch["kind"] == "product":
            flops = _product_flops(launch)
        moved = launch["read"] + launch["written"]
        ms = max(1000 * moved / ceilings.copy, 1000 * flops / ceilings.matmul, LEAST)
        found.append(Work(_cause(launch), times * ms, times))
    # A launch is added only where all micro-steps need it, so the count of `bench.compiled` is the exact one.
    return [*found, Work(GAPS, GAP * compiled["step_launches"], 0)]


def _cause(launch: dict) -> str:
    if launch["kind"] == "kernel":
        return launch["op"] if launch["op"] in OPS else PYTORCH
    return _KINDS.get(launch["kind"], PYTORCH)


def _product_flops(launch: dict) -> float:
    """Two a multiply-add: twice the root of the product of the sizes of both operands and the result, batches aside."""
    sizes = [_sizes(shape) for shape in launch["tensors"].values()]
    matrices = [s for s in sizes if len(s) >= 2]
    *_, a, b = [s for name, s in zip(launch["tensors"], sizes, strict=True) if "out" not in name and len(s) >= 2]
    result = next((s for name, s in zip(launch["tensors"], sizes, strict=True) if "out" in name), matrices[0])
    return 2 * (prod(a) * prod(b) * prod(result)) ** 0.5


def _mlp_flops(launch: dict) -> float:
    """Each weight of the feed-forward is multiplied once with every row, forward, and once more for the gradient of x."""
    if not launch["name"].startswith("_mlp"):
        return 0
    sizes = {name: _sizes(shape) for name, shape in launch["tensors"].items()}
    *rows, _ = sizes["out_ptr" if "out_ptr" in sizes else "dx_ptr"]
    return 2 * prod(rows) * (prod(sizes["gate_up_weight_ptr"]) + prod(sizes["down_weight_ptr"]))


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", shape.partition("[")[2]))


def _direction(launch: dict) -> str:
    """The part of the step, forward or backward, of what computes attention; nothing for all else."""
    computes = launch["kind"] == "attention" or (launch["kind"] == "kernel" and launch["name"].startswith("_attention"))
    return launch["part"] if computes else ""


def _attention_flops(launches: list[dict], config: TrainConfig) -> dict[str, float]:
    """FLOPs of one such launch: the needed ones of a micro-step, 2 of 7 products forward, divided among its launches."""
    needed = step_costs(config.shape(), config.batch_size, 1)["attention"].flops * NEEDED["attention"]
    shares = {"forward": needed * 2 / 7, "backward": needed * 5 / 7}
    counts = {part: sum(_direction(launch) == part for launch in launches) for part in shares}
    return {part: share / counts[part] for part, share in shares.items() if counts[part]}
