"""What stands around the code says what is there: the Makefile's help, and the pages' links to files."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import faults

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.name for path in ROOT.glob("*.md"))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed here")
def test_make_help_lists_every_target():
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    # As from a shell: a make that runs these tests tells its children to name the folder that they enter.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    printed = subprocess.run(["make", "help"], cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in printed.splitlines()] == targets
    assert all(len(line.split()) > 2 for line in printed.splitlines())


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("page", [name for name in PAGES if name != "CHANGELOG.md"])  # which tells of what was, too
def test_the_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"\b((?:kernels|model|training|bench|learn|tests)/[\w/]+\.py)\b", text)
    assert not [name for name in named if not (ROOT / name).exists() and "OP" not in name]  # OP: a new op's


def test_the_table_of_faults_is_what_the_marks_of_the_tests_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert faults.with_table(readme) == readme, "python -m tests.support.faults writes it"
    assert len(faults.collect()) > 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('@pytest.mark.fault("one")\ndef test(): ...', "two texts"),
        ('@pytest.mark.fault("one", f"{two}")\ndef test(): ...', "two texts"),
        ('pytest.param(1, marks=pytest.mark.fault("a", "b")), pytest.mark.fault("a", "c")', "'a' has another outcome"),
    ],
)
def test_a_mark_of_a_fault_that_says_too_little_or_two_things_is_refused(tmp_path, source, message):
    (tmp_path / "test_it.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        faults.collect(tmp_path)
