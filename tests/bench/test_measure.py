import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import command, measure
from bench.measure import GpuInstant, Interrupted, Timing, environment, time_in_turn, write_json
from bench.ops import __main__ as ops
from bench.ops.rows import OpRow
from bench.step import __main__ as step
from model.flops import Cost
from training.errors import UserError


class Clock:
    """A clock that stands still but for the calls made of it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def call(self, *seconds):
        """A call that takes so many seconds, one figure a turn."""
        turns = iter(seconds)

        def take():
            self.now += next(turns)

        return take


def test_the_median_is_of_the_turns_after_the_warm_up():
    clock = Clock()
    timing = time_in_turn({"a": clock.call(50.0, 40.0, 3.0, 1.0, 8.0)}, repeats=3, warmup=2, clock=clock)
    assert timing == {"a": Timing(median=3.0, minimum=1.0, maximum=8.0, repeats=3)}


def test_a_stop_before_the_first_counted_turn_has_nothing_to_keep():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        time_in_turn({"a": stop}, repeats=3)
    assert not isinstance(stopped.value, Interrupted)


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    time_in_turn(calls, repeats=2, warmup=1)
    assert "".join(order) == "abcabcabc"


def test_what_comes_before_a_call_is_told_its_name_and_is_not_in_its_time():
    clock, told = Clock(), []

    def before(name):
        told.append(name)
        clock.now += 1000.0

    timing = time_in_turn({"a": clock.call(2.0), "b": clock.call(5.0)}, repeats=1, warmup=0, clock=clock, before=before)
    assert [timing["a"].median, timing["b"].median] == [2.0, 5.0]
    assert told == ["a", "b"]


def test_progress_tells_warm_up_from_counted_runs():
    said = []
    time_in_turn({"a": lambda: None}, repeats=2, warmup=1, progress=said.append)
    assert said == ["a, warm-up", "a, run 1 of 2", "a, run 2 of 2"]


@pytest.fixture
def twice_as_slow():
    """Timings of a kernel and of what takes twice its time, by a clock that is not ours."""
    clock = Clock()
    calls = {
        "copy": clock.call(9e-6, 3e-6, 2e-6),
        "triton": clock.call(9e-6, 4e-6, 4e-6),
        "compiled": clock.call(9e-6, 8e-6, 8e-6),
    }
    return time_in_turn(calls, repeats=2, warmup=1, clock=clock)


def test_a_planted_slowdown_of_two_is_reported_as_two_by_the_ops_bench(twice_as_slow):
    row = OpRow("swiglu", "", "", "forward", 8000, 0, ops.speeds(twice_as_slow, Cost(8000)), {})
    assert row.speedup == pytest.approx({"copy": 0.625, "compiled": 2.0})
    assert row.timings["triton"].us == pytest.approx(4.0)
    assert row.timings["triton"].gb_per_s == pytest.approx(2.0)  # 8000 bytes in 4 us
    assert row.timings["triton"].of_copy == pytest.approx(0.625)  # the copy's median is 2.5 us


def test_a_planted_slowdown_of_two_is_reported_as_two_by_the_step_bench(twice_as_slow):
    config = step.defaults("reference")
    rows = [
        {"variant": name, "seconds_to_first_step": 1.0, "peak_memory": None}
        | step.figures(twice_as_slow[name], config, torch.device("cpu"), torch.float32)
        for name in ("compiled", "triton")
    ]
    result = {"preset": "reference", "micro_steps": 4, "batch_size": 128, "sequence_length": 256, "dtype": "float32"}
    result |= {"n_layers": 8, "layers_of_preset": 8, "tokens": {"source": "zipf", "most_frequent": 0.04}}
    table = step.table(result | {"rows": step.against_baseline(rows), "environment": environment()})
    assert table.columns[-1].header == "vs compiled"
    assert list(table.columns[-1].cells) == ["1.00x", "2.00x"]


class FakeEvent:
    """A CUDA event on a time line of milliseconds that the test moves."""

    now = 0.0
    waited_for = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        FakeEvent.waited_for += 1

    def elapsed_time(self, later):
        return later.at - self.at


def test_the_gpus_clock_counts_its_own_seconds_and_is_read_after_all_calls(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)

    def kernel():
        assert FakeEvent.waited_for == 0, "a wait between calls would let the GPU run dry"
        FakeEvent.now += 1.5

    timing = time_in_turn({"a": kernel}, repeats=3, warmup=1, clock=GpuInstant)["a"]
    assert (timing.median, timing.repeats) == (pytest.approx(1.5e-3), 3)
    assert FakeEvent.waited_for == 3


def test_the_wall_clock_waits_for_a_gpu_in_use(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    time_in_turn({"a": lambda: None}, repeats=1, warmup=0)
    assert len(waits) == 2


def test_the_environment_is_json_and_does_not_depend_on_the_working_directory(monkeypatch, tmp_path):
    here = environment()
    assert json.loads(json.dumps(here)) == here
    assert here["torch"] == torch.__version__
    monkeypatch.chdir(tmp_path)
    assert environment()["commit"] == here["commit"]


def test_the_command_line_is_kept_without_the_place_of_the_result(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["x", "--op", "rope", "--json", "/home/me/x.json", "--repeats", "3", "--out=/tmp/y"]
    )
    monkeypatch.setattr(
        "sys.modules", {**sys.modules, "__main__": SimpleNamespace(__spec__=SimpleNamespace(name="bench.ops"))}
    )
    assert environment()["command"] == "python -m bench.ops --op rope --repeats 3"


def test_the_flush_reads_all_of_its_memory(monkeypatch):
    monkeypatch.setattr(measure, "FLUSH_BYTES", 4000)
    flush = measure.gpu_flush(torch.device("cpu"))
    assert flush().shape == ()
    assert flush.__self__.nbytes == 4000


def test_the_environment_of_a_gpu_has_the_state_of_that_gpu_among_others(monkeypatch):
    lines = {
        "nvidia-smi": "GPU-aaaa, 570.1, 345 MHz, 1593 MHz, 71.5 W, 700.0 W, 30\n"
        "GPU-bbbb, 570.1, 1980 MHz, 2619 MHz, 501.2 W, 700.0 W, 61",
        "git": "abc1234",
    }
    monkeypatch.setattr(measure, "_output", lambda line: lines[line[0]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="bbbb"))
    state = environment()["gpu_state"]
    assert state["clocks.sm"] == "1980 MHz"
    assert state["power.draw"] == "501.2 W"
    lines["nvidia-smi"] = None  # as on AMD
    assert environment()["gpu_state"] is None


def test_a_result_is_written_whole_and_replaces_the_one_before(tmp_path):
    path = tmp_path / "new" / "result.json"
    for result in ({"rows": [1]}, {"rows": [1, 2]}):
        write_json(path, result)
        assert json.loads(path.read_text()) == result
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_a_result_that_cannot_be_encoded_leaves_the_one_before(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"rows": [1]})
    with pytest.raises(TypeError):
        write_json(path, {"rows": [object()]})
    assert json.loads(path.read_text()) == {"rows": [1]}


def test_a_path_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    for check in (command.check_writable, lambda path: write_json(path, {})):
        with pytest.raises(UserError, match="can't be written: "):
            check(str(tmp_path / "file" / "result.json"))
    with pytest.raises(UserError, match="can't be written: it is a folder"):
        command.check_writable(str(tmp_path))


def test_asking_whether_a_path_can_be_written_leaves_what_is_there(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("kept")
    command.check_writable(str(path))
    command.check_writable("")
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == "kept"


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UserError("--repeats is 0"), 2, "error: --repeats is 0\n"),
        (KeyboardInterrupt(), 130, "stopped; what was measured so far is kept\n"),
    ],
)
def test_a_mistake_and_a_stop_are_one_line_and_a_status(monkeypatch, capsys, error, status, says):
    def body(options, console):
        raise error

    monkeypatch.setattr("sys.argv", ["ops.py"])
    with pytest.raises(SystemExit) as stopped:
        command.run(ops.OpsBench, "", body)
    assert stopped.value.code == status
    assert capsys.readouterr().err.endswith(says)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ops.py"])
    with pytest.raises(ZeroDivisionError):
        command.run(ops.OpsBench, "", lambda options, console: 1 / 0)


def test_tables_are_wide_where_stdout_is_no_terminal(capsys):
    command.terminal().print("x" * 150)
    assert capsys.readouterr().out == "x" * 150 + "\n"


# ------------------------------------------------------------------------------------------------------- the interpreter


@pytest.mark.parametrize("name", ["compiled", "machine_code", "roofline", "waterfall"])
def test_what_compiles_kernels_leaves_the_interpreter(name, monkeypatch):
    class Left(Exception):
        pass

    def execve(program, arguments, environ):
        assert program == sys.executable
        assert arguments[:3] == [sys.executable, "-m", f"bench.{name}"]
        assert arguments[3:] == ["--preset", "smoke"]
        assert "TRITON_INTERPRET" not in environ
        raise Left

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(command.os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["", "--preset", "smoke"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name=f"bench.{name}.__main__"))
    with pytest.raises(Left):
        importlib.import_module(f"bench.{name}.__main__").main()
