"""README's table of faults, from the tests that inject them: `python -m tests.support.faults` writes it.

A test of a fault is marked with what happens and what comes of it, in words for the README:

    @pytest.mark.fault("the newest checkpoint is damaged", "the file is named, and the checkpoints to go on from")

The marks are read from the source of the tests, so that the table needs no test to be run or imported.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- faults: written by python -m tests.support.faults -->", "<!-- end of faults -->"


def collect(tests: Path = ROOT / "tests") -> list[tuple[str, str, Path]]:
    """What happens, what comes of it and the file of the test, by file and line; several tests of a fault give one row.

    Raises ValueError for a mark without two literal texts, and for a fault that has two outcomes.
    """
    rows: dict[str, tuple[str, Path]] = {}
    for path in sorted(tests.rglob("test_*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in sorted(calls, key=lambda call: call.lineno):
            if ast.unparse(call.func) != "pytest.mark.fault":
                continue
            words = [word.value for word in call.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            if len(words) != 2 or len(call.args) != 2 or call.keywords:
                raise ValueError(
                    f"{path}:{call.lineno}: a fault is marked with two texts: what happens, what comes of it"
                )
            fault, outcome = words
            if rows.setdefault(fault, (outcome, path))[0] != outcome:
                raise ValueError(f"{path}:{call.lineno}: {fault!r} has another outcome in {rows[fault][1]}")
    return [(fault, outcome, path) for fault, (outcome, path) in rows.items()]


def table(rows: list[tuple[str, str, Path]]) -> str:
    """The rows as Markdown, each outcome a link to its test."""
    lines = ["| what happens | what comes of it |", "|---|---|"]
    for fault, outcome, path in rows:
        fault, outcome = (words.replace("|", r"\|") for words in (fault, outcome))
        lines.append(f"| {fault} | [{outcome}]({path.relative_to(ROOT).as_posix()}) |")
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """The text of README.md with the table as the tests have it now. ValueError unless it has the table's two marks."""
    written, count = re.subn(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}",
        lambda _: f"{BEGIN}\n{table(collect())}\n{END}",
        readme,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"README.md must have {BEGIN} and {END} once")
    return written


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
