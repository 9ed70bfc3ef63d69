"""ms/step, tokens/s, MFU and peak memory of a whole training step: `python -m bench.step --preset reference`.

Variants: `reference` (the loop this project started from) and `reference-compiled`; `plain` (the torch twins, eager), `compiled`
(the torch twins under torch.compile) and `fused` (the Triton kernels, compiled). Small models are timed in turn in one process,
large ones one after another. Time includes the update and the reading of the loss; the batch is ready beforehand.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

import kernels
from bench.measure import Timing, environment, time_in_turn, write_json
from bench.reference_loop import ReferenceStep
from model import Llama, flops
from training import hardware
from training.config import TrainConfig, defaults, fail
from training.device import memory_name, resolve_device, resolve_dtype, set_determinism
from training.distributed import World
from training.errors import UserError
from training.step import Trainer

Variant = Literal["reference", "reference-compiled", "plain", "compiled", "fused"]
# Above this, models are not held side by side: parameters, gradients and moments are 16 bytes a parameter each time.
SIDE_BY_SIDE = 200_000_000


@dataclass(kw_only=True)
class StepBench:
    """Time training steps of a preset."""

    preset: str = "reference"
    """Shape and batch, as in train.py."""
    variants: list[Variant] = field(default_factory=list)
    """What to time; empty: plain and compiled, and fused where there is a GPU."""
    batch_size: int = 0
    """Sequences in a micro-step; 0: the preset's."""
    micro_steps: int = 0
    """Micro-steps in a step; 0: the preset's."""
    repeats: int = 5
    """Counted steps of each variant."""
    warmup: int = 2
    """Steps of each variant before them; the first one compiles."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype, as in train.py."""
    deterministic: bool = True
    """Deterministic algorithms, as in train.py."""
    json: str = ""
    """File to write the result to."""


def main() -> None:
    """Parse the command line, time, print."""
    options = tyro.cli(StepBench, description=__doc__)
    try:
        measure(options, Console())
    except UserError as error:
        fail(error)


def measure(options: StepBench, console: Console) -> dict:
    """Time the variants, print a table and return (and write, where asked) the result."""
    config = defaults(options.preset)
    config.batch_size = options.batch_size or config.batch_size
    config.gradient_accumulation_steps = options.micro_steps or config.gradient_accumulation_steps
    config.device, config.dtype = options.device, options.dtype
    config.compile = config.fused = False
    set_determinism(options.deterministic)
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    variants = options.variants or ["plain", "compiled"] + (["fused"] if device.type == "cuda" else [])
    if "fused" in variants and device.type != "cuda":
        raise UserError(f"--variants fused needs a GPU, and the device is {device}; allowed here: all others")
    if device.type != "cuda":
        console.print("no GPU here: the CPU is timed, MFU is n/a, and nothing of this says how fast a GPU is")

    groups = [variants] if flops.parameters(config) < SIDE_BY_SIDE else [[v] for v in variants]
    rows: list[dict] = []
    for group in groups:
        rows += _time_group(group, config, options, device, dtype, console)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result = {
        "bench": "step",
        "preset": options.preset,
        "batch_size": config.batch_size,
        "micro_steps": config.gradient_accumulation_steps,
        "sequence_length": config.max_seq_len,
        "dtype": str(dtype).removeprefix("torch."),
        "deterministic": options.deterministic,
        "rows": rows,
        "environment": environment(),
    }
    console.print(table(result))
    if options.json:
        write_json(options.json, result)
    return result


def _time_group(variants, config, options, device, dtype, console) -> list[dict]:
    """Variants timed in turn; one row of figures each."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.gradient_accumulation_steps, config.batch_size, config.max_seq_len + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    micro_batches = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    calls, first_seconds, memory = {}, {}, {}
    with console.status("") as status:
        for variant in variants:
            status.update(f"{variant}: the first step")
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            calls[variant] = make_step(variant, config, device, dtype, micro_batches)
            calls[variant]()
            first_seconds[variant] = time.perf_counter() - start
            # Of this variant alone: what the others beside it hold was there before.
            memory[variant] = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
        timings = time_in_turn(calls, repeats=options.repeats, warmup=options.warmup, progress=status.update)
    return [
        _row(variant, timings[variant], first_seconds[variant], memory[variant], config, device, dtype)
        for variant in variants
    ]


def make_step(
    variant: str, config: TrainConfig, device: torch.device, dtype: torch.dtype, micro_batches: list[tuple]
) -> Callable[[], float]:
    """A step of a fresh model on always the same batch, which returns its loss."""
    torch.manual_seed(config.seed)
    if variant.startswith("reference"):
        step = ReferenceStep(config.shape(), device, dtype, compiled=variant.endswith("compiled"))
        return lambda: step(micro_batches)
    spec = "all" if variant == "fused" else "none"
    with device:
        model = Llama(config.shape(), kernels.select(spec, config.n_layers), dtype)
    compiled = TrainConfig(**asdict(config) | {"compile": variant != "plain"})
    trainer = Trainer(model, compiled, World())
    valid = sum(targets.numel() for _, targets in micro_batches)
    batches = [(tokens, targets, None) for tokens, targets in micro_batches]
    return lambda: trainer.step(batches, valid, config.learning_rate).loss.item()


def _row(variant: str, timing: Timing, first: float, memory: int | None, config, device, dtype) -> dict:
    tokens = config.batch_size * config.gradient_accumulation_steps * config.max_seq_len
    rate = tokens / timing.median
    flops_per_token = flops.flops_per_token(config)
    return {
        "variant": variant,
        "ms": 1000 * timing.median,
        "ms_min": 1000 * timing.minimum,
        "ms_max": 1000 * timing.maximum,
        "repeats": timing.repeats,
        "tokens_per_second": rate,
        "tflops": rate * flops_per_token / 1e12,
        "mfu": hardware.mfu(flops_per_token, rate, memory_name(device), str(dtype).removeprefix("torch.")),
        "peak_memory": memory,
        "seconds_to_first_step": first,
    }


def table(result: dict) -> Table:
    """The result as people read it. The ratio is to the first row: above 1 is faster."""
    env = result["environment"]
    title = (
        f"{result['preset']}: {result['micro_steps']} x {result['batch_size']} x {result['sequence_length']} tokens, "
        f"{result['dtype']}, {env['device']}, torch {env['torch']}"
    )
    shown = Table(title=title)
    for heading in (
        "variant",
        "ms/step",
        "min - max",
        "tokens/s",
        "TFLOP/s",
        "MFU",
        "peak GiB",
        "first step s",
        "speed",
    ):
        shown.add_column(heading, justify="left" if heading == "variant" else "right")
    base = result["rows"][0]["ms"]
    for row in result["rows"]:
        shown.add_row(
            row["variant"],
            f"{row['ms']:.2f}",
            f"{row['ms_min']:.2f} - {row['ms_max']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tflops']:.3f}",
            "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}",
            "n/a" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f}",
            f"{row['seconds_to_first_step']:.1f}",
            f"{base / row['ms']:.2f}x",
        )
    return shown


if __name__ == "__main__":
    main()
