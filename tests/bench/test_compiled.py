import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.compiled import KNOWN, without_gpu
from bench.compiled.__main__ import CompiledOptions, check, step_config, words
from bench.compiled.diff import difference
from bench.compiled.record import Generated, Shape, _comment, parameters
from bench.compiled.show import by_op, fold, joined, remarks, show
from training.errors import UserError

ROOT = Path(__file__).parents[2]
can_compile = torch.version.cuda is not None and torch.__version__.startswith(tuple(KNOWN))


def run(*words):
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compiled", *words]
    environ |= {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=500)


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.skipif(can_compile, reason="this PyTorch can")
def test_without_a_known_build_with_cuda_one_line_says_how_to_get_one():
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "bench.compiled needs a build of PyTorch with CUDA" in line or "does not know those of" in line
    assert "pip install torch==2.11.0" in line


@pytest.mark.parametrize(
    ("version", "cuda", "message"),
    [
        ("2.11.0+cpu", None, "has none"),
        ("2.99.0+cu140", "14.0", r"does not know those of 2\.99\.0\+cu140 \(it knows 2\.11\)"),
    ],
)
def test_the_version_is_asked_before_anything_is_changed(monkeypatch, version, cuda, message):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    available = torch.cuda.is_available
    with pytest.raises(UserError, match=message):
        without_gpu.pretend("h100", None)
    assert torch.cuda.is_available is available


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h200"}, "--gpu is 'h200'; allowed: a100, h100, b200"),
        ({"diff": ["a", "b", "c"]}, "--diff names 3"),
        ({"kernels": "all,-rop"}, "--kernels"),
        ({"preset": "tiny"}, "--preset is 'tiny'"),
        ({"layers": -1}, "--layers is -1"),
    ],
    ids=str,
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        check(CompiledOptions(**options))


def test_the_options_that_say_what_is_compiled_go_on_to_a_commit():
    options = CompiledOptions(preset="124m", kernels="none", layers=2, code=False, packed=True, json="x")
    assert words(options) == ["--preset", "124m", "--kernels", "none", "--layers", "2", "--packed", "--no-code"]
    assert words(CompiledOptions()) == []


def test_the_step_is_that_of_train_py():
    config = step_config(CompiledOptions(preset="reference", layers=2))
    assert (config.n_layers, config.batch_size, config.dim) == (2, 128, 288)


# --------------------------------------------------------------------------------------------------------------- reading

SOURCE = """
@triton.jit
def triton_poi_fused_add_0(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    pass
"""
OURS = """
@triton_heuristics.user_autotune(custom_kernel=True)
@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,  # None without a residual, and so is summed_ptr
    n_rows,
    q_stride: tl.constexpr, k_stride,
    D: tl.constexpr,
):
    pass
"""


def test_arguments_of_a_launch_are_the_parameters_that_are_no_constants():
    assert parameters(Generated("triton_poi_fused_add_0", SOURCE)) == ["in_ptr0", "out_ptr0", "xnumel"]
    assert parameters(Generated("_norm_kernel", OURS)) == ["x_ptr", "residual_ptr", "n_rows", "k_stride"]
    assert Generated("_norm_kernel", OURS).is_ours
    assert not Generated("triton_poi_fused_add_0", SOURCE).is_ours


def test_what_inductor_fused_stands_in_the_last_comment_above_the_launch():
    above = [
        "# Topologically Sorted Source Nodes: [sum_1], Original ATen: [aten.sum]",
        "# Topologically Sorted Source Nodes: [mul, dx], Original ATen: [aten.mul, aten._to_copy]",
        "stream0 = get_raw_stream(0)",
    ]
    assert _comment(above) == (("mul", "dx"), ("mul", "_to_copy"))
    added = ["# Topologically Sorted Source Nodes: [as_strided_default, clone_default_3], Original ATen: []"]
    assert _comment(added)[1] == ("as_strided", "clone")
    assert _comment([]) == ((), ())


def test_shapes_are_short():
    assert str(Shape.of(torch.empty(3, 4, dtype=torch.bfloat16))) == "bf16[3, 4]"
    assert Shape.of(torch.empty(3, 4).T).meta().stride() == (1, 4)


# ---------------------------------------------------------------------------------------------------------------- tables


def launch(title, part="forward", kind="kernel", op="swiglu", read=2**20, written=2**20, code=None, name=None):
    row = {"part": part, "kind": kind, "title": title, "name": name or title, "op": op, "site": "", "code": code}
    return row | {"read": read, "written": written}


def result(*rows):
    floor = {"swiglu": {"launches": 1, "bytes": 2**20}, "rope": {"launches": 1, "bytes": 0}}
    shape = {"preset": "smoke", "batch_size": 1, "sequence_length": 8, "layers": 1, "packed": False, "kernels": "all"}
    return {
        "launches": list(rows),
        "floor": floor,
        "built_for": "H100 SXM",
        "micro_steps": 2,
        "step_launches": 5,
    } | shape


def test_what_layers_repeat_is_written_once():
    layer = [launch("a"), launch("b"), launch("b"), launch("c")]
    blocks = fold([launch("first"), *layer * 5, launch("last")])
    assert [(block.times, [row["title"] for row in block.rows]) for block in blocks] == [
        (1, ["first"]),
        (5, ["a", "b", "b", "c"]),
        (1, ["last"]),
    ]
    assert [block.times for block in fold([launch("a"), launch("b")])] == [1]
    assert fold([]) == []


def test_launches_of_other_bytes_are_not_folded():
    blocks = fold([launch("a"), launch("a", read=7), launch("a", read=7)])
    assert [(block.times, len(block.rows)) for block in blocks] == [(1, 1), (2, 1)]


def test_arithmetic_on_scalars_shares_a_line():
    small = {"kind": "eager", "read": 4, "written": 4}
    rows = joined([launch("a"), launch("mul", **small), launch("div", **small), launch("mul", **small), launch("b")])
    assert [row["title"] for row in rows] == ["a", "scalars: 2 mul, div", "b"]
    assert (rows[1]["calls"], rows[1]["read"], rows[1]["written"]) == (3, 12, 12)


def test_totals_stand_beside_the_floor():
    totals = by_op(result(launch("a"), launch("b", part="backward", read=1), launch("c", part="start", op="optimizer")))
    assert totals["swiglu"]["forward launches"] == totals["swiglu"]["backward launches"] == 1
    assert totals["swiglu"]["bytes"] == 3 * 2**20 + 1
    assert totals["swiglu"]["floor bytes"] == 2**20
    assert totals["optimizer"]["step launches"] == 1
    assert totals["rope"]["floor launches"] == 1


def test_copies_fallbacks_and_spills_are_named():
    spilling = {"stack": [0, 8], "registers": [255], "widest_load": [16], "widest_store": [16]}
    lines = remarks(
        result(
            launch("clone -> bf16[9]", kind="copy"),
            launch("clone -> bf16[9]", kind="copy"),
            launch("index_put_ f32[9]", kind="fallback"),
            launch("k", code=spilling),
        )
    )
    assert lines[0] == "copies in compiled code: 2, 0.004 GB: 2 x clone -> bf16[9]"
    assert lines[1].startswith("fallbacks to PyTorch's own kernels: 1, 0.002 GB: 1 x index_put_ f32[9]")
    assert lines[2] == "kernels that spill: k"
    assert lines[3].startswith("a step of 2 micro-steps: 5 launches")


def test_the_tables_print():
    console = Console(width=200, file=io.StringIO())
    show(
        result(launch("_swiglu_forward_kernel"), launch("index_put_ f32[9]", kind="fallback", part="backward")), console
    )
    text = console.file.getvalue()
    assert "FALLBACK index_put_ f32[9]" in text
    assert "built for H100 SXM, not measured" in text


def test_a_difference_is_what_one_side_launches_more_often_or_otherwise():
    code = {"registers": [32], "stack": [0]}
    before = result(launch("a"), launch("a"), launch("b", code=code), launch("same", code=code))
    after = result(
        launch("a"),
        launch("b", code=code | {"registers": [40]}),
        launch("same", code=code),
        launch("clone", kind="copy"),
    )
    changes = {change["launch"]: change for change in difference(before, after)}
    assert set(changes) == {"a", "b", "COPY clone"}
    assert changes["a"]["times"] == [2, 1]
    assert changes["b"]["code"] == [code, code | {"registers": [40]}]
    assert changes["COPY clone"]["bytes"] == [0, 2**21]
    assert difference(before, before) == []


# ------------------------------------------------------------------------------------------------------------ the real one


@pytest.mark.skipif(not can_compile, reason=f"needs PyTorch {' or '.join(KNOWN)} with CUDA")
def test_a_small_step_is_compiled_and_its_code_built(tmp_path):
    file = tmp_path / "smoke.json"
    done = run("--preset", "smoke", "--layers", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["environment"]["gpu"] is None  # nothing of it was measured on one
    rows = found["launches"]
    assert {row["part"] for row in rows} == {"start", "forward", "backward", "update"}
    (swiglu,) = (row for row in rows if row["name"] == "_swiglu_forward_kernel")
    assert swiglu["op"] == "swiglu"
    assert swiglu["read"] == 2 * swiglu["written"] > 0
    assert swiglu["code"]["registers"][0] > 0
    assert all(row["code"] for row in rows if row["kind"] in ("kernel", "generated"))
    totals = by_op(found)
    assert totals["linear"]["bytes"] == totals["linear"]["floor bytes"]  # a product moves no more than it must
    assert (
        totals["linear"]["forward launches"] + totals["linear"]["backward launches"]
        == totals["linear"]["floor launches"]
    )
    assert "_swiglu_forward_kernel" in done.stdout
