import io
import json

import pytest
from rich.console import Console

from bench import archive
from bench.archive import RESULTS
from bench.report import __main__ as report
from bench.report import charts
from bench.report.__main__ import BEGIN, END, Report, main, readme_block, results_page, with_block
from bench.report.goals import LOSS_HEAD_SIZE, OPS, STEP, UNMEASURED, Goal
from bench.report.profiles import OURS, part_of
from bench.report.standings import Standings
from bench.report.summary import summary
from training.errors import UserError

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


def write(folder, name, bench, gpu=H100, date="2026-03-01T00:00:00+00:00", **data):
    environment = {"gpu": gpu, "date": date, "torch": "2.13.0", "triton": "3.7.1", "commit": "abc", "command": "python"}
    path = folder / "2026-03-01-device" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bench": bench, "environment": environment} | data))
    return path


PROFILE = {
    "busy_ms": 4.0,
    "launches": 14,
    "kernels": [
        {"name": "nvjet_sm90_tst_288x128", "launches": 4, "ms": 2.0},
        {"name": "_swiglu_forward_kernel", "launches": 8, "ms": 1.97},
        {"name": "Memset (Device)", "launches": 2, "ms": 0.03},
    ],
}


def write_step(folder, name="step", ms=32.0, compiled=96.0, captured=48.0, deterministic=True, **changes):
    def row(variant, ms):
        return {"variant": variant, "ms": ms, "ms_min": ms - 1, "ms_max": ms + 2, "mfu": 0.2, "peak_memory": 3 * 2**30}

    rows = [row("compiled", compiled), row("compiled-captured", captured), row("fused", ms) | {"profile": PROFILE}]
    rows = [row for row in rows if row["ms"]] + [{"variant": "plain", "failed": "out of memory"}]
    shape = {"batch_size": 128, "micro_steps": 4, "sequence_length": 256, "n_layers": 8, "layers_of_preset": 8}
    shape["tokens"] = {"source": "zipf", "most_frequent": 0.04}
    shape |= {key: changes.pop(key) for key in shape.keys() & changes.keys()}
    settings = {"dtype": "bfloat16", "deterministic": deterministic}
    return write(folder, name, "step", preset="reference", rows=rows, **shape, **settings, **changes)


def write_ops(folder, name="ops", op="rms_norm", size="8192x2048", us=None, absent=None, memory=None, **place):
    us = us or {"copy": 40.0, "triton": 50.0, "compiled": 60.0, "liger": 75.0}
    timings = {variant: {"us": x, "gb_per_s": 1.0, "of_copy": us["copy"] / x} for variant, x in us.items()}
    for variant, gib in (memory or {}).items():
        timings[variant]["peak_memory"] = gib * 2**30
    rows = [
        {"op": op, "size": size, "pass": p, "timings": timings, "failed": {}} for p in ("forward", "backward", "both")
    ]
    return write(folder, name, "ops", rows=rows, absent=absent or {}, **place)


def write_parity(folder, **place):
    row = {"op": "rope", "switch": "rope", "call": "rope", "tensor": "q", "plain": 1e-3, "fused": 2e-3, "ratio": 2.0}
    rows = [
        row | {"layer": layer, "pass": "output", "excess": e}
        for layer, e in ((0, 1.0), (1, 2.5), ("out", float("nan")))
    ]
    rows.append(row | {"layer": 0, "pass": "gradient", "fused": None, "excess": None})
    return write(folder, "parity", "parity", preset="reference", dtype="float32", ops=rows, **place)


def write_loss_parity(folder, **place):
    losses = {"plain": [3.0, 2.0, 1.0], "fused": [3.0, 2.1, 1.1], "nudged-1": [3.0, 2.0]}
    data = {"preset": "reference", "dtype": "bfloat16", "steps": 3, "losses": losses}
    return write(folder, "loss", "loss_parity", **data, **place)


def write_roofline(folder, **place):
    row = {"op": "linear", "part": "wo", "ms": 4.0, "share": 1.0}
    of = {"gpu": "H100 SXM", "copy_tb_s": 3.0, "matmul_tflops": 800, "ms": 4.0, "mfu": 0.5, "rows": [row]}
    of |= {"copy_source": "measured", "matmul_source": "datasheet"}
    measured = [{"variant": "fused", "ms": 5.0}]
    return write(folder, "roofline", "roofline", preset="reference", gpus=[of | {"measured": measured}], **place)


def lines(block, start):
    return [line for line in block.splitlines() if line.startswith(f"| {start}")]


# --------------------------------------------------------------------------------------------------------------- README


def test_the_readme_says_what_the_results_say():
    readme = (report.ROOT / "README.md").read_text(encoding="utf-8")
    expected = with_block(readme, readme_block(archive.read(RESULTS)))
    assert readme == expected, "README.md's tables are not what bench/results/ says: run python -m bench.report"


def test_with_no_results_every_goal_has_a_row_that_is_marked_unmeasured():
    page = results_page([], [])
    for preset in STEP:
        rows = lines(page, f"{preset} |")
        assert len(rows) == 6
        assert all(UNMEASURED in row for row in rows)
    for op, size, direction in OPS:
        assert all(UNMEASURED in row for row in lines(page, f"{op} | {size} | {direction}"))
        assert len(lines(page, f"{op} | {size} | {direction}")) == 1
    assert "≤ 34 ms (stretch 28 ms); ≥ 1.30x compiled, captured or not" in page
    assert "met" not in page.replace("method", "")
    assert "memory ≤ 25% of eager" in lines(page, "**Triton kernel**")[0]


def test_the_readme_has_what_is_measured_and_names_what_is_not(tmp_path):
    block = readme_block([])
    assert "|" not in block
    assert "Not measured on H100 SXM yet: the step of reference, 124m, llama3.2-1b; the ops rms_norm, " in block
    assert "; the loss head." in block
    write_step(tmp_path)
    write_ops(tmp_path)
    block = readme_block(archive.read(tmp_path))
    assert "Not measured on H100 SXM yet: the step of 124m, llama3.2-1b; the ops add_rms_norm, " in block
    assert UNMEASURED not in block
    assert [line.split(" | ")[1] for line in lines(block, "reference")] == [
        "plain, eager",
        "plain, compiled",
        "plain, compiled, captured",
        "**fused**",
    ]
    assert not lines(block, "124m")
    assert len(lines(block, "rms_norm")) == 3


def test_a_step_shows_its_figures_and_what_became_of_the_goals(tmp_path):
    write_step(tmp_path)
    block = readme_block(archive.read(tmp_path))
    goals = (
        "≤ 34 ms (stretch 28 ms): met: 32 ms; ≥ 1.30x compiled, captured or not: met: 1.50x compiled, captured or not"
    )
    assert lines(block, "reference | **fused**") == [
        f"| reference | **fused** | 32.0 | 20.0% | 1.50x compiled-captured | 3.00 | {goals} |"
    ]
    assert lines(block, "reference | plain, eager") == ["| reference | plain, eager | out of memory |  |  |  |  |"]


def test_against_one_of_the_two_baselines_the_goal_is_not_decided(tmp_path):
    write_step(tmp_path, captured=0.0)
    (row,) = lines(readme_block(archive.read(tmp_path)), "reference | **fused**")
    assert "| 3.00x compiled |" in row
    assert f"≥ 1.30x compiled, captured or not: {UNMEASURED}" in row


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (Goal("ms", at_most=38.0, stretch=32.0), 38.0, "met: 38 ms"),
        (Goal("ms", at_most=38.0, stretch=32.0), 32.0, "stretch met: 32 ms"),
        (Goal("ms", at_most=38.0, stretch=32.0), 38.1, "**missed**: 38.1 ms"),
        (Goal("mfu", at_least=0.46, stretch=0.5), 0.46, "met: 46.0%"),
        (Goal("mfu", at_least=0.46, stretch=0.5), 0.459, "**missed**: 45.9%"),
        (Goal("mfu", at_least=0.46, stretch=0.5), 0.51, "stretch met: 51.0%"),
        (Goal("of_copy", at_least=0.9), None, UNMEASURED),
    ],
)
def test_a_goal_is_met_at_its_bound_and_missed_past_it(goal, value, verdict):
    assert goal.verdict(value) == verdict


def test_the_newest_figure_of_a_gpu_and_preset_wins_and_its_ratio_is_of_its_own_run(tmp_path):
    write_step(tmp_path, "b-old", ms=36.0, date="2026-03-01T00:00:00+00:00")
    write_step(tmp_path, "a-new", ms=40.0, captured=50.0, date="2026-03-02T00:00:00+00:00")
    write_step(tmp_path, "other-gpu", ms=30.0, gpu="NVIDIA H200", date="2026-03-03T00:00:00+00:00")
    write_step(tmp_path, "other-batch", ms=9.0, batch_size=32, date="2026-03-03T00:00:00+00:00")
    write_step(tmp_path, "free", ms=8.0, deterministic=False, date="2026-03-03T00:00:00+00:00")
    write_step(tmp_path, "few-layers", ms=7.0, n_layers=2, date="2026-03-03T00:00:00+00:00")
    write_step(tmp_path, "uniform", ms=6.0, tokens={"source": "uniform"}, date="2026-03-03T00:00:00+00:00")
    write_step(tmp_path, "text", ms=39.0, captured=0.0, compiled=0.0, tokens={"source": "stdlib"}, gpu="NVIDIA H200")
    first, second = lines(readme_block(archive.read(tmp_path)), "reference | **fused**")
    assert first.startswith("| reference | **fused** | 40.0 | 20.0% | 1.25x compiled-captured |")
    assert "**missed**: 40 ms" in first
    assert second.startswith("| reference | **fused** | 30.0 |")
    assert "goal" not in second
    assert "missed" not in second
    page = results_page(archive.read(tmp_path), [])
    assert "4 x 128 x 256, bfloat16, 2 of 8 layers | zipf | fused | 7.0 |" in page
    assert "4 x 128 x 256, bfloat16, uniform tokens | uniform | fused | 6.0 |" in page


def test_older_results_read_as_uniform_tokens_and_all_layers(tmp_path):
    path = write_step(tmp_path)
    data = json.loads(path.read_text())
    for key in ("tokens", "n_layers", "layers_of_preset"):
        del data[key]
    path.write_text(json.dumps(data))
    (steps,) = Standings(archive.read(tmp_path)).all_steps()
    assert (steps.batch, steps.plain_settings) == ("4 x 128 x 256, bfloat16, uniform tokens", False)
    assert steps.variants["fused"]["tokens"] == "uniform"


def test_a_later_run_of_one_variant_leaves_the_others(tmp_path):
    write_step(tmp_path, "a", date="2026-03-01T00:00:00+00:00")
    path = write_step(tmp_path, "b", ms=33.0, date="2026-03-02T00:00:00+00:00")
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"rows": [row for row in data["rows"] if row["variant"] == "fused"]}))
    steps = Standings(archive.read(tmp_path)).steps("H100 SXM", "reference")
    assert steps["compiled"]["ms"] == 96.0
    assert steps["fused"]["ms"] == 33.0
    assert "vs_best" not in steps["fused"]  # nothing to compare with in that run


def test_a_cpus_figures_stay_out_of_the_readme(tmp_path):
    write_step(tmp_path, gpu=None)
    results = archive.read(tmp_path)
    assert readme_block(results) == readme_block([])
    assert "| CPU | reference |" in results_page(results, [])


def test_an_op_stands_against_the_copy_and_the_fastest_peer_and_names_those_that_were_not_there(tmp_path):
    write_ops(tmp_path, absent={"flex": "not installed"})
    block = readme_block(archive.read(tmp_path))
    row = "| rms_norm | 8192x2048 | forward | 50.0 | 80% of a copy | 1.20x compiled; flex not installed |"
    goals = "≥ 90% of a copy: **missed**: 80% of a copy; ≥ 1.00x the best peer: met: 1.20x the best peer (not all peers ran)"
    assert lines(block, "rms_norm | 8192x2048 | forward")[0] == f"{row} {goals} |"


def test_packed_documents_stand_against_the_dense_mask(tmp_path):
    us = {"copy": 10.0, "triton": 100.0, "flex": 90.0, "sdpa-mask": 450.0}
    write_ops(tmp_path, op="packed_attention", size="4x4096x128", us=us)
    row = lines(readme_block(archive.read(tmp_path)), "packed_attention | 4x4096x128 | both")[0]
    assert "≥ 4.00x a dense mask: met: 4.50x a dense mask" in row


def test_activations_stand_against_those_with_all_logits(tmp_path):
    state = 16 * 8_483_616  # parameters, gradients and two moments of the reference
    path = write_step(tmp_path)
    data = json.loads(path.read_text())
    memory = {"fused": state + 30, "compiled": state + 90, "unchunked": state + 100}
    rows = [{"variant": name, "ms": 1.0, "peak_memory": n} for name, n in memory.items()]
    path.write_text(json.dumps(data | {"rows": rows}))
    steps = Standings(archive.read(tmp_path)).steps("H100 SXM", "reference")
    assert steps["fused"]["memory_of_unchunked"] == 0.3
    assert "memory_of_unchunked" not in steps["compiled"]


def test_the_loss_head_stands_against_eager_by_its_memory(tmp_path):
    us = {"copy": 10.0, "triton": 2000.0, "eager": 4000.0, "F.linear_cross_entropy": 1900.0}
    write_ops(tmp_path, op="linear_cross_entropy", size=LOSS_HEAD_SIZE, us=us, memory={"triton": 2, "eager": 10})
    row = lines(readme_block(archive.read(tmp_path)), "**Triton kernel**")[0]
    assert row.startswith("| **Triton kernel** | 2,000 | 2.00 |")
    assert "memory ≤ 25% of eager: met: 20% of eager" in row
    assert "≥ 1.00x the best peer: **missed**: 0.95x the best peer" in row


# --------------------------------------------------------------------------------------------------------------- charts


def test_charts_are_drawn_of_what_there_is_and_are_the_same_the_second_time(tmp_path):
    for make in (write_step, write_ops, write_parity, write_loss_parity, write_roofline):
        make(tmp_path / "results")
    results, folder = archive.read(tmp_path / "results"), tmp_path / "charts"
    drawn = charts.draw(results, folder)
    assert drawn == charts.names(results)
    assert {name.split("-")[0] for name in drawn} == {"step", "ops", "parity", "loss", "floor"}
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(first) == set(drawn)
    assert all(picture.startswith(b"\x89PNG") for picture in first.values())
    (folder / "of-a-result-that-is-gone.png").write_bytes(b"")
    charts.draw(results, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_the_page_says_where_the_time_of_a_step_goes(tmp_path):
    write_step(tmp_path)
    page = results_page(archive.read(tmp_path), [])
    title = "**reference on H100 SXM** (4 x 128 x 256, bfloat16): milliseconds of a step, in so many launches"
    table = page[page.index(title) :].split("\n\n")[1].splitlines()
    assert table == [
        "|  | fused |",
        "| --- | --: |",
        "| products (cuBLAS) | 2.00 ms in 4 |",
        f"| {OURS} | 1.97 ms in 8 |",
        "| copies and fills of memory | 0.03 ms in 2 |",
        "| all that the GPU did | 4.00 ms in 14 |",
        "| **the step** | 32.00 ms |",
    ]
    assert f"| `_swiglu_forward_kernel` | {OURS} | 8 | 1.97 | 49.2% |" in page
    assert "| 1 more |  | 2 | 0.03 | 0.8% |" in page


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("_attention_dkdv_kernel", OURS),
        ("triton_poi_fused__to_copy_add_4", "kernels that Inductor wrote"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "products (cuBLAS)"),
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>, cutlass::bfloat16_t>",
            "attention of PyTorch",
        ),
        ("triton_poi_fused__scaled_dot_product_flash_attention_backward_3", "kernels that Inductor wrote"),
        ("void (anonymous namespace)::indexing_backward_kernel<float, 4>(long const*)", "PyTorch's own"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
            "copies and fills of memory",
        ),
        ("void at_cuda_detail::cub::detail::radix_sort::DeviceRadixSort", "PyTorch's own"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills of memory"),
        ("ncclDevKernel", "other"),
    ],
)
def test_a_kernel_is_counted_by_its_name(kernel, part):
    assert part_of(kernel) == part


def test_the_page_has_the_checks_and_what_became_of_the_tests(tmp_path):
    rows = [
        {"check": "gradients: plain", "passed": True, "value": 0.0086, "bound": 0.02, "where": "wo", "seconds": 1.0},
        {"check": "bits", "passed": False, "failed": "RuntimeError: no", "seconds": 1.0},
    ]
    write(tmp_path, "check", "check", dtype="bfloat16", rows=rows)
    cases = {"tests-kernels": {"status": "failed", "last_line": "== 25 failed, 553 passed in 89 s =="}}
    write(tmp_path, "all", "all", cases=cases | {"step-reference": {"status": "done"}})
    page = results_page(archive.read(tmp_path), [])
    assert "| H100 SXM | bfloat16 | gradients: plain | 0.0086 | 0.02 | wo | passed |" in page
    assert "| H100 SXM | bfloat16 | bits | RuntimeError: no |  |  | **failed** |" in page
    (row,) = lines(page, "tests-kernels")
    assert row.endswith("| failed: 25 failed, 553 passed in 89 s |")
    assert "-n " not in row
    assert lines(page, "step-reference |")[0].endswith("| done |")


def test_the_summary_of_a_run_is_ten_lines_at_most(tmp_path):
    folder = write_step(tmp_path).parent
    write_ops(tmp_path)
    checks = [{"check": "bits", "passed": False, "failed": "no"}, {"check": "products", "passed": True}]
    write(tmp_path, "check", "check", dtype="bfloat16", rows=checks)
    cases = {
        "tests-kernels": {"status": "failed", "last_line": "1 failed, 2 passed"},
        "ops-rope": {"status": "timed out"},
    }
    said = summary(folder, {"cases": cases})
    assert len(said) <= 9
    assert said[2:] == [
        "checks: 1 of 2 passed; failed: bits",
        "tests: kernels 1 failed, 2 passed",
        "step of reference: fused 32.00 ms, MFU 20.0%, 1.50x compiled-captured; goals: ≤ 34 ms (stretch 28 ms): met: 32 ms, "
        "≥ 1.30x compiled, captured or not: met: 1.50x compiled, captured or not",
        "of it busy 4.00 ms in 14 launches: 2.00 nvjet_sm90_tst_288x128, 1.97 _swiglu_forward_kernel, 0.03 Memset (Device)",
        "goals of ops: 3 met, 2 missed: rms_norm 8192x2048 forward 80% of a copy, rms_norm 8192x2048 backward 80% of a copy",
        "went wrong: tests-kernels failed, ops-rope timed out",
    ]
    assert summary(tmp_path / "nowhere", {"cases": {}}) == ["", "summary"]


def test_the_page_says_what_the_floor_is_mostly_made_of(tmp_path):
    write_roofline(tmp_path)
    row = "| reference | H100 SXM | 3.00 TB/s (measured), 800 TFLOP/s (datasheet) | 4.0 | 50.0% | linear wo (100%) |"
    assert row in results_page(archive.read(tmp_path), [])


def test_the_page_says_what_a_compiled_step_launches(tmp_path):
    launch = {
        "part": "forward",
        "kind": "copy",
        "name": "k",
        "read": 10**9,
        "written": 10**9,
        "code": {"stack": [0, 8]},
    }
    data = {"preset": "reference", "kernels": "all", "built_for": "H100 SXM", "step_launches": 1038}
    floor = {"swiglu": {"launches": 1, "bytes": 10**9}}
    write(tmp_path, "compiled", "compiled", launches=[launch], floor=floor, **data)
    page = results_page(archive.read(tmp_path), [])
    assert "Built without a GPU, not measured" in page
    assert "| reference | all | H100 SXM | 1 | 0 | 0 | 1,038 | 2.00 | 1.00 | 1 | 0 | k |" in page


def test_the_page_names_the_worst_error_even_where_it_is_no_number(tmp_path):
    write_parity(tmp_path)
    assert "layer out, q" in results_page(archive.read(tmp_path), [])


# -------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that stands in for the project."""
    results = tmp_path / "bench" / "results"
    monkeypatch.setattr(archive, "RESULTS", results)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(f"# It\n\n{BEGIN}\nstale\n{END}\n\nrest\n")
    results.mkdir(parents=True)
    return tmp_path


def test_the_command_writes_what_check_then_agrees_with(checkout, console):
    write_step(checkout / "bench" / "results")
    with pytest.raises(SystemExit):
        main(Report(check=True), console)
    assert "stale" in (checkout / "README.md").read_text()
    main(Report(), console)
    main(Report(check=True), console)
    readme = (checkout / "README.md").read_text()
    assert "stale" not in readme
    assert readme.startswith(f"# It\n\n{BEGIN}\n**A training step on H100 SXM**")
    assert readme.endswith(f"{END}\n\nrest\n")
    page = (checkout / "bench" / "RESULTS.md").read_text()
    assert "![step-h100-sxm-reference.png](results/charts/step-h100-sxm-reference.png)" in page
    assert (checkout / "bench" / "results" / "charts" / "step-h100-sxm-reference.png").exists()
    assert "1 results" in console.file.getvalue()


@pytest.mark.parametrize("text", ["no marks", f"{BEGIN}", f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_both_marks_is_refused(text):
    with pytest.raises(UserError, match=r"README\.md must hold the lines"):
        with_block(text, "x")


def test_a_result_of_another_form_is_named(tmp_path):
    write(tmp_path, "old", "step", preset="reference")
    with pytest.raises(UserError, match=r"old\.json is not what bench\.step writes \(KeyError: 'micro_steps'\)"):
        readme_block(archive.read(tmp_path))
