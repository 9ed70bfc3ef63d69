"""A training step as a waterfall, from the least that it can take up to what it takes: `python -m bench.waterfall`.

    python -m bench.waterfall --preset reference                   the newest measured step of an H100, else a predicted one
    python -m bench.waterfall --preset 124m --predicted            from what torch.compile makes of the step, without a GPU
    python -m bench.waterfall --step STEP.json --variant compiled  of a result of `bench.step --profile`

The first line is the floor (`python -m bench.roofline`): every op reads its inputs and writes its outputs once, every product
does its FLOPs, at the ceilings of the GPU. Each line below adds what one cause takes over its part of the floor; the last line is
the step. The highest bar is where to look first: the op's page in `bench.ops`, its machine code in `bench.machine_code --show`,
the launches that Inductor adds in `bench.compiled`.

A measured waterfall is made of the kernels of a profile. A predicted one is made of the launches that `bench.compiled` lists, by
the model at the top of bench/waterfall/predicted.py, and is named predicted; it needs a build of PyTorch with CUDA, and no GPU.
"""

from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import archive, command
from bench.archive import Result
from bench.measure import environment, write_json
from bench.roofline.__main__ import find_ceilings, named_gpu
from bench.waterfall import measured, predicted
from bench.waterfall.bars import floors, gather, rows
from training.config import TrainConfig, defaults
from training.errors import UserError
from training.hardware import Gpu


@dataclass(kw_only=True)
class Waterfall:
    """Print where the time of a training step goes, from its floor up."""

    preset: str = "reference"
    """Shape and batch, as in train.py."""
    gpu: str = "H100 SXM"
    """GPU by its name in training/hardware.py."""
    variant: str = "fused"
    """Of a measured step: as `bench.step` names it."""
    step: str = ""
    """JSON of `bench.step --profile`; empty: the newest of this preset and GPU in bench/results."""
    predicted: bool = False
    """Predict, where there is a measured step too."""
    compiled: str = ""
    """Predict from this JSON of `bench.compiled`; empty: compile the step now."""
    kernels: str = "all"
    """Of a predicted step: selection of kernels, as in train.py."""
    json: str = ""
    """File to write the result to."""


def measure(options: Waterfall, console: Console) -> dict:
    """Print the waterfall and return (and write, where asked) the result."""
    command.check_writable(options.json)
    gpu, config = named_gpu(options.gpu), defaults(options.preset, "cpu")
    results, here = archive.read(), environment()  # before a prediction lets there seem to be a GPU
    if options.step and (options.predicted or options.compiled):
        raise UserError("--step is a measured step; it goes with neither --predicted nor --compiled")
    result = None
    if not options.predicted and not options.compiled:
        result = of_measured(options, config, gpu, results)
    _check_used(options, is_measured=result is not None)
    if result is None:
        result = of_predicted(options, config, gpu, results, console)
    result["environment"] = here
    console.print(table(result))
    if options.json:
        write_json(options.json, result)
    return result


def _check_used(options: Waterfall, *, is_measured: bool) -> None:
    """UserError for an option that says what the step shall have, where the step comes from elsewhere."""
    given = Waterfall()
    if is_measured and options.kernels != given.kernels:
        raise UserError(
            f"--kernels {options.kernels} is of a predicted step, and this one is measured, {options.variant}; add --predicted"
        )
    if options.compiled and options.kernels != given.kernels:
        raise UserError(f"--kernels {options.kernels}: the kernels of --compiled {options.compiled} are in that file")
    if not is_measured and options.variant != given.variant:
        raise UserError(
            f"--variant {options.variant} is of a measured step: bench/results has no profile of it for {options.preset} on "
            f"{options.gpu}, or a predicted one is asked for; of that --kernels says what it has"
        )


# -------------------------------------------------------------------------------------------------------------- sources


def of_measured(options: Waterfall, config: TrainConfig, gpu: Gpu, results: list[Result]) -> dict | None:
    """The waterfall of a profiled step; None where there is none. UserError where the one that is named does not serve."""
    given = archive.read_one(options.step) if options.step else None
    found = None
    for result in [given] if given else results:
        if result.bench != "step" or (
            not given and (result.gpu != gpu.name or result.data["preset"] != options.preset)
        ):
            continue
        whole = result.data.get("n_layers", config.n_layers) == config.n_layers
        for row in result.data["rows"]:
            if row["variant"] == options.variant and "profile" in row and (given or whole):
                found = result, row
    if found is None:
        if given:
            raise UserError(
                f"--step {options.step} holds no profile of --variant {options.variant} (bench.step --profile)"
            )
        return None
    result, row = found
    step = result.data
    config = replace(
        defaults(step["preset"], "cpu"),
        n_layers=step["n_layers"],
        batch_size=step["batch_size"],
        gradient_accumulation_steps=step["micro_steps"],
    )
    own = next((g for g in [gpu] if result.gpu == g.name), None) or named_gpu(result.gpu or "")
    source = f"measured {result.date[:10]}, {row['variant']}"
    return _result(config, own, results, measured.works(row), source) | {
        "variant": row["variant"],
        "of": str(result.date),
    }


def of_predicted(options: Waterfall, config: TrainConfig, gpu: Gpu, results: list[Result], console: Console) -> dict:
    """The waterfall of a step that `bench.compiled` lists."""
    if options.compiled:
        compiled = archive.read_one(options.compiled).data
        if compiled["bench"] != "compiled" or "launches" not in compiled:
            raise UserError(f"--compiled {options.compiled} is no result of bench.compiled")
        for option, what, given in (("preset", "preset", options.preset), ("gpu", "built_for", gpu.name)):
            if compiled[what] != given:
                raise UserError(f"--compiled {options.compiled} is of {compiled[what]}, and --{option} is {given}")
    else:
        from bench.compiled import __main__ as bench_compiled
        from bench.compiled import without_gpu

        models = {name: short for short, (name, _) in without_gpu.MODELS.items()}
        if gpu.name not in models:
            raise UserError(f"--gpu is {gpu.name!r}; a step can be predicted for {', '.join(models)}")
        asked = bench_compiled.CompiledOptions(preset=options.preset, kernels=options.kernels, gpu=models[gpu.name])
        bench_compiled.check(asked)
        compiled = bench_compiled.compiled(asked, console)
    config = replace(
        config,
        n_layers=compiled["layers"],
        batch_size=compiled["batch_size"],
        gradient_accumulation_steps=compiled["micro_steps"],
    )
    ceilings = find_ceilings(gpu, results)
    source = f"predicted, kernels {compiled['kernels']}"
    return _result(config, gpu, results, predicted.works(compiled, config, ceilings), source) | {"variant": "predicted"}


def _result(config: TrainConfig, gpu: Gpu, results: list[Result], works: list, source: str) -> dict[str, Any]:
    ceilings = find_ceilings(gpu, results)
    bars = gather(works, floors(config, ceilings))
    return {
        "bench": "waterfall",
        "preset": config.preset,
        "n_layers": config.n_layers,
        "batch_size": config.batch_size,
        "micro_steps": config.gradient_accumulation_steps,
        "sequence_length": config.max_seq_len,
        "of_gpu": gpu.name,
        "source": source,
        "copy_tb_s": ceilings.copy / 1e12,
        "copy_source": ceilings.copy_source,
        "matmul_tflops": ceilings.matmul / 1e12,
        "matmul_source": ceilings.matmul_source,
        "floor_ms": sum(bar.floor_ms for bar in bars),
        "rows": rows(bars),
        "ms": sum(bar.ms for bar in bars),
    }


# --------------------------------------------------------------------------------------------------------------- table

WIDTH = 40
"""Characters of the longest bar."""


def table(result: dict) -> Table:
    """The waterfall as text."""
    shape = f"{result['micro_steps']} x {result['batch_size']} x {result['sequence_length']} tokens"
    shown = Table(
        title=f"a step of {result['preset']} ({shape}, {result['n_layers']} layers) on {result['of_gpu']}: {result['source']}",
        caption=f"floor at {result['copy_tb_s']:.2f} TB/s ({result['copy_source']}) and {result['matmul_tflops']:.0f} TFLOP/s "
        f"({result['matmul_source']}); takes: all of it, its floor included",
    )
    for heading in ("", "floor ms", "takes ms", "over it", "launches", "the step so far, ms"):
        shown.add_column(heading, justify="left" if heading in ("", "the step so far, ms") else "right")
    scale = WIDTH / max(result["ms"], result["floor_ms"])
    shown.add_row("the floor", f"{result['floor_ms']:.2f}", "", "", "", "█" * round(result["floor_ms"] * scale))
    for row in result["rows"]:
        start, end = sorted((row["from_ms"], row["from_ms"] + row["above_ms"]))
        bar = " " * round(start * scale) + "█" * max(1, round(end * scale) - round(start * scale))
        figures = (f"{row['floor_ms']:.2f}" if row["floor_ms"] else "", f"{row['ms']:.2f}", f"{row['above_ms']:+.2f}")
        shown.add_row(row["cause"], *figures, str(row["launches"] or ""), bar)
    shown.add_row("the step", "", f"{result['ms']:.2f}", "", "", "█" * round(result["ms"] * scale))
    return shown


def main() -> None:
    """Run the command, in a process whose kernels can be compiled."""
    command.leave_interpreter()
    command.run(Waterfall, __doc__, measure)


if __name__ == "__main__":
    main()
