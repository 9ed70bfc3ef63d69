"""The tables of LEARN.md, from the machine code of every step: `python -m learn`. No GPU is needed.

Figures depend on Triton; those on the page are of the version that requirements.lock pins. `--check` writes nothing and has
exit status 1 where the page says something else than the compiler does.
"""

import argparse
import os
import sys
from pathlib import Path

from kernels.launch import HAVE_TRITON

PAGE = Path(__file__).parents[1] / "LEARN.md"
MARK = "<!-- {}: written by python -m learn -->\n"
END = "<!-- end -->"


def tables() -> dict[str, str]:
    """What stands behind each mark of the page."""
    import triton

    from learn import ladders

    made_with = f"Triton {triton.__version__}, sm_90, bfloat16.\n\n"
    norms = [
        f"**{ladders.ROWS:,} rows of {width}** ({name})\n\n{_rms_norm(width)}" for width, name in ladders.WIDTHS.items()
    ]
    sizes = [
        f"**B {size.batch}, T {size.time}, {size.q_heads} and {size.k_heads} heads, D {size.head_dim}** ({size.name})\n\n"
        f"{_attention(size)}"
        for size in ladders.ATTENTION_SIZES
    ]
    return {
        "rms_norm": made_with + "\n".join(norms),
        "rms_norm backward": made_with + _rms_norm_backward(288),
        "attention": made_with + "\n".join(sizes),
    }


def _rms_norm(width: int) -> str:
    from learn.ladders import RMS_NORM, ROWS, rms_norm_figures

    rows = []
    for step in RMS_NORM:
        x = rms_norm_figures(step, width)
        rows.append(
            [step.title, str(x.launches), f"{x.bytes / (ROWS * width):.1f}", f"{x.instructions:.1f}", *_machine(x)]
        )
    return _table(["step", "launches", "bytes an element", "instructions an element", *MACHINE], rows)


def _rms_norm_backward(width: int) -> str:
    from learn.ladders import RMS_NORM_BACKWARD, ROWS, rms_norm_backward_figures

    rows = []
    for step in RMS_NORM_BACKWARD:
        x = rms_norm_backward_figures(step, width)
        rows.append([step.title, str(x.launches), f"{x.bytes / (ROWS * width):.1f}", f"{x.programs:,}", *_machine(x)])
    return _table(["backward", "launches", "bytes an element", "programs", *MACHINE], rows)


def _attention(size) -> str:
    from learn.ladders import ATTENTION, attention_figures, scores_computed

    rows = []
    for step in ATTENTION:
        x = attention_figures(step, size)
        computed = f"{scores_computed(step, size, x.tile):.2f}"
        rows.append(
            [step.title, str(x.launches), f"{x.bytes / 1e6:,.0f}", computed, f"{x.instructions:.1f}", *_machine(x)]
        )
    headings = ["step", "launches", "MB", "scores computed for one seen", "instructions a score", *MACHINE]
    return _table(headings, rows)


MACHINE = ["registers", "resident warps", "bytes a load"]


def _machine(x) -> list[str]:
    programs, warps = x.resident
    return [str(x.registers), f"{programs} × {warps} ({x.occupancy:.0%})", str(x.load)]


def _table(headings: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["--:"] * (len(headings) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in (headings, rule, *rows))


def with_tables(page: str, made: dict[str, str]) -> str:
    """The page with each table between its mark and the next end."""
    for name, table in made.items():
        before, mark, rest = page.partition(MARK.format(name))
        _, end, after = rest.partition(END)
        if not (mark and end):
            raise SystemExit(f"LEARN.md must hold {MARK.format(name).strip()} and {END} after it")
        page = f"{before}{mark}\n{table}\n{end}{after}"
    return page


def main(arguments: list[str] | None = None) -> int:
    """Write the page or compare it; 1 where it is compared and differs, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m learn", description="Write the tables of LEARN.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a table differs")
    options = parser.parse_args(arguments)
    if not HAVE_TRITON:
        parser.error("Triton is not installed here (it has no build for this machine?)")
    page = PAGE.read_text(encoding="utf-8")
    made = with_tables(page, tables())
    if not options.check:
        PAGE.write_text(made, encoding="utf-8")
        print("LEARN.md is written")
        return 0
    print("LEARN.md is as the compiler says" if made == page else "LEARN.md is not as the compiler says")
    return int(made != page)


if __name__ == "__main__":
    if "TRITON_INTERPRET" in os.environ:  # kernels that were defined in the interpreter cannot be compiled
        environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "learn", *sys.argv[1:]], environ)
    sys.exit(main())
