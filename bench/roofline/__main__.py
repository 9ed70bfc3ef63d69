"""The floor of a training step on a GPU, op by op, and what a step issues beside it: `python -m bench.roofline`.

    python -m bench.roofline --preset 124m --gpu "H100 SXM" "B200"
    python -m bench.roofline --copy-tb-s 3.0 --matmul-tflops 798       ceilings that someone measured

The floor of an op is its bytes over the memory's bandwidth (each input read and each output written once), that of a matrix
product this or its FLOPs over the matrix peak, whichever is longer; the floor of the step is their sum. FLOPs and bytes are those
of model/flops.py, with one difference: MFU counts attention over all keys and without what its backward recomputes; here it is
the causal half, and 7 products for 6. The feed-forward of a narrow model is one kernel in it on every GPU, also where that is not
chosen (kernels/mlp/op.py). Ceilings are the datasheet's (training/hardware.py), or those measured on that GPU where
bench/results/ has them, or those of the options.

A second table counts, without a GPU, the launches of a step and the bytes of their tensors (bench/roofline/launches.py): plain
PyTorch in eager mode, the Triton kernels as an H100 gets them, and the floor. What stands there above the floor is waste, bytes
that some other arrangement of the same step would not move, but for the zeroing of the gradients and their reading by the norm,
which the floor leaves out.
"""

import difflib
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import archive, command
from bench.archive import Result
from bench.measure import environment, write_json
from bench.ops.catalogue import SHEETS
from bench.ops.rows import OpRow
from bench.roofline.launches import COUNTED_AS, Tally, count
from kernels.launch import HAVE_TRITON, INTERPRETED
from model.flops import flops_per_token, kernel_costs, step_costs
from training.config import TrainConfig, defaults
from training.errors import UserError
from training.hardware import GPUS, Gpu

NEEDED = {"attention": 7 / 12}
"""FLOPs that must be computed for each that MFU counts: half the keys, and the scores once more in the backward. The kernels here,
whose backward computes them twice, do 9/12."""

LARGE = 2**28
"""Bytes of a copy that says how fast the memory is: what a smaller one writes may still lie in the cache when it ends."""


@dataclass(kw_only=True)
class Roofline:
    """Print what a training step must cost at least, and what it issues."""

    preset: str = "reference"
    """Shape and batch, as in train.py."""
    gpu: list[str] = field(default_factory=lambda: ["H100 SXM"])
    """GPUs by their names in training/hardware.py."""
    batch_size: int = 0
    """Sequences in a micro-step; 0: the preset's."""
    micro_steps: int = 0
    """Micro-steps in a step; 0: the preset's."""
    copy_tb_s: float = 0.0
    """Bandwidth of the memory in TB/s; 0: as measured, or the datasheet's."""
    matmul_tflops: float = 0.0
    """Half-precision matrix peak in TFLOP/s; 0: as measured, or the datasheet's."""
    count: bool = True
    """Count what a step issues: some seconds, a minute for the largest presets."""
    json: str = ""
    """File to write the result to."""


def measure(options: Roofline, console: Console) -> dict:
    """Print the tables and return (and write, where asked) the result."""
    command.check_at_least(options, batch_size=0, micro_steps=0, copy_tb_s=0, matmul_tflops=0)
    command.check_writable(options.json)
    if not options.gpu:
        raise UserError(f"--gpu names none; allowed: {', '.join(gpu.name for gpu in GPUS)}")
    gpus = [named_gpu(name) for name in options.gpu]
    if len(gpus) > 1 and (options.copy_tb_s or options.matmul_tflops):
        raise UserError("--copy-tb-s and --matmul-tflops are those of one GPU; --gpu names several")
    config = defaults(options.preset, "cpu")
    config = replace(
        config,
        batch_size=options.batch_size or config.batch_size,
        gradient_accumulation_steps=options.micro_steps or config.gradient_accumulation_steps,
    )
    config.check()
    results = archive.read()
    result: dict[str, Any] = {
        "bench": "roofline",
        "preset": options.preset,
        "batch_size": config.batch_size,
        "micro_steps": config.gradient_accumulation_steps,
        "sequence_length": config.max_seq_len,
        "gpus": [],
        "issued": [],
        "environment": environment(),
    }
    for gpu in gpus:
        ceilings = find_ceilings(gpu, results, options.copy_tb_s, options.matmul_tflops)
        measured = {
            "measured": measured_steps(config, gpu, results),
            "measured_ops": measured_ops(config, gpu, results),
        }
        result["gpus"].append(floor(config, ceilings) | measured)
        console.print(floor_table(result, result["gpus"][-1]))
    if options.count:
        result["issued"] = issued(config)
        console.print(issued_table(result))
        console.print(worst(result), highlight=False)
    if options.json:
        write_json(options.json, result)
    return result


def named_gpu(name: str) -> Gpu:
    """The row of training/hardware.py. UserError, with the nearest name and all of them, for another."""
    known = {gpu.name: gpu for gpu in GPUS}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"--gpu is {name!r}; {meant}allowed: {', '.join(known)}")
    return known[name]


# ------------------------------------------------------------------------------------------------------------- ceilings


@dataclass(frozen=True)
class Ceilings:
    """What a GPU does at most, and where each figure is from."""

    gpu: Gpu
    copy: float  # bytes/s
    copy_source: str
    matmul: float  # FLOP/s, half precision
    matmul_source: str


def find_ceilings(gpu: Gpu, results: list[Result], copy_tb_s: float = 0.0, matmul_tflops: float = 0.0) -> Ceilings:
    """Those given, else the best that was measured on that GPU, else the datasheet's."""
    here = [result for result in results if result.gpu == gpu.name]
    rows = [OpRow.read(row) for result in here if result.bench == "ops" for row in result.data["rows"]]
    copies = [row.timings["copy"].gb_per_s / 1000 for row in rows if row.bytes >= LARGE]
    matmuls = [result.data["ceilings"]["matmul_tflops"] for result in here if "ceilings" in result.data]
    products = [row for result in here if result.bench == "products" for row in result.data["rows"]]
    copies += [row["gb_s"] / 1000 for row in products if row["product"].startswith("copy")]
    matmuls += [row["tflops"] for row in products if row["product"].startswith("matmul")]
    copy, copy_source = _first(copy_tb_s, max(copies, default=0.0), gpu.bandwidth / 1000)
    matmul, matmul_source = _first(matmul_tflops, max(matmuls, default=0.0), gpu.bf16 or gpu.fp16)
    return Ceilings(gpu, copy * 1e12, copy_source, matmul * 1e12, matmul_source)


def _first(given: float, measured: float, datasheet: float) -> tuple[float, str]:
    return (given, "given") if given else (measured, "measured") if measured else (datasheet, "datasheet")


# ---------------------------------------------------------------------------------------------------------------- floor


def floor(config: TrainConfig, ceilings: Ceilings) -> dict:
    """The least that a step can take, with a row an op (a weight, for matrix products).

    ms_matrix and ms_memory: FLOPs over the peak, bytes over the bandwidth; ms: the longer one, kernel by kernel.
    """
    micro_steps = config.gradient_accumulation_steps
    rows: dict[tuple[str, str], dict] = {}
    for op, part, cost in kernel_costs(config.shape(), config.batch_size, micro_steps):
        if not cost.bytes:
            continue
        row = rows.setdefault((op, part), {"op": op, "part": part})
        flops = cost.flops * NEEDED.get(op, 1)
        matrix, memory = 1000 * flops / ceilings.matmul, 1000 * cost.bytes / ceilings.copy
        figures = {"flops": flops, "bytes": cost.bytes, "ms_matrix": matrix, "ms_memory": memory}
        for name, value in (figures | {"ms": max(matrix, memory)}).items():
            row[name] = row.get(name, 0) + value
    total = sum(row["ms"] for row in rows.values())
    for row in rows.values():
        row["bound"] = "matrix" if row["ms_matrix"] > row["ms_memory"] else "memory"
        row["share"] = row["ms"] / total
    tokens_per_second = 1000 * config.batch_size * config.max_seq_len * micro_steps / total
    gpu = ceilings.gpu
    return {
        "gpu": gpu.name,
        "copy_tb_s": ceilings.copy / 1e12,
        "copy_source": ceilings.copy_source,
        "matmul_tflops": ceilings.matmul / 1e12,
        "matmul_source": ceilings.matmul_source,
        "rows": list(rows.values()),
        "ms": total,
        "tokens_per_second": tokens_per_second,
        "mfu": flops_per_token(config.shape()) * tokens_per_second / ((gpu.bf16 or gpu.fp16) * 1e12),
    }


def measured_steps(config: TrainConfig, gpu: Gpu, results: list[Result]) -> list[dict]:
    """What `bench.step` measured of this step on this GPU: the newest of each variant, deterministic or not."""
    batch = (config.preset, config.batch_size, config.gradient_accumulation_steps)
    newest: dict[tuple[str, bool], dict] = {}
    for result in results:
        data = result.data
        if result.bench != "step" or result.gpu != gpu.name or data["dtype"] == "float32":
            continue
        all_layers = data.get("n_layers", config.n_layers) == config.n_layers
        if all_layers and (data["preset"], data["batch_size"], data["micro_steps"]) == batch:
            for row in data["rows"]:
                if "ms" in row:
                    kept = {name: row[name] for name in ("variant", "ms", "mfu")}
                    kept |= {"deterministic": data["deterministic"], "date": result.date}
                    newest[row["variant"], data["deterministic"]] = kept
    return list(newest.values())


def measured_ops(config: TrainConfig, gpu: Gpu, results: list[Result]) -> dict[str, float]:
    """Milliseconds a step that the Triton kernels of an op take on this GPU, from the newest of `bench.ops` at this size."""
    if config.batch_size != defaults(config.preset, "cpu").batch_size:  # bench.ops has the preset's
        return {}
    calls = {op: sheet.calls(config) for op, sheet in SHEETS.items()}
    newest: dict[str, float] = {}
    for result in results:
        if result.bench == "ops" and result.gpu == gpu.name and result.data["dtype"] != "float32":
            for row in map(OpRow.read, result.data["rows"]):
                of_a_step = (row.size, row.direction) == (config.preset, "both") and calls.get(row.op)
                if of_a_step and "triton" in row.timings:
                    newest[row.op] = row.timings["triton"].us / 1000
    measured: dict[str, float] = {}
    if ("rms_norm" in newest) == ("add_rms_norm" in newest):  # half of the norms would be no figure of the norms
        for op, ms in newest.items():
            counted_as = COUNTED_AS.get(op, op)
            step = ms * calls[op] * config.gradient_accumulation_steps
            measured[counted_as] = measured.get(counted_as, 0.0) + step
    return measured


# --------------------------------------------------------------------------------------------------------------- issued


def issued(config: TrainConfig) -> list[dict]:
    """Launches and bytes of a step by op: plain, fused, floor. Fused is None where Triton can't say."""
    plain = count(config, "none")
    fused = count(config, "all") if HAVE_TRITON and not INTERPRETED else None
    least = floor_tally(config)
    rows = []
    for op in dict.fromkeys([*least, *plain, *(fused or {})]):
        tallies = {"plain": plain, "fused": fused, "floor": least}
        found = {name: None if tally is None else tally.get(op, Tally()) for name, tally in tallies.items()}
        rows.append({"op": op} | {name: None if t is None else vars(t) for name, t in found.items()})
    return rows


def floor_tally(config: TrainConfig) -> dict[str, Tally]:
    """The floor by op: `model.flops`' bytes, in one launch a pass, three a matrix product, one an update."""
    costs = step_costs(config.shape(), config.batch_size, config.gradient_accumulation_steps)
    products = 3 * 2 + 2 if costs["mlp"].bytes else 3 * 4  # of the weights in mlp the gradients alone
    layers, micro_steps = config.n_layers, config.gradient_accumulation_steps
    passes: dict[str, int] = {}
    for op, sheet in SHEETS.items():
        counted_as = COUNTED_AS.get(op, op)
        passes[counted_as] = passes.get(counted_as, 0) + 2 * sheet.calls(config)
    passes |= {
        "rope": layers,
        "linear": products * layers,
        "linear_cross_entropy": 4,
    }  # attention's backward is rope's too
    launches = {op: n * micro_steps for op, n in passes.items()} | {"optimizer": 1}
    return {op: Tally(launches[op], cost.bytes) for op, cost in costs.items() if cost.bytes}


# ---------------------------------------------------------------------------------------------------------------- print


def floor_table(result: dict, of: dict) -> Table:
    """The floor on one GPU, op by op, and below it what was measured there."""
    title = (
        f"floor of a step of {_batch(result)} on {of['gpu']}: copy {of['copy_tb_s']:.2f} TB/s ({of['copy_source']}), "
        f"matmul {of['matmul_tflops']:.0f} TFLOP/s ({of['matmul_source']})"
    )
    shown = Table(title=title, caption="MFU: (6 N_matmul + 12 L H D T) FLOPs a token, over the datasheet's dense peak")
    shown.add_column("op")
    for heading in ("TFLOP", "GB", "ms by matrix", "ms by memory", "bound by", "ms", "share", "measured ms"):
        shown.add_column(heading, justify="right")
    measured = dict(of["measured_ops"])
    for row in of["rows"]:
        numbers = [row["flops"] / 1e12, row["bytes"] / 1e9, row["ms_matrix"], row["ms_memory"]]
        name = " ".join((row["op"], row["part"])).strip()
        found = f"{measured.pop(row['op']):.2f}" if row["op"] in measured else ""  # of an op's parts, beside the first
        floor = (row["bound"], f"{row['ms']:.2f}", f"{row['share']:.1%}")
        shown.add_row(name, *(f"{x:.2f}" for x in numbers), *floor, found)
    shown.add_section()
    speed = f"{of['tokens_per_second']:,.0f} tokens/s, MFU {of['mfu']:.1%}"
    shown.add_row("floor", "", "", "", "", "", f"{of['ms']:.2f}", "100%")
    shown.add_row(speed)
    for row in of["measured"]:
        name = f"measured {row['date'][:10]}: {row['variant']}{'' if row['deterministic'] else ', not deterministic'}"
        shown.add_row(name, "", "", "", "", "", "", f"{row['ms'] / of['ms']:.0%}", f"{row['ms']:.2f}")
    if not of["measured"]:
        shown.add_row("measured: nothing yet")
    return shown


def issued_table(result: dict) -> Table:
    """Launches and bytes by op."""
    shown = Table(
        title=f"what a step of {_batch(result)} issues in bfloat16, counted without a GPU",
        caption="plain: PyTorch in eager mode, where torch.compile would join elementwise calls; floor: a product adds to its "
        "gradient itself; fused: as on an H100, whichever GPU is asked for. Where mlp is not for a GPU (README.md) "
        "its products and swiglu run in turn",
    )
    shown.add_column("op")
    for heading in ("launches: plain", "fused", "floor", "GB: plain", "fused", "floor", "fused above floor"):
        shown.add_column(heading, justify="right")
    kinds = ("plain", "fused", "floor")
    rows = result["issued"]
    total = {kind: _total([row[kind] for row in rows]) for kind in kinds}
    for row in [*rows, {"op": "step"} | total]:
        launches = ["n/a" if row[kind] is None else f"{row[kind]['launches']:,}" for kind in kinds]
        moved = ["n/a" if row[kind] is None else f"{row[kind]['bytes'] / 1e9:.2f}" for kind in kinds]
        above = "n/a" if row["fused"] is None else f"{_above(row) / 1e9:.2f}"
        if row["op"] == "step":
            shown.add_section()
        shown.add_row(row["op"], *launches, *moved, above)
    return shown


def _total(tallies: list[dict | None]) -> dict | None:
    if None in tallies:
        return None
    return {name: sum(tally[name] for tally in tallies) for name in ("launches", "bytes")}


def _above(row: dict) -> int:
    return row["fused"]["bytes"] - row["floor"]["bytes"]


def worst(result: dict) -> str:
    """Which op moves most above its floor, in words."""
    if any(row["fused"] is None for row in result["issued"]):
        return "the fused step is not counted: there is no Triton here, or it is in its interpreter"
    row = max(result["issued"], key=_above)
    of = result["gpus"][0]
    ms = 1000 * _above(row) / (of["copy_tb_s"] * 1e12)
    return (
        f"furthest above its floor in the fused step: {row['op']}, {_above(row) / 1e9:.2f} GB, {ms:.2f} ms at the "
        f"{of['copy_tb_s']:.2f} TB/s of {of['gpu']}"
    )


def _batch(result: dict) -> str:
    return f"{result['preset']} ({result['micro_steps']} x {result['batch_size']} x {result['sequence_length']} tokens)"


def main() -> None:
    """Run the command, in a process without Triton's interpreter: kernels that it holds launch nothing to be counted."""
    command.leave_interpreter()
    command.run(Roofline, __doc__, measure)


if __name__ == "__main__":
    main()
