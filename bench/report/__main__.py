"""bench/RESULTS.md, its charts and the README's tables, from the JSON in bench/results/: `python -m bench.report`.

The newest figure of a GPU, a size and a variant is the one that is shown; ratios are within the run that measured both. The README
has what was measured; what was not is marked in RESULTS.md, beside its goal. `--check` writes nothing and has exit status 1 where
README.md or RESULTS.md is not what the JSON says.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench import archive, command, time_to_loss
from bench.all import gpu_cases
from bench.archive import Result
from bench.parity.__main__ import worst
from bench.report import charts, compiled, generation, profiles
from bench.report.goals import GPU, LOSS_HEAD, LOSS_HEAD_SIZE, OPS, STEP, UNMEASURED, verdicts
from bench.report.markdown import table
from bench.report.standings import CPU, Standings, Steps
from training.errors import UserError

ROOT = archive.RESULTS.parent.parent
BEGIN, END = "<!-- results: written by python -m bench.report -->", "<!-- end of results -->"

VARIANTS = {
    "plain": "plain, eager",
    "compiled": "plain, compiled",
    "compiled-captured": "plain, compiled, captured",
    "fused": "**fused**",
    "liger": "Liger's ops, eager",
    "liger-compiled": "Liger's ops, compiled",
}

LOSS_HEADS = {
    "triton": "**Triton kernel**",
    "compiled": "compiled `F.cross_entropy`",
    "F.linear_cross_entropy": "`F.linear_cross_entropy`",
    "liger": "Liger",
    "eager": "matmul + `F.cross_entropy`",
}


@dataclass(kw_only=True)
class Report:
    """Rebuild the tables and charts of what was measured."""

    check: bool = False
    """Write nothing; exit status 1 where a file is not what the JSON says."""


def main(options: Report, console: Console) -> None:
    """Write, or compare, the files of this checkout."""
    folder = archive.RESULTS
    results = archive.read(folder)
    readme, summary = ROOT / "README.md", folder.parent / "RESULTS.md"
    pages = {
        readme: with_block(_read(readme), readme_block(results)),
        summary: results_page(results, charts.names(results)),
    }
    if options.check:
        stale = [path.name for path, text in pages.items() if not path.exists() or _read(path) != text]
        console.print(f"not what bench/results/ says: {', '.join(stale)}" if stale else "as bench/results/ says")
        if stale:
            raise SystemExit(1)
        return
    drawn = charts.draw(results, folder / "charts")
    for path, text in pages.items():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}") from None
    gpus = ", ".join(dict.fromkeys(result.gpu or CPU for result in results)) or "none"
    console.print(f"{len(results)} results (of: {gpus}), {len(drawn)} charts; README.md and RESULTS.md are written")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def with_block(readme: str, block: str) -> str:
    """The README with this block between its marks. UserError where it does not have each mark once, in order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise UserError(f"README.md must hold the lines {BEGIN} and {END}, once each and in this order")
    return f"{before}{BEGIN}\n{block}{END}{after}"


def cells(figures: dict, forms: dict[str, str]) -> list[str]:
    """Figures in these forms; where there are none at all, said once, so that a row of them reads."""
    if not figures:
        return [UNMEASURED] + [""] * (len(forms) - 1)
    if "failed" in figures:
        return [figures["failed"]] + [""] * (len(forms) - 1)
    found = {name: figures.get(name) for name in forms}
    found["peak_memory"] = None if found.get("peak_memory") is None else found["peak_memory"] / 2**30
    return ["n/a" if found[name] is None else form.format(found[name]) for name, form in forms.items()]


# --------------------------------------------------------------------------------------------------------------- README


def readme_block(results: list[Result]) -> str:
    """What stands between the README's marks: what was measured on each GPU, and in a sentence what was not."""
    standings = Standings(results)
    parts = []
    for gpu in dict.fromkeys([GPU, *standings.gpus]):
        parts += [_titled(title, rows) for title, rows in _tables(standings, gpu, measured=True) if rows]
    parts.append(unmeasured(standings))
    parts.append(
        "`python -m bench.all --minutes 120` measures all of this on the GPU you have; `python -m bench.report` writes it here. "
        "Every goal, more figures, charts and where they are from: [bench/RESULTS.md](bench/RESULTS.md).\n"
    )
    return "\n".join(parts)


def unmeasured(standings: Standings) -> str:
    """A sentence that names what has a goal and no figure."""
    steps = [preset for preset in STEP if "ms" not in standings.steps(GPU, preset).get("fused", {})]
    ops = dict.fromkeys(op for op, size, direction in OPS if "us" not in standings.op(GPU, op, size, direction))
    named = [f"the step of {', '.join(steps)}"] if steps else []
    named += [f"the ops {', '.join(ops)}"] if ops else []
    named += [] if standings.loss_heads(GPU) else ["the loss head"]
    if not named:
        return f"All that has a goal was measured on {GPU}.\n"
    return f"Not measured on {GPU} yet: {'; '.join(named)}.\n"


def _tables(standings: Standings, gpu: str, measured: bool) -> list[tuple[str, str]]:
    """Titles and tables of the step, the ops and the loss head; measured: only rows with figures, an empty table being ""."""
    return [
        (
            f"**A training step on {gpu}** (bfloat16, deterministic, tokens as frequent as in text; "
            "`python -m bench.step --preset PRESET`)\n\n"
            "fused: every kernel, AdamW's too, and one CUDA graph a step; compiled: `torch.compile`, torch's AdamW; captured: the "
            "same in a CUDA graph as well. vs best: against the faster of the two; above 1 is faster.",
            step_table(standings, gpu, measured),
        ),
        (
            f"**Each op on {gpu}** (`python -m bench.ops --op OP`)\n\n"
            "us: median, cold cache; of a copy: the time of a copy of the bytes that must move, over the op's.",
            ops_table(standings, gpu, measured),
        ),
        (
            f"**The loss head on {gpu}**, forward and backward, at the size of {LOSS_HEAD_SIZE} "
            "(`python -m bench.ops --op linear_cross_entropy`)",
            loss_head_table(standings, gpu, measured),
        ),
    ]


def _titled(title: str, rows: str) -> str:
    return f"{title}\n\n{rows}"


def step_table(standings: Standings, gpu: str, measured: bool = False) -> str:
    """A row a preset and variant."""
    rows = []
    for preset, goals in STEP.items():
        steps = standings.steps(gpu, preset)
        for variant, name in VARIANTS.items():
            figures = steps.get(variant, {})
            goal = "; ".join(verdicts(goals, figures, gpu)) if variant == "fused" else ""
            if figures or not measured:
                rows.append([preset, name, *_step_cells(figures), goal])
    headings = ["preset", "variant", "ms/step", "MFU", "vs best", "peak GiB", "goal"]
    return table(headings, rows, numbers_from=2) if rows else ""


def _step_cells(figures: dict) -> list[str]:
    if "best" in figures:
        figures = figures | {"vs_best": f"{figures['vs_best']:.2f}x {figures['best']}"}
    return cells(figures, {"ms": "{:.1f}", "mfu": "{:.1%}", "vs_best": "{}", "peak_memory": "{:.2f}"})


def ops_table(standings: Standings, gpu: str, measured: bool = False) -> str:
    """A row an op, size and pass that has a goal."""
    rows = []
    for (op, size, direction), goals in OPS.items():
        figures = standings.op(gpu, op, size, direction)
        counted = "tflops" if any(goal.figure == "tflops" for goal in goals) else "of_copy"
        forms = {"us": "{:.1f}", counted: {"tflops": "{:.0f} TFLOP/s", "of_copy": "{:.0%} of a copy"}[counted]}
        if figures or not measured:
            goal = "; ".join(verdicts(goals, figures, gpu))
            rows.append([op, size, direction, *cells(figures, forms), _peer(figures), goal])
    headings = ["op", "size", "pass", "us", "speed", "vs best peer", "goal"]
    return table(headings, rows, numbers_from=3) if rows else ""


def loss_head_table(standings: Standings, gpu: str, measured: bool = False) -> str:
    """A row an implementation: time and the most memory held, and the goals in that of the kernel."""
    heads = standings.loss_heads(gpu)
    rows = []
    for variant, name in LOSS_HEADS.items():
        figures = heads.get(variant, {})
        goal = "; ".join(verdicts(LOSS_HEAD, figures, gpu)) if variant == "triton" else ""
        if figures or not measured:
            rows.append([name, *cells(figures, {"us": "{:,.0f}", "peak_memory": "{:.2f}"}), goal])
    return table(["", "us", "peak GiB", "goal"], rows) if rows else ""


def _peer(figures: dict) -> str:
    """How many times faster than the fastest peer, which; and which peers were not there to be compared with."""
    if "vs_best" not in figures:
        return ""
    absent = "".join(f"; {name} {reason}" for name, reason in figures["absent"].items())
    return f"{figures['vs_best']:.2f}x {figures['best']}{absent}"


# ------------------------------------------------------------------------------------------------------------ RESULTS.md


def results_page(results: list[Result], drawn: list[str]) -> str:
    """bench/RESULTS.md: every newest figure, where it is from, and what nothing has measured."""
    standings = Standings(results)
    parts = [
        "# Results\n",
        "Written by `python -m bench.report` from the JSON in [results/](results/): edit neither.\n",
    ]
    parts += [f"![{name}](results/charts/{name})\n" for name in drawn]
    parts += ["## Goals\n"]
    for gpu in dict.fromkeys([GPU, *standings.gpus]):
        parts += [_titled(title, rows) for title, rows in _tables(standings, gpu, measured=False)]
    parts += ["## Where the time of a step goes\n", profiles.page(standings) or _nothing("bench.step --profile")]
    parts += [
        "## Products\n",
        _products(standings.newest("products", "dtype")) or "Nothing has timed cuBLAS by itself.\n",
    ]
    parts += [_was_run(results)]
    parts += ["## Checks\n", _checks(standings.newest("check", "dtype")) or _nothing("bench.check")]
    parts += ["## Steps\n", _by_step(standings.all_steps()) or _nothing("bench.step")]
    parts += ["## Ops\n", _by_op(standings) or _nothing("bench.ops")]
    parts += [
        "## Loss parity\n",
        _loss_parity(standings.newest("loss_parity", "preset")) or _nothing("bench.loss_parity"),
    ]
    parts += ["## Time to a loss\n", _time_to_loss(standings.newest("time_to_loss", "preset"))]
    parts += [
        "## Errors against float64\n",
        _parity(standings.newest("parity", "preset", "dtype")) or _nothing("bench.parity"),
    ]
    parts += [
        "## What a compiled step launches\n",
        "Built without a GPU, not measured: which launches there are, and the bytes of their tensors. A library call is one. "
        "Micro-steps after the first launch a little more, which the whole step counts.\n",
        _compiled(standings.newest("compiled", "preset", "kernels")) or _nothing("bench.compiled"),
    ]
    parts += [
        "## Generated text\n",
        "The likeliest tokens after a prompt of one; tokens/s of all streams together. whole-sequence: the whole sequence again "
        "for each token; transformers: its generate, with its cache.\n",
        generation.section(standings.newest("generation", "preset")) or _nothing("bench.generation"),
    ]
    parts += ["## The floor\n", _roofline(standings.newest("roofline", "preset")) or _nothing("bench.roofline")]
    parts += ["## Where the figures are from\n", _sources(results) or "Nothing has been measured.\n"]
    return "\n".join(parts)


def _nothing(program: str) -> str:
    return f"{UNMEASURED}: `python -m {program}` has left nothing in bench/results/ yet.\n"


def _was_run(results: list[Result]) -> str:
    """What `bench.all` would run on a GPU, and what became of it on each."""
    records: dict[str, dict[str, str]] = {}
    for result in results:
        if result.bench == "all" and result.gpu:
            statuses = {name: _became(name, record) for name, record in result.data["cases"].items()}
            records[result.gpu] = records.get(result.gpu, {}) | statuses
    gpus = list(dict.fromkeys([GPU, *records]))
    rows = []
    for case in gpu_cases():
        words = case.arguments
        if "-n" in words:  # how many processes, which is this machine's
            at = words.index("-n")
            words = words[:at] + words[at + 2 :]
        became = (records.get(gpu, {}).get(case.name, UNMEASURED) for gpu in gpus)
        rows.append([case.name, f"`python -m {shlex.join(words)}`", *became])
    return "## What was run on a GPU\n\n" + table(["case", "command", *gpus], rows, numbers_from=2)


def _became(name: str, record: dict) -> str:
    """How a case ended, and of tests how many passed."""
    is_tests = name.startswith("tests-") and record.get("last_line")
    return f"{record['status']}: {record['last_line'].strip('= ')}" if is_tests else record["status"]


def _checks(results: list[Result]) -> str:
    rows = []
    for result in results:
        for row in result.data["rows"]:
            found = row["failed"] if "failed" in row else f"{row['value']:.2g}"
            bound = "" if "failed" in row else f"{row['bound']:.2g}"
            verdict = "passed" if row["passed"] else "**failed**"
            rows.append(
                [result.gpu or CPU, result.data["dtype"], row["check"], found, bound, row.get("where", ""), verdict]
            )
    headings = ["on", "dtype", "check", "found", "allowed", "at", ""]
    return table(headings, rows, numbers_from=3) if rows else ""


def _by_step(steps: list[Steps]) -> str:
    rows = [
        [of.where, of.preset, of.batch, figures["tokens"], variant, *_step_cells(figures), figures["date"][:10]]
        for of in steps
        for variant, figures in of.variants.items()
    ]
    headings = ["on", "preset", "batch", "tokens", "variant", "ms/step", "MFU", "vs best", "peak GiB", "date"]
    return table(headings, rows, numbers_from=5) if rows else ""


def _by_op(standings: Standings) -> str:
    rows = []
    for where, figures in standings.all_ops().items():
        if "us" in figures or "failed" in figures:
            measured = cells(figures, {"us": "{:.1f}", "of_copy": "{:.0%}"})
            rows.append([*where, *measured, _peer(figures), figures["date"][:10]])
    headings = ["on", "op", "size", "pass", "us", "of a copy", "vs best peer", "date"]
    return table(headings, rows, numbers_from=4) if rows else ""


def _products(results: list[Result]) -> str:
    """Matrix products as cuBLAS does them by themselves: what a step could not do without."""
    forms = {"us": "{:.1f}", "tflops": "{:.0f}", "gb_s": "{:.0f}"}
    rows = [
        [result.gpu or CPU, result.data["dtype"], row["product"], *cells(row, forms)]
        for result in results
        for row in result.data["rows"]
    ]
    return table(["on", "dtype", "product", "us", "TFLOP/s", "GB/s"], rows, numbers_from=3) if rows else ""


def _loss_parity(results: list[Result]) -> str:
    rows = []
    for result in results:
        data = result.data
        if "within" in data:  # or it was stopped before its end
            drift, bound = data["drift"]["fused"]["max"], data["bound"]["max"]
            verdict = "within" if data["within"] else "**NOT within**"
            rows.append(
                [result.gpu or CPU, data["preset"], str(data["steps"]), f"{drift:.1e}", f"{bound:.1e}", verdict]
            )
    return table(["on", "preset", "steps", "drift (nats)", "bound", ""], rows, numbers_from=2) if rows else ""


def _time_to_loss(results: list[Result]) -> str:
    rows = [
        [result.gpu or CPU, result.data["preset"], f"{result.data['target']:.3f}", *line]
        for result in results
        for line in time_to_loss.lines(result.data)
    ]
    headings = ["on", "preset", "to a loss of", "run", "steps", "seconds", "ms a step", "first step, s", "last loss"]
    return table(headings, rows, numbers_from=4) if rows else _nothing("bench.time_to_loss")


def _parity(results: list[Result]) -> str:
    rows = []
    for result in results:
        measured = [row for row in result.data["ops"] if row["excess"] is not None]
        for op in dict.fromkeys(row["op"] for row in measured):
            row = worst([row for row in measured if row["op"] == op])
            where = f"layer {row['layer']}, {row['tensor']}"
            errors = [f"{row['plain']:.1e}", f"{row['fused']:.1e}", f"{row['excess']:.2f}"]
            rows.append([result.gpu or CPU, result.data["preset"], result.data["dtype"], op, where, *errors])
    headings = ["on", "preset", "dtype", "op", "worst at", "plain", "fused", "fused over plain or the floor"]
    return table(headings, rows, numbers_from=5) if rows else ""


def _compiled(results: list[Result]) -> str:
    rows = compiled.rows(results)
    return table(compiled.HEADINGS, rows, numbers_from=3) if rows else ""


def _roofline(results: list[Result]) -> str:
    rows = []
    for result in results:
        for of in result.data["gpus"]:
            largest = max(of["rows"], key=lambda row: row["share"])
            where = " ".join((largest["op"], largest["part"])).strip()
            copy = f"{of['copy_tb_s']:.2f} TB/s ({of['copy_source']})"
            ceilings = f"{copy}, {of['matmul_tflops']:.0f} TFLOP/s ({of['matmul_source']})"
            floor = [f"{of['ms']:.1f}", f"{of['mfu']:.1%}", f"{where} ({largest['share']:.0%})"]
            rows.append([result.data["preset"], of["gpu"], ceilings, *floor])
    return table(["preset", "GPU", "ceilings", "ms/step", "MFU", "largest"], rows, numbers_from=3) if rows else ""


def _sources(results: list[Result]) -> str:
    rows = []
    for result in results:
        env = result.data["environment"]
        versions = f"torch {env['torch']}, Triton {env['triton']}, commit {env['commit']}"
        name = "/".join(result.path.parts[-2:])
        rows.append([f"[{name}](results/{name})", result.gpu or CPU, result.date[:10], versions, f"`{env['command']}`"])
    return table(["file", "on", "date", "with", "command"], rows, numbers_from=5) if rows else ""


if __name__ == "__main__":
    command.run(Report, __doc__, main)
