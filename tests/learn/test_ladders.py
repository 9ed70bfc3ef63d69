"""The figures of the ladders: what LEARN.md says, and that each step pays where it says so.

Machine code cannot be built in a process that has Triton's interpreter on, as this one may: it is built in another. Run as
a program, this file prints the figures of every step at the ladder's first size.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from kernels.launch import HAVE_TRITON, triton
from learn import __main__ as learn
from learn.__main__ import MARK, with_tables

ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^triton==([\w.]+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)[1]
pinned_triton = pytest.mark.skipif(
    not HAVE_TRITON or triton.__version__ != PINNED, reason=f"the figures are those of Triton {PINNED}"
)

MORE_IS_BETTER = {"occupancy", "load", "programs"}


def page():
    return learn.PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def built():
    """What this file prints as a program: building every step takes half a minute."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pinned_triton
def test_the_page_says_what_the_compiler_does(built):
    assert with_tables(page(), built["tables"]) == page(), "python -m learn writes it anew"


@pinned_triton
def test_each_step_pays_in_the_figure_that_it_names(built):
    assert [len(steps) for steps in built["ladders"].values()] == [6, 2, 6]
    for ladder, steps in built["ladders"].items():
        assert [bool(step["pays"]) for step in steps[1:5]] == [True] * len(steps[1:5]), ladder
        for before, step in itertools.pairwise(steps):
            if name := step["pays"]:
                better = step[name] > before[name] if name in MORE_IS_BETTER else step[name] < before[name]
                assert better, f"{ladder}, {step['title']}: {name} from {before[name]} to {step[name]}"


@pinned_triton
def test_the_last_step_is_nearly_ours(built):
    for ladder in ("rms_norm", "attention"):
        last, ours = built["ladders"][ladder][-2:]
        assert last["instructions"] == pytest.approx(ours["instructions"], rel=0.2)
        assert last["load"] == ours["load"]
        if ladder == "rms_norm":  # attention's tile is one that a GPU timed: smaller than the ladder's
            assert last["resident"] == ours["resident"]


def test_a_table_is_written_between_its_marks():
    page = f"before\n{MARK.format('attention')}\n| old |\n\n<!-- end -->\nafter\n"
    assert with_tables(page, {"attention": "| new |\n"}) == page.replace("old", "new")


@pytest.mark.parametrize("page", ["nothing", MARK.format("attention"), "<!-- end -->\n" + MARK.format("attention")])
def test_a_page_without_its_marks_is_refused(page):
    with pytest.raises(SystemExit, match=r"LEARN\.md must hold <!-- attention: written"):
        with_tables(page, {"attention": "| new |\n"})


def test_the_lines_that_the_page_quotes_are_those_of_the_steps():
    sources = [
        [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (ROOT / "learn").glob("*.py")
    ]
    quoted = re.findall(r"```python\n(.*?)```", page(), re.DOTALL)
    assert len(quoted) >= 10
    for block in quoted:
        for line in filter(None, map(str.strip, block.splitlines())):
            assert any(line in source for source in sources), f"no step has the line {line!r}"


def test_check_tells_a_page_that_differs_and_writing_puts_it_right(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learn, "HAVE_TRITON", True)
    monkeypatch.setattr(learn, "tables", lambda: {"attention": "| new |\n"})
    monkeypatch.setattr(learn, "PAGE", tmp_path / "LEARN.md")
    learn.PAGE.write_text(MARK.format("attention") + "| old |\n\n<!-- end -->", encoding="utf-8")
    assert learn.main(["--check"]) == 1
    assert "is not as" in capsys.readouterr().out
    assert "old" in page()
    assert learn.main([]) == 0
    assert learn.main(["--check"]) == 0
    assert "new" in page()


if __name__ == "__main__":
    from learn.ladders import (
        ATTENTION,
        ATTENTION_SIZES,
        RMS_NORM,
        RMS_NORM_BACKWARD,
        WIDTHS,
        attention_figures,
        rms_norm_backward_figures,
        rms_norm_figures,
    )

    width = next(iter(WIDTHS))

    def told(step, figures):
        return {"title": step.title, "pays": step.pays, "occupancy": figures.occupancy, **asdict(figures)}

    ladders = {
        "rms_norm": [told(step, rms_norm_figures(step, width)) for step in RMS_NORM],
        "backward": [told(step, rms_norm_backward_figures(step, 288)) for step in RMS_NORM_BACKWARD],
        "attention": [told(step, attention_figures(step, ATTENTION_SIZES[0])) for step in ATTENTION],
    }
    print(json.dumps({"tables": learn.tables(), "ladders": ladders}))
