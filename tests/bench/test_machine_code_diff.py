"""`bench.machine_code --diff`: rows of two commits are matched, what differs is told, and new faults are the exit status."""

import io
import json
import subprocess
import tempfile
from types import SimpleNamespace

import pytest
from rich.console import Console

from bench.machine_code import __main__ as machine_code
from bench.machine_code import diff as machine_code_diff
from bench.machine_code.__main__ import MachineCodeOptions, run
from bench.machine_code.diff import Change, difference, rows_at, show
from training.errors import UserError

CODE = {
    "registers": 32, "stack": 0, "shared": 0, "warps": 4, "programs": 16, "occupancy": 1.0, "widest_load": 16,
    "widest_store": 16, "matrix": {}, "instructions": {"float": 8, "integer": 20}, "loads": {"x_ptr": 16}, "stores": {},
}  # fmt: skip
SPILL = "spills: 8 bytes a thread, at 255 registers"


def row(name="swiglu forward", presets=("reference",), faults=(), constants=(("D", 288), ("BLOCK_M", 4)), **code):
    known = {"arch": "sm_90", "name": name, "presets": list(presets), "faults": list(faults)}
    return known | {"constants": dict(constants), "code": CODE | code}


def figures(old, new):
    (change,) = difference([old], [new])
    return change.figures


# ------------------------------------------------------------------------------------------------------- the difference


def test_equal_rows_have_no_difference():
    assert difference([row(), row("rope forward")], [row(), row("rope forward")]) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({}, {"registers": 40, "programs": 12}, [("registers", 32, 40), ("resident warps", 64, 48)]),
        ({}, {"widest_load": 2, "loads": {"x_ptr": 2}}, [("widest_load", 16, 2), ("narrowest load of x_ptr", 16, 2)]),
        ({"matrix": {"HMMA": 4}}, {"matrix": {"HGMMA": 2}}, [("HMMA", 4, 0), ("HGMMA", 0, 2)]),
        (
            {},
            {"instructions": {"float": 8, "special": 1}},
            [("integer instructions", 20, 0), ("special instructions", 0, 1)],
        ),
        (
            {},
            {"constants": {"D": 288, "BLOCK_M": 8}, "warps": 8},
            [("tile", "4", "8"), ("warps", 4, 8), ("resident warps", 64, 128)],
        ),
    ],
)
def test_figures_that_differ_are_told_before_and_after(old, new, found):
    assert figures(row(**old), row(**new)) == found


def test_a_figure_that_an_older_result_does_not_have_is_left_out():
    old = row(registers=30)
    del old["code"]["instructions"]
    assert figures(old, row()) == [("registers", 30, 32)]


def test_rows_are_matched_by_preset_where_sizes_have_parted():
    old = [row(presets=("reference", "124m", "350m"))]
    new = [row(presets=("reference",)), row(presets=("124m", "350m"), registers=40)]
    (change,) = difference(old, new)
    assert (change.presets, change.figures) == (["124m", "350m"], [("registers", 32, 40)])


def test_rows_of_equal_name_are_matched_by_size_and_then_in_order():
    small, large, other = {"D": 64}, {"D": 128}, {"D": 256}
    old = [row(constants=small), row(constants=large, registers=50)]
    assert difference(old, [row(constants=large, registers=50), row(constants=small)]) == []
    (change,) = difference(old, [row(constants=large, registers=50), row(constants=other, registers=33)])
    assert change.figures == [("registers", 32, 33)]


def test_rows_in_only_one_of_them_are_told():
    before, after = row("rope forward"), row("attention forward", faults=[SPILL])
    gone, new = sorted(difference([row(), before], [row(), after]), key=lambda change: change.only, reverse=True)
    assert (gone.name, gone.only, gone.new_faults) == ("rope forward", "before", [])
    assert (new.name, new.only, new.new_faults) == ("attention forward", "after", [SPILL])


@pytest.mark.parametrize(
    ("stack_before", "stack_after", "new"), [(0, 8, True), (4, 8, True), (8, 8, False), (16, 8, False), (8, 0, False)]
)
def test_a_spill_is_a_new_fault_where_it_was_not_or_was_smaller(stack_before, stack_after, new):
    def spilling(stack):
        return row(stack=stack, faults=[SPILL.replace("8", str(stack), 1)] if stack else [])

    changes = difference([spilling(stack_before)], [spilling(stack_after)])
    assert [fault for change in changes for fault in change.new_faults] == [SPILL] * new


def test_a_second_kind_of_fault_is_new():
    narrow = "loads x_ptr 2 bytes at a time, although its rows are aligned to 16"
    (change,) = difference(
        [row(faults=[narrow.replace("2", "4", 1)])], [row(faults=[narrow, narrow.replace("x_", "y_")])]
    )
    assert change.new_faults == [narrow.replace("x_", "y_")]


# ---------------------------------------------------------------------------------------------------------------- print


def printed(changes):
    console = Console(file=io.StringIO(), width=120)
    show(changes, "v1", console)
    return console.file.getvalue()


def test_the_table_has_a_line_a_figure_and_one_for_the_instructions_and_names_each_kernel_once():
    mix = {"integer": 9, "float": 8, "special": 1234}
    text = printed(difference([row(shared=1024)], [row(registers=40, faults=[SPILL], instructions=mix)]))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert lines == [
        ["swiglu forward", "reference", "registers", "32", "40", "+8"],
        ["", "", "shared", "1,024", "0", "-1,024"],
        ["", "", "instructions", "", "", "special +1,234, integer -11"],
    ]
    assert f"new: sm_90 swiglu forward of reference: {SPILL}" in text


def test_where_nothing_differs_one_line_says_so():
    assert printed([]) == "no figure differs from v1\n"


def test_kernels_of_one_side_are_named_in_a_line():
    changes = [
        Change("sm_90", name, ["124m"], [], [], only)
        for name, only in (("a", "after"), ("a", "after"), ("b", "before"))
    ]
    assert printed(changes) == "sm_90, only here: a\nsm_90, only at v1: b\n"


# ----------------------------------------------------------------------------------------------------------- the commit

PROGRAM = """
import json, sys
assert "--bad" not in sys.argv, "no such option"
with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
    json.dump({"rows": [dict.fromkeys(KEYS, sys.argv)]}, file)
sys.exit(1)  # as where a kernel is at fault
""".replace("KEYS", repr(machine_code_diff.KEYS))


def git(folder, *arguments):
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """v0 has no bench, v1 and v2 have one that tells its arguments, as a file and as a room, and the working tree a broken one."""
    root, temporary = tmp_path / "project", tmp_path / "temporary"
    (root / "bench").mkdir(parents=True)
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    git(root, "init")
    git(root, "commit", "--allow-empty", "-m", "first")
    git(root, "tag", "v0")
    (root / "bench" / "__init__.py").touch()
    (root / "bench" / "machine_code.py").write_text(PROGRAM)
    git(root, "add", ".")
    git(root, "commit", "-m", "second")
    git(root, "tag", "v1")
    (root / "bench" / "machine_code.py").unlink()
    (root / "bench" / "machine_code").mkdir()
    (root / "bench" / "machine_code" / "__init__.py").touch()
    (root / "bench" / "machine_code" / "__main__.py").write_text(PROGRAM)
    git(root, "add", ".")
    git(root, "commit", "-m", "third")
    git(root, "tag", "v2")
    (root / "bench" / "machine_code" / "__main__.py").write_text("raise SystemExit('of the working tree')")
    yield root
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("revision", ["v1", "v2"])
def test_the_program_of_the_commit_runs_with_the_selection_and_its_folder_is_removed(repository, revision):
    (found,) = rows_at(revision, ["--arch", "sm_90"], Console(quiet=True), repository)
    assert found["name"][1:4] == ["--arch", "sm_90", "--json"]
    assert not found["name"][0].startswith(str(repository))


@pytest.mark.parametrize(
    ("revision", "selection", "message"),
    [
        ("v3", [], "--diff is 'v3', which names no commit of .*project"),
        ("--all", [], "--diff is '--all', which names no commit"),
        ("v0", [], "--diff is 'v0', which has no bench.machine_code yet|which has no files"),
        ("v1", ["--bad"], "bench.machine_code --bad fails at v1: AssertionError: no such option"),
    ],
)
def test_what_cannot_be_built_at_a_commit_is_said(repository, revision, selection, message):
    with pytest.raises(UserError, match=message):
        rows_at(revision, selection, Console(quiet=True), repository)


def test_a_result_of_an_older_format_is_refused(repository, monkeypatch):
    monkeypatch.setattr(machine_code_diff, "KEYS", (*machine_code_diff.KEYS, "colour"))
    with pytest.raises(UserError, match=r"whose bench.machine_code does not write yet: colour"):
        rows_at("v1", [], Console(quiet=True), repository)


def test_the_folder_is_removed_after_ctrl_c_too(repository, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine_code_diff, "_built", stopped)
    with pytest.raises(KeyboardInterrupt):
        rows_at("v1", [], Console(quiet=True), repository)


def test_outside_of_a_git_checkout_there_is_nothing_to_compare_with(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match=r"--diff compares with a commit, and .* is not a git checkout"):
        rows_at("HEAD", [], Console(quiet=True), tmp_path)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(("before", "status"), [([], 1), ([SPILL], 0)])
def test_the_exit_status_is_1_where_a_fault_is_new_and_0_where_it_was_there(monkeypatch, tmp_path, before, status):
    asked = []
    monkeypatch.setattr(machine_code, "HAVE_TRITON", True)
    monkeypatch.setattr(
        machine_code_diff,
        "rows_at",
        lambda revision, selection, _: asked.append(selection) or [row(faults=before, stack=8)],
    )
    here = SimpleNamespace(result=lambda: row(faults=[SPILL], stack=8))
    monkeypatch.setattr(machine_code, "sweep", lambda options, console: [here])
    options = MachineCodeOptions(
        diff="v1", arch=["sm_90", "sm_80"], kernel="swiglu", jobs=3, json=str(tmp_path / "a.json")
    )
    assert run(options, Console(quiet=True)) == status
    assert asked == [["--arch", "sm_90", "sm_80", "--kernel", "swiglu", "--jobs", "3"]]
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == [here.result()]


def test_git_that_is_not_installed_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--diff needs git, which can't be run"):
        rows_at("HEAD", [], Console(quiet=True), tmp_path)
