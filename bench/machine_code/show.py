"""`python -m bench.machine_code --show KERNEL`: a kernel's loops, and the instructions of the hottest one by source line.

An instruction belongs to the line of the kernel's own file from which it comes, by way of whatever was inlined there. The
compiler mixes the instructions of many lines; they are gathered here, and --whole prints them as they stand.
"""

import linecache
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.machine_code.build import build, compile_specialized, disassemble
from bench.machine_code.disassembly import KINDS, Instruction
from bench.machine_code.loops import Loop, find_loops, hottest, works
from bench.machine_code.rows import Row, sizes, tile
from training.errors import UserError

GLOBAL = ("global load", "global store")
IN_FULL = {"matrix", "shared load", "shared store", "tensor memory", "local memory", "atomic", "special", *GLOBAL}
"""Kinds whose opcodes are told with all that is behind the first dot."""


def choose(name: str, rows: list[Row]) -> Row:
    """The row of that name, else the only one with the name in its own; `NAME:2` is the second of equal names.

    UserError, with the candidates, where it is none or more than one.
    """
    titles = _titles(rows)
    found = [title for title in titles if name == title] or [title for title in titles if name in title]
    if len(found) == 1:
        return titles[found[0]]
    if not found:
        raise UserError(f"--show is {name!r}, which is in none of: {', '.join(titles)}")
    raise UserError(f"--show is {name!r}, which is in more than one; say which: {', '.join(found)}")


def _titles(rows: list[Row]) -> dict[str, Row]:
    counts, titles, seen = Counter(row.name for row in rows), {}, Counter()
    for row in rows:
        seen[row.name] += 1
        titles[row.name if counts[row.name] == 1 else f"{row.name}:{seen[row.name]}"] = row
    return titles


def show(row: Row, console: Console, *, loop: int = 0, whole: bool = False) -> None:
    """Print a kernel's figures, its loops, and loop number `loop` (0: the hottest) or the whole of it.

    UserError for a loop that it does not have. Raises what Triton and its assemblers raise.
    """
    instructions = disassemble(compile_specialized(row.specialized))
    loops = [found for found in find_loops(instructions) if works(found, instructions)]
    if not 0 <= loop <= len(loops):
        raise UserError(f"--loop is {loop}; {row.name} has {len(loops)} loops on {row.arch}, and 0 is the hottest")
    hot = loops[loop - 1] if loop else hottest(loops, instructions)
    source = Path(row.launched.kernel.fn.__code__.co_filename)

    console.print(Text(_figures(row)))
    console.print(_loop_table(instructions, loops, source))
    if whole:
        for line in listing(instructions, loops, source):
            console.print(Text(line), no_wrap=True, overflow="ignore", crop=False)
        return
    body = instructions if hot is None else [instructions[at] for at in hot.body]
    what = "no loop: all of it" if hot is None else f"loop {loops.index(hot) + 1}"
    console.print(line_table(body, source, f"{what}, by line of {source.name}"))
    others = "--loop N takes another loop; " if len(loops) > 1 else ""
    console.print(f"{others}--whole prints every instruction in its place")


def _figures(row: Row) -> str:
    code = build(row.specialized)
    parts = [f"{row.name}, {row.arch}, {' '.join(row.presets)}: {sizes(row.specialized.constants)}".rstrip(": ")]
    parts += [f"tile {tile(row.specialized.constants) or 'none'}", f"{code.warps} warps", f"{code.registers} registers"]
    parts += [f"{code.stack} bytes of stack", f"{code.shared:,} bytes of shared memory", f"{code.programs} resident"]
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------------------------- loops


def counts(instructions: list[Instruction]) -> dict[str, str]:
    """How many there are by kind, of those kinds that occur; accesses to global memory by width too: `4×16 B`."""
    found: dict[str, str] = {}
    for kind in KINDS:
        these = [x for x in instructions if x.kind == kind]
        if kind in GLOBAL:
            widths = sorted(Counter(x.width for x in these).items(), reverse=True)
            found[kind] = " ".join(f"{n}×{width} B" for width, n in widths)
        elif these:
            found[kind] = str(len(these))
    return {kind: text for kind, text in found.items() if text}


def _loop_table(instructions: list[Instruction], loops: list[Loop], source: Path) -> Table:
    bodies = {"all": instructions} | {
        f"{'  ' * (loop.depth - 1)}{i}": [instructions[at] for at in loop.body] for i, loop in enumerate(loops, 1)
    }
    columns = counts(instructions)
    shown = Table("loop", "lines", title="instructions by kind; a loop counts those of the loops in it too")
    for column in ("all", *columns):
        shown.add_column(column, justify="right")
    for name, body in bodies.items():
        lines = [line for x in body if (line := source_line(x, source))]
        span = f"{min(lines)}-{max(lines)}" if lines else "unknown"
        counted = counts(body)
        shown.add_row(name, span, str(len(body)), *(counted.get(kind, "") for kind in columns))
    return shown


# ---------------------------------------------------------------------------------------------------------------- lines


def source_line(instruction: Instruction, source: Path) -> int:
    """The innermost line of a file that an instruction comes from; 0 where it is not known."""
    return next((line for file, line in instruction.stack if file == source.name), 0)


def line_table(instructions: list[Instruction], source: Path, title: str) -> Table:
    """A row a source line, in the order of the source: how many instructions, and which."""
    shown = Table(title=title)
    shown.add_column("line", justify="right")
    shown.add_column("source", overflow="ellipsis", no_wrap=True, max_width=64)
    shown.add_column("all", justify="right")
    shown.add_column("instructions", overflow="fold")
    by_line: dict[int, list[Instruction]] = {}
    for instruction in instructions:
        by_line.setdefault(source_line(instruction, source), []).append(instruction)
    for line, these in sorted(by_line.items()):
        text = _source(source, line) if line else "(made by the compiler)"
        shown.add_row(str(line or ""), Text(text), str(len(these)), Text(opcodes(these)))
    return shown


def opcodes(instructions: list[Instruction]) -> str:
    """`2 HGMMA.64x64x16.F32.BF16, 16 FADD, 9 integer`: by kind, then by number."""
    found: Counter[tuple[int, str]] = Counter()
    for x in instructions:
        name = x.opcode if x.kind in IN_FULL else x.opcode.split(".")[0]
        found[KINDS.index(x.kind), x.kind if x.kind in ("integer", "control") else name] += 1
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -item[1]))
    return ", ".join(f"{n} {name}" for (_, name), n in ordered)


def listing(instructions: list[Instruction], loops: list[Loop], source: Path) -> list[str]:
    """Every instruction in its place: the loops that it is in, its text, and the source line where that changes."""
    lines, last = [], None
    inside: dict[int, list[int]] = {}
    for number, loop in enumerate(loops, 1):
        for at in loop.body:
            inside.setdefault(at, []).append(number)
    for at, instruction in enumerate(instructions):
        line = source_line(instruction, source)
        annotation = f"{line:4}  {_source(source, line)}" if line and line != last else ""
        where = ".".join(map(str, inside.get(at, [])))
        branch = f" -> {instruction.target}" if instruction.target is not None else ""
        lines.append(f"{where:>5} {at:5}  {instruction.text + branch:72}  {annotation}".rstrip())
        last = line or last
    return lines


def _source(source: Path, line: int) -> str:
    return linecache.getline(str(source), line).strip()
