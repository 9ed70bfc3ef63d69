"""`python -m bench.compiled --diff A [B]`: what differs between two selections of kernels, or two commits."""

import json
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import commit
from bench.compiled.record import PARTS
from bench.compiled.show import by_op, label
from training.errors import UserError

Launch = tuple[str, str]
"""Its part of the step, and what it is."""


def result_at(revision: str, options: list[str], console: Console, root: Path = commit.ROOT) -> dict:
    """The result of `bench.compiled` with these options at a commit. UserError where it can't be had."""
    with commit.laid_out(revision, root) as folder, console.status(f"compiling {revision}"):
        if not commit.has(folder, "bench.compiled"):
            raise UserError(f"--diff is {revision!r}, which has no bench.compiled yet")
        file = folder / "result-of-compiled.json"
        done = commit.run_there(folder, "bench.compiled", [*options, "--json", str(file)])
        if not file.exists():
            raise UserError(f"--diff: bench.compiled fails at {revision}: {commit.last_words(done.stderr)}")
        return json.loads(file.read_text(encoding="utf-8"))


def counted(result: dict) -> Counter[Launch]:
    """How often each launch comes, by part and title."""
    return Counter((row["part"], label(row)) for row in result["launches"])


def difference(before: dict, after: dict) -> list[dict]:
    """The launches that one has more often than the other, and those whose machine code differs, in the order of a step."""
    one, two = counted(before), counted(after)
    moved = [_bytes(result) for result in (before, after)]
    codes = [_codes(result) for result in (before, after)]
    changes = []
    for launch in sorted({*one, *two}, key=lambda launch: PARTS.index(launch[0])):
        in_both = launch in one and launch in two
        recompiled = in_both and codes[0].get(launch) != codes[1].get(launch)
        if one[launch] != two[launch] or recompiled:
            changes.append(
                {
                    "part": launch[0],
                    "launch": launch[1],
                    "times": [one[launch], two[launch]],
                    "bytes": [found.get(launch, 0) for found in moved],
                    "code": [found.get(launch) for found in codes],
                }
            )
    return changes


def _bytes(result: dict) -> dict[Launch, int]:
    found: dict[Launch, int] = {}
    for row in result["launches"]:
        launch = row["part"], label(row)
        found[launch] = found.get(launch, 0) + row["read"] + row["written"]
    return found


def _codes(result: dict) -> dict[Launch, dict]:
    return {(row["part"], label(row)): row["code"] for row in result["launches"] if row["code"]}


def show(before: dict, after: dict, names: tuple[str, str], console: Console) -> None:
    """Print the launches that differ, then the totals of both by op."""
    changes = difference(before, after)
    shown = Table(title=f"launches that differ between {names[0]} and {names[1]}", title_justify="left")
    shown.add_column("part")
    shown.add_column("launch", overflow="fold", max_width=90)
    for heading in ("times", "then", "MB", "then", "registers", "spills"):
        shown.add_column(heading, justify="right")
    for change in changes:
        figures = [_then(change["code"], name) for name in ("registers", "stack")]
        style = None if all(change["times"]) else "red" if change["times"][1] else "green"
        moved = (f"{n / 1e6:.2f}" for n in change["bytes"])
        shown.add_row(change["part"], change["launch"], *map(str, change["times"]), *moved, *figures, style=style)
    console.print(shown if changes else f"{names[0]} and {names[1]} launch the same")
    console.print(_totals(before, after, names))


def _then(codes: list[dict | None], name: str) -> str:
    """A figure of the code, before and after where it changed."""
    found = ["–".join(map(str, code[name])) for code in codes if code]
    return " → ".join(dict.fromkeys(found))


def _totals(before: dict, after: dict, names: tuple[str, str]) -> Table:
    shown = Table(title="by op", title_justify="left", caption=f"launches and GB: of {names[0]}, then of {names[1]}")
    shown.add_column("op")
    for heading in ("launches", "then", "GB", "then", "more or less"):
        shown.add_column(heading, justify="right")
    sides = [by_op(result) for result in (before, after)]
    whole = [0, 0, 0, 0]
    for op in dict.fromkeys([*sides[0], *sides[1]]):
        rows = [side.get(op) for side in sides]
        launches = [
            sum(row[f"{part} launches"] for part in ("forward", "backward", "step")) if row else 0 for row in rows
        ]
        moved = [row["bytes"] if row else 0 for row in rows]
        whole = [a + b for a, b in zip(whole, [*launches, *moved], strict=True)]
        _add_row(shown, op, launches, moved)
    shown.add_section()
    _add_row(shown, "step", whole[:2], whole[2:])
    return shown


def _add_row(table: Table, op: str, launches: list[int], moved: list[int]) -> None:
    gigabytes = [f"{n / 1e9:.3f}" for n in moved]
    table.add_row(op, *map(str, launches), *gigabytes, f"{(moved[1] - moved[0]) / 1e9:+.3f}")


def result(before: dict, after: dict, names: tuple[str, str]) -> dict:
    """For JSON: both sides and what differs."""
    sides = dict(zip(("before", "after"), (before, after), strict=True))
    return {"bench": "compiled-diff", "names": list(names), "changes": difference(before, after), **sides}
