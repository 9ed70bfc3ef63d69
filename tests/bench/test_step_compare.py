import io
import json

import pytest
from rich.console import Console

from bench.step.__main__ import StepBench, measure
from bench.step.compare import compare, show
from training.errors import UserError


def row(variant, ms, spread=1.0, memory=None):
    return {"variant": variant, "ms": ms, "ms_min": ms - spread, "ms_max": ms + spread, "peak_memory": memory}


def result(*rows, **changes):
    return {
        "preset": "reference",
        "batch_size": 128,
        "micro_steps": 4,
        "sequence_length": 256,
        "dtype": "bfloat16",
        "deterministic": True,
        "rows": list(rows),
        "environment": {"device": "H100", "torch": "2.13.0", "commit": "abc", "date": "2026-01-01"},
    } | changes


def verdicts(before, after):
    return {row["variant"]: (row["verdict"], row["speedup"]) for row in compare(before, after)["rows"]}


def test_a_slowdown_of_two_is_reported_as_such_and_a_change_within_the_spread_is_not():
    before = result(row("fused", 40), row("compiled", 60), row("plain", 100, spread=5))
    after = result(row("fused", 80), row("compiled", 30), row("plain", 104, spread=5))
    assert verdicts(before, after) == {
        "fused": ("slower", 0.5),
        "compiled": ("faster", 2.0),
        "plain": ("within the spread", 100 / 104),
    }


def test_variants_that_one_side_lacks_are_named_with_the_reason():
    before = result(row("fused", 40), {"variant": "liger", "failed": "liger-kernel is not installed"})
    after = result(row("liger", 50))
    assert verdicts(before, after) == {
        "fused": ("not measured after: not asked for", None),
        "liger": ("not measured before: liger-kernel is not installed", None),
    }


def test_memory_and_what_else_differs_are_told():
    environment = result()["environment"] | {"torch": "2.14.0"}
    before = result(row("fused", 40, memory=2**30))
    after = result(
        row("fused", 40, memory=2**29), deterministic=False, environment=environment, tokens={"source": "zipf"}
    )
    found = compare(before, after)
    assert found["rows"][0]["memory_change"] == -(2**29)
    told = {"deterministic": [True, False], "tokens": ["uniform", "zipf"], "torch": ["2.13.0", "2.14.0"]}
    assert found["differs"] == told


def files(folder, *contents):
    paths = [folder / f"{i}.json" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return [str(path) for path in paths]


def test_the_command_prints_the_comparison_and_measures_nothing(tmp_path):
    console = Console(file=io.StringIO(), width=120)
    paths = files(tmp_path, result(row("fused", 40, memory=0)), result(row("fused", 80, memory=2**20)))
    found = measure(StepBench(compare=tuple(paths)), console)
    assert found["rows"][0]["verdict"] == "slower"
    shown = console.file.getvalue()
    assert "0.50x" in shown
    assert "+1" in shown
    assert "slower" in shown


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ("{", "is not a result of bench.step"),
        ({"rows": []}, "is not a result of bench.step .KeyError: 'preset'"),
        (result(preset="124m"), "preset is reference in .* and 124m in .*can't be compared"),
    ],
)
def test_files_that_cannot_be_compared_are_named(tmp_path, after, message):
    with pytest.raises(UserError, match=message):
        show(*files(tmp_path, result(), after), Console(file=io.StringIO()))
    with pytest.raises(UserError, match=r"nowhere.json can't be read"):
        show(str(tmp_path / "nowhere.json"), *files(tmp_path, result()), Console(file=io.StringIO()))


def test_other_layers_are_other_work_where_both_say_how_many(tmp_path):
    console = Console(file=io.StringIO())
    show(*files(tmp_path, result(), result(n_layers=3)), console)
    with pytest.raises(UserError, match=r"n_layers is 8 in .* and 3 in "):
        show(*files(tmp_path, result(n_layers=8), result(n_layers=3)), console)
