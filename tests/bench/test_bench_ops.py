import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bench.archive import Result
from bench.measure import Timing, environment
from bench.ops import __main__ as ops
from bench.ops.__main__ import OpsBench, copy_of, matmul_ceilings, measure, measure_case
from bench.ops.catalogue import SHEETS
from bench.ops.rows import OpRow, Speed
from bench.ops.sheet import Peer, always
from bench.peers import liger
from bench.report.standings import Standings
from kernels.launch import INTERPRETED
from model.flops import Cost
from training.config import TrainConfig
from training.errors import UserError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = TrainConfig(max_seq_len=6, batch_size=2, dim=32, n_heads=4, n_kv_heads=2, ffn_dim=24, vocab_size=256)
CPU, META = torch.device("cpu"), torch.device("meta")

pytestmark = pytest.mark.usefixtures("determinism_put_back")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


# ---------------------------------------------------------------------------------------------------------------- figures


def timings(**us):
    return {name: Timing(1e-6 * x, 1e-6 * x, 1e-6 * x, 1) for name, x in us.items()}


def test_flops_are_reported_as_teraflops_and_as_a_share_of_the_matmul():
    # 8 GFLOP in 20 us are 400 TFLOP/s, half of what the matmul did
    speeds = ops.speeds(timings(copy=2, triton=20, flex=40), Cost(8000, 8 * 10**9), ceiling=800e12)
    assert speeds["triton"].tflops == pytest.approx(400)
    assert speeds["triton"].of_matmul == pytest.approx(0.5)
    assert speeds["flex"].tflops == pytest.approx(200)
    assert speeds["triton"].of_copy == pytest.approx(0.1)
    assert speeds["copy"].tflops is None


def test_where_memory_is_the_limit_there_are_no_flops():
    assert ops.speeds(timings(copy=2, triton=20), Cost(8000))["triton"].tflops is None
    assert ops.speeds(timings(copy=2, triton=20), Cost(1, 10))["triton"].of_matmul is None


def row(flops=0, failed=None, **us):
    speeds = ops.speeds(timings(**us), Cost(8000, flops), ceiling=1e15)
    return OpRow("attention", "124m", "2 x 2", "both", 8000, flops, speeds, failed or {})


def test_the_best_peer_is_the_fastest_and_no_ceiling():
    assert row(copy=2, matmul=1, triton=4, eager=12, flex=5).best_peer == ("flex", 1.25)
    assert row(copy=2, triton=4).best_peer is None
    assert row(copy=2, eager=4).best_peer is None
    assert row(copy=2, eager=4).speedup == {}


def test_a_row_is_read_as_it_was_written():
    written = row(10**9, {"flex": "RuntimeError: no"}, copy=2, triton=20, eager=40)
    written.timings["triton"].peak_memory = 2**29
    as_json = json.loads(json.dumps(written.result()))
    assert as_json["pass"] == "both"
    assert as_json["speedup"] == {"copy": pytest.approx(0.1), "eager": pytest.approx(2)}
    assert "tflops" not in as_json["timings"]["copy"]
    assert OpRow.read(as_json) == written


def test_rows_of_older_and_newer_files_are_read_and_what_is_none_is_refused():
    least = {"us": 1.0, "gb_per_s": 2.0, "of_copy": 0.5}
    older = {"op": "rope_qkv", "size": "124m", "pass": "forward", "timings": {"triton": least}, "failed": {}}
    assert OpRow.read(older).timings["triton"] == Speed(1.0, 2.0, 0.5)
    newer = older | {"colour": "red", "timings": {"triton": least | {"watts": 700}}}
    assert OpRow.read(newer) == OpRow.read(older)
    for key in older:
        with pytest.raises(KeyError, match=key):
            OpRow.read({name: value for name, value in older.items() if name != key})
    with pytest.raises(TypeError):
        OpRow.read(older | {"timings": {"triton": {"us": 1.0}}})


class HotClock:
    """A clock for matrix products that take 1 ms each, and 2 ms once 50 were made."""

    def __init__(self, monkeypatch):
        self.now, self.products, self.rested = 0.0, 0, []
        multiply = torch.Tensor.__matmul__

        def product(a, b):
            self.products += 1
            self.now += 1e-3 if self.products <= 50 else 2e-3
            return multiply(a, b)

        monkeypatch.setattr(torch.Tensor, "__matmul__", product)
        monkeypatch.setattr(ops.time, "sleep", lambda seconds: self.rested.append((self.products, seconds)))

    def __call__(self):
        return self.now


def test_the_matmul_is_timed_after_a_rest_and_when_it_has_run_for_long(monkeypatch):
    clock = HotClock(monkeypatch)
    ceilings = matmul_ceilings(torch.float32, CPU, clock=clock, rest=3.0, seconds=0.1)
    assert clock.rested == [(2, 3.0)]  # after a first call, and its warm-up
    assert ceilings["matmul_tflops"] == pytest.approx(2 * 512**3 / 1e-3 / 1e12)
    assert ceilings["sustained_matmul_tflops"] == pytest.approx(2 * 512**3 / 2e-3 / 1e12)


def test_the_copy_moves_the_bytes_it_is_asked_for():
    target = copy_of(1000, DEVICE)()
    assert target.nbytes == 500
    assert target.any()


# ----------------------------------------------------------------------------------------------------------------- timing


def test_on_a_gpu_each_call_starts_from_cold_caches_and_each_backward_from_a_new_graph(monkeypatch):
    happened = []

    class Instant:
        def __init__(self):
            happened.append("clock")

        def __sub__(self, earlier):
            return 1.0

    class Recorder:
        def __init__(self, op, variant, case):
            pass

        def __getattr__(self, name):
            return lambda direction: happened.append(f"{name} {direction}")

    memory = iter([700, 1000])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(memory))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: happened.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(memory))
    monkeypatch.setattr(ops, "GpuInstant", Instant)
    monkeypatch.setattr(ops, "Contender", Recorder)
    monkeypatch.setattr(ops, "gpu_flush", lambda device: lambda: happened.append("flush"))
    monkeypatch.setattr(ops, "copy_of", lambda n_bytes, device: lambda: happened.append("copy"))
    monkeypatch.setattr(ops, "WARMUP", 0)
    case = SHEETS["swiglu"].case(SMALL, torch.float32, META)
    rows = measure_case("swiglu", "small", case, ["triton"], torch.device("cuda"), repeats=1)
    copy = ["flush", "clock", "copy", "clock"]
    forward = ["prepare forward", "flush", "clock", "run forward", "clock"]
    backward = ["prepare backward", "flush", "clock", "run backward", "clock"]
    assert happened == copy + forward + copy + backward + ["reset", "run both"]
    assert [row.direction for row in rows] == ["forward", "backward", "both"]
    assert rows[2].timings["triton"].peak_memory == 300
    assert rows[2].timings["triton"].us == pytest.approx(2e6)  # the sum of the two
    assert not any(row.timings[name].peak_memory for row in rows[:2] for name in ("copy", "triton"))


def test_a_loss_head_is_timed_without_gradients_and_as_a_whole(uncompiled):
    case = SHEETS["linear_cross_entropy"].case(SMALL, torch.float32, CPU)
    rows = measure_case("linear_cross_entropy", "small", case, ["eager", "twin"], CPU, repeats=1, ceiling=1e12)
    assert [row.direction for row in rows] == ["evaluation", "both"]
    assert [row.flops for row in rows] == [2 * 12 * 32 * 256, 6 * 12 * 32 * 256]
    assert all(row.timings["twin"].of_matmul > 0 for row in rows)


def test_a_planted_delay_shows_in_the_variant_that_has_it(monkeypatch):
    seconds = iter(range(1000))
    clock = SimpleNamespace(now=0.0)

    def slow(x):
        clock.now += 2.0
        return x * 2

    def fast(x):
        clock.now += 1.0
        return x * 2

    monkeypatch.setattr(ops, "clock_of", lambda device: lambda: clock.now + 1e-9 * next(seconds))
    for name, function in {"eager": slow, "triton": fast}.items():
        monkeypatch.setitem(SHEETS["swiglu"].peers, name, Peer(always(function)))
    forward, *_ = measure_case(
        "swiglu", "small", SHEETS["swiglu"].case(SMALL, torch.float32, CPU), ["eager", "triton"], CPU, repeats=3
    )
    assert forward.speedup["eager"] == pytest.approx(2.0, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------- command


def test_on_a_cpu_the_twins_are_measured_and_the_rest_is_named(console, tmp_path, monkeypatch, uncompiled):
    monkeypatch.setattr(liger, "installed", lambda: False)
    path = tmp_path / "ops.json"
    result = measure(OpsBench(op="swiglu", repeats=2, device="cpu", json=str(path)), console)
    assert json.loads(path.read_text()) == result
    assert result["absent"] == {"liger": "not installed", "triton": "no GPU"}
    assert result["deterministic"]
    assert "ceilings" not in result  # of a matmul, which a pointwise op is not measured by
    forward, backward, both = result["rows"]
    assert [row["pass"] for row in result["rows"]] == ["forward", "backward", "both"]
    assert set(forward["timings"]) == {"copy", "eager", "compiled"}
    assert both["bytes"] == forward["bytes"] + backward["bytes"] == 8 * 1024 * 352 * 4
    assert both["timings"]["eager"]["us"] == pytest.approx(
        forward["timings"]["eager"]["us"] + backward["timings"]["eager"]["us"]
    )
    shown = console.file.getvalue()
    assert shown.count("no GPU here") == 1
    assert shown.count("not installed") == 3


def test_what_a_gpu_bench_of_attention_would_compare_is_named_on_a_cpu(console, monkeypatch, uncompiled):
    monkeypatch.setattr(ops, "matmul_ceilings", lambda *_: {"matmul_tflops": 0.5, "sustained_matmul_tflops": 0.25})
    result = measure(OpsBench(op="attention", repeats=1, device="cpu"), console)
    timed = {row["op"]: set(row["timings"]) for row in result["rows"]}
    assert list(timed) == ["attention", "packed_attention", "rope_attention", "decode_attention"]
    assert set(result["absent"]) == {"sdpa-cudnn", "sdpa-efficient", "flex", "varlen", "triton"}
    assert not any(row["failed"] for row in result["rows"])
    assert {"eager", "sdpa-flash"} <= timed["attention"]
    assert {"eager", "sdpa-mask"} <= timed["packed_attention"]
    assert {"eager", "compiled"} <= timed["rope_attention"]
    assert {"eager", "compiled", "sdpa-mask"} <= timed["decode_attention"]
    shown = console.file.getvalue()
    assert shown.count("no GPU here") == 1
    assert shown.count("a matmul in this run: 0.5 TFLOP/s in a burst, 0.25 sustained") == 3


def test_the_report_finds_the_figures_it_is_about(console, monkeypatch, uncompiled, no_gpu):
    monkeypatch.setattr(ops, "matmul_ceilings", lambda *_: {"matmul_tflops": 1.0, "sustained_matmul_tflops": 1.0})
    triton = Peer(SHEETS["linear_cross_entropy"].peers["twin"].make)
    monkeypatch.setitem(SHEETS["linear_cross_entropy"].peers, "triton", triton)
    monkeypatch.setattr("bench.report.standings.LOSS_HEAD_SIZE", "smoke")
    result = measure(OpsBench(op="linear_cross_entropy", repeats=1, device="cpu"), console)
    for timing in result["rows"][-1]["timings"].values():
        timing["peak_memory"] = 2**30
    standings = Standings([Result(Path("x.json"), result)])
    heads = standings.loss_heads("CPU")
    absent = set(result["absent"])  # torch 2.11 has no F.linear_cross_entropy
    assert {"eager", "compiled", "F.linear_cross_entropy", "triton"} - absent <= set(heads)
    assert not {"eager", "compiled", "triton"} & absent
    assert heads["triton"]["memory_of_eager"] == 1
    assert {"tflops", "vs_best", "us"} <= set(standings.op("CPU", "linear_cross_entropy", "smoke", "both"))


def test_memory_is_a_row_of_its_own_where_flops_are_counted():
    both = row(10**9, {"flex": "RuntimeError: no"}, copy=2, eager=40, triton=20)
    both.timings["eager"].peak_memory = 3 * 2**30
    both.timings["triton"].peak_memory = 2**29
    result = {"dtype": "bfloat16", "environment": environment(), "absent": {"liger": "not installed"}}
    result["ceilings"] = {"matmul_tflops": 800.0, "sustained_matmul_tflops": 700.0}
    shown = ops.table("attention", [both], ["eager", "flex", "liger", "triton"], result)
    cells = list(zip(*(column.cells for column in shown.columns), strict=True))
    assert [column.header for column in shown.columns][-3:] == ["TFLOP/s", "of matmul", "vs best peer"]
    assert cells[0] == (
        "124m",
        "2 x 2",
        "both",
        "2.0",
        "40.0",
        "failed",
        "not installed",
        "20.0",
        "50",
        "5%",
        "2.00x eager",
    )
    assert cells[1][2:8] == ("peak GiB", "", "3.00", "", "", "0.50")
    assert "failed: flex: RuntimeError: no" in shown.caption
    assert "800 TFLOP/s in a burst, 700 sustained" in shown.caption


def test_what_fails_is_named_and_the_others_are_measured(console, monkeypatch):
    def fail(case):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setitem(SHEETS["swiglu"].peers, "compiled", Peer(fail))
    options = OpsBench(op="swiglu", repeats=1, device="cpu", variants=["eager", "compiled"])
    row = measure(options, console)["rows"][0]
    assert row["failed"] == {"compiled": "RuntimeError: first line"}
    assert set(row["timings"]) == {"copy", "eager"}
    assert "failed: compiled: RuntimeError: first line" in console.file.getvalue()


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, which stands in for a GPU")
def test_a_kernel_that_fails_is_an_exit_status_and_one_that_runs_is_a_column(console, monkeypatch):
    monkeypatch.setattr(Peer, "why_absent", lambda peer, device, dtype: "")
    monkeypatch.setattr(ops, "size", lambda name: SMALL)
    options = OpsBench(op="swiglu", repeats=1, device="cpu", variants=["eager", "triton"])
    row = measure(options, console)["rows"][2]
    assert row["speedup"]["eager"] == pytest.approx(row["timings"]["eager"]["us"] / row["timings"]["triton"]["us"])
    assert "vs best peer" in console.file.getvalue()
    monkeypatch.setitem(SHEETS["swiglu"].peers, "triton", Peer(lambda case: None))
    with pytest.raises(SystemExit) as stopped:
        measure(options, console)
    assert stopped.value.code == 1


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_switch_of_determinism_is_kept_to_and_written_down(console, deterministic):
    options = OpsBench(op="swiglu", repeats=1, device="cpu", variants=["eager"], deterministic=deterministic)
    assert measure(options, console)["deterministic"] is deterministic
    assert torch.are_deterministic_algorithms_enabled() is deterministic


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "gelu"}, "--op is 'gelu', which is in the name of no op that has a kernel: rms_norm, add_rms_norm"),
        ({"preset": ["gpt2"]}, "--preset is 'gpt2'; allowed: reference, .*, 8192x8192"),
        ({"variants": ["flash"]}, "--variants is 'flash'; allowed: eager, compiled, .*sdpa-flash"),
        ({"repeats": 0}, "--repeats is 0; it must be at least 1"),
        ({"device": "tpu"}, "--device is 'tpu'; allowed: auto"),
    ],
)
def test_mistakes_in_the_options_are_named(console, options, message):
    with pytest.raises(UserError, match=message):
        measure(OpsBench(**options), console)


def run(*arguments):
    """A command as on a machine without a GPU, where sizes are small."""
    # A worker of pytest-xdist says so in its environment, and pytest-benchmark refuses to measure in one.
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    inherited |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    project = Path(__file__).parents[2]
    line = [sys.executable, "-m", *arguments]
    return subprocess.run(line, cwd=project, env=inherited, capture_output=True, text=True, timeout=300)


def test_pytest_benchmark_runs_the_same_cases(tmp_path):
    result = tmp_path / "benchmark.json"
    only = "(swiglu or linear_cross_entropy) and (copy or twin)"
    cases = run("pytest", "bench", "--benchmark-only", "-k", only, f"--benchmark-json={result}")
    assert cases.returncode == 0, cases.stdout
    measured = json.loads(result.read_text())["benchmarks"]
    passes = {"swiglu smoke forward", "swiglu smoke backward"}
    passes |= {"linear_cross_entropy smoke evaluation", "linear_cross_entropy smoke both"}
    assert {m["group"] for m in measured} == passes
    assert all(m["extra_info"]["bytes"] > 0 for m in measured)


@pytest.mark.slow
def test_the_command_runs_on_a_cpu_with_the_compiler():
    bench = run("bench.ops", "--repeats", "3")
    assert bench.returncode == 0, bench.stderr
    assert "compiled" in bench.stdout
    assert "failed" not in bench.stdout
    for mistake in (run("bench.ops", "--op", "gelu"), run("bench.ops", "--tune", "attention")):
        assert mistake.returncode == 2
        assert mistake.stderr.count("\n") == 1
