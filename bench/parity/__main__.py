"""How far the Triton kernels are from float64, op by op and layer by layer: `python -m bench.parity --preset reference`.

One batch goes through three models of equal weights: the torch twins in float64, the torch twins in the compute dtype
(`plain`), and the kernels (`fused`). Errors are relative to float64, as root mean squares. Two tables:

- each op by itself: every call on the arguments and upstream gradients that it got in the plain model, outputs and gradients
  (bench/parity/op_errors.py). It tells which op is wrong.
- the whole model: the loss and the parameters' gradients, layer by layer, with the errors of all ops in them
  (bench/parity/model_errors.py). It tells whether that matters.

An op may be as wrong as its dtype makes it. So what --tolerance bounds is the error of fused over that of plain, where plain's
counts as no less than what rounding a result once costs. Beyond it, or with an error that is not a number, the exit status
is 1. A kernel that differs from its twin in rounding alone stays near 1.

--bisect turns the kernels on by layer and by op, ever fewer, until one alone makes the loss or a gradient of the whole model
exceed the tolerance, and names it; if several do, all of them, and those that do so only together as such. It sees what the
second table sees, and owes nothing to how the first one was made. SwiGLU's kernel is tried without mlp, which runs in its place.

The first table has what the model calls. mlp is among it in a narrow model, and here on fewer tokens than in training.

The weights are drawn so that each product keeps the scale of what it is given: with those of a new model attention would be
nearly uniform, and the branches next to nothing beside the residual stream. They are numbers of the compute dtype, so that no
error comes from rounding them. Tokens are random. In float16 the loss is scaled, as in training.

On a CPU the kernels need TRITON_INTERPRET=1, a small preset, few layers and a short sequence.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

import kernels
from bench import command
from bench.measure import environment, write_json
from bench.parity.bisection import Selection, bisect, spell, union
from bench.parity.model_errors import Models, Select
from bench.parity.op_errors import FLOOR, measure_call
from kernels import grammar
from kernels.mlp.op import on_any_rows
from training.config import TrainConfig, defaults, interpreting
from training.device import resolve_device, resolve_dtype, set_determinism
from training.errors import UserError


@dataclass(kw_only=True)
class Parity:
    """Measure the errors of the kernels and of plain PyTorch against float64."""

    preset: str = "reference"
    """Shape of the model, as in train.py."""
    batch_size: int = 2
    """Sequences in the batch."""
    n_layers: int = 0
    """Layers; 0: the preset's."""
    max_seq_len: int = 0
    """Tokens in a sequence; 0: the preset's."""
    kernels: str = "all"
    """Triton kernels to measure, by op and layer as in train.py."""
    tolerance: float = 2.0
    """How many times the error of plain that of fused may be."""
    bisect: bool = False
    """Search for the ops and layers that make the whole model exceed the tolerance."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto: bfloat16 on a GPU that has it, as in train.py."""
    seed: int = 1337
    """Of weights and tokens."""
    json: str = ""
    """File to write the result to."""


@on_any_rows()
def measure(options: Parity, console: Console, select: Select = kernels.select) -> dict:
    """Print the tables, and the search where asked, and return (and write, where asked) what they show.

    select: what gives each place its ops for a spec, in place of `kernels.select`. Exit status 1 where an error exceeds the
    tolerance.
    """
    config = _configure(options)
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    if dtype == torch.bfloat16 and config.uses_triton() and interpreting():
        raise UserError("--dtype is bfloat16, which Triton's interpreter gets wrong; allowed with it: float32, float16")
    result = {
        "bench": "parity",
        "preset": options.preset,
        "batch_size": config.batch_size,
        "n_layers": config.n_layers,
        "max_seq_len": config.max_seq_len,
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": options.kernels,
        "tolerance": options.tolerance,
        "floor": {str(of).removeprefix("torch."): floor for of, floor in FLOOR.items()},
    }
    with console.status("float64") as status:
        models = Models(config, device, dtype, select)
        status.update("each op by itself")
        result["ops"] = op_rows(models, options.kernels)
        status.update("the whole model")
        result["model"] = models.errors(options.kernels)
    result["environment"] = environment()
    beyond = [row for row in result["ops"] + result["model"] if not within(row, options.tolerance)]
    result["within"] = not beyond
    if options.json:
        write_json(options.json, result)
    _show(result, console)
    if options.bisect:
        result["bisection"] = _bisect(models, options, console)
        if options.json:
            write_json(options.json, result)
    if beyond:
        raise SystemExit(1)
    return result


def _configure(options: Parity) -> TrainConfig:
    """The model and batch that the options describe, checked. Switches deterministic algorithms on."""
    command.check_at_least(options, batch_size=1, n_layers=0, max_seq_len=0)
    if not options.tolerance >= 1:
        raise UserError(f"--tolerance is {options.tolerance:g}; it must be at least 1: as wrong as plain PyTorch")
    command.check_writable(options.json)
    config = defaults(options.preset, options.device)
    config = replace(
        config,
        batch_size=options.batch_size,
        n_layers=options.n_layers or config.n_layers,
        max_seq_len=options.max_seq_len or config.max_seq_len,
        kernels=options.kernels,
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
    )
    config.check()
    set_determinism(True)
    return config


# ----------------------------------------------------------------------------------------------------------------- rows


def op_rows(models: Models, spec: str) -> list[dict]:
    """A row for each output and gradient of each call: `layer`, `call`, `op`, `switch`, and those of `measure_call`."""
    n_layers = models.config.n_layers
    ops, chosen = models.select(spec, n_layers), grammar.parse(spec, n_layers)
    rows = []
    for call in models.calls():
        fused = getattr(ops[call.place], call.op) if call.switch in chosen[call.place] else None
        layer = "out" if call.place == n_layers else call.place
        where = {"layer": layer, "call": call.name, "op": call.op, "switch": call.switch}
        rows += [where | row for row in measure_call(call, fused)]
    return rows


def within(row: dict, tolerance: float) -> bool:
    """Whether an error is within the tolerance, as it is where nothing fused was measured. What is not a number is not."""
    return row["excess"] is None or row["excess"] <= tolerance


def worst(rows: list[dict]) -> dict:
    """The row that is furthest beyond what it may be; where nothing fused was measured, the one of plain's largest error."""

    def badness(row: dict) -> tuple[bool, float]:
        value = row["plain"] if row["excess"] is None else row["excess"]
        return value != value, value  # NaN above all

    return max(rows, key=badness)


# --------------------------------------------------------------------------------------------------------------- search


def _bisect(models: Models, options: Parity, console: Console) -> dict:
    """Search for the kernels that exceed the tolerance, a line a step, and say how to turn just those off."""
    steps: list[dict] = []

    def exceeds(selection: Selection) -> bool:
        spec = spell(selection)
        row = worst(models.errors(spec))
        is_within = within(row, options.tolerance)
        steps.append({"kernels": spec, "within": is_within} | row)
        verdict = "within" if is_within else "exceeds"
        _say(console, f"  {spec}: {verdict}, {row['excess']:.3g} in {row['tensor']} ({row['layer']})")
        return not is_within

    _say(console, "bisection: what is on, and the worst of loss and gradients by its excess over plain")
    culprits = bisect(tuple(grammar.parse(options.kernels, models.config.n_layers)), exceeds)
    off = f"{options.kernels},{spell(union(culprits), '-')}" if culprits else options.kernels
    for culprit in culprits:
        together = " together, each of them within it" if sum(map(len, culprit)) > 1 else ""
        _say(console, f"exceeds the tolerance: {spell(culprit)}{together}")
    _say(console, f"all but that: --kernels {off}" if culprits else "the whole model is within the tolerance")
    return {"steps": steps, "culprits": [spell(culprit) for culprit in culprits], "all_but_culprits": off}


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


# --------------------------------------------------------------------------------------------------------------- tables


def _show(result: dict, console: Console) -> None:
    """Both tables and the verdict."""
    env, tolerance = result["environment"], result["tolerance"]
    size = f"{result['n_layers']} layers, {result['batch_size']} x {result['max_seq_len']} tokens"
    _say(console, f"{result['preset']}, {size}, {result['dtype']}, {env['device']}, torch {env['torch']}")
    _say(console, f"errors against float64, of the worst tensor; ratio: fused over plain; !: beyond {tolerance:g}")
    console.print(op_table(result["ops"], tolerance))
    console.print(model_table(result["model"], tolerance))
    wrong = dict.fromkeys(f"{row['switch']}@{row['layer']}" for row in result["ops"] if not within(row, tolerance))
    if wrong:
        _say(console, f"beyond the tolerance by itself: {', '.join(wrong)}")
    verdict = "within" if result["within"] else "NOT within"
    _say(console, f"fused ({result['kernels']}) is {verdict} the tolerance of {tolerance:g}")


def op_table(rows: list[dict], tolerance: float) -> Table:
    """A line a call: the worst of its outputs and the worst of its gradients."""
    shown = Table(title="each op by itself")
    for heading in ("layer", "op"):
        shown.add_column(heading)
    for heading in ("output", "gradient"):
        _add_columns(shown, heading)
    of_calls = list(dict.fromkeys((row["layer"], row["call"]) for row in rows))
    for (layer, call), (next_layer, _) in zip(of_calls, [*of_calls[1:], (None, None)], strict=True):
        of_call = [row for row in rows if (row["layer"], row["call"]) == (layer, call)]
        passes = [[row for row in of_call if row["pass"] == name] for name in ("output", "gradient")]
        cells = [cell for of_pass in passes for cell in _cells(worst(of_pass), tolerance)]
        shown.add_row(str(layer), call, *cells, end_section=next_layer != layer)
    return shown


def model_table(rows: list[dict], tolerance: float) -> Table:
    """A line for the loss, and a line a layer: the worst gradient of its parameters."""
    shown = Table(title="the whole model")
    shown.add_column("layer")
    _add_columns(shown, "loss, gradient of")
    for layer, pass_ in dict.fromkeys((row["layer"], row["pass"]) for row in rows):
        group = [row for row in rows if (row["layer"], row["pass"]) == (layer, pass_)]
        shown.add_row(str(layer), *_cells(worst(group), tolerance))
    return shown


def _add_columns(table: Table, tensor: str) -> None:
    table.add_column(tensor)
    for heading in ("plain", "fused", "ratio"):
        table.add_column(heading, justify="right")


def _cells(row: dict, tolerance: float) -> list[str]:
    if row["fused"] is None:
        return [row["tensor"], f"{row['plain']:.1e}", "off", ""]
    mark = "" if within(row, tolerance) else " [bold red]![/]"
    return [row["tensor"], f"{row['plain']:.1e}", f"{row['fused']:.1e}", f"{row['ratio']:.2f}{mark}"]


if __name__ == "__main__":
    command.run(Parity, __doc__, measure)
