import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bench.measure import Timing, version
from bench.step import __main__ as step
from bench.step.__main__ import StepBench, measure
from bench.step.variants import PER_OP, VARIANTS, make_step, make_trainer, selection, why_absent
from kernels import grammar
from model import flops
from training.config import TrainConfig
from training.errors import UserError

CPU = torch.device("cpu")
TINY = TrainConfig(
    vocab_size=300,
    max_seq_len=16,
    dim=32,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    batch_size=2,
    gradient_accumulation_steps=2,
)


pytestmark = pytest.mark.usefixtures("determinism_put_back")


@pytest.fixture
def tiny(monkeypatch):
    """A model small enough for a test stands in for every preset, on the CPU, and nothing is compiled."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(step, "defaults", lambda preset: TINY)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


def batch():
    tokens = torch.arange(34).view(2, 17) % 300
    return [(tokens[:, :-1], tokens[:, 1:])] * 2


@pytest.mark.parametrize("variant", ["reference", "reference-compiled", "plain", "compiled", "unchunked"])
def test_every_variant_trains(tiny, variant):
    take = make_step(variant, TINY, CPU, torch.float32, batch())
    losses = [take() for _ in range(8)]
    assert losses[0] == pytest.approx(torch.tensor(300.0).log().item(), abs=0.1)  # nothing is known yet
    assert losses[-1] < losses[0] - 0.1


def options(variant):
    config = replace(TINY, **selection(variant))
    return config.switches(), config.compile, config.capture


def test_variants_get_the_kernels_the_compilation_and_the_capture_that_they_are_named_for():
    every = set(grammar.SWITCHES)
    assert options("plain")[:2] == options("liger")[:2] == (set(), False)
    assert options("compiled")[:2] == options("liger-compiled")[:2] == options("unchunked")[:2] == (set(), True)
    assert options("compiled-captured")[:2] == (set(), True)
    assert options("fused") == (every, True, True)
    assert options("fused-uncaptured") == (every, True, False)
    for op in every:
        with_it = {op} | {grammar.NEEDS.get(op, op)}
        off_with_it = {op} | {other for other, needed in grammar.NEEDS.items() if needed == op}
        assert options(f"only-{op}") == (with_it, True, False)
        assert options(f"without-{op}") == (every - off_with_it, True, False)
    assert len(PER_OP) == 2 * len(every)
    assert set(PER_OP) <= set(VARIANTS)


def test_the_twins_are_captured_where_they_are_asked_to_be_and_the_kernels_wherever_they_run(monkeypatch):
    asked = {}

    def trainer(model, config, world, capture):
        asked[variant] = capture

    monkeypatch.setattr("bench.step.variants.Trainer", trainer)
    for variant in ("plain", "compiled", "compiled-captured", "fused-uncaptured"):
        make_trainer(variant, TINY, CPU, torch.float32, compile=False)
    assert asked == {"plain": None, "compiled": None, "compiled-captured": True, "fused-uncaptured": None}


def test_a_cpu_captures_nothing_whatever_is_asked():
    assert not make_trainer("compiled-captured", TINY, CPU, torch.float32, compile=False).captures


def test_what_cannot_run_here_says_why(monkeypatch):
    monkeypatch.setattr("bench.step.variants.version", lambda package: None)
    gpu = torch.device("cuda")
    assert why_absent("liger", gpu) == "liger-kernel is not installed"
    assert why_absent("transformers", CPU) == "transformers is not installed"
    assert why_absent("fused", CPU) == why_absent("only-rope", CPU) == why_absent("compiled-captured", CPU) == "no GPU"
    assert why_absent("fused", gpu) is why_absent("compiled-captured", gpu) is why_absent("compiled", CPU) is None


@pytest.mark.skipif(version("transformers") is None, reason="transformers is not installed")
def test_transformers_llama_has_as_many_parameters_and_trains():
    from bench.peers.transformers_llama import TransformersLlama

    for tied in (True, False):
        shape = replace(TINY, tie_embeddings=tied)
        assert sum(p.numel() for p in TransformersLlama(shape).parameters()) == flops.parameters(shape)
    take = make_step("transformers", TINY, CPU, torch.float32, batch())
    losses = [take() for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1


def test_figures_by_hand(monkeypatch):
    monkeypatch.setattr(step, "name_of", lambda device: "NVIDIA H100 80GB HBM3")
    figures = step.figures(Timing(0.5, 0.4, 0.7, 5), step.defaults("reference"), CPU, torch.bfloat16)
    flops_per_token = 6 * (8 * (288 * 576 + 288 * 288 + 3 * 288 * 768) + 4096 * 288) + 12 * 8 * 8 * 36 * 256
    rate = 4 * 128 * 256 / 0.5
    assert (figures["ms"], figures["ms_min"], figures["ms_max"]) == (500.0, 400.0, 700.0)
    assert figures["tokens_per_second"] == rate
    assert figures["tflops"] == pytest.approx(rate * flops_per_token / 1e12)
    assert figures["mfu"] == pytest.approx(rate * flops_per_token / 989.4e12)


def test_the_result_is_a_row_a_variant_on_the_terminal_and_in_the_file(tiny, console, tmp_path):
    path = tmp_path / "step.json"
    result = measure(StepBench(variants=["plain", "reference"], repeats=2, json=str(path)), console)
    assert json.loads(path.read_text()) == result
    assert [row["variant"] for row in result["rows"]] == ["plain", "reference"]
    for row in result["rows"]:
        assert row["repeats"] == 2
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["mfu"] is None
        assert row["peak_memory"] is None
    assert result["environment"]["gpu"] is None
    shown = console.file.getvalue()
    assert shown.count("no GPU here") == 1
    assert "reference: 2 x 2 x 16 tokens, float32" in shown
    assert "tokens drawn by Zipf's law, " in shown


def test_batch_and_micro_steps_are_the_options(tiny, console):
    result = measure(StepBench(variants=["plain"], repeats=1, batch_size=1, micro_steps=3), console)
    row = result["rows"][0]
    assert (result["batch_size"], result["micro_steps"]) == (1, 3)
    assert row["tokens_per_second"] == pytest.approx(3 * 16 / (row["ms"] / 1000))


def test_a_variant_that_runs_out_of_memory_is_named_and_the_others_are_measured(tiny, console, monkeypatch):
    make = step.make_step

    def make_or_not(variant, *rest):
        if variant == "plain":
            raise torch.OutOfMemoryError
        return make(variant, *rest)

    monkeypatch.setattr(step, "make_step", make_or_not)
    result = measure(StepBench(variants=["plain", "compiled"], repeats=1), console)
    assert result["rows"][0] == {"variant": "plain", "failed": "out of memory"}
    assert result["rows"][1]["ms"] > 0
    assert "out of memory" in console.file.getvalue()


def test_a_variant_that_breaks_is_named_and_the_command_fails_after_its_table(tiny, console, monkeypatch, tmp_path):
    make, path = step.make_step, tmp_path / "step.json"

    def make_or_not(variant, *rest):
        if variant == "plain":
            raise RuntimeError("out of\nluck")
        return make(variant, *rest)

    monkeypatch.setattr(step, "make_step", make_or_not)
    with pytest.raises(SystemExit, match="1"):
        measure(StepBench(variants=["plain", "compiled"], repeats=1, json=str(path)), console)
    rows = json.loads(path.read_text())["rows"]
    assert rows[0] == {"variant": "plain", "failed": "RuntimeError: out of"}
    assert rows[1]["ms"] > 0
    assert "RuntimeError: out of" in console.file.getvalue()


def test_ctrl_c_keeps_the_whole_turns_that_were_timed(tiny, console, monkeypatch, tmp_path):
    path, make = tmp_path / "step.json", step.make_step

    def make_until_stopped(variant, *rest):
        take, calls = make(variant, *rest), iter(range(100))

        def call():
            if (
                variant == "compiled" and next(calls) == 3 + (1 + 3) + 1 + 2
            ):  # first steps, by itself, warm-up, two turns
                raise KeyboardInterrupt
            return take()

        return call

    monkeypatch.setattr(step, "make_step", make_until_stopped)
    with pytest.raises(KeyboardInterrupt):
        measure(StepBench(variants=["plain", "compiled"], repeats=50, json=str(path)), console)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["variant"], row["repeats"]) for row in rows] == [("plain", 2), ("compiled", 2)]
    assert "ms/step" in console.file.getvalue()


def test_a_stop_keeps_the_variants_that_were_ready(tiny, console, monkeypatch, tmp_path):
    path, make = tmp_path / "step.json", step.make_step

    def make_or_stop(variant, *rest):
        if variant == "compiled":
            raise KeyboardInterrupt
        return make(variant, *rest)

    monkeypatch.setattr(step, "make_step", make_or_stop)
    with pytest.raises(KeyboardInterrupt):
        measure(StepBench(variants=["plain", "compiled"], repeats=50, json=str(path)), console)
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["variant"], row["repeats"], row["in_turn"]) == ("plain", step.FIRST_REPEATS, False)
    assert "ms/step" in console.file.getvalue()


def test_the_time_is_kept_before_the_profiler_runs(tiny, console, monkeypatch):
    monkeypatch.setattr(step.profile, "profile", lambda call: {"busy_ms": 4.0})
    rows, options = [], StepBench(profile=True, repeats=1)
    micro_batches = step.tokens.draw(TINY)[0]

    def keep(variant, row):
        rows.append(row)

    step._time_group(["plain"], TINY, options, CPU, torch.float32, micro_batches, keep, console)
    assert [row.get("profile") for row in rows] == [None, {"busy_ms": 4.0}]


@pytest.mark.parametrize(
    ("ms", "name", "speeds"),
    [
        ({"compiled": 90.0, "compiled-captured": 60.0, "fused": 40.0}, "compiled-captured", [60 / 90, 1.0, 1.5]),
        ({"compiled": 50.0, "compiled-captured": 60.0, "fused": 40.0}, "compiled", [1.0, 50 / 60, 1.25]),
        ({"fused": 40.0, "compiled": 60.0}, "compiled", [1.5, 1.0]),
        ({"fused": 40.0, "plain": 60.0}, "fused", [1.0, 40 / 60]),
    ],
)
def test_speeds_are_against_the_faster_of_compiled_and_the_same_captured(ms, name, speeds):
    rows = [{"variant": variant, "ms": x} for variant, x in ms.items()] + [{"variant": "liger", "failed": "no"}]
    assert step.baseline(rows) == name
    *timed, failed = step.against_baseline(rows)
    assert [row["vs_best"] for row in timed] == pytest.approx(speeds)
    assert "vs_best" not in failed


def test_some_layers_of_a_preset_are_said(tiny, console, monkeypatch):
    monkeypatch.setattr(step, "defaults", lambda preset: replace(TINY, n_layers=3))
    result = measure(StepBench(variants=["plain"], repeats=1, n_layers=1), console)
    assert (result["n_layers"], result["layers_of_preset"]) == (1, 3)
    assert "reference with 1 of its 3 layers: 2 x 2 x 16" in console.file.getvalue()


def test_what_is_missing_is_a_row_and_no_failure(tiny, console, monkeypatch):
    monkeypatch.setattr("bench.step.variants.version", lambda package: None)
    result = measure(StepBench(variants=["plain", "transformers", "fused"], repeats=1), console)
    assert result["rows"][1:] == [
        {"variant": "transformers", "failed": "transformers is not installed"},
        {"variant": "fused", "failed": "no GPU"},
    ]
    assert "transformers is not installed" in console.file.getvalue()


def test_large_models_are_held_one_at_a_time_and_written_as_they_are_done(tiny, console, monkeypatch, tmp_path):
    written, held = [], []
    monkeypatch.setattr(step, "SIDE_BY_SIDE", 0)
    monkeypatch.setattr(step, "write_json", lambda path, result: written.append(len(result["rows"])))
    time_in_turn = step.time_in_turn
    monkeypatch.setattr(
        step, "time_in_turn", lambda calls, **rest: held.append(list(calls)) or time_in_turn(calls, **rest)
    )
    measure(StepBench(variants=["plain", "reference"], repeats=1, json=str(tmp_path / "step.json")), console)
    assert held == [["plain"], ["reference"]]
    assert written == [1, 2, 2]  # and once more with the clocks at the end


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"variants": ["fused"], "device": "cpu"},
            r"--variants: none of them can run on cpu .fused: no GPU.",
        ),
        (
            {"variants": ["fast"]},
            "--variants is 'fast'; allowed: reference, reference-compiled, plain, compiled, compiled-captured, fused",
        ),
        ({"preset": "gpt2"}, "--preset is 'gpt2'; allowed: reference, smoke"),
        ({"repeats": 0}, "--repeats is 0; it must be at least 1"),
        ({"batch_size": -1}, "--batch-size is -1; it must be at least 0"),
        ({"n_layers": -1}, "--n-layers is -1; it must be at least 0"),
        ({"device": "tpu"}, "--device is 'tpu'; allowed: auto, cpu, cuda"),
        ({"profile": True, "device": "cpu"}, "--profile shows the kernels of a GPU, and this would run on cpu"),
    ],
)
def test_mistakes_in_the_options_are_named(console, options, message):
    with pytest.raises(UserError, match=message):
        measure(StepBench(**options), console)
