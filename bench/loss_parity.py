"""The loss of a training run with the Triton kernels beside plain PyTorch: `python -m bench.loss_parity`.

Same weights, same data, same schedule; what differs is the order of sums, and so the rounding. A training run is chaotic: from
the smallest difference on, two runs drift apart until they differ as any two equally good runs do. So the drift of `fused` from
`plain` is held against that of `nudged` from `plain`: the plain run again, each initial weight changed once, at random, by up
to half a unit in the last place of the compute dtype. That is the least it could be for a kernel that rounds otherwise, as
such a kernel rounds otherwise at every step; it takes no other kernel to compare with and works on any device. Other seeds
would be no measure: they give other data or other weights, and far greater differences.

Two stretches are held against each other: the first steps, where a small fault shows and chaos does not yet, and the whole run,
smoothed by the mean of a twentieth of it. The bound: both the largest and the mean difference at most twice those of the nudged
run that drifted most. Tried on a CPU, 300 steps of smoke in bfloat16: three nudged runs drifted by 0.05 to 0.09 nats, and a run
whose norms were computed in float64 and whose SwiGLU was written another way by 0.07; after 20 steps it was 3e-4 to 5e-4, and 2e-4.

On a CPU the kernels need TRITON_INTERPRET=1, a small preset and few steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import kernels
from bench import command
from bench.measure import environment, write_json
from model import Llama
from training.config import TrainConfig, defaults
from training.data.batches import Batch, Batches, prefetch
from training.data.prepare import prepare
from training.device import resolve_device, resolve_dtype, set_determinism
from training.distributed import World
from training.step.schedule import learning_rate
from training.step.trainer import Trainer

BOUND = 2.0
FIRST_STEPS = 20


@dataclass(kw_only=True)
class LossParity:
    """Train with the kernels and without them, and compare the losses."""

    preset: str = "reference"
    """Shape, batch and schedule, as in train.py."""
    steps: int = 1000
    """Optimizer steps of each run."""
    kernels: str = "all"
    """Triton kernels of the fused run, by op and layer as in train.py."""
    nudged: int = 3
    """Nudged plain runs; the one that drifts most makes the bound."""
    batch_size: int = 0
    """Sequences in a micro-step; 0: the preset's."""
    micro_steps: int = 0
    """Micro-steps in a step; 0: the preset's."""
    data: str = "stdlib"
    """As in train.py."""
    data_dir: str = "data"
    """As in train.py."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto: bfloat16 on a GPU that has it, as in train.py."""
    json: str = ""
    """File to write the curves to; it grows as runs are done."""


def measure(options: LossParity, console: Console) -> dict:
    """Train all runs, print how far they drifted and return (and write, where asked) curves and bound.

    Exit status 1 where `fused` is not within the bound.
    """
    command.check_at_least(options, steps=1, nudged=1, batch_size=0, micro_steps=0)
    command.check_writable(options.json)
    config = defaults(options.preset, options.device)
    config = replace(
        config,
        batch_size=options.batch_size or config.batch_size,
        gradient_accumulation_steps=options.micro_steps or config.gradient_accumulation_steps,
        data=options.data,
        data_dir=options.data_dir,
        device=options.device,
        dtype=options.dtype,
        kernels=options.kernels,
    )
    config.check()
    set_determinism(config.deterministic)
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    dataset = prepare(config.data, vocab_size=config.vocab_size, data_dir=config.data_dir, progress=True)
    batches = Batches.of_run(config, dataset.train, config.gradient_accumulation_steps)

    result = {
        "bench": "loss_parity",
        "preset": options.preset,
        "batch_size": config.batch_size,
        "micro_steps": config.gradient_accumulation_steps,
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": options.kernels,
        "steps": options.steps,
        "losses": {},
    }
    names = ["plain", "fused", *(f"nudged-{i + 1}" for i in range(options.nudged))]
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(names) * options.steps)
        for name in names:
            progress.update(task, description=name)
            losses = []
            for loss in _train(name, config, device, dtype, batches, options.steps):
                losses.append(loss)
                progress.advance(task)
            result["losses"][name] = torch.stack(losses).tolist()
            torch.compiler.reset()
            result["environment"] = environment()
            if options.json:
                write_json(options.json, result)
    result |= compare(result["losses"])
    if options.json:
        write_json(options.json, result)
    console.print(table(result))
    console.print(f"fused ({options.kernels}) is {'' if result['within'] else 'NOT '}within the bound", highlight=False)
    if not result["within"]:
        raise SystemExit(1)
    return result


def _train(
    name: str, config: TrainConfig, device: torch.device, dtype: torch.dtype, batches: Batches, steps: int
) -> Iterator[Tensor]:
    """The loss of each step of a run, 0-d on the device."""
    spec = config.kernel_spec if name == "fused" else "none"
    torch.manual_seed(config.seed)
    with device:
        model = Llama(config.shape(), kernels.select(spec, config.n_layers), dtype)
    if name.startswith("nudged"):
        nudge(model, int(name.removeprefix("nudged-")))
    trainer = Trainer(model, replace(config, kernels=spec), World())  # which captures steps where there are kernels
    valid = batches.tokens_per_step

    def load(step: int) -> list[Batch]:
        return batches.micro_batches(step, config.gradient_accumulation_steps)

    for step, micro_batches in enumerate(prefetch(load, 0, steps, device=device)):
        yield trainer.step(micro_batches, valid, learning_rate(config, step)).loss


@torch.no_grad()
def nudge(model: Llama, seed: int) -> None:
    """Change each parameter, relative to itself and at random, by up to half a unit in the last place of the compute dtype."""
    half_ulp = torch.finfo(model.compute_dtype).eps / 2
    generator = torch.Generator(device=model.cos.device).manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).uniform_(-half_ulp, half_ulp, generator=generator)
        parameter.mul_(1 + noise)
    model.refresh_compute_weights()


def compare(losses: dict[str, list[float]]) -> dict:
    """How far each run drifted from `plain`, in nats, and whether `fused` is within the bound, which the nudged runs make.

    `drift` and `bound` hold the largest and the mean difference, of the smoothed curves and of the first steps.
    """
    curves = {name: torch.tensor(values, dtype=torch.float64) for name, values in losses.items()}
    plain = curves.pop("plain")
    window = max(1, len(plain) // 20)
    drift = {}
    for name, curve in curves.items():
        whole = (curve - plain).unfold(0, window, 1).mean(-1).abs()
        first = (curve - plain)[:FIRST_STEPS].abs()
        drift[name] = {"max": whole.max(), "mean": whole.mean(), "first_max": first.max(), "first_mean": first.mean()}
        drift[name] = {kind: value.item() for kind, value in drift[name].items()}
    resolution = torch.finfo(torch.float32).eps * plain.abs().max().item()  # of a float32 loss
    nudged = [values for name, values in drift.items() if name.startswith("nudged")]
    bound = {kind: BOUND * (max(values[kind] for values in nudged) + resolution) for kind in drift["fused"]}
    within = all(drift["fused"][kind] <= bound[kind] for kind in bound)  # False where a loss is not a number
    return {"window": window, "drift": drift, "bound": bound, "within": within}


def table(result: dict) -> Table:
    """The comparison as people read it."""
    env = result["environment"]
    shown = Table(
        title=f"{result['preset']}, {result['steps']} steps, {result['dtype']}, {env['device']}, torch {env['torch']}",
        caption=f"nats from plain, losses averaged over {result['window']} of the steps",
    )
    shown.add_column("run")
    for heading in ("last loss", "largest", "mean", f"largest of the first {FIRST_STEPS}", "mean"):
        shown.add_column(heading, justify="right")
    for name, losses in result["losses"].items():
        shown.add_row(name, f"{losses[-1]:.4f}", *(f"{drift:.1e}" for drift in result["drift"].get(name, {}).values()))
    shown.add_row("bound", "", *(f"{drift:.1e}" for drift in result["bound"].values()))
    return shown


if __name__ == "__main__":
    command.run(LossParity, __doc__, measure)
