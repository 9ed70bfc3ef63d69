"""Generated text, timed: every variant gives the same tokens, and the figures follow from the times."""

import io

import pytest
import torch
from rich.console import Console

from bench import generation
from bench.archive import Result
from bench.generation import GenerationBench, measure, rows
from bench.measure import Timing
from bench.report.generation import section
from training.errors import UserError


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A run of a moment, nothing compiled."""
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    small = {"vocab_size": 300, "dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 8}

    def defaults(preset):
        return generation.TrainConfig(**small)

    monkeypatch.setattr(generation, "defaults", defaults)
    return {"device": "cpu", "repeats": 1, "json": str(tmp_path / "generation.json")}


def test_every_variant_that_runs_here_gives_the_same_tokens(console, quick):
    result = measure(GenerationBench(streams=[1, 3], **quick), console)
    here = {"cached", "cached-compiled", "whole-sequence"} | {"transformers"} - set(result["absent"])
    assert result["absent"]["cached-captured"] == "no GPU"
    for streams in (1, 3):
        of_streams = {row["variant"]: row for row in result["rows"] if row["streams"] == streams}
        assert set(of_streams) == here
        assert all(row["agrees"] == 1 for row in of_streams.values())
    shown = console.file.getvalue()
    assert "8 tokens: float32" in shown
    assert "cached-captured: no GPU" in shown


def test_tokens_a_second_and_ratios_are_those_of_the_medians():
    seconds = {"cached": 2.0, "whole-sequence": 10.0, "transformers": 3.0}
    timings = {name: Timing(median=s, minimum=s / 2, maximum=2 * s, repeats=3) for name, s in seconds.items()}
    same = [[1, 2, 3, 4]] * 2
    found = rows(2, 4, timings, {"cached": [[1, 2, 3, 4], [1, 2, 3, 9]], "whole-sequence": same, "transformers": same})
    assert found[0] == {
        "streams": 2,
        "variant": "cached",
        "ms_per_token": 500.0,
        "tokens_per_s": 4.0,
        "tokens_per_s_min": 2.0,
        "tokens_per_s_max": 8.0,
        "vs_whole-sequence": 5.0,
        "vs_transformers": 1.5,
        "agrees": 7 / 8,
    }
    assert "vs_whole-sequence" not in found[1]
    assert found[2]["vs_whole-sequence"] == 10 / 3


def test_the_report_has_a_row_a_variant():
    timings = {"cached": Timing(2.0, 1.0, 4.0, 3), "whole-sequence": Timing(10.0, 9.0, 11.0, 3)}
    data = {"bench": "generation", "preset": "reference", "tokens": 256, "rows": rows(1, 4, timings, {})}
    data["environment"] = {"gpu": None, "device": "CPU, x86_64, 1 threads", "date": "2026-11-26T00:00:00+00:00"}
    lines = section([Result(None, data)]).splitlines()
    assert lines[2].startswith(
        "| CPU, 1 threads | reference | 256 | 1 | cached | 2.0 | 1.0 to 4.0 | 5.00x |  | 2026-11-26 |"
    )
    assert len(lines) == 4
    assert section([]) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ["fast"]}, "--variants is 'fast'; allowed: cached, "),
        ({"streams": []}, r"--streams is \[\]; one or more"),
        ({"streams": [1, 0]}, r"--streams is \[1, 0\]"),
        ({"tokens": 9}, "--tokens is 9; allowed: 2 to 8"),
        ({"repeats": 0}, "--repeats is 0"),
    ],
)
def test_mistakes_in_the_options_are_named(console, quick, options, message):
    with pytest.raises(UserError, match=message):
        measure(GenerationBench(**quick | options), console)
