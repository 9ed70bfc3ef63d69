"""What a run would take on GPUs that are not here: `python -m training.plan --preset llama3.1-70b --gpus 256 --parallel hsdp`.

Everything is computed, by the closed forms of training/plan/costs.py, and nothing measured: no run of several GPUs has been tried.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import tyro

from model.config import RECOMPUTE, LlamaConfig, option
from training.config import preset_options
from training.errors import UserError
from training.hardware import GPUS, LINKS, Gpu
from training.plan.costs import Layout, Memory, flops, layout, memory, traffic
from training.stopping import exit_statuses

GB = 1e9
MOST_SEQUENCES = 1024
"""Of a micro-step: no more are tried."""
LEAST = {"gpus": 1, "gpus_per_machine": 1, "batch_size": 0, "max_seq_len": 0, "tokens_per_step": 0}
MOST = 2**40
"""That these options may be."""


@dataclass(kw_only=True)
class Plan:
    """Memory, FLOPs and communication of a training step on so many GPUs, and the command to type."""

    preset: str = "llama3.1-8b"
    """Shape and batch, as in train.py."""
    gpus: int = 8
    """GPUs in all."""
    gpu: str = "H100 SXM"
    """By its name in training/hardware.py."""
    gpus_per_machine: int = 8
    """GPUs of a machine, joined by NVLink."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "fsdp"
    """As in train.py."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """As in train.py; auto: the first of none, selective and full with which a sequence fits."""
    batch_size: int = 0
    """Sequences in a micro-step of a GPU; 0: as many as fit and the step has."""
    max_seq_len: int = 0
    """Tokens in a sequence; 0: the preset's."""
    tokens_per_step: int = 0
    """Tokens of all GPUs in an optimizer step, rounded to whole micro-steps; 0: the preset's, at least a sequence of each GPU."""
    reserve: float = 0.1
    """Share of a GPU's memory that is left to CUDA, NCCL and fragments: an assumption."""
    mfu: float = 0.4
    """MFU for which tokens a day are told beside those of the floor: an assumption."""
    network_gb_s: float = 50.0
    """GB/s that a GPU sends to other machines, while it receives as much: 50 are 400 Gbit/s for each GPU, an assumption."""


@dataclass(frozen=True)
class Step:
    """A way to run that fits."""

    recompute: str
    batch: int
    micro_steps: int
    memory: Memory


def fitting(plan: Plan, config: LlamaConfig, where: Layout, gpu: Gpu) -> Step | None:
    """The way that the options describe, or the first of those they leave open that fits; None where none does."""
    for recompute in modes(plan):
        batch = plan.batch_size or even_batch(plan, config, where, largest_batch(plan, config, where, gpu, recompute))
        if batch:
            micro_steps = micro_steps_of(plan, config, where, batch)
            found = memory(config, where, batch * config.max_seq_len, recompute, micro_steps)
            if found.peak <= usable(plan, gpu):
                return Step(recompute, batch, micro_steps, found)
    return None


def modes(plan: Plan) -> tuple[str, ...]:
    """What --activation-checkpointing leaves open."""
    return RECOMPUTE if plan.activation_checkpointing == "auto" else (plan.activation_checkpointing,)


def largest_batch(plan: Plan, config: LlamaConfig, where: Layout, gpu: Gpu, recompute: str) -> int:
    """Most sequences of a micro-step that fit on a GPU, counted up to MOST_SEQUENCES; 0 where one does not."""
    batch = 0
    while batch < MOST_SEQUENCES:
        micro_steps = micro_steps_of(plan, config, where, batch + 1)
        if memory(config, where, (batch + 1) * config.max_seq_len, recompute, micro_steps).peak > usable(plan, gpu):
            break
        batch += 1
    return batch


def even_batch(plan: Plan, config: LlamaConfig, where: Layout, most: int) -> int:
    """Sequences of the fewest micro-steps, all alike, that make about the tokens asked for with at most so many each."""
    sequences = max(1, round(tokens_asked(plan) / (config.max_seq_len * where.gpus)))
    return most and round(sequences / math.ceil(sequences / most))


def micro_steps_of(plan: Plan, config: LlamaConfig, where: Layout, batch: int) -> int:
    """Micro-steps of each GPU that make a step of about the tokens asked for."""
    return max(1, round(tokens_asked(plan) / (batch * config.max_seq_len * where.gpus)))


def tokens_asked(plan: Plan) -> int:
    """Tokens that a step of all GPUs shall have."""
    run = preset_options(plan.preset)
    sequences = run.get("batch_size", 128) * run.get("gradient_accumulation_steps", 4)
    return plan.tokens_per_step or sequences * LlamaConfig(**shape_of(run)).max_seq_len


def shape_of(run: dict) -> dict:
    """The options of the shape among those of a preset."""
    return {name: value for name, value in run.items() if name in LlamaConfig.__dataclass_fields__}


def usable(plan: Plan, gpu: Gpu) -> float:
    """Bytes of a GPU that a run can have."""
    return (1 - plan.reserve) * gpu.memory * GB


def what_would(plan: Plan, config: LlamaConfig, where: Layout, gpu: Gpu) -> str:
    """The nearest way that fits, in words: fewer sequences at a time, more GPUs, shorter sequences."""
    fitted = {mode: largest_batch(plan, config, where, gpu, mode) for mode in modes(plan)}
    mode = max(fitted, key=lambda mode: fitted[mode])
    if fitted[mode]:
        return f"--batch-size {fitted[mode]} --activation-checkpointing {mode}"
    most = replace(plan, parallel="fsdp", activation_checkpointing="auto", batch_size=0)
    length = config.max_seq_len
    while length >= min(512, config.max_seq_len):
        for gpus in _counts(plan):
            shorter = replace(config, max_seq_len=length)
            if step := fitting(most, shorter, layout("fsdp", gpus, plan.gpus_per_machine), gpu):
                on = "the same GPUs" if gpus == plan.gpus else f"{gpus} of these GPUs (--gpus {gpus})"
                cut = f" --max-seq-len {length}" if length < config.max_seq_len else ""
                return f"--parallel fsdp --activation-checkpointing {step.recompute}{cut} on {on}"
        length //= 2
    many = layout("fsdp", 1024 * plan.gpus_per_machine, plan.gpus_per_machine)
    needed = memory(config, many, config.max_seq_len, "full").peak / (1 - plan.reserve) / GB
    return f"no number of these GPUs, but GPUs of {needed:,.0f} GB each, or a model cut within its layers, which is not built here"


def _counts(plan: Plan) -> Iterator[int]:
    """The plan's number of GPUs and, doubled again and again, larger ones that fill their machines."""
    gpus, here = plan.gpus, plan.gpus_per_machine
    yield gpus
    while (gpus := 2 * gpus if 2 * gpus <= here else here * math.ceil(2 * gpus / here)) <= 16384:
        yield gpus


def report(plan: Plan) -> list[str]:
    """What is printed, line by line. UserError for options that are none."""
    run = preset_options(plan.preset)
    gpu = next((gpu for gpu in GPUS if gpu.name == plan.gpu), None)
    if gpu is None or gpu.bf16 is None:
        allowed = ", ".join(gpu.name for gpu in GPUS if gpu.bf16 is not None)
        raise UserError(f"--gpu is {plan.gpu!r}; those with bfloat16 in training/hardware.py are {allowed}")
    for name, least in LEAST.items():
        value, chosen = getattr(plan, name), "" if least else " (0: chosen here)"
        if not least <= value <= MOST:
            raise UserError(f"{option(name)} is {value}; it must be from {least}{chosen} to {MOST}")
    for name in ("reserve", "mfu"):
        if not 0 < getattr(plan, name) < 1:
            raise UserError(f"{option(name)} is {getattr(plan, name)}; it must be between 0 and 1")
    if not 0 < plan.network_gb_s < math.inf:
        raise UserError(f"--network-gb-s is {plan.network_gb_s}; it must be positive and finite")
    config = LlamaConfig(**shape_of(run) | ({"max_seq_len": plan.max_seq_len} if plan.max_seq_len else {}))
    try:
        where = layout(plan.parallel, plan.gpus, plan.gpus_per_machine)
    except ValueError as error:
        raise UserError(error) from None
    alone = " (one GPU keeps the whole model)" if where.parallel != plan.parallel else ""
    lines = [
        f"{plan.preset} on {plan.gpus} x {gpu.name} of {gpu.memory} GB, --parallel {plan.parallel}{alone}, bfloat16, sequences of "
        f"{config.max_seq_len:,}: computed, not measured"
    ]
    step = fitting(plan, config, where, gpu)
    if step is None:
        recompute = plan.activation_checkpointing if plan.activation_checkpointing != "auto" else "full"
        found = memory(config, where, max(1, plan.batch_size) * config.max_seq_len, recompute)
        lines += [*_memory(found), f"does not fit: {usable(plan, gpu) / GB:.1f} GB are to be had of {gpu.memory}"]
        return [*lines, f"what would fit: {what_would(plan, config, where, gpu)}"]
    return [
        *lines,
        *_memory(step.memory),
        *_batches(plan, config, where, gpu, step),
        *_times(plan, config, where, gpu, step),
    ]


def _memory(found: Memory) -> list[str]:
    return [
        f"memory a GPU  {found.peak / GB:7.1f} GB at the peak",
        f"  always      {found.always / GB:7.1f}  parameters, gradients, moments",
        f"  activations {found.kept / GB:7.1f}  kept from forward to backward",
        f"  {found.moment:<19} {found.at_the_peak / GB:.1f}  what the worst moment adds: what is gathered, gradients under way",
    ]


def _batches(plan: Plan, config: LlamaConfig, where: Layout, gpu: Gpu, step: Step) -> list[str]:
    most = {mode: largest_batch(plan, config, where, gpu, mode) for mode in RECOMPUTE}
    found = ", ".join(
        f"{mode} {batch or 'does not fit'}{' or more' * (batch == MOST_SEQUENCES)}" for mode, batch in most.items()
    )
    tokens = step.batch * step.micro_steps * where.gpus * config.max_seq_len
    return [
        f"largest micro-batch, in sequences, by --activation-checkpointing: {found}",
        f"a step        {step.micro_steps} micro-step{'s' * (step.micro_steps > 1)} of {step.batch} x {config.max_seq_len:,} "
        f"tokens a GPU, {tokens:,} in all",
    ]


def _times(plan: Plan, config: LlamaConfig, where: Layout, gpu: Gpu, step: Step) -> list[str]:
    tokens = step.batch * step.micro_steps * config.max_seq_len  # of a GPU
    counted, again = flops(config, tokens, step.recompute)
    compute = (counted + again) / (gpu.bf16 * 1e12)
    sent = traffic(config, where, step.micro_steps)
    within = sent.within / (LINKS.get(gpu.name, PCIE) * GB)
    between = sent.between / (plan.network_gb_s * GB)
    floor = max(compute, within, between)
    all_tokens = tokens * where.gpus
    day = 86400 * all_tokens
    assumed = max(counted / (plan.mfu * gpu.bf16 * 1e12), within, between)
    link = LINKS.get(gpu.name)
    words = f"{link:g} GB/s of NVLink" if link else f"{PCIE:g} GB/s of PCIe, assumed"
    command = _command(plan, config, where, step)
    return [
        f"compute       {(counted + again) / 1e12:,.0f} TFLOP a GPU and step ({again / (counted or 1):.0%} of it computed again), "
        f"at least {1000 * compute:,.0f} ms at {gpu.bf16:g} TFLOP/s",
        f"in a machine  {sent.within / GB:,.1f} GB a GPU and step, at least {1000 * within:,.0f} ms at {words}",
        f"between them  {sent.between / GB:,.1f} GB a GPU and step, at least {1000 * between:,.0f} ms at "
        f"{plan.network_gb_s:g} GB/s, assumed",
        f"tokens a day  {day / floor / 1e9:,.2f} billion at the most, were all of it hidden behind the longest; "
        f"{day / assumed / 1e9:,.2f} at {plan.mfu:.0%} MFU, assumed",
        "",
        command,
    ]


PCIE = 32.0
"""GB/s each way of 16 lanes of PCIe 4."""


def _command(plan: Plan, config: LlamaConfig, where: Layout, step: Step) -> str:
    machines = where.gpus // where.per_machine
    how = "--standalone" if machines == 1 else f"--nnodes {machines} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    whole = (
        memory(config, Layout("ddp", 1, 1, 1), 1, "full").always // 8
    )  # the model in bfloat16, as a sample gathers it
    sample = " --sample-tokens 0" if where.parallel != "ddp" and step.memory.always + whole > 40 * GB else ""
    length = f" --max-seq-len {config.max_seq_len}" if plan.max_seq_len else ""
    return (
        f"torchrun {how} --nproc-per-node {where.per_machine} train.py --preset {plan.preset} --fused --parallel {plan.parallel} "
        f"--activation-checkpointing {step.recompute} --batch-size {step.batch} "
        f"--gradient-accumulation-steps {step.micro_steps * where.gpus}{length}{sample}"
    )


def main() -> None:
    """Print the plan."""
    with exit_statuses():
        plan = tyro.cli(Plan, description=Plan.__doc__, prog="python -m training.plan")
        try:
            print("\n".join(report(plan)))
        except UserError as error:
            print(f"python -m training.plan: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None


if __name__ == "__main__":
    main()
