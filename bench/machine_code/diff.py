"""`python -m bench.machine_code --diff COMMIT`: what changed in the machine code between a commit and the working tree.

The commit's files are laid out in a folder of their own, where its own `bench.machine_code` builds the same selection; git's
index, branches and working trees stay as they are, and the folder is removed whatever happens.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import commit
from bench.commit import ROOT
from bench.machine_code.rows import sizes, tile
from training.errors import UserError

KEYS = ("arch", "name", "presets", "constants", "faults", "code")
"""What of a row is read here."""
FIXED = ("warps", "registers", "stack", "shared", "resident warps", "widest_load", "widest_store")
MIX = " instructions"
BY_NAME = {
    "matrix": "{}",
    "instructions": "{}" + MIX,
    "loads": "narrowest load of {}",
    "stores": "narrowest store of {}",
}
"""Figures that are counted by name; one without a name is 0."""
LESS_IS_BETTER = {"registers", "stack", "shared"}
MORE_IS_BETTER = {"resident warps", "widest_load", "widest_store"}


# ----------------------------------------------------------------------------------------------------------- the commit


def rows_at(revision: str, selection: list[str], console: Console, root: Path = ROOT) -> list[dict]:
    """The rows of `bench.machine_code` at a commit of the repository at `root`, as in its JSON.

    selection: its options. UserError where there is no such commit, or where it can't build that.
    """
    with commit.laid_out(revision, root) as folder, console.status(f"building {revision}"):
        return _built(revision, selection, folder)


def _built(revision: str, selection: list[str], folder: Path) -> list[dict]:
    if not commit.has(folder, "bench.machine_code"):
        raise UserError(f"--diff is {revision!r}, which has no bench.machine_code yet")
    result = folder / "result-of-machine-code.json"
    done = commit.run_there(folder, "bench.machine_code", [*selection, "--json", str(result)])
    if not result.exists():  # whatever the status: 1 says both that a kernel is at fault and that Python failed
        raise UserError(
            f"--diff: bench.machine_code {' '.join(selection)} fails at {revision}: {commit.last_words(done.stderr)}"
        )
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    if missing := [key for key in KEYS if any(key not in row for row in rows)]:
        raise UserError(f"--diff is {revision!r}, whose bench.machine_code does not write yet: {', '.join(missing)}")
    return rows


# ------------------------------------------------------------------------------------------------------- the difference


@dataclass
class Change:
    """A kernel whose machine code differs, with the presets for which it does so."""

    arch: str
    name: str
    presets: list[str]
    figures: list[tuple[str, Any, Any]]
    """Name, before, after."""
    new_faults: list[str]
    """What the gate says now and did not say before."""
    only: str = ""
    """before or after, where the kernel is in one of them only."""


def difference(old_rows: list[dict], new_rows: list[dict]) -> list[Change]:
    """What differs between the rows of two results; nothing where no figure does.

    Rows are matched by architecture, name and preset: which presets share a row, and with which tile, may itself have
    changed. Among rows that are equal in these, equal sizes go first, then the order. A figure that one of the results does
    not have, being older, is left out.
    """
    old, new = _by_preset(old_rows), _by_preset(new_rows)
    presets: dict[tuple[int | None, int | None], list[str]] = {}
    for key in dict.fromkeys([*new, *old]):
        for pair in _pairs(old.get(key, []), new.get(key, []), old_rows, new_rows):
            presets.setdefault(pair, []).append(key[2])
    changes = []
    for (before, after), shared in presets.items():
        change = _change(
            None if before is None else old_rows[before], None if after is None else new_rows[after], shared
        )
        if change.only or change.figures or change.new_faults:
            changes.append(change)
    return changes


def _by_preset(rows: list[dict]) -> dict[tuple[str, str, str], list[int]]:
    places: dict[tuple[str, str, str], list[int]] = {}
    for at, row in enumerate(rows):
        for preset in row["presets"]:
            places.setdefault((row["arch"], row["name"], preset), []).append(at)
    return places


def _pairs(
    old: list[int], new: list[int], old_rows: list[dict], new_rows: list[dict]
) -> list[tuple[int | None, int | None]]:
    pairs, left = [], list(old)
    for equal_sizes in (True, False):
        for at in [at for at in new if at not in {after for _, after in pairs}]:
            wanted = sizes(new_rows[at]["constants"])
            for before in left:
                if not equal_sizes or sizes(old_rows[before]["constants"]) == wanted:
                    pairs.append((before, at))
                    left.remove(before)
                    break
    paired = {after for _, after in pairs}
    return [*pairs, *((None, at) for at in new if at not in paired), *((before, None) for before in left)]


def _change(old: dict | None, new: dict | None, presets: list[str]) -> Change:
    known = new or old
    change = Change(known["arch"], known["name"], presets, [], [])
    if new is None:
        change.only = "before"
    elif old is None:
        change.only, change.new_faults = "after", new["faults"]
    else:
        change.figures = _figures(old, new)
        said = {_words(fault) for fault in old["faults"]}
        spills_more = new["code"]["stack"] > old["code"]["stack"]
        change.new_faults = [
            fault
            for fault in new["faults"]
            if _words(fault) not in said or (spills_more and fault.startswith("spills"))
        ]
    return change


def _figures(old: dict, new: dict) -> list[tuple[str, Any, Any]]:
    # Programs that are resident say little where their warps differ too.
    before, after = (
        row["code"] | {"resident warps": row["code"]["programs"] * row["code"]["warps"]} for row in (old, new)
    )
    found = [("tile", tile(old["constants"]), tile(new["constants"]))]
    found += [(name, before[name], after[name]) for name in FIXED if name in before and name in after]
    for figure, label in BY_NAME.items():
        if figure in before and figure in after:
            for name in dict.fromkeys([*before[figure], *after[figure]]):
                found.append((label.format(name), before[figure].get(name, 0), after[figure].get(name, 0)))
    return [(name, was, now) for name, was, now in found if was != now and name != "matrix" + MIX]


def _words(fault: str) -> str:
    return re.sub(r"\b\d[\d,]*", "", fault)


# ---------------------------------------------------------------------------------------------------------------- print


def show(changes: list[Change], revision: str, console: Console) -> None:
    """Print a table an architecture, what is in one only, and the new faults in words; one line where nothing differs."""
    if not changes:
        console.print(f"no figure differs from {revision}")
    for arch in dict.fromkeys(change.arch for change in changes):
        these = [change for change in changes if change.arch == arch]
        if any(change.figures for change in these):
            console.print(table([change for change in these if change.figures], revision))
        for only, where in (("after", "here"), ("before", f"at {revision}")):
            if names := dict.fromkeys(change.name for change in these if change.only == only):
                console.print(f"{arch}, only {where}: {', '.join(names)}")
    for change in changes:
        for fault in change.new_faults:
            console.print(f"[red]new: {change.arch} {change.name}[/red] of {', '.join(change.presets)}: {fault}")


def table(changes: list[Change], revision: str) -> Table:
    """The changed figures on one architecture, one a line, but the instructions of all kinds in one."""
    shown = Table("kernel", "presets", "figure", title=changes[0].arch)
    for heading in (revision, "here"):
        shown.add_column(heading, justify="right")
    shown.add_column("by")
    for change in changes:
        mix = {name.removesuffix(MIX): after - before for name, before, after in change.figures if name.endswith(MIX)}
        lines = []
        for figure, before, after in change.figures:
            if not figure.endswith(MIX):
                by = f"{after - before:+,}" if type(after) is int else ""
                lines.append((figure, *_both(before, after), by, _style(figure, by)))
        if mix:
            largest_first = sorted(mix.items(), key=lambda item: -abs(item[1]))
            lines.append(("instructions", "", "", ", ".join(f"{kind} {by:+,}" for kind, by in largest_first), None))
        for i, (*cells, style) in enumerate(lines):
            shown.add_row(*((change.name, " ".join(change.presets)) if i == 0 else ("", "")), *cells, style=style)
        shown.add_section()
    return shown


def _both(before: Any, after: Any) -> tuple[str, ...]:
    return tuple(f"{x:,}" if type(x) is int else x for x in (before, after))


def _style(figure: str, by: str) -> str | None:
    if figure not in LESS_IS_BETTER | MORE_IS_BETTER:
        return None
    return "green" if by.startswith("-") == (figure in LESS_IS_BETTER) else "red"
