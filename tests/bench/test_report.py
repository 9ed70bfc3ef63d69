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
from bench.report.standings import Standings
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


def write_step(folder, name="step", ms=36.0, compiled=72.0, batch_size=128, deterministic=True, **place):
    def row(variant, ms):
        return {"variant": variant, "ms": ms, "ms_min": ms - 1, "ms_max": ms + 2, "mfu": 0.2, "peak_memory": 3 * 2**30}

    rows = [row("compiled", compiled), row("fused", ms), {"variant": "plain", "failed": "out of memory"}]
    shape = {"batch_size": batch_size, "micro_steps": 4, "sequence_length": 256}
    settings = {"dtype": "bfloat16", "deterministic": deterministic}
    return write(folder, name, "step", preset="reference", rows=rows, **shape, **settings, **place)


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
    block = readme_block([])
    for preset in STEP:
        rows = lines(block, f"{preset} |")
        assert len(rows) == 5
        assert all(UNMEASURED in row for row in rows)
    for op, size, direction in OPS:
        assert all(UNMEASURED in row for row in lines(block, f"{op} | {size} | {direction}"))
        assert len(lines(block, f"{op} | {size} | {direction}")) == 1
    assert "≤ 38 ms (stretch 32 ms); ≥ 1.50x compiled" in block
    assert "met" not in block
    assert "memory ≤ 25% of eager" in lines(block, "**Triton kernel**")[0]


def test_a_step_shows_its_figures_and_what_became_of_the_goals(tmp_path):
    write_step(tmp_path)
    block = readme_block(archive.read(tmp_path))
    goals = "≤ 38 ms (stretch 32 ms): met: 36 ms; ≥ 1.50x compiled: met: 2.00x compiled"
    assert lines(block, "reference | **fused**") == [
        f"| reference | **fused** | 36.0 | 20.0% | 2.00x | 3.00 | {goals} |"
    ]
    assert lines(block, "reference | plain, eager") == ["| reference | plain, eager | out of memory |  |  |  |  |"]
    assert UNMEASURED in lines(block, "reference | Liger")[0]


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
    write_step(tmp_path, "a-new", ms=40.0, compiled=50.0, date="2026-03-02T00:00:00+00:00")
    write_step(tmp_path, "other-gpu", ms=30.0, gpu="NVIDIA H200", date="2026-03-03T00:00:00+00:00")
    write_step(tmp_path, "other-batch", ms=9.0, batch_size=32, date="2026-03-03T00:00:00+00:00")
    write_step(tmp_path, "free", ms=8.0, deterministic=False, date="2026-03-03T00:00:00+00:00")
    first, second = lines(readme_block(archive.read(tmp_path)), "reference | **fused**")
    assert first.startswith("| reference | **fused** | 40.0 | 20.0% | 1.25x |")
    assert "**missed**: 40 ms" in first
    assert second.startswith("| reference | **fused** | 30.0 |")
    assert "goal" not in second
    assert "missed" not in second


def test_a_later_run_of_one_variant_leaves_the_others(tmp_path):
    write_step(tmp_path, "a", date="2026-03-01T00:00:00+00:00")
    path = write_step(tmp_path, "b", ms=33.0, date="2026-03-02T00:00:00+00:00")
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"rows": [row for row in data["rows"] if row["variant"] == "fused"]}))
    steps = Standings(archive.read(tmp_path)).steps("H100 SXM", "reference")
    assert steps["compiled"]["ms"] == 72.0
    assert steps["fused"]["ms"] == 33.0
    assert "vs_compiled" not in steps["fused"]  # nothing to compare with in that run


def test_a_cpus_figures_stay_out_of_the_readme(tmp_path):
    write_step(tmp_path, gpu=None)
    results = archive.read(tmp_path)
    assert readme_block(results) == readme_block([])
    assert "| CPU | reference |" in results_page(results, [])


def test_an_op_stands_against_the_copy_and_the_fastest_peer_and_names_those_that_were_not_there(tmp_path):
    write_ops(tmp_path, absent={"flex": "not installed"})
    block = readme_block(archive.read(tmp_path))
    row = "| rms_norm | 8192x2048 | forward | 50.0 | 80% of a copy | 1.20x compiled; flex not installed |"
    assert lines(block, "rms_norm | 8192x2048 | forward")[0] == f"{row} ≥ 90% of a copy: **missed**: 80% of a copy |"


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


def test_the_page_says_what_the_floor_is_mostly_made_of(tmp_path):
    write_roofline(tmp_path)
    row = "| reference | H100 SXM | 3.00 TB/s, 800 TFLOP/s | 4.0 | 50.0% | linear wo (100%) |"
    assert row in results_page(archive.read(tmp_path), [])


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


@pytest.mark.parametrize("text", ["{", "[]", '{"bench": "step"}', '{"bench": "step", "environment": {"gpu": null}}'])
def test_a_broken_result_is_named(tmp_path, text):
    path = write_step(tmp_path)
    path.write_text(text)
    with pytest.raises(UserError, match=r"step\.json is not what a command of the bench writes"):
        archive.read(tmp_path)


def test_a_result_of_another_form_is_named(tmp_path):
    write(tmp_path, "old", "step", preset="reference")
    with pytest.raises(UserError, match=r"old\.json is not what bench\.step writes \(KeyError: 'micro_steps'\)"):
        readme_block(archive.read(tmp_path))


def test_results_come_by_their_dates_and_none_from_a_folder_that_is_not_there(tmp_path):
    write_step(tmp_path, "a", date="2026-03-02T00:00:00+00:00")
    write_step(tmp_path, "b", date="2026-03-01T00:00:00+00:00")
    assert [result.path.stem for result in archive.read(tmp_path)] == ["b", "a"]
    assert archive.read(tmp_path / "nowhere") == []
