"""The tables of `bench.compiled`: the launches in order, folded where layers repeat them, and their totals beside the floor."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.compiled.record import KINDS, PARTS

SMALL = 1024
"""Bytes. Calls outside of compiled code that move less, one after another, share a line: they are arithmetic on scalars."""


# ----------------------------------------------------------------------------------------------------------------- fold


@dataclass(frozen=True)
class Block:
    """Launches that come `times` times, one group after the other."""

    times: int
    rows: list[dict]


def fold(rows: list[dict]) -> list[Block]:
    """The launches with what repeats written once: at each place the repetition that takes in most launches."""
    keys = [(row["title"], row["op"], row["read"], row["written"]) for row in rows]
    blocks: list[Block] = []
    at = 0
    while at < len(rows):
        length, times = max(
            ((n, _repeats(keys, at, n)) for n in range(1, (len(rows) - at) // 2 + 1)),
            key=lambda found: ((found[1] - 1) * found[0], -found[0]),
            default=(1, 1),
        )
        if times == 1:
            length = 1
        if times == 1 and blocks and blocks[-1].times == 1:
            blocks[-1].rows.append(rows[at])
        else:
            blocks.append(Block(times, rows[at : at + length]))
        at += length * times
    return blocks


def _repeats(keys: list[Any], at: int, length: int) -> int:
    """How many times the `length` keys from `at` on come there one after another."""
    times = 1
    while keys[at : at + length] == keys[at + times * length : at + (times + 1) * length]:
        times += 1
    return times


# --------------------------------------------------------------------------------------------------------------- in order


def show(result: dict, console: Console) -> None:
    """Print a result: its parts in order, then the totals."""
    for part in PARTS:
        rows = [row for row in result["launches"] if row["part"] == part]
        console.print(_table(part, rows))
    console.print(_totals(result))
    console.print(_kinds(result))
    for line in remarks(result):
        console.print(line, highlight=False)


def _table(part: str, rows: list[dict]) -> Table:
    moved = sum(row["read"] + row["written"] for row in rows)
    often = "once a step" if part in ("start", "update") else "once a micro-step"
    shown = Table(title=f"{part}, {often}: {len(rows)} launches, {moved / 1e9:.3f} GB", title_justify="left")
    shown.add_column("times", justify="right")
    shown.add_column("launch", overflow="fold")
    shown.add_column("for")
    for heading in ("MB read", "written", "registers", "spills", "load/store"):
        shown.add_column(heading, justify="right")
    shown.add_column("asked for in")
    for block in fold(joined(rows)):
        is_layer = block.times > 1 and len(block.rows) > 1
        if is_layer:
            shown.add_section()
        for row in block.rows:
            figures = (f"{row['read'] / 1e6:.2f}", f"{row['written'] / 1e6:.2f}", *_code(row["code"]))
            style = {"copy": "red", "fallback": "red"}.get(row["kind"])
            times = str(block.times * row.get("calls", 1))
            shown.add_row(times, label(row), row["op"], *figures, row["site"], style=style)
        if is_layer:
            shown.add_section()
    return shown


def label(row: dict) -> str:
    """What a row says of a launch that is not ours."""
    return {
        "generated": f"Inductor: {row['title']}",
        "copy": f"COPY {row['title']}",
        "fallback": f"FALLBACK {row['title']}",
    }.get(row["kind"], row["title"])


def joined(rows: list[dict]) -> list[dict]:
    """The launches, with calls on scalars that follow each other in one row, whose `calls` says how many they are."""
    found: list[dict] = []
    small: list[dict] = []
    for row in [*rows, None]:
        if row is not None and row["kind"] == "eager" and row["read"] + row["written"] < SMALL:
            small.append(row)
            continue
        if small:
            names = Counter(x["name"] for x in small)
            title = "scalars: " + ", ".join(name if n == 1 else f"{n} {name}" for name, n in names.items())
            moved = {figure: sum(x[figure] for x in small) for figure in ("read", "written")}
            found.append(small[0] | moved | {"title": title, "calls": len(small)})
            small = []
        if row is not None:
            found.append(row)
    return found


def _code(code: dict | None) -> tuple[str, str, str]:
    """Registers, spills and the widest accesses: least and most where Inductor chooses on the GPU."""
    if code is None:
        return "", "", ""
    registers, spills, loads, stores = (
        "–".join(map(str, code[name])) for name in ("registers", "stack", "widest_load", "widest_store")
    )
    return registers, spills, f"{loads}/{stores}"


# ---------------------------------------------------------------------------------------------------------------- totals


def _totals(result: dict) -> Table:
    """Launches and bytes by op, beside the floor."""
    shown = Table(
        title=f"{heading(result)}, by op",
        title_justify="left",
        caption="floor: each op reads its inputs and writes its outputs once (bench.roofline). Caches are not in the count.",
    )
    shown.add_column("op")
    for name in ("launches: forward", "backward", "once a step", "floor", "GB: forward", "backward", "once a step"):
        shown.add_column(name, justify="right")
    for name in ("GB", "floor", "above floor"):
        shown.add_column(name, justify="right")
    totals = by_op(result)
    whole = {name: sum(row[name] for row in totals.values()) for name in next(iter(totals.values()))}
    for op, row in [*totals.items(), ("step", whole)]:
        if op == "step":
            shown.add_section()
        floor = row["floor bytes"]
        above = f"{(row['bytes'] - floor) / 1e9:+.3f}"
        shown.add_row(
            op,
            *(f"{row[f'{part} launches']:,}" for part in ("forward", "backward", "step")),
            f"{row['floor launches']:,}",
            *(f"{row[f'{part} bytes'] / 1e9:.3f}" for part in ("forward", "backward", "step")),
            f"{row['bytes'] / 1e9:.3f}",
            f"{floor / 1e9:.3f}",
            above,
        )
    return shown


def by_op(result: dict) -> dict[str, dict[str, int]]:
    """By op: launches and bytes of each part (start and update together as `step`), all bytes, and the floor's of both."""
    ops = dict.fromkeys([*result["floor"], *(row["op"] for row in result["launches"])])
    totals = {}
    for op in ops:
        rows = [row for row in result["launches"] if row["op"] == op]
        found: dict[str, int] = {}
        for part, among in (("forward", ["forward"]), ("backward", ["backward"]), ("step", ["start", "update"])):
            of_part = [row for row in rows if row["part"] in among]
            found[f"{part} launches"] = len(of_part)
            found[f"{part} bytes"] = sum(row["read"] + row["written"] for row in of_part)
        floor = result["floor"].get(op, {"launches": 0, "bytes": 0})
        found |= {
            "bytes": sum(row["read"] + row["written"] for row in rows),
            "floor launches": floor["launches"],
            "floor bytes": floor["bytes"],
        }
        totals[op] = found
    return totals


def _kinds(result: dict) -> Table:
    """Launches and bytes by who wrote them."""
    shown = Table(title="by kind", title_justify="left")
    shown.add_column("kind")
    shown.add_column("what it is")
    for name in ("launches", "GB", "spills"):
        shown.add_column(name, justify="right")
    for kind, meaning in KINDS.items():
        rows = [row for row in result["launches"] if row["kind"] == kind]
        spills = [max(row["code"]["stack"]) for row in rows if row["code"]]
        moved = sum(row["read"] + row["written"] for row in rows)
        spilled = f"{sum(map(bool, spills))}" if spills else ""
        shown.add_row(kind, meaning, f"{len(rows):,}", f"{moved / 1e9:.3f}", spilled)
    return shown


def heading(result: dict) -> str:
    """What a result is of."""
    shape = f"{result['batch_size']} x {result['sequence_length']} tokens, {result['layers']} layers"
    packed = ", packed documents" if result["packed"] else ""
    return f"{result['preset']} ({shape}{packed}), kernels {result['kernels']}, built for {result['built_for']}, not measured"


def remarks(result: dict) -> list[str]:
    """What deserves a word: copies, fallbacks and spills by name, and how many launches a whole step makes."""
    rows = result["launches"]
    lines = []
    for kind, word in (("copy", "copies in compiled code"), ("fallback", "fallbacks to PyTorch's own kernels")):
        found = [row for row in rows if row["kind"] == kind]
        moved = sum(row["read"] + row["written"] for row in found)
        names = "; ".join(f"{n} x {title}" for title, n in Counter(row["title"] for row in found).items())
        lines.append(f"{word}: {len(found)}, {moved / 1e9:.3f} GB{': ' + names if names else ''}")
    spilled = sorted({row["name"] for row in rows if row["code"] and max(row["code"]["stack"])})
    lines.append(f"kernels that spill: {', '.join(spilled) or 'none'}")
    lines.append(
        f"a step of {result['micro_steps']} micro-steps: {result['step_launches']:,} launches (a library call counts as one)"
    )
    return lines
