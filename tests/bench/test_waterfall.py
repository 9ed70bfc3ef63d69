import io
import itertools
import json

import pytest
import torch
from rich.console import Console

from bench import archive
from bench.archive import Result
from bench.report.charts import draw
from bench.roofline.__main__ import Ceilings, find_ceilings
from bench.waterfall import measured, predicted
from bench.waterfall.__main__ import Waterfall, measure
from bench.waterfall.bars import COPIES, GAPS, INDUCTOR, OPS, PRODUCTS, PYTORCH, Work, floors, gather, rows
from model.flops import step_costs
from training.config import defaults
from training.errors import UserError
from training.hardware import GPUS

H100 = next(gpu for gpu in GPUS if gpu.name == "H100 SXM")
CEILINGS = Ceilings(H100, 3.0e12, "given", 800e12, "given")
REFERENCE = defaults("reference", "cpu")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


def written(console) -> str:
    return console.file.getvalue()


def environment(device=None, date="2026-01-02T00:00:00+00:00"):
    return {"gpu": device, "date": date}


# ----------------------------------------------------------------------------------------------------------------- bars


def test_the_floor_is_that_of_the_roofline_cut_by_cause():
    least = floors(REFERENCE, CEILINGS)
    assert set(least) == {PRODUCTS, *OPS} - {"swiglu"}  # it is in the feed-forward's kernel
    costs = step_costs(REFERENCE.shape(), REFERENCE.batch_size, REFERENCE.gradient_accumulation_steps)
    assert least["rope"] == pytest.approx(1000 * costs["rope"].bytes / 3.0e12)
    assert least[PRODUCTS] > least["linear_cross_entropy"] > 0  # the loss head's products are products


@pytest.mark.parametrize("of", [of for of in archive.read() if of.bench == "waterfall"], ids=lambda of: of.path.stem)
def test_what_is_committed_rises_from_the_floor_of_todays_formula(of):
    gpu = next(gpu for gpu in GPUS if gpu.name == of.data["of_gpu"])
    figures = [1e12 * of.data[figure] for figure in ("copy_tb_s", "matmul_tflops")]
    least = floors(defaults(of.data["preset"], "cpu"), Ceilings(gpu, figures[0], "", figures[1], ""))
    assert {row["cause"]: row["floor_ms"] for row in of.data["rows"] if row["floor_ms"]} == pytest.approx(least)


def test_bars_add_up_to_the_step_and_each_begins_where_the_last_one_ended():
    works = [
        Work("swiglu", 3.0, 2),
        Work(PRODUCTS, 9.0, 4),
        Work("swiglu", 1.0),
        Work(GAPS, 0.5, 0),
        Work(INDUCTOR, 0.25),
    ]
    bars = gather(works, {"swiglu": 2.5, PRODUCTS: 8.0, "rope": 0.5})
    assert [bar.cause for bar in bars] == [
        "swiglu",
        PRODUCTS,
        "rope",
        INDUCTOR,
        GAPS,
    ]  # what has no floor, then gaps, last
    assert [bar.above for bar in bars] == [1.5, 1.0, -0.5, 0.25, 0.5]
    assert bars[0].launches == 3
    found = rows(bars)
    assert found[0]["from_ms"] == 11.0
    for before, after in itertools.pairwise(found):
        assert after["from_ms"] == before["from_ms"] + before["above_ms"]
    assert found[-1]["from_ms"] + found[-1]["above_ms"] == sum(work.ms for work in works)


# ------------------------------------------------------------------------------------------------------------- measured


@pytest.mark.parametrize(
    ("kernel", "cause"),
    [
        ("_rms_norm_backward_kernel", "rms_norm"),
        ("_attention_dkdv_kernel", "attention"),
        ("_rope_forward_kernel", "rope"),
        ("_linear_cross_entropy_softmax_kernel", "linear_cross_entropy"),
        ("_adamw_update_kernel", "optimizer"),
        ("nvjet_sm90_tst_288x128_64x3_1x2_h_bz_coopA_NNN", PRODUCTS),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>(int)", PRODUCTS),
        ("triton_red_fused_sum_0", INDUCTOR),
        ("void pytorch_flash::flash_fwd_kernel<int>(int)", "attention"),
        ("Memcpy DtoD (Device -> Device)", COPIES),
        ("void at::native::vectorized_elementwise_kernel<4>(int)", PYTORCH),
        ("memset32", PYTORCH),
        ("_of_somebody_else_kernel", PYTORCH),
    ],
)
def test_a_kernel_is_counted_by_its_name(kernel, cause):
    assert measured.cause(kernel) == cause


def step(variant="fused", preset="reference", device="NVIDIA H100 80GB HBM3", date="2026-01-02T00:00:00+00:00", **data):
    """A result of bench.step, as JSON holds it, whose step takes 40 ms, 38 of them at work."""
    kernels = [
        {"name": "_swiglu_forward_kernel", "launches": 32, "ms": 8.0},
        {"name": "nvjet_a", "launches": 96, "ms": 29.5},
        {"name": "triton_a", "launches": 4, "ms": 0.5},
    ]
    row = {"variant": variant, "ms": 40.0, "profile": {"busy_ms": 38.0, "launches": 132, "kernels": kernels}}
    return {
        "bench": "step",
        "preset": preset,
        "n_layers": 8,
        "batch_size": 128,
        "micro_steps": 4,
        "sequence_length": 256,
        "dtype": "bfloat16",
        "deterministic": True,
        "rows": [row, {"variant": "plain", "ms": 90.0}],
        "environment": environment(device, date),
    } | data


def test_a_measured_step_is_its_kernels_and_the_time_between_them(console, monkeypatch):
    older = step(date="2026-01-01T00:00:00+00:00")
    older["rows"][0]["ms"] = 50.0
    others = [step(preset="124m"), step(device="NVIDIA H200"), step(n_layers=2), older, step()]
    monkeypatch.setattr(archive, "read", lambda: [Result(None, data) for data in others])
    result = measure(Waterfall(), console)
    assert result["ms"] == pytest.approx(40.0)
    assert (result["source"], result["of_gpu"]) == ("measured 2026-01-02, fused", "H100 SXM")
    by_cause = {row["cause"]: row for row in result["rows"]}
    assert by_cause[GAPS]["above_ms"] == pytest.approx(2.0)
    assert by_cause["swiglu"]["ms"] == 8.0
    assert by_cause["swiglu"]["launches"] == 32
    assert by_cause["swiglu"]["above_ms"] == 8.0  # the floor has it in the feed-forward's kernel
    least = floors(REFERENCE, find_ceilings(H100, []))
    assert by_cause[PRODUCTS]["above_ms"] == pytest.approx(29.5 - least[PRODUCTS])
    assert by_cause["mlp"]["above_ms"] == pytest.approx(-least["mlp"])
    last = result["rows"][-1]
    assert last["from_ms"] + last["above_ms"] == pytest.approx(result["ms"])
    text = written(console)
    assert "the floor" in text
    assert "between launches" in text
    assert "predicted" not in text


def test_a_step_is_taken_from_the_file_that_is_named(console, monkeypatch, tmp_path):
    monkeypatch.setattr(archive, "read", list)
    path = tmp_path / "step.json"
    path.write_text(json.dumps(step("compiled", n_layers=4)))
    assert measure(Waterfall(step=str(path), variant="compiled"), console)["n_layers"] == 4
    with pytest.raises(UserError, match=r"--step .* holds no profile of --variant plain"):
        measure(Waterfall(step=str(path), variant="plain"), console)
    with pytest.raises(UserError, match=r"--step is a measured step; it goes with neither"):
        measure(Waterfall(step=str(path), predicted=True), console)
    with pytest.raises(UserError, match=r"missing\.json can't be read"):
        measure(Waterfall(step=str(tmp_path / "missing.json")), console)
    path.write_text(
        "{"
    )  # the user's own file: that it be deleted, as what lies in bench/results may be, is not for us to say
    with pytest.raises(UserError, match=r"step\.json is not what a command of the bench writes \(JSON[^;]*\)$"):
        measure(Waterfall(step=str(path)), console)


# ------------------------------------------------------------------------------------------------------------ predicted


def launch(part="forward", kind="kernel", name="_swiglu_forward_kernel", op="swiglu", read=0, written=0, **tensors):
    return {"part": part, "kind": kind, "name": name, "op": op, "read": read, "written": written, "tensors": tensors}


def compiled(launches, **data):
    return {
        "bench": "compiled",
        "preset": "reference",
        "kernels": "all",
        "layers": 8,
        "batch_size": 128,
        "micro_steps": 4,
        "built_for": "H100 SXM",
        "step_launches": 1000,
        "launches": launches,
        "environment": environment(),
    } | data


def predict(*launches):
    return predicted.works(compiled(list(launches)), REFERENCE, CEILINGS)


def test_a_launch_takes_its_bytes_or_its_flops_or_the_least_there_is():
    by_bytes, by_flops, least, update, gaps = predict(
        launch(read=2 * 10**9, written=10**9),
        launch(
            kind="product", name="mm", **{"0": "bf16[4096, 2048]", "1": "bf16[2048, 1024]", "out": "bf16[4096, 1024]"}
        ),
        launch(kind="eager", name="add", op="optimizer", read=4),
        launch("update", name="_adamw_update_kernel", op="optimizer", read=3 * 10**9),
    )
    assert (by_bytes.cause, by_bytes.launches, by_bytes.ms) == ("swiglu", 4, pytest.approx(4 * 1.0))
    assert (by_flops.cause, by_flops.ms) == (PRODUCTS, pytest.approx(4 * 1000 * 2 * 4096 * 2048 * 1024 / 800e12))
    assert (least.cause, least.ms) == (PYTORCH, pytest.approx(4 * predicted.LEAST))
    assert (update.cause, update.launches, update.ms) == ("optimizer", 1, pytest.approx(1.0))
    assert (gaps.cause, gaps.ms) == (GAPS, pytest.approx(1000 * predicted.GAP))


def test_a_product_added_to_its_result_counts_once():
    work, _ = predict(
        launch(
            kind="product",
            name="addmm",
            **{"0": "f32[576, 288]", "1": "bf16[576, 32768]", "2": "bf16[32768, 288]", "out": "f32[576, 288]"},
        )
    )
    assert work.ms == pytest.approx(4 * 1000 * 2 * 576 * 32768 * 288 / 800e12)


def test_attentions_flops_are_shared_among_what_computes_it():
    works = predict(
        launch(name="_attention_forward_kernel", op="attention"),
        launch("backward", name="_attention_dq_kernel", op="attention"),
        launch("backward", name="_attention_dkdv_kernel", op="attention"),
        launch("backward", name="_attention_dkdv_kernel", op="rms_norm", kind="generated"),
    )
    flops = step_costs(REFERENCE.shape(), 128, 1)["attention"].flops * 7 / 12
    assert sum(work.ms for work in works[:3]) == pytest.approx(4 * 1000 * flops / 800e12)
    assert works[1].ms == works[2].ms == pytest.approx(works[0].ms * 5 / 4)
    assert works[3].cause == INDUCTOR


def test_the_products_inside_of_the_feed_forwards_kernels_are_counted():
    weights = {"gate_up_weight_ptr": "bf16[1536, 288]", "down_weight_ptr": "bf16[288, 768]"}
    rows = "bf16[128, 256, 288]"
    forward, backward, by_bytes, _ = predict(
        launch(name="_mlp_forward_kernel", op="mlp", x_ptr=rows, out_ptr=rows, **weights),
        launch("backward", name="_mlp_backward_kernel", op="mlp", dx_ptr=rows, **weights),
        launch("backward", name="_mlp_backward_kernel", op="mlp", dx_ptr=rows, read=10**9, **weights),
    )
    assert forward.cause == "mlp"
    assert forward.ms == backward.ms == pytest.approx(4 * 1000 * 2 * 32768 * 3 * 288 * 768 / 800e12)
    assert by_bytes.ms > forward.ms


def test_a_predicted_step_says_so(console, monkeypatch, tmp_path):
    monkeypatch.setattr(archive, "read", lambda: [Result(None, step())])
    path = tmp_path / "compiled.json"
    path.write_text(json.dumps(compiled([launch(read=3 * 10**9)])))
    out = tmp_path / "waterfall.json"
    result = measure(Waterfall(compiled=str(path), json=str(out)), console)
    assert result["variant"] == "predicted"
    assert "predicted, kernels all" in written(console)
    assert json.loads(out.read_text())["rows"] == result["rows"]
    with pytest.raises(UserError, match=r"--compiled .* is of reference, and --preset is 124m"):
        measure(Waterfall(compiled=str(path), preset="124m"), console)
    with pytest.raises(UserError, match=r"--compiled .* is of H100 SXM, and --gpu is B200"):
        measure(Waterfall(compiled=str(path), gpu="B200"), console)
    path.write_text(json.dumps(step()))
    with pytest.raises(UserError, match=r"--compiled .* is no result of bench.compiled"):
        measure(Waterfall(compiled=str(path)), console)


def test_the_gpu_that_a_prediction_is_for_is_not_the_one_that_made_it(console, monkeypatch):
    def compile_it(asked, console):  # as `bench.compiled.without_gpu.pretend` leaves torch behind
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B200")
        monkeypatch.setattr("bench.measure._gpu_state", lambda: None)
        return compiled([launch(read=10**9)], built_for="B200")

    monkeypatch.setattr(archive, "read", list)
    monkeypatch.setattr("bench.compiled.__main__.check", lambda options: None)
    monkeypatch.setattr("bench.compiled.__main__.compiled", compile_it)
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = measure(Waterfall(predicted=True, gpu="B200"), console)
    assert (result["of_gpu"], result["environment"]["gpu"]) == ("B200", here)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"kernels": "rms_norm"},
            "--kernels rms_norm is of a predicted step, and this one is measured, fused; add --pred",
        ),
        (
            {"kernels": "none", "compiled": "c.json"},
            "--kernels none: the kernels of --compiled c.json are in that file",
        ),
        (
            {"variant": "compiled"},
            "--variant compiled is of a measured step: bench/results has no profile of it for ref",
        ),
        ({"variant": "compiled", "predicted": True}, "--variant compiled is of a measured step"),
    ],
)
def test_what_would_be_passed_over_is_refused(console, monkeypatch, options, words):
    monkeypatch.setattr(archive, "read", lambda: [Result(None, step())])
    with pytest.raises(UserError, match=words):
        measure(Waterfall(**options), console)


def test_the_report_draws_it(console, monkeypatch, tmp_path):
    monkeypatch.setattr(archive, "read", lambda: [Result(None, step())])
    result = measure(Waterfall(), console) | {"environment": environment()}
    drawn = draw([Result(None, result)], tmp_path / "charts")
    assert drawn == ["waterfall-h100-sxm-reference-fused.png"]
    assert (tmp_path / "charts" / drawn[0]).stat().st_size > 10_000
