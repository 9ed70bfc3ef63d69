"""Seconds and steps until a run is as good as it has to be: `python -m bench.time_to_loss --preset smoke`.

    python -m bench.time_to_loss --preset smoke --runs compiled compiled+muon
    python -m bench.time_to_loss --preset reference --data tinystories --steps 5000 --target 1.6

Milliseconds a step say how fast a run is, and a loss how good it is; what is wanted is both. A run is a variant of `bench.step`
(plain, compiled, compiled-captured, fused) and, after a plus, the optimizer (adamw, where none is said, or muon). All train on
the same batches by the same schedule, with each of `--seeds` seeds: of the weights and of the order of the data. Every few steps
(`--eval-interval`) the same validation batches say how good a run is; the target is reached where the line between two of these
losses crosses it.

The clock counts training steps only, from the second on: the first compiles, and is told beside it. Runs take turns, seed by
seed, so that a machine that becomes slower does so for all.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from time import perf_counter
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import command
from bench.measure import environment, write_json
from bench.step import variants
from training.config import TrainConfig, defaults
from training.data.batches import Batches, prefetch
from training.data.prepare import prepare
from training.data.shards import Dataset
from training.device import resolve_device, resolve_dtype, set_determinism
from training.errors import UserError
from training.step.schedule import learning_rate

OPTIMIZERS = ("adamw", "muon")


@dataclass(kw_only=True)
class TimeToLoss:
    """Train until a validation loss is reached, in several ways, and compare steps and seconds."""

    preset: str = "smoke"
    """Shape, batch and schedule, as in train.py."""
    runs: list[str] = field(default_factory=list)
    """Variants of bench.step, each with +muon for that optimizer; empty: those that this machine can run, with both."""
    target: float = 0.0
    """Validation loss in nats; 0: what the first run ends with, the worst of its seeds."""
    steps: int = 0
    """Optimizer steps of each run, at whose end the learning rate is at its least; 0: the preset's."""
    seeds: int = 2
    """Runs of each kind, with the preset's seed and those after it."""
    eval_interval: int = 20
    """Steps between evaluations."""
    eval_iters: int = 0
    """Batches of an evaluation; 0: the preset's."""
    data: str = "stdlib"
    """As in train.py."""
    data_dir: str = "data"
    """As in train.py."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype, as in train.py."""
    json: str = ""
    """File to write the curves to; it grows as runs are done."""


def measure(options: TimeToLoss, console: Console) -> dict:
    """Train all runs, print what they took and return (and write, where asked) the curves."""
    command.check_at_least(options, seeds=1, steps=0, eval_interval=1, eval_iters=0, target=0)
    command.check_writable(options.json)
    config = run_config(options)
    set_determinism(config.deterministic)
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    names = list(dict.fromkeys(options.runs)) or _possible(device)
    for name in names:
        _check_run(name, device)
    dataset = prepare(config.data, vocab_size=config.vocab_size, data_dir=config.data_dir, progress=True)
    result: dict[str, Any] = {
        "bench": "time_to_loss",
        "preset": options.preset,
        "steps": config.max_iters,
        "batch_size": config.batch_size,
        "micro_steps": config.gradient_accumulation_steps,
        "sequence_length": config.max_seq_len,
        "dtype": str(dtype).removeprefix("torch."),
        "data": config.data,
        "rows": [],
        "environment": environment(),
    }
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(names) * options.seeds * config.max_iters)
        for seed in range(config.seed, config.seed + options.seeds):
            for name in names:
                progress.update(task, description=f"{name}, seed {seed}")
                row = train(name, replace(config, seed=seed), device, dtype, dataset, lambda: progress.advance(task))
                result["rows"].append(row)
                torch.compiler.reset()
                result |= {"target": options.target or _reached_by_all(result["rows"], names[0])}
                for each in result["rows"]:
                    each |= reach(each["curve"], result["target"])
                if options.json:
                    write_json(options.json, result)
    console.print(table(result))
    return result


def run_config(options: TimeToLoss) -> TrainConfig:
    """The options that all runs share."""
    config = defaults(options.preset, options.device)
    steps = options.steps or config.max_iters
    config = replace(
        config,
        max_iters=steps,
        warmup_iters=min(config.warmup_iters, steps // 10),
        eval_interval=options.eval_interval,
        eval_iters=options.eval_iters or config.eval_iters,
        data=options.data,
        data_dir=options.data_dir,
        device=options.device,
        dtype=options.dtype,
    )
    config.check()
    return config


def _possible(device: torch.device) -> list[str]:
    found = [v for v in ("plain", "compiled", "compiled-captured", "fused") if not variants.why_absent(v, device)]
    return [*found, f"{found[-1]}+muon"]


def _check_run(name: str, device: torch.device) -> None:
    variant, plus, optimizer = name.partition("+")
    if variant not in variants.WHOLE or variant.startswith("reference") or (plus and optimizer not in OPTIMIZERS):
        allowed = [v for v in variants.WHOLE if not v.startswith("reference")]
        raise UserError(f"--runs names {name!r}; allowed: {', '.join(allowed)}, each with +{' or +'.join(OPTIMIZERS)}")
    if reason := variants.why_absent(variant, device):
        raise UserError(f"--runs names {name!r}, which can't run here: {reason}")


def train(
    name: str, config: TrainConfig, device: torch.device, dtype: torch.dtype, dataset: Dataset, advance=lambda: None
) -> dict:
    """One run: its curve as (step, seconds, validation loss), evaluated before the first step, every so often, and at the end."""
    variant, _, optimizer = name.partition("+")
    trainer = variants.make_trainer(variant, config, device, dtype, optimizer=optimizer or "adamw")
    count = config.gradient_accumulation_steps
    batches, held_out = Batches.of_run(config, dataset.train, count), Batches.of_run(config, dataset.val, 1)
    n_val = min(config.eval_iters, int(held_out.steps_per_epoch))

    def validation_loss() -> float:
        return trainer.evaluate(held_out.micro_batches(i, 1)[0] for i in range(n_val))

    curve, seconds, first = [(0, 0.0, validation_loss())], 0.0, 0.0
    steps = prefetch(lambda step: batches.micro_batches(step, count), 0, config.max_iters, device=device)
    _wait(device)
    since = perf_counter()
    for step, micro_batches in enumerate(steps, start=1):
        trainer.step(micro_batches, batches.tokens_per_step, learning_rate(config, step - 1))
        advance()
        if step == 1:
            _wait(device)
            first, since = perf_counter() - since, perf_counter()
        if step % config.eval_interval == 0 or step == config.max_iters:
            _wait(device)
            seconds += perf_counter() - since
            curve.append((step, seconds, validation_loss()))
            _wait(device)
            since = perf_counter()
    return {"run": name, "seed": config.seed, "first_step": first, "curve": curve}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reach(curve: list, target: float) -> dict:
    """Steps and seconds at which the loss first came down to the target, between two evaluations in proportion; None: never."""
    for (step, seconds, loss), (next_step, next_seconds, next_loss) in pairwise(curve):
        if next_loss <= target:
            part = 1.0 if loss <= next_loss else min(1.0, max(0.0, (loss - target) / (loss - next_loss)))
            return {
                "steps_to_target": step + part * (next_step - step),
                "seconds_to_target": seconds + part * (next_seconds - seconds),
            }
    return {"steps_to_target": None, "seconds_to_target": None}


def _reached_by_all(rows: list[dict], name: str) -> float:
    """What this run's seeds all came down to, rounded up: the same run rounds otherwise when it is compiled."""
    return math.ceil(1000 * max(min(loss for *_, loss in row["curve"]) for row in rows if row["run"] == name)) / 1000


def table(result: dict) -> Table:
    """The comparison as people read it: a line a run, the mean of its seeds and how far they are apart."""
    env = result["environment"]
    shown = Table(
        title=f"{result['preset']}, {result['steps']} steps, {result['dtype']}, {env['device']}, torch {env['torch']}: "
        f"to a validation loss of {result['target']:.4f}",
        caption="seconds of training, the first step aside; ± half the distance of the seeds",
    )
    shown.add_column("run")
    for heading in ("steps", "seconds", "ms a step", "first step, s", "last loss"):
        shown.add_column(heading, justify="right")
    for line in lines(result):
        shown.add_row(*line)
    return shown


def lines(result: dict) -> list[list[str]]:
    """The rows of the table."""
    found = []
    for name in dict.fromkeys(row["run"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["run"] == name]
        cells = [
            _spread([row[f"{what}_to_target"] for row in rows], form)
            for what, form in (("steps", ".0f"), ("seconds", ".1f"))
        ]
        ms = [1000 * row["curve"][-1][1] / max(1, row["curve"][-1][0] - 1) for row in rows]
        last = [row["curve"][-1][2] for row in rows]
        first = [row["first_step"] for row in rows]
        found.append([name, *cells, _spread(ms, ".1f"), _spread(first, ".1f"), _spread(last, ".4f")])
    return found


def _spread(values: list, form: str) -> str:
    reached = [value for value in values if value is not None and math.isfinite(value)]
    if len(reached) < len(values):
        return f"not reached by {len(values) - len(reached)} of {len(values)}"
    mean, apart = sum(reached) / len(reached), (max(reached) - min(reached)) / 2
    return f"{mean:{form}} ± {apart:{form}}" if len(reached) > 1 else f"{mean:{form}}"


if __name__ == "__main__":
    command.run(TimeToLoss, __doc__, measure)
