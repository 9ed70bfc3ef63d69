import importlib
import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import kernels
from bench import loss_parity
from bench.loss_parity import LossParity, compare, measure, nudge
from kernels.launch import INTERPRETED
from model import Llama
from training.config import TrainConfig
from training.errors import UserError

SHAPE = {"vocab_size": 320, "max_seq_len": 16, "dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 48}
TINY = TrainConfig(**SHAPE, batch_size=2, gradient_accumulation_steps=2, warmup_iters=2, learning_rate=1e-2)
select_module = importlib.import_module("kernels.ops")
CAN_RUN_KERNELS = INTERPRETED or torch.cuda.is_available()


pytestmark = pytest.mark.usefixtures("determinism_put_back")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text to train on, and the folder where it is prepared once."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "stories.txt").write_text(
        "\n\n".join(f"Once {name} went to the {place}.\nIt rained {i} times." for i in range(30)
                    for name, place in (("a bear", "sea"), ("an owl", "wood"), ("Tim", "market")))
    )  # fmt: skip
    return {"data": str(folder / "stories.txt"), "data_dir": str(folder / "data")}


@pytest.fixture
def options(text, monkeypatch):
    """Five steps of a model small enough for a test, which stands in for every preset."""
    monkeypatch.setattr(loss_parity, "defaults", lambda preset, device: TINY)
    return LossParity(steps=5, nudged=2, dtype="float32", **text)


def losses(**drifts):
    """Curves of 40 steps around a falling one: by how much each differs from it, at every step or one by one."""
    plain = [4 - step / 20 for step in range(40)]
    curves = {"plain": plain}
    for name, drift in drifts.items():
        drift = drift if isinstance(drift, list) else [drift] * 40
        curves[name.replace("_", "-")] = [loss + d for loss, d in zip(plain, drift, strict=True)]
    return curves


def test_the_drift_is_of_the_smoothed_curve_and_of_the_first_steps():
    spike = [0.0] * 10 + [0.4] + [0.0] * 19 + [0.2] * 10
    drift = compare(losses(fused=spike, nudged_1=0.1))["drift"]
    assert drift["fused"]["max"] == pytest.approx(0.2)  # over 2 steps, the spike is no more than that
    assert drift["fused"]["mean"] == pytest.approx((2 * 0.2 + 0.1 + 9 * 0.2) / 39)
    assert drift["fused"]["first_max"] == pytest.approx(0.4)
    assert drift["fused"]["first_mean"] == pytest.approx(0.4 / 20)
    assert drift["nudged-1"] == pytest.approx(dict.fromkeys(drift["fused"], 0.1))


def test_the_bound_is_twice_the_drift_of_the_nudged_run_that_drifted_most():
    assert compare(losses(fused=-0.39, nudged_1=0.05, nudged_2=0.2))["within"]
    assert not compare(losses(fused=0.41, nudged_1=0.2, nudged_2=-0.05))["within"]


def test_a_fault_that_shows_in_the_first_steps_alone_is_out_of_bounds():
    chaos = [1e-5] * 20 + [0.1] * 20
    assert compare(losses(fused=chaos, nudged_1=chaos))["within"]
    assert not compare(losses(fused=[1e-4] * 20 + [0.1] * 20, nudged_1=chaos))["within"]


def test_what_float32_cannot_show_is_within_bounds_and_what_is_no_number_is_not():
    assert compare(losses(fused=2e-7, nudged_1=0.0))["within"]
    assert not compare(losses(fused=2e-6, nudged_1=0.0))["within"]
    assert not compare(losses(fused=[0.0] * 39 + [math.nan], nudged_1=1.0))["within"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nudge_is_half_a_unit_in_the_last_place_of_the_compute_dtype(dtype):
    def model():
        torch.manual_seed(0)
        return Llama(TINY.shape(), kernels.select("none", 1), dtype)

    before, nudged, again, other = (model() for _ in range(4))
    for changed, seed in ((nudged, 1), (again, 1), (other, 2)):
        nudge(changed, seed)
    change = (nudged.embedding.weight / before.embedding.weight - 1).abs().max().item()
    half_ulp = torch.finfo(dtype).eps / 2
    assert 0.9 * half_ulp < change < 1.1 * half_ulp + 1e-7
    assert torch.equal(nudged.embedding.weight, again.embedding.weight)
    assert not torch.equal(nudged.embedding.weight, other.embedding.weight)
    if dtype == torch.bfloat16:  # the copy that the forward pass reads
        linear = nudged.layers[0].wo
        assert torch.equal(linear.compute_weight, linear.weight.bfloat16())
        assert not torch.equal(linear.compute_weight, before.layers[0].wo.compute_weight)


@pytest.mark.skipif(not CAN_RUN_KERNELS, reason="needs a GPU or the interpreter")
def test_the_kernels_are_within_the_bound_and_the_curves_are_kept(options, console, tmp_path):
    options.json = str(tmp_path / "parity.json")
    result = measure(options, console)
    assert json.loads((tmp_path / "parity.json").read_text()) == result
    assert result["within"]
    assert list(result["losses"]) == ["plain", "fused", "nudged-1", "nudged-2"]
    assert {len(curve) for curve in result["losses"].values()} == {5}
    plain = result["losses"]["plain"]
    assert plain[0] == pytest.approx(math.log(320), abs=0.1)
    assert plain[-1] < plain[0]
    assert "fused (all) is within the bound" in console.file.getvalue()


def test_nothing_but_the_kernels_and_the_nudges_makes_runs_differ(options, console, monkeypatch):
    seeds = []
    monkeypatch.setattr(select_module, "TRITON", kernels.TORCH)
    monkeypatch.setattr(loss_parity, "nudge", lambda model, seed: seeds.append(seed))
    result = measure(replace(options, kernels="all,-adamw"), console)
    assert all(curve == result["losses"]["plain"] for curve in result["losses"].values())
    assert seeds == [1, 2]


def test_a_planted_fault_is_out_of_bounds(options, console, monkeypatch):
    wrong = replace(kernels.TORCH, swiglu=lambda gate_up: kernels.TORCH.swiglu(gate_up) * 1.001)
    monkeypatch.setattr(select_module, "TRITON", wrong)
    with pytest.raises(SystemExit) as stopped:
        measure(options, console)
    assert stopped.value.code == 1
    assert "NOT within the bound" in console.file.getvalue()
    options.kernels = "all,-swiglu"  # and so it is bisected
    assert measure(options, console)["within"]


def test_curves_are_written_as_runs_are_done(options, console, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(select_module, "TRITON", kernels.TORCH)
    monkeypatch.setattr(loss_parity, "write_json", lambda path, result: written.append(list(result["losses"])))
    options.json = str(tmp_path / "parity.json")
    measure(options, console)
    assert [len(names) for names in written] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps is 0; it must be at least 1"),
        ({"nudged": 0}, "--nudged is 0; it must be at least 1"),
        ({"kernels": "gelu"}, "unknown switch 'gelu'"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_in_the_options_are_named(options, console, changes, message):
    with pytest.raises(UserError, match=message):
        measure(replace(options, **changes), console)


def test_an_unknown_preset_is_named(console):
    with pytest.raises(UserError, match="--preset is 'gpt2'; allowed: reference"):
        measure(LossParity(preset="gpt2"), console)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_or_the_interpreter_the_ways_on_are_named(options, console, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        measure(options, console)
