import io
import json

import pytest
import torch
from rich.console import Console

from bench import check
from bench.check import INTERPRETED, Check, CheckBench, Found, Gradients, checks, measure, relative

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("determinism_put_back")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU it is the command that is run")
def test_products_and_gradients_pass_here(console, tmp_path):
    path = tmp_path / "check.json"
    result = measure(CheckBench(device="cpu", json=str(path)), console)
    assert json.loads(path.read_text()) == result
    kinds = ["plain", "fused", "plain, compiled", "fused, compiled"]
    assert [row["check"] for row in result["rows"][2:]] == [f"gradients: {kind}" for kind in kinds]
    assert all(row["passed"] for row in result["rows"])
    shown = console.file.getvalue().splitlines()
    assert [line.split()[0] for line in shown[1:-1]] == ["pass"] * 6
    assert shown[-1] == "6 of 6 checks passed"


def test_without_the_interpreter_plain_pytorch_is_checked_and_it_is_said(console, monkeypatch):
    monkeypatch.setattr(check, "INTERPRETED", False)
    monkeypatch.setattr(check, "checks", lambda device, dtype, with_kernels: iter([]) if not with_kernels else None)
    measure(CheckBench(device="cpu"), console)
    assert "TRITON_INTERPRET=1 runs them in the interpreter" in console.file.getvalue()
    assert not any("fused" in each.name for each in checks(CPU, torch.float16, with_kernels=False))


def test_a_failure_and_a_crash_stop_nothing_and_are_the_exit_status(console, monkeypatch, tmp_path):
    def crash():
        raise RuntimeError("out of\nluck")

    found = {"nan": float("nan"), "over": 2.0, "at the bound": 1.0}
    listed = [Check("crash", crash), *(Check(n, lambda x=x: Found(x, 1.0, "wo")) for n, x in found.items())]
    monkeypatch.setattr(check, "checks", lambda *_: iter(listed))
    path = tmp_path / "check.json"
    with pytest.raises(SystemExit, match="1"):
        measure(CheckBench(device="cpu", json=str(path)), console)
    rows = json.loads(path.read_text())["rows"]
    assert [row["passed"] for row in rows] == [False, False, False, True]
    assert rows[0]["failed"] == "RuntimeError: out of"
    shown = console.file.getvalue()
    assert "wo: 2, allowed 1" in shown
    assert shown.endswith("1 of 4 checks passed\n")


def test_a_product_that_was_rounded_to_half_precision_fails(monkeypatch):
    assert check.added_product(CPU, torch.float16).passed
    monkeypatch.setattr(check, "add_product", lambda total, a, b: total.add_((a.float() @ b.float()).half()))
    assert not check.added_product(CPU, torch.float16).passed


@pytest.fixture
def gradients(monkeypatch):
    """Gradients that are made up: a reference, plain's with an error of 1%, and whatever a test gives for another variant."""
    reference = {"wo": torch.ones(100), "norm": torch.full((4,), 2.0), "loss": torch.tensor(8.0)}
    computed = {
        ("plain", torch.float32): reference,
        ("plain", torch.float16): {n: 1.01 * x for n, x in reference.items()},
    }
    made = Gradients(check.MODEL, CPU, torch.float16)
    monkeypatch.setattr(made, "compute", lambda variant, dtype: computed[variant, dtype])
    made.of_plain()
    return made, lambda changed: computed.__setitem__(("fused", torch.float16), reference | changed)


@pytest.mark.parametrize(
    ("changed", "passed", "where"),
    [
        ({"wo": torch.full((100,), 1.03)}, True, "wo"),
        ({"wo": torch.full((100,), 1.032)}, False, "wo"),
        ({"wo": torch.full((100,), 1.02), "norm": torch.full((4,), 2.1)}, False, "norm"),
        ({"norm": torch.zeros(4)}, False, "norm"),
        ({"norm": torch.full((4,), float("nan"))}, False, "norm"),
        ({"loss": torch.tensor(8.5)}, False, "loss"),
    ],
)
def test_each_parameter_is_held_to_three_times_the_error_of_plain_and_a_thousandth(gradients, changed, passed, where):
    made, give = gradients
    give(changed)
    found = made.of("fused")
    assert (found.passed, found.where) == (passed, where)
    assert ("norm: zero, allowed " in str(found)) == (where in changed and not changed[where].any())


def test_a_reference_of_zeros_may_be_met_by_zeros_only():
    assert relative(torch.zeros(3), torch.ones(3)) == float("inf")
    assert relative(torch.full((3,), 1.1), torch.ones(3)) == pytest.approx(0.1)


def test_all_there_is_to_compare_comes_of_the_variants_that_are_named_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr(Gradients, "of", lambda self, variant, **options: asked.append((variant, options)))
    monkeypatch.setattr(check, "same_bits", lambda captured, uncaptured, *_: asked.append((captured, uncaptured)))
    on_gpu = list(checks(torch.device("cuda"), torch.bfloat16, with_kernels=True))
    assert len({each.name for each in on_gpu}) == len(on_gpu)
    for each in on_gpu[3:]:
        each.run()
    assert ("compiled-captured", {}) in asked
    assert ("fused", {}) in asked
    assert (("fused", {}), ("fused-uncaptured", {})) in asked
