import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import archive
from bench.archive import Result
from bench.ops.rows import OpRow, Speed
from bench.report.standings import Standings
from bench.roofline import __main__ as roofline
from bench.roofline.__main__ import (
    Ceilings,
    Roofline,
    find_ceilings,
    floor,
    floor_tally,
    measure,
    measured_ops,
    measured_steps,
)
from bench.roofline.launches import ACCUMULATION, GLUE, Tally, call_bytes, count, launch_bytes, tensor_bytes
from kernels.launch import HAVE_TRITON, LaunchRecord
from model import flops
from model.flops import step_costs
from training.config import TrainConfig, defaults
from training.errors import UserError
from training.hardware import GPUS

ROOT = Path(__file__).parents[2]
H100 = next(gpu for gpu in GPUS if gpu.name == "H100 SXM")
MEASURED = Ceilings(H100, 3.0e12, "given", 798e12, "given")
TINY = TrainConfig(
    vocab_size=512,
    max_seq_len=64,
    dim=64,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    batch_size=4,
    gradient_accumulation_steps=3,
)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


@pytest.fixture
def no_results(monkeypatch):
    monkeypatch.setattr(archive, "read", lambda: [])


def result(bench, device="NVIDIA H100 80GB HBM3", date="2026-01-02T00:00:00+00:00", **data):
    return Result(Path("x.json"), {"bench": bench, "environment": {"gpu": device, "date": date}} | data)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


# ---------------------------------------------------------------------------------------------------------------- floor


def test_a_memory_bound_op_takes_its_bytes_and_a_product_the_longer_of_the_two():
    rows = {(row["op"], row["part"]): row for row in floor(defaults("llama3.2-1b", "cpu"), MEASURED)["rows"]}
    tokens = 8 * 4 * 4096
    swiglu = rows["swiglu", ""]
    assert swiglu["ms"] == swiglu["ms_memory"] == pytest.approx(1000 * 16 * tokens * 8192 * 8 * 2 / 3.0e12)
    assert swiglu["bound"] == "memory"
    down = rows["linear", "w_down"]
    assert down["ms"] == down["ms_matrix"] == pytest.approx(1000 * 16 * 6 * tokens * 8192 * 2048 / 798e12)
    assert down["bound"] == "matrix"
    # Two products forward and five backward, over the causal half of the keys.
    attention = 16 * 7 * tokens * 2048 * 4096
    assert rows["attention", ""]["flops"] == pytest.approx(attention)


def test_each_product_by_itself_takes_the_longer_of_the_two():
    # Of the three products of a weight, one here is bound by its bytes and two by their FLOPs, so that sums do not tell.
    halfway = Ceilings(H100, 1e9, "given", 1e9 * 2 * 256 * 64 * 64 / 74_000, "given")
    row = next(row for row in floor(TINY, halfway)["rows"] if row["part"] == "wo")
    assert row["ms"] > max(row["ms_matrix"], row["ms_memory"]) * 1.001


@pytest.mark.parametrize("of", Standings(archive.read()).newest("roofline", "preset"), ids=lambda of: of.data["preset"])
def test_what_is_committed_is_the_floor_of_todays_formula(of):
    for gpu in of.data["gpus"]:
        rows = floor(defaults(of.data["preset"], "cpu"), MEASURED)["rows"]
        counted = [
            [(row["op"], row["part"], row["bytes"], row["flops"]) for row in side] for side in (gpu["rows"], rows)
        ]
        assert counted[0] == counted[1], f"python -m bench.roofline --preset {of.data['preset']} --json {of.path}"


def test_the_step_is_the_sum_of_its_rows():
    of = floor(TINY, MEASURED)
    assert of["ms"] == pytest.approx(sum(row["ms"] for row in of["rows"]))
    assert sum(row["share"] for row in of["rows"]) == pytest.approx(1)
    assert of["tokens_per_second"] == pytest.approx(3 * 4 * 64 / (of["ms"] / 1000))
    flops = sum(cost.flops for cost in step_costs(TINY.shape(), 4, 3).values())
    assert of["mfu"] == pytest.approx(flops / (of["ms"] / 1000) / 989.4e12)


@pytest.mark.parametrize(("preset", "ms"), [("reference", 23.2), ("124m", 746.0), ("llama3.2-1b", 12.5e-3 * 131_072)])
def test_floors_agree_with_an_independent_estimate_on_the_ceilings_of_one_h100(monkeypatch, preset, ms):
    monkeypatch.setattr(roofline, "NEEDED", {})  # the estimate counts attention as MFU does
    monkeypatch.setattr(flops, "mlp_serves", lambda *size: False)  # and each part of the feed-forward by itself
    found = floor(defaults(preset, "cpu"), MEASURED)
    # It has a backward pass of rope, as long as the forward, which is part of attention's here.
    rope = next(row["ms"] for row in found["rows"] if row["op"] == "rope")
    assert found["ms"] + rope == pytest.approx(ms, rel=0.06)


# ------------------------------------------------------------------------------------------------------------- ceilings


def copied(gb_per_s, n_bytes=2**30):
    speeds = {"copy": Speed(us=1.0, gb_per_s=gb_per_s, of_copy=1.0)}
    return OpRow("swiglu", "reference", "", "forward", n_bytes, 0, speeds, {}).result()


def test_ceilings_are_those_given_else_the_best_measured_on_that_gpu_else_the_datasheets():
    ops = result("ops", rows=[copied(2900), copied(3000), copied(9000, n_bytes=2**20)])
    other = result("ops", "NVIDIA H200", rows=[copied(4400)], ceilings={"matmul_tflops": 850})
    sheet = find_ceilings(H100, [other])
    assert (sheet.copy, sheet.copy_source, sheet.matmul) == (3.35e12, "datasheet", 989.4e12)
    found = find_ceilings(H100, [ops, other])
    assert (found.copy, found.copy_source, found.matmul_source) == (3.0e12, "measured", "datasheet")
    matmul = result("ops", rows=[], ceilings={"matmul_tflops": 790})
    assert find_ceilings(H100, [ops, matmul]).matmul == 790e12
    given = find_ceilings(H100, [ops, matmul], copy_tb_s=2.5, matmul_tflops=700)
    assert (given.copy, given.matmul, given.copy_source) == (2.5e12, 700e12, "given")


def test_what_was_measured_of_this_step_on_this_gpu_stands_beside_it():
    def step(ms, date="2026-01-02", device="NVIDIA H100 80GB HBM3", batch_size=128, **more):
        rows = [{"variant": "fused", "ms": ms, "mfu": 0.2}, {"variant": "plain", "failed": "out of memory"}]
        data = {"preset": "reference", "batch_size": batch_size, "micro_steps": 4, "dtype": "bfloat16"}
        return result("step", device, date, deterministic=True, rows=rows, **data | more)

    reference = defaults("reference", "cpu")
    results = [step(40.0), step(38.0, "2026-02-01"), step(30.0, device="NVIDIA H200"), step(10.0, batch_size=32)]
    results.append(step(5.0, "2026-03-01", n_layers=2))
    found = measured_steps(reference, H100, results)
    assert [(row["variant"], row["ms"], row["date"]) for row in found] == [("fused", 38.0, "2026-02-01")]


def test_measured_ops_are_a_steps_worth_of_calls():
    rows = [
        OpRow(op, "reference", "", "both", 0, 0, {"triton": Speed(us, 1.0, 1.0)}, {}).result()
        for op, us in (("rms_norm", 100.0), ("add_rms_norm", 50.0), ("swiglu", 10.0))
    ]
    found = measured_ops(defaults("reference", "cpu"), H100, [result("ops", dtype="bfloat16", rows=rows)])
    assert found == {"rms_norm": pytest.approx(4 * (0.1 + 16 * 0.05)), "swiglu": pytest.approx(4 * 8 * 0.01)}
    assert measured_ops(defaults("reference", "cpu"), H100, [result("ops", dtype="bfloat16", rows=rows[:1])]) == {}


# ------------------------------------------------------------------------------------------------------------- counting

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("func", "args", "n_bytes"),
    [
        (aten.mm.default, (meta(4, 8), meta(8, 16)), (32 + 128 + 64) * 2),
        (aten.add_.Tensor, (meta(8), meta(8)), 3 * 16),
        (aten.copy_.default, (meta(8), meta(8, dtype=torch.float32)), 16 + 32),
        (aten.zeros_like.default, (meta(8),), 16),
        (aten.view.default, (meta(4, 8), [32]), None),
        (aten.empty_like.default, (meta(8),), None),
        (aten.embedding.default, (meta(1000, 8), meta(4, dtype=torch.int64)), 4 * 8 * 2 * 2 + 4 * 8),
        (aten.gather.default, (meta(4, 1000), 1, meta(4, 1, dtype=torch.int64)), 32 + 32 + 8),
        (aten.mul.Tensor, (meta(8, 1).expand(8, 100), meta(8, 100)), 16 + 1600 + 1600),
        (aten._foreach_mul_.Scalar, ([meta(8), meta(4)], 2.0), 2 * (16 + 8)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_bytes_of_a_call_by_hand(func, args, n_bytes):
    assert call_bytes(func, args, {}, func(*args)) == n_bytes


@pytest.mark.parametrize(("beta", "n_bytes"), [(0, 64 + 256 + 128), (1, 64 + 256 + 128 + 128)])
def test_a_product_reads_what_it_is_written_to_only_to_add_to_it(beta, n_bytes):
    out = meta(4, 16)
    arguments = {"beta": beta, "out": out}
    assert call_bytes(aten.addmm.out, (out, meta(4, 8), meta(8, 16)), arguments, out) == n_bytes


def test_bytes_of_a_triton_launch_by_hand():
    x, y = meta(4, 8), meta(4, 8, dtype=torch.float32)
    launched = LaunchRecord(None, (1,), {"x_ptr": x, "y_ptr": y, "n": 4, "BLOCK": 8}, 4, 2)
    assert launch_bytes(launched, changed=set()) == 64 + 128
    assert launch_bytes(launched, changed={y.untyped_storage()._cdata}) == 64 + 2 * 128
    assert tensor_bytes(meta(0, 8)) == 0


@pytest.fixture(scope="module")
def plain():
    return count(TINY, "none")


def test_every_op_of_the_floor_is_counted_under_its_name(plain):
    assert set(plain) - {GLUE} == {*floor_tally(TINY), ACCUMULATION}
    assert all(tally.launches > 0 and tally.bytes > 0 for tally in plain.values())


def test_no_op_moves_less_than_its_floor(plain):
    least = floor_tally(TINY)
    found = plain | {
        "linear": plain["linear"] + plain[ACCUMULATION]
    }  # the floor's products add to a gradient themselves
    for op in ("linear", "rms_norm", "rope", "swiglu", "attention", "linear_cross_entropy", "optimizer"):
        assert found[op].bytes >= least[op].bytes, op
        assert found[op].launches >= least[op].launches, op


def test_micro_steps_and_layers_count_as_often_as_they_run(plain):
    more = count(dataclasses.replace(TINY, gradient_accumulation_steps=6), "none")
    assert more["rms_norm"] == plain["rms_norm"].times(2)
    assert more["optimizer"].launches < 2 * plain["optimizer"].launches
    deeper = count(dataclasses.replace(TINY, n_layers=4), "none")
    assert deeper["swiglu"] == plain["swiglu"].times(2)
    assert deeper["linear_cross_entropy"] == plain["linear_cross_entropy"]


def test_the_floor_has_the_bytes_of_the_closed_form():
    costs = step_costs(TINY.shape(), 4, 3)
    assert {op: cost.bytes for op, cost in costs.items() if op != "mlp"} == {
        op: tally.bytes for op, tally in floor_tally(TINY).items()
    }
    assert floor_tally(TINY)["linear"].launches == 3 * 3 * 4 * 2


def test_a_feed_forward_that_is_one_kernel_has_a_lower_floor(monkeypatch):
    """By what the table in kernels/mlp/op.py says: 4 F elements a row fewer forward, 3 F backward, and four launches of six."""
    config = defaults("reference", "cpu")
    whole, launches = step_costs(config.shape(), 128, 4), floor_tally(config)
    monkeypatch.setattr(flops, "mlp_serves", lambda *size: False)
    apart, apart_launches = step_costs(config.shape(), 128, 4), floor_tally(config)
    assert whole["mlp"].bytes > whole["swiglu"].bytes == 0
    assert apart["swiglu"].bytes > apart["mlp"].bytes == 0
    assert sum(cost.flops for cost in whole.values()) == sum(cost.flops for cost in apart.values())
    saved = sum(cost.bytes for cost in apart.values()) - sum(cost.bytes for cost in whole.values())
    assert saved == 8 * 4 * 2 * (128 * 256) * (4 + 3) * 768
    assert sum(t.launches for t in apart_launches.values()) - sum(t.launches for t in launches.values()) == 4 * 4 * 8


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton has no build for this machine")
def test_the_kernels_move_their_floor_and_little_more(tmp_path):
    """In a process of its own: in Triton's interpreter, which this one may have on, nothing can be recorded."""
    path = tmp_path / "roofline.json"
    options = ["--preset", "reference", "--json", str(path)]
    environ = {**os.environ, "TRITON_INTERPRET": "1"}  # which the command gets rid of
    done = subprocess.run(
        [sys.executable, "-m", "bench.roofline", *options], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {row["op"]: row for row in json.loads(path.read_text())["issued"]}
    assert rows["mlp"]["fused"] == rows["mlp"]["floor"]
    for op in ("rms_norm", "rope"):
        fused, least, plain = (Tally(**rows[op][kind]) for kind in ("fused", "floor", "plain"))
        assert least.bytes <= fused.bytes <= 1.25 * least.bytes, op
        assert fused.bytes < 0.2 * plain.bytes, op
        assert least.launches <= fused.launches < 0.25 * plain.launches, op
    assert "furthest above its floor in the fused step" in done.stdout
    assert "fused: as on an H100, whichever GPU is asked for" in " ".join(done.stdout.split())


# -------------------------------------------------------------------------------------------------------------- command


def test_the_result_is_a_table_a_gpu_and_the_file(console, no_results, tmp_path):
    path = tmp_path / "roofline.json"
    found = measure(Roofline(gpu=["H100 SXM", "B200"], count=False, json=str(path)), console)
    assert json.loads(path.read_text()) == found
    assert [of["gpu"] for of in found["gpus"]] == ["H100 SXM", "B200"]
    assert found["gpus"][1]["ms"] < found["gpus"][0]["ms"]
    shown = console.file.getvalue()
    assert "copy 7.70 TB/s (datasheet)" in shown
    assert shown.count("measured: nothing yet") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": []}, "--gpu names none; allowed: .*H100 SXM"),
        ({"gpu": ["H900"]}, "--gpu is 'H900'; did you mean 'H[0-9A-Z ]+'. allowed: .*H100 SXM"),
        ({"preset": "gpt2"}, "--preset is 'gpt2'; allowed: reference"),
        ({"batch_size": -1}, "--batch-size is -1; it must be at least 0"),
        ({"copy_tb_s": -1.0}, "--copy-tb-s is -1.0; it must be at least 0"),
        ({"gpu": ["B200", "T4"], "copy_tb_s": 1.0}, "--gpu names several"),
        ({"json": "/dev/null/x.json"}, "--json is /dev/null/x.json, which can't be written"),
    ],
)
def test_mistakes_in_the_options_are_named(console, no_results, options, message):
    with pytest.raises(UserError, match=message):
        measure(Roofline(**options), console)
