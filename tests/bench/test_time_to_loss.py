import io
import json

import pytest
import torch
from rich.console import Console

from bench import time_to_loss
from bench.archive import Result
from bench.report.charts import draw
from bench.step import variants
from bench.time_to_loss import TimeToLoss, lines, measure, reach
from training.config import TrainConfig
from training.errors import UserError

SHAPE = {"vocab_size": 320, "max_seq_len": 16, "dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 48}
TINY = TrainConfig(
    **SHAPE, batch_size=4, gradient_accumulation_steps=1, warmup_iters=2, learning_rate=3e-3, eval_iters=2
)

pytestmark = pytest.mark.usefixtures("determinism_put_back")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(time_to_loss, "defaults", lambda preset, device: TINY)
    path = tmp_path / "stories.txt"
    path.write_text(
        "\n\n".join(
            f"Once Tim went to the {place}.\nIt rained {i} times." for i in range(60) for place in ("sea", "wood")
        )
    )
    here = {"data": str(path), "data_dir": str(tmp_path / "data"), "dtype": "float32", "device": "cpu"}
    return lambda **more: TimeToLoss(**here | {"steps": 12, "eval_interval": 4, "runs": ["plain", "plain+muon"]} | more)


@pytest.mark.parametrize(
    ("target", "steps", "seconds"), [(4.0, 10, 1.0), (3.5, 15, 1.5), (3.0, 20, 2.0), (2.5, 35, 3.5), (1.9, None, None)]
)
def test_the_target_is_reached_between_two_evaluations_in_proportion(target, steps, seconds):
    curve = [(0, 0.0, 5.0), (10, 1.0, 4.0), (20, 2.0, 3.0), (30, 3.0, 3.1), (40, 4.0, 1.9 + 1e-9)]
    found = reach(curve, target)
    if steps is None:
        assert found == {"steps_to_target": None, "seconds_to_target": None}
    else:
        assert found["steps_to_target"] == pytest.approx(steps, abs=0.1)
        assert found["seconds_to_target"] == pytest.approx(seconds, abs=0.01)


def test_runs_that_are_never_a_number_reach_nothing():
    assert reach([(0, 0.0, 5.0), (10, 1.0, float("nan"))], 4.0)["steps_to_target"] is None


def test_runs_share_the_data_and_differ_in_what_they_are_called(options, console, tmp_path):
    path = tmp_path / "out.json"
    result = measure(options(json=str(path)), console)
    assert [(row["run"], row["seed"]) for row in result["rows"]] == [
        (run, seed) for seed in (1337, 1338) for run in ("plain", "plain+muon")
    ]
    by_run = {(row["run"], row["seed"]): row["curve"] for row in result["rows"]}
    for curve in by_run.values():
        assert [step for step, *_ in curve] == [0, 4, 8, 12]
        assert [seconds for _, seconds, _ in curve] == sorted(seconds for _, seconds, _ in curve)
        assert curve[-1][2] < curve[0][2]
    assert by_run["plain", 1337][0] == by_run["plain+muon", 1337][0]  # before the first step they are one model
    assert by_run["plain", 1337][1][2] != by_run["plain+muon", 1337][1][2]
    assert by_run["plain", 1337][0] != by_run["plain", 1338][0]
    worst = max(min(loss for *_, loss in by_run["plain", seed]) for seed in (1337, 1338))
    assert 0 <= result["target"] - worst < 0.001
    assert all(row["steps_to_target"] is not None for row in result["rows"] if row["run"] == "plain")
    assert json.loads(path.read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    text = console.file.getvalue()
    assert "plain+muon" in text
    assert "to a validation loss of" in text


def test_a_run_is_the_same_when_it_is_run_again(options, console):
    first, second = (measure(options(seeds=1, runs=["plain"]), console)["rows"][0]["curve"] for _ in range(2))
    assert [(step, loss) for step, _, loss in first] == [(step, loss) for step, _, loss in second]


def test_a_run_that_is_named_twice_is_made_once(options, console):
    assert len(measure(options(seeds=1, steps=4, runs=["plain", "plain"]), console)["rows"]) == 1


def test_lines_say_what_was_not_reached():
    curve = [(0, 0.0, 5.0), (11, 2.0, 4.0)]
    rows = [
        {"run": "plain", "seed": seed, "first_step": 0.5, "curve": curve} | reach(curve, target)
        for seed, target in ((1, 4.5), (2, 3.0))
    ]
    assert lines({"rows": rows}) == [
        ["plain", "not reached by 1 of 2", "not reached by 1 of 2", "200.0 ± 0.0", "0.5 ± 0.0", "4.0000 ± 0.0000"]
    ]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["quick"], r"--runs names 'quick'; allowed: plain, compiled, .*, each with \+adamw or \+muon"),
        (["plain+sgd"], r"--runs names 'plain\+sgd'; allowed: "),
        (["reference"], r"--runs names 'reference'; allowed: "),
    ],
)
def test_a_run_that_is_none_is_refused(options, console, runs, message):
    with pytest.raises(UserError, match=message):
        measure(options(runs=runs), console)


def test_a_target_that_is_no_number_is_refused(options, console):
    with pytest.raises(UserError, match="--target is nan; it must be at least 0"):
        measure(options(target=float("nan")), console)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run on a GPU")
def test_a_run_that_this_machine_has_no_gpu_for_is_refused(options, console):
    with pytest.raises(UserError, match=r"--runs names 'fused', which can't run here: no GPU"):
        measure(options(runs=["fused"]), console)


def test_by_itself_it_takes_what_the_machine_can_run():
    assert time_to_loss._possible(torch.device("cpu")) == ["plain", "compiled", "compiled+muon"]
    assert time_to_loss._possible(torch.device("cuda"))[-2:] == ["fused", "fused+muon"]
    assert set(time_to_loss._possible(torch.device("cuda"))[:-1]) <= set(variants.WHOLE)


def test_the_report_draws_it(options, console, tmp_path):
    result = measure(options(seeds=1), console)
    drawn = draw([Result(None, result)], tmp_path / "charts")
    assert drawn == ["time-to-loss-cpu-smoke.png"]
    assert (tmp_path / "charts" / drawn[0]).stat().st_size > 10_000
