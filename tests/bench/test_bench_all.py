import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
from rich.console import Console

from bench import all as bench_all
from bench import check, generation, loss_parity
from bench.all import PROJECT, AllBench, Case, cpu_cases, gpu_cases, in_groups, main, run_all
from bench.ops import __main__ as ops
from bench.ops.catalogue import SHEETS
from bench.parity import __main__ as parity
from bench.roofline import __main__ as roofline
from bench.step import __main__ as step
from bench.step import variants as step_variants
from training.errors import UserError

OPTIONS = {
    "bench.check": check.CheckBench,
    "bench.step": step.StepBench,
    "bench.ops": ops.OpsBench,
    "bench.parity": parity.Parity,
    "bench.loss_parity": loss_parity.LossParity,
    "bench.roofline": roofline.Roofline,
    "bench.generation": generation.GenerationBench,
}
CPU_VARIANTS = {"eager"}  # of bench.ops


def python(statement, name, seconds=30, side_by_side=False):
    """A case that runs a statement."""
    return Case(name, ("timeit", "-n", "1", "-r", "1", statement), seconds, side_by_side)


GOOD = python("print('all is well')", "good")
BAD = python("print('so far'); assert False", "bad")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


def statuses(result):
    return {name: record["status"] for name, record in result["cases"].items()}


def test_a_crash_and_a_hang_cost_one_case_each(tmp_path, console):
    hang = python("import time; time.sleep(60)", "hang", seconds=1)
    result = run_all([BAD, hang, GOOD], tmp_path, 60, console)
    assert statuses(result) == {"bad": "failed", "hang": "timed out", "good": "done"}
    assert list(result["cases"]) == ["bad", "hang", "good"]
    assert result["cases"]["bad"]["exit_status"] == 1
    assert json.loads((tmp_path / "all.json").read_text()) == result
    assert "so far" in (tmp_path / "bad.log").read_text()
    shown = console.file.getvalue()
    assert "all is well" in shown
    assert shown.endswith("left: bad, hang\n")


def test_the_children_of_a_case_end_with_it(tmp_path, console):
    late = tmp_path / "late"
    grandchild = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    run_all([python(child, "parent", seconds=1)], tmp_path, 60, console)
    time.sleep(2)
    assert not late.exists()


def test_a_second_run_skips_what_is_done_and_tries_last_what_failed(tmp_path, console):
    marks = tmp_path / "marks"
    first, second, third = (
        python(f"open({str(marks)!r}, 'a').write('{name}'); assert {good}", name)
        for name, good in (("a", False), ("b", True), ("c", True))
    )
    run_all([first, second], tmp_path, 60, console)
    result = run_all([first, second, third], tmp_path, 60, console)
    assert marks.read_text() == "abca"
    assert statuses(result) == {"a": "failed", "b": "done", "c": "done"}


def test_when_the_time_is_up_the_rest_is_left(tmp_path, console):
    slow = python("import time; time.sleep(60)", "slow")
    result = run_all([slow, GOOD], tmp_path, 1, console)
    assert statuses(result) == {"slow": "cut short"}  # which is no fault of its own
    assert console.file.getvalue().endswith("left: slow, good\n")
    assert run_all([GOOD], tmp_path / "never made", 0, console)["cases"] == {}


def test_a_stop_ends_the_case_and_keeps_the_ones_before(tmp_path):
    program = f"""
import sys
from pathlib import Path
from bench import all as bench_all
from bench.all import AllBench, Case, command, main
sleep = Case("sleep", ("timeit", "-n", "1", "-r", "1", "open({str(tmp_path / "started")!r}, 'w'); import time; time.sleep(2); \\
open({str(tmp_path / "late")!r}, 'w')"), 60)
bench_all.cpu_cases = bench_all.gpu_cases = lambda: [Case("good", ("timeit", "-n", "1", "1"), 60), sleep]
command.run(AllBench, "", main)
"""
    arguments = [sys.executable, "-c", program, "--out", str(tmp_path)]
    process = subprocess.Popen(arguments, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "started").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out.endswith("left: sleep\n")
    assert err == "stopped; what was measured so far is kept\n"
    assert statuses(json.loads((tmp_path / "all.json").read_text())) == {"good": "done"}
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_what_is_run_on_a_gpu_comes_in_the_order_of_its_value():
    names = [case.name for case in gpu_cases()]
    kinds = ["check", "tests-kernels", "step-reference", "ops-rms_norm", "step-124m", "step-llama3.2-1b", "loss-parity"]
    assert [name for name in names if name in kinds] == kinds
    assert len(set(names)) == len(names)


def test_the_first_four_minutes_are_checks_and_tests_side_by_side_and_the_step_by_itself():
    first, second, *rest = in_groups(gpu_cases())
    assert [case.name for case in first] == ["check", "compile-reference", "tests-kernels"]
    assert [case.name for case in second] == ["step-reference"]
    assert "--profile" in second[0].arguments
    assert max(case.seconds for case in first) <= 150
    assert all(case.name.startswith("tests-") for group in rest if len(group) > 1 for case in group)


def test_what_is_only_compiled_leaves_no_figures(tmp_path):
    (compiled,) = (case for case in gpu_cases() if case.name.startswith("compile-"))
    assert "--json" not in compiled.command(tmp_path)


def test_the_output_of_what_is_only_compiled_is_shown_where_it_failed(tmp_path, console):
    quiet = [replace(case, json=False) for case in (GOOD, BAD)]
    run_all(quiet, tmp_path, 60, console)
    shown = console.file.getvalue()
    assert "all is well" not in shown
    assert "so far" in shown


def test_cases_that_take_no_times_run_side_by_side(tmp_path, console):
    for_the_other = """import os, time; open({mine!r}, "w"); end = time.time() + 20
while not os.path.exists({other!r}): time.sleep(0.01); assert time.time() < end"""
    marks = str(tmp_path / "a"), str(tmp_path / "b")
    first, second = (
        python(for_the_other.format(mine=mine, other=other), name, side_by_side=True)
        for name, mine, other in (("first", *marks), ("second", *reversed(marks)))
    )
    hang = python("import time; time.sleep(60)", "hang", seconds=1, side_by_side=True)
    result = run_all([hang, first, second, GOOD], tmp_path, 60, console)
    assert statuses(result) == {"hang": "timed out", "first": "done", "second": "done", "good": "done"}


def test_groups_keep_the_order():
    cases = [python("1", name, side_by_side=together) for name, together in zip("abcde", (1, 1, 0, 0, 1), strict=True)]
    assert [[case.name for case in group] for group in in_groups(cases)] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_all_cases_compile_into_one_place_that_the_environment_may_name(tmp_path, console, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    for name in ("one", "two"):
        show = "import os; print(os.environ['TORCHINDUCTOR_CACHE_DIR'], os.environ['TRITON_CACHE_DIR'])"
        run_all([python(show, name)], tmp_path, 60, console)
    places = [(tmp_path / f"{name}.log").read_text().splitlines()[0].split() for name in ("one", "two")]
    assert places[0] == places[1]
    assert places[0][0].startswith(tempfile.gettempdir())
    assert places[0][1] == "/mine"


@pytest.mark.parametrize("case", [*gpu_cases(), *cpu_cases()], ids=lambda case: case.name)
def test_every_command_line_is_one_that_its_program_takes(case):
    module, *arguments = case.arguments
    assert importlib.util.find_spec(module)
    if module in OPTIONS:
        options = tyro.cli(OPTIONS[module], args=case.command(PROJECT)[3:])
        assert set(getattr(options, "variants", ())) <= {*step_variants.VARIANTS, *CPU_VARIANTS}
    else:
        assert module == "pytest"
        assert all((PROJECT / argument).exists() for argument in arguments if argument.startswith("tests/"))


def test_the_ops_that_have_kernels_are_all_measured():
    wanted = [argument for case in gpu_cases() for argument in case.arguments if "bench.ops" in case.arguments]
    assert all(any(name in op for name in wanted) for op in SHEETS)


def test_the_benchs_own_commands_write_into_the_folder(tmp_path):
    assert Case("x", ("bench.step",), 1).command(tmp_path)[-2:] == ["--json", str(tmp_path / "x.json")]
    assert "--json" not in GOOD.command(tmp_path)


def test_without_a_gpu_a_tiny_version_runs_and_says_so(tmp_path, console, monkeypatch):
    monkeypatch.setattr(bench_all.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_all, "cpu_cases", lambda: [GOOD])
    main(AllBench(out=str(tmp_path / "new" / "folder")), console)
    assert (tmp_path / "new" / "folder" / "good.log").exists()
    shown = console.file.getvalue().replace("\n", " ")
    assert shown.count("no GPU here") == 1
    assert "step-llama3.2-1b" in shown


def test_the_folder_is_named_after_the_day_and_the_device(console, monkeypatch, tmp_path):
    folders = []
    monkeypatch.setattr(bench_all, "PROJECT", tmp_path)
    monkeypatch.setattr(bench_all, "run_all", lambda cases, folder, *rest: folders.append(folder) or {"cases": {}})
    monkeypatch.setattr(bench_all.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_all.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    main(AllBench(), console)
    assert folders[0].parent == tmp_path / "bench" / "results"
    assert folders[0].name == f"{bench_all.date.today()}-nvidia-h100-80gb-hbm3"


def test_a_failed_case_is_the_exit_status(tmp_path, console, monkeypatch):
    monkeypatch.setattr(bench_all.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_all, "cpu_cases", lambda: [BAD])
    with pytest.raises(SystemExit) as stopped:
        main(AllBench(out=str(tmp_path)), console)
    assert stopped.value.code == 1


def test_mistakes_are_named(tmp_path, console):
    with pytest.raises(UserError, match=r"--minutes is -1.0; it must be more than 0"):
        main(AllBench(minutes=-1.0), console)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out is .*file, which can't be a folder"):
        main(AllBench(out=str(tmp_path / "file")), console)
    (tmp_path / "all.json").write_text("{")
    with pytest.raises(UserError, match=r"all.json is not what an earlier run left there"):
        main(AllBench(out=str(tmp_path)), console)


@pytest.mark.slow
def test_the_tiny_version_measures_and_then_has_nothing_left(tmp_path):
    line = [sys.executable, "-m", "bench.all", "--minutes", "3", "--out", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for wait in (180, 30):
        run = subprocess.run(line, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=wait)
        assert run.returncode == 0, run.stdout + run.stderr
        assert run.stdout.endswith("left: nothing\n")
    assert sorted(path.name for path in Path(tmp_path).glob("*.json")) == [
        "all.json",
        "check.json",
        "ops-smoke.json",
        "step-smoke.json",
    ]
