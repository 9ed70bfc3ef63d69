"""ms/step, tokens/s, MFU and peak memory of a whole training step: `python -m bench.step --preset reference`.

Variants: fused, compiled, compiled in a CUDA graph, plain, Liger-Kernel's ops, transformers' Llama, each kernel alone;
`bench/step/variants.py` lists them. Each is timed as soon as it is compiled, and all again in turn where they are small enough to
be held in one process. Time includes the update and the reading of the loss; the batch is ready beforehand, its tokens as frequent
as in text (`bench/step/tokens.py`). `--profile` shows where the GPU's time goes, kernel by kernel. `--compare BEFORE.json
AFTER.json` only prints what changed between two.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch._dynamo.config
from rich.console import Console
from rich.table import Table

from bench import command
from bench.measure import Interrupted, Timing, environment, time_in_turn, write_json
from bench.step import compare as step_compare
from bench.step import profile, tokens
from bench.step.variants import PEERS, PER_OP, VARIANTS, baseline, make_step, why_absent
from model import flops
from training import hardware
from training.config import TrainConfig, defaults
from training.device import name_of, resolve_device, resolve_dtype, set_determinism
from training.errors import UserError

# Above this, models are not held side by side: parameters, gradients and moments are 16 bytes a parameter each time, and a captured
# step keeps its activations.
SIDE_BY_SIDE = 100_000_000
OUT_OF_MEMORY = "out of memory"
FIRST_REPEATS = 3
"""Counted steps of a variant by itself, before all are timed in turn."""
ON_GPU = ("fused", "compiled-captured", "compiled", "liger-compiled", "plain", "liger")
"""Without --variants, what is worth most first; on a CPU plain and compiled."""


@dataclass(kw_only=True)
class StepBench:
    """Time training steps of a preset."""

    preset: str = "reference"
    """Shape and batch, as in train.py."""
    variants: list[str] = field(default_factory=list)
    """What to time, of bench/step/variants.py; empty: plain and compiled, and where there is a GPU fused, compiled-captured and
    Liger's ops."""
    per_op: bool = False
    """Also each kernel alone on and each alone off."""
    batch_size: int = 0
    """Sequences in a micro-step; 0: the preset's."""
    micro_steps: int = 0
    """Micro-steps in a step; 0: the preset's."""
    n_layers: int = 0
    """Layers, to profile a large model by a few of them; 0: the preset's."""
    tokens: Literal["auto", "zipf", "uniform"] = "auto"
    """auto: of the prepared corpus where data_dir has it, else by Zipf's law; uniform hides what frequent tokens cost."""
    data: str = TrainConfig.data
    """The corpus, as in train.py."""
    data_dir: str = TrainConfig.data_dir
    """Where prepared corpora are, as in train.py."""
    profile: bool = False
    """Also show each variant's GPU kernels of one step by their time."""
    repeats: int = 5
    """Counted steps of each variant."""
    warmup: int = 1
    """Steps of each variant before them, beside the three that compile it, record it and measure its memory."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype, as in train.py."""
    deterministic: bool = True
    """Deterministic algorithms, as in train.py."""
    json: str = ""
    """File to write the result to; it grows as variants are done."""
    compare: tuple[str, str] | None = None
    """Two results to compare, the earlier one first; nothing is measured."""


def measure(options: StepBench, console: Console) -> dict:
    """Time the variants, print a table and return (and write, where asked) the result.

    Exit status 1, after the table, where a variant of this project failed.
    """
    if options.compare:
        return step_compare.show(*options.compare, console)
    command.check_at_least(options, batch_size=0, micro_steps=0, n_layers=0, repeats=1, warmup=0)
    command.check_writable(options.json)
    config = defaults(options.preset)
    config = replace(
        config,
        batch_size=options.batch_size or config.batch_size,
        gradient_accumulation_steps=options.micro_steps or config.gradient_accumulation_steps,
        n_layers=options.n_layers or config.n_layers,
        data=options.data,
        data_dir=options.data_dir,
        device=options.device,
        dtype=options.dtype,
    )
    config.check()
    set_determinism(options.deterministic)
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    on_gpu = device.type == "cuda"
    variants = list(options.variants) or list(ON_GPU if on_gpu else ("plain", "compiled"))
    variants = list(dict.fromkeys([*variants, *(PER_OP if options.per_op else ())]))
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"--variants is {variant!r}; allowed: {', '.join(VARIANTS)}")
    if all(why_absent(variant, device) for variant in variants):
        reasons = ", ".join(f"{variant}: {why_absent(variant, device)}" for variant in variants)
        raise UserError(f"--variants: none of them can run on {device} ({reasons})")
    if options.profile and not on_gpu:
        raise UserError(f"--profile shows the kernels of a GPU, and this would run on {device}")
    if not on_gpu:
        console.print("no GPU here: the CPU is timed, MFU is n/a, and nothing of this says how fast a GPU is")

    micro_batches, drawn = tokens.draw(config, options.tokens)
    micro_batches = [(t.to(device), targets.to(device)) for t, targets in micro_batches]
    result: dict[str, Any] = {
        "bench": "step",
        "preset": options.preset,
        "n_layers": config.n_layers,
        "layers_of_preset": defaults(options.preset).n_layers,
        "batch_size": config.batch_size,
        "micro_steps": config.gradient_accumulation_steps,
        "sequence_length": config.max_seq_len,
        "dtype": str(dtype).removeprefix("torch."),
        "deterministic": options.deterministic,
        "tokens": drawn,
        "rows": [],
        "environment": environment(),
    }
    rows: dict[str, dict] = {}

    def keep(variant: str, row: dict) -> None:
        rows[variant] = {"variant": variant} | row
        result["rows"] = against_baseline([rows[v] for v in variants if v in rows])
        if options.json:
            write_json(options.json, result)

    try:
        for group in [variants] if flops.parameters(config) < SIDE_BY_SIDE else [[v] for v in variants]:
            # Dynamo keeps eight graphs of one function and refuses more; here each variant is one, and they stay side by side.
            with torch._dynamo.config.patch(recompile_limit=2 * len(VARIANTS)):
                _time_group(group, config, options, device, dtype, micro_batches, keep, console)
            torch.compiler.reset()  # compiled code holds on to the models it was compiled for
            _release(device)
            result["environment"] = environment()  # clocks and power as they are under load
        if options.json:
            write_json(options.json, result)
    finally:
        if result["rows"]:
            show(result, console)
    excused = {OUT_OF_MEMORY, *(why_absent(variant, device) for variant in variants)}
    ours = [row for row in result["rows"] if row["variant"] not in PEERS]
    if any(row.get("failed", OUT_OF_MEMORY) not in excused for row in ours):
        raise SystemExit(1)
    return result


def _time_group(
    variants: list[str],
    config: TrainConfig,
    options: StepBench,
    device: torch.device,
    dtype: torch.dtype,
    micro_batches: tokens.MicroBatches,
    keep: Callable[[str, dict], None],
    console: Console,
) -> None:
    """Time variants, each by itself as soon as it is ready and, where they are several, all in turn; `keep` gets every row."""
    calls: dict[str, Callable[[], float]] = {}
    costs: dict[str, dict] = {}
    alone = len(variants) == 1
    repeats = options.repeats if alone else min(FIRST_REPEATS, options.repeats)

    def keep_timings(timings: dict[str, Timing], in_turn: bool) -> None:
        for variant, timing in timings.items():
            keep(variant, figures(timing, config, device, dtype) | costs[variant] | {"in_turn": in_turn})

    with console.status("") as status:
        for variant in variants:
            if reason := why_absent(variant, device):
                keep(variant, {"failed": reason})
                continue
            status.update(f"{variant}: the first steps")
            failed = ""
            try:
                call, costs[variant] = _first_steps(variant, config, device, dtype, micro_batches)
                timings = time_in_turn({variant: call}, repeats=repeats, warmup=options.warmup, progress=status.update)
            except Interrupted as stop:
                keep_timings(stop.timings, in_turn=False)
                raise
            except torch.OutOfMemoryError:
                failed = OUT_OF_MEMORY
            except Exception as error:  # a peer's or a kernel's: the others are measured none the less
                failed = f"{type(error).__name__}: {error}".splitlines()[0]
            if failed:  # the error, which refers to the model, is gone by now
                keep(variant, {"failed": failed})
                _release(device)
                continue
            keep_timings(timings, in_turn=False)
            calls[variant] = call
            if options.profile:
                status.update(f"{variant}: the profiler")
                costs[variant]["profile"] = profile.profile(call)
                keep_timings(timings, in_turn=False)
        if alone or not calls:
            return
        try:
            timings = time_in_turn(calls, repeats=options.repeats, warmup=options.warmup, progress=status.update)
        except Interrupted as stop:
            keep_timings(stop.timings, in_turn=True)
            raise
    keep_timings(timings, in_turn=True)


def _release(device: torch.device) -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first_steps(
    variant: str, config: TrainConfig, device: torch.device, dtype: torch.dtype, micro_batches: list[tuple]
) -> tuple[Callable[[], float], dict]:
    """A variant's step, after the three that tell the time to the first one (s) and the peak memory (bytes)."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0  # by the variants that are held beside this one
    start = time.perf_counter()
    step = make_step(variant, config, device, dtype, micro_batches)
    step()
    seconds = time.perf_counter() - start
    step()
    if on_gpu:  # the third step: a captured one is recorded there, in memory of its own
        torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
    return step, {"seconds_to_first_step": seconds, "peak_memory": peak}


def figures(timing: Timing, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> dict:
    tokens = config.batch_size * config.gradient_accumulation_steps * config.max_seq_len
    rate = tokens / timing.median
    flops_per_token = flops.flops_per_token(config)
    return {
        "ms": 1000 * timing.median,
        "ms_min": 1000 * timing.minimum,
        "ms_max": 1000 * timing.maximum,
        "repeats": timing.repeats,
        "tokens_per_second": rate,
        "tflops": rate * flops_per_token / 1e12,
        "mfu": hardware.mfu(flops_per_token, rate, name_of(device), str(dtype).removeprefix("torch.")),
    }


def against_baseline(rows: list[dict]) -> list[dict]:
    """The rows, each that was timed with `vs_best`: how many times faster it is than the baseline."""
    ms = next((row["ms"] for row in rows if row["variant"] == baseline(rows)), None)
    return [row | {"vs_best": ms / row["ms"]} if "ms" in row else row for row in rows]


def show(result: dict, console: Console) -> None:
    """Print the table, and where the time of each variant goes, as far as that was asked for."""
    console.print(table(result))
    for row in result["rows"]:
        if "profile" in row:
            console.print(profile.table(row["variant"], row["profile"]))


def table(result: dict) -> Table:
    """The result as people read it. Speeds are relative to the baseline."""
    env, drawn = result["environment"], result["tokens"]
    cut = result["n_layers"] != result["layers_of_preset"]
    layers = f" with {result['n_layers']} of its {result['layers_of_preset']} layers" if cut else ""
    of = {"zipf": "drawn by Zipf's law", "uniform": "drawn uniformly"}.get(drawn["source"], f"of {drawn['source']}")
    shown = Table(
        title=f"{result['preset']}{layers}: {result['micro_steps']} x {result['batch_size']} x {result['sequence_length']} tokens, "
        f"{result['dtype']}, {env['device']}, torch {env['torch']}",
        caption=f"tokens {of}, {drawn['most_frequent']:.1%} of them the most frequent one; speed: above 1 is faster\n"
        "MFU: (6 N_matmul + 12 L H D T) FLOPs a token, over the GPU's dense peak",
    )
    shown.add_column("variant")
    base = f"vs {baseline(result['rows'])}"
    for heading in ("ms/step", "min - max", "tokens/s", "TFLOP/s", "MFU", "peak GiB", "first step s", base):
        shown.add_column(heading, justify="right")
    for row in result["rows"]:
        if "ms" not in row:
            shown.add_row(row["variant"], row["failed"])
            continue
        shown.add_row(
            row["variant"],
            f"{row['ms']:.2f}",
            f"{row['ms_min']:.2f} - {row['ms_max']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tflops']:.3f}",
            "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}",
            "n/a" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f}",
            f"{row['seconds_to_first_step']:.1f}",
            f"{row['vs_best']:.2f}x",
        )
    return shown


if __name__ == "__main__":
    command.run(StepBench, __doc__, measure)
