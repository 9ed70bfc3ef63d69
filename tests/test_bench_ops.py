import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import kernels
from bench import liger, ops
from bench.op_cases import CASES, SIZES, cut, size
from bench.ops import OPS, Contender, OpsBench, copy_of, implementation, measure
from kernels import grammar
from kernels.launch import INTERPRETED
from kernels.select import FIELDS
from training.config import TrainConfig
from training.errors import UserError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = TrainConfig(max_seq_len=6, batch_size=2, dim=32, n_heads=4, n_kv_heads=2, ffn_dim=24)
META = torch.device("meta")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


def outputs_of(result):
    return result if isinstance(result, tuple) else (result,)


def test_every_op_with_a_kernel_has_a_case():
    assert {op for switch in grammar.TRITON_SWITCHES for op in FIELDS[switch]} == set(OPS) <= set(CASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "rope", "swiglu"])
def test_bytes_are_those_of_the_tensors_that_are_read_and_written(op, dtype):
    case = CASES[op](SMALL, dtype, DEVICE)
    activations = [x for x in case.wanted if x.ndim > 1]  # a norm's weight is nothing beside them
    outputs = outputs_of(getattr(kernels.TORCH, op)(*case.arguments))
    rstd = 4 * 12 if "norm" in op else 0
    tables = 2 * 6 * 4 * 4 if op == "rope" else 0
    assert case.forward_bytes == sum(x.nbytes for x in (*activations, *outputs)) + rstd + tables
    # Backward reads what was saved (x, the sum or the packed input; rope none) and the upstream gradients, and writes one gradient
    # for each input; but x and residual share theirs.
    saved = 0 if op == "rope" else activations[0].nbytes
    written = sum(x.nbytes for x in activations) // (2 if op == "add_rms_norm" else 1)
    assert case.backward_bytes == saved + sum(x.nbytes for x in outputs) + written + rstd + tables


def test_bytes_by_hand():
    # 12 tokens of width 32, two bytes each; 4 + 2 heads of 8; a feed-forward of 24
    n_bytes = {op: CASES[op](SMALL, torch.bfloat16, META) for op in ("rms_norm", "add_rms_norm", "rope", "swiglu")}
    n_bytes = {op: (case.forward_bytes, case.backward_bytes) for op, case in n_bytes.items()}
    assert n_bytes == {
        "rms_norm": (2 * 768 + 48, 3 * 768 + 48),
        "add_rms_norm": (4 * 768 + 48, 4 * 768 + 48),
        "rope": (2 * 12 * 6 * 8 * 2 + 192, 2 * 12 * 6 * 8 * 2 + 192),
        "swiglu": (3 * 12 * 24 * 2, 5 * 12 * 24 * 2),
    }


def test_bytes_of_attention_by_hand():
    # 12 tokens, 4 query heads and 2 of keys of 8, two bytes each; the statistics are float32, one a token and head. The backward
    # has two launches: q, k, v, do are read by both, o by one; dq, dk, dv are written once.
    q, k, statistics = 12 * 4 * 8 * 2, 12 * 2 * 8 * 2, 12 * 4 * 4
    case = CASES["attention"](SMALL, torch.bfloat16, META)
    assert case.forward_bytes == 2 * q + 2 * k + statistics
    assert case.backward_bytes == (2 * 2 + 1 + 1) * q + (2 * 2 + 2) * k + 4 * statistics


def test_bytes_of_the_loss_head_by_hand(monkeypatch):
    # 12 tokens in chunks of 8, width 32, 256 tokens in the vocabulary. Each of two chunks reads its hidden states and the whole
    # weight twice; logits are written, read twice, written over and read twice; the second chunk also reads the weight's gradient.
    monkeypatch.setattr("bench.op_cases.chunk_rows", lambda n_rows, vocab_size, element_size: 8)
    hidden, weight, logits = 12 * 32, 256 * 32, 12 * 256
    case = CASES["linear_cross_entropy"](replace(SMALL, vocab_size=256), torch.bfloat16, META)
    assert case.forward_bytes == 2 * (2 * hidden + 4 * weight + 6 * logits) + 4 * (hidden + 3 * weight)
    assert case.backward_bytes == (4 + 2) * hidden + (4 + 4) * weight


def test_a_peer_without_the_op_is_named(monkeypatch):
    monkeypatch.setattr(liger, "ops", dict)
    with pytest.raises(LookupError, match="Liger-Kernel has no attention"):
        implementation("attention", "liger")


def test_every_size_is_a_case_of_every_op():
    shapes = {name: [CASES[op](size(name), torch.bfloat16, META).shape for op in OPS] for name in SIZES}
    assert shapes["reference"][:2] == ["32768 x 288"] * 2
    assert "8192 x 16384" in shapes["llama3.1-405b"]
    assert "8192 x 2 x 2048" in shapes["8192x2048"]
    assert "8192 x (32 + 8) x 128" in shapes["llama3.1-8b"]


def test_queries_and_keys_are_slices_of_a_packed_product_and_leaves():
    q, k, *_ = CASES["rope"](SMALL, torch.float32, DEVICE).arguments
    assert q.stride() == k.stride() == (6 * 64, 64, 8, 1)
    assert q.is_leaf
    assert k.is_leaf


def test_a_cut_size_keeps_its_widths():
    small = cut(size("llama3.1-8b"), 1024)
    assert (small.batch_size, small.max_seq_len, small.dim) == (1, 1024, 4096)
    assert cut(size("smoke"), 1024).batch_size == 8
    assert cut(size("smoke"), 100).max_seq_len == 100


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("op", OPS)
def test_the_contenders_compute_the_same(op):
    check_same(op, "triton", tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "rope", "swiglu"])
def test_liger_computes_the_same(op):
    pytest.importorskip("liger_kernel")
    check_same(op, "liger", tolerance=1e-4)


def check_same(op, variant, tolerance):
    torch.manual_seed(0)
    case = CASES[op](replace(SMALL, n_heads=2, n_kv_heads=1), torch.float32, DEVICE)  # heads of 16, attention's least
    arguments = case.liger_arguments if variant == "liger" and case.liger_arguments else case.arguments
    wanted = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    expected = outputs_of(implementation(op, "eager")(*case.arguments))
    actual = outputs_of(implementation(op, variant)(*arguments))
    upstream = [torch.randn_like(y) for y in expected]
    expected += torch.autograd.grad(expected, case.wanted, [dy.clone() for dy in upstream])
    actual += torch.autograd.grad(actual, wanted, [dy.clone() for dy in upstream])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def test_each_backward_goes_through_a_forward_of_its_own():
    calls = []

    def once(x):
        calls.append(x.shape)
        return torch.tanh(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "implementation", lambda op, variant: once)
        contender = Contender("swiglu", "eager", CASES["swiglu"](SMALL, torch.float32, DEVICE))
        for _ in range(2):
            contender.prepare_backward()
            contender.backward()
    assert len(calls) == 3


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
            return lambda: happened.append(name)

    monkeypatch.setattr(ops, "GpuInstant", Instant)
    monkeypatch.setattr(ops, "Contender", Recorder)
    monkeypatch.setattr(ops, "gpu_flush", lambda device: lambda: happened.append("flush"))
    monkeypatch.setattr(ops, "copy_of", lambda n_bytes, device: lambda: happened.append("copy"))
    monkeypatch.setattr(ops, "WARMUP", 0)
    case = CASES["swiglu"](SMALL, torch.float32, META)
    ops.measure_case("swiglu", case, ["triton"], torch.device("cuda"), repeats=1)
    copy = ["flush", "clock", "copy", "clock"]
    forward = ["flush", "clock", "forward", "clock"]
    backward = ["prepare_backward", "flush", "clock", "backward", "clock"]
    assert happened == copy + forward + copy + backward


def test_the_copy_moves_the_bytes_it_is_asked_for():
    target = copy_of(1000, DEVICE)()
    assert target.nbytes == 500
    assert target.any()


def test_on_a_cpu_the_twins_are_measured_and_the_rest_is_named(console, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(liger, "installed", lambda: False)
    path = tmp_path / "ops.json"
    result = measure(OpsBench(op="swiglu", repeats=2, device="cpu", json=str(path)), console)
    assert json.loads(path.read_text()) == result
    assert result["absent"] == {"liger": "not installed", "triton": "no GPU"}
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


def test_what_fails_is_named_and_the_others_are_measured(console, monkeypatch):
    make = ops.implementation

    def make_or_not(op, variant):
        if variant == "compiled":
            raise RuntimeError("first line\nsecond line")
        return make(op, variant)

    monkeypatch.setattr(ops, "implementation", make_or_not)
    options = OpsBench(op="swiglu", repeats=1, device="cpu", variants=["eager", "compiled"])
    row = measure(options, console)["rows"][0]
    assert row["failed"] == {"compiled": "RuntimeError: first line"}
    assert set(row["timings"]) == {"copy", "eager"}
    assert "failed: compiled: RuntimeError: first line" in console.file.getvalue()


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, which stands in for a GPU")
def test_a_kernel_that_fails_is_an_exit_status_and_one_that_runs_is_a_column(console, monkeypatch):
    monkeypatch.setattr(ops, "why_absent", lambda variant, device: None)
    monkeypatch.setattr(ops, "size", lambda name: SMALL)
    options = OpsBench(op="swiglu", repeats=1, device="cpu", variants=["eager", "triton"])
    row = measure(options, console)["rows"][2]
    assert row["speedup"]["eager"] == pytest.approx(row["timings"]["eager"]["us"] / row["timings"]["triton"]["us"])
    assert "vs compiled" in console.file.getvalue()
    monkeypatch.setattr(ops, "implementation", lambda op, variant: kernels.TORCH.swiglu if variant == "eager" else None)
    with pytest.raises(SystemExit) as stopped:
        measure(options, console)
    assert stopped.value.code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "gelu"}, "--op is 'gelu', which is in the name of no op that has a kernel: rms_norm, add_rms_norm"),
        ({"preset": ["gpt2"]}, "--preset is 'gpt2'; allowed: reference, .*, 8192x8192"),
        ({"repeats": 0}, "--repeats is 0; it must be at least 1"),
        ({"device": "tpu"}, "--device is 'tpu'; allowed: auto"),
    ],
)
def test_mistakes_in_the_options_are_named(console, options, message):
    with pytest.raises(UserError, match=message):
        measure(OpsBench(**options), console)


def run(*arguments):
    # A worker of pytest-xdist says so in its environment, and pytest-benchmark refuses to measure in one.
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    environment = inherited | {"OMP_NUM_THREADS": "1"}
    project = Path(__file__).parent.parent
    line = [sys.executable, "-m", *arguments]
    return subprocess.run(line, cwd=project, env=environment, capture_output=True, text=True, timeout=300)


def test_pytest_benchmark_runs_the_same_cases(tmp_path):
    result = tmp_path / "benchmark.json"
    cases = run("pytest", "bench", "--benchmark-only", "-k", "swiglu and copy", f"--benchmark-json={result}")
    assert cases.returncode == 0, cases.stdout
    measured = json.loads(result.read_text())["benchmarks"]
    assert {m["group"] for m in measured} == {"swiglu smoke forward", "swiglu smoke backward"}
    assert all(m["extra_info"]["bytes"] > 0 for m in measured)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_the_command_runs_on_a_cpu_with_the_compiler():
    bench = run("bench.ops", "--op", "swiglu", "--repeats", "3")
    assert bench.returncode == 0, bench.stderr
    assert "compiled" in bench.stdout
    assert "failed" not in bench.stdout
    mistake = run("bench.ops", "--op", "gelu")
    assert mistake.returncode == 2
    assert mistake.stderr.count("\n") == 1
