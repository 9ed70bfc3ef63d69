"""The error map and the bisection, by faults planted in one kernel of one layer: each must be named, and nothing else."""

import io
import json
from dataclasses import fields, replace

import pytest
import torch
from rich.console import Console

import kernels
from bench.parity import __main__ as parity
from bench.parity.__main__ import Parity, measure, op_table, worst
from kernels import grammar
from kernels.launch import INTERPRETED
from training.config import TrainConfig
from training.errors import UserError

SHAPE = {"vocab_size": 300, "max_seq_len": 12, "dim": 32, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 48}
CAN_RUN_KERNELS = INTERPRETED or torch.cuda.is_available()
needs_kernels = pytest.mark.skipif(not CAN_RUN_KERNELS, reason="needs a GPU or the interpreter")
TWINS = kernels.TORCH

pytestmark = pytest.mark.usefixtures("determinism_put_back")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


@pytest.fixture
def options(monkeypatch):
    """A model small enough for a test, which stands in for every preset."""
    monkeypatch.setattr(parity, "defaults", lambda preset, device: TrainConfig(**SHAPE))
    return Parity(dtype="float32", batch_size=1)


# --------------------------------------------------------------------------------------------------------------- faults


class Scaled(torch.autograd.Function):
    """x times `forward` one way, its gradient times `backward` the other way."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx, dx):
        return dx * ctx.factor, None, None


def wrong(op, argument=None, forward=1.0, backward=1.0):
    """A twin with a factor on its (first) output, or on one of its arguments and on what goes back to that."""

    def faulty(*arguments, **keywords):
        if argument is not None:
            scaled = Scaled.apply(arguments[argument], forward, backward)
            arguments = (*arguments[:argument], scaled, *arguments[argument + 1 :])
        outputs = getattr(TWINS, op)(*arguments, **keywords)
        if argument is not None:
            return outputs
        if isinstance(outputs, tuple):
            return Scaled.apply(outputs[0], forward, backward), *outputs[1:]
        return Scaled.apply(outputs, forward, backward)

    return faulty


def planting(faults, triton=TWINS):
    """A `kernels.select` with faults: {place: {op: function}}; all else is `triton` where a kernel is on."""

    def select(spec, n_layers):
        places = []
        for place, switches in enumerate(grammar.parse(spec, n_layers)):
            here = replace(TWINS)
            for field in fields(kernels.Ops):
                switch = "rms_norm" if "rms_norm" in field.name else field.name
                if switch in switches:
                    kernel = faults.get(place, {}).get(field.name, getattr(triton, field.name))
                    here = replace(here, **{field.name: kernel})
            places.append(here)
        return places

    return select


def search(options, console, select):
    """The result of a bisection, from the file it is written to as well, and the exit status."""
    written = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "write_json", lambda path, result: written.update(json.loads(json.dumps(result))))
        status = 0
        try:
            measure(replace(options, bisect=True, json="unused.json"), console, select)
        except SystemExit as stopped:
            status = stopped.code
    return written, status


def named(result):
    """The ops that the map finds beyond the tolerance."""
    return sorted(
        {f"{row['switch']}@{row['layer']}" for row in result["ops"] if not parity.within(row, result["tolerance"])}
    )


FAULTS = {
    "swiglu@1, output": ("swiglu@1", 1, {"swiglu": wrong("swiglu", forward=1.001)}),
    "swiglu@1, gradient": ("swiglu@1", 1, {"swiglu": wrong("swiglu", backward=1.001)}),
    "mlp@1, output": ("mlp@1", 1, {"mlp": wrong("mlp", forward=1.001)}),
    "mlp@0, gradient of x": ("mlp@0", 0, {"mlp": wrong("mlp", 0, backward=1.001)}),
    "mlp@2, gradient of gate_up_weight": ("mlp@2", 2, {"mlp": wrong("mlp", 1, backward=1.001)}),
    "mlp@1, gradient of down_weight": ("mlp@1", 1, {"mlp": wrong("mlp", 2, backward=1.001)}),
    "rope@0, gradient of qkv": ("rope@0", 0, {"rope": wrong("rope", 0, backward=1.001)}),
    "rope@2, q": ("rope@2", 2, {"rope": wrong("rope", forward=1.001)}),
    "attention@2, output": ("attention@2", 2, {"attention": wrong("attention", forward=1.001)}),
    "attention@1, gradient of q": ("attention@1", 1, {"attention": wrong("attention", 0, backward=0.999)}),
    "rms_norm@0, the first norm": ("rms_norm@0", 0, {"rms_norm": wrong("rms_norm", forward=1.001)}),
    "rms_norm@1, gradient of weight": ("rms_norm@1", 1, {"add_rms_norm": wrong("add_rms_norm", 2, backward=1.001)}),
    "rms_norm@out, gradient of x": ("rms_norm@out", 3, {"add_rms_norm": wrong("add_rms_norm", 0, backward=1.001)}),
    "linear_cross_entropy@out, loss": (
        "linear_cross_entropy@out", 3, {"linear_cross_entropy": wrong("linear_cross_entropy", forward=1.001)}
    ),
    "linear_cross_entropy@out, gradient of weight": (
        "linear_cross_entropy@out", 3, {"linear_cross_entropy": wrong("linear_cross_entropy", 1, backward=1.001)}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "place", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_fault_in_one_kernel_of_one_layer_is_named(options, console, name, place, fault):
    result, status = search(options, console, planting({place: fault}))
    assert status == 1
    assert result["bisection"]["culprits"] == [name]
    assert named(result) == [name]
    assert f"--kernels all,-{name}\n" in console.file.getvalue()


def test_several_faults_are_all_named_and_what_is_left_is_fine(options, console):
    faults = {
        0: {"attention": wrong("attention", 2, backward=1.001), "mlp": wrong("mlp", forward=1.001)},
        1: {"swiglu": wrong("swiglu", forward=1.01), "rope": wrong("rope", 0, forward=1.001)},
        3: {"add_rms_norm": wrong("add_rms_norm", forward=1.001)},
    }
    result, status = search(options, console, planting(faults))
    found = result["bisection"]
    assert status == 1
    assert sorted(found["culprits"]) == ["attention@0", "mlp@0", "rms_norm@out", "rope@1", "swiglu@1"]
    assert found["steps"][0]["kernels"] == "all"
    assert not found["steps"][0]["within"]
    assert found["steps"][-1]["within"]
    options.kernels = found["all_but_culprits"]
    assert measure(options, console, planting(faults))["within"]


def test_a_kernel_that_gives_no_number_is_named(options, console):
    fault = {"swiglu": lambda gate_up: TWINS.swiglu(gate_up) * float("nan")}
    result, status = search(options, console, planting({2: fault}))
    assert status == 1
    assert result["bisection"]["culprits"] == named(result) == ["swiglu@2"]


def test_errors_that_only_together_exceed_are_named_together(options, console):
    little = {"swiglu": wrong("swiglu", backward=1 + 1.2e-6)}
    select = planting(dict.fromkeys(range(3), little))
    each = [measure(replace(options, kernels=f"swiglu@{i}", tolerance=1e9), console, select) for i in range(3)]
    every = measure(replace(options, kernels="swiglu", tolerance=1e9), console, select)
    alone, together = max(worst(r["model"])["excess"] for r in each), worst(every["model"])["excess"]
    assert 1 < alone < together
    options.tolerance = (alone + together) / 2
    result, _ = search(options, console, select)
    assert result["bisection"]["culprits"] in (["swiglu@0-1"], ["swiglu@1-2"], ["swiglu@0,swiglu@2"], ["swiglu@0-2"])
    assert "together" in console.file.getvalue()


# ------------------------------------------------------------------------------------------------------- without faults


@needs_kernels
def test_the_kernels_are_within_the_tolerance_and_nothing_is_named(options, console):
    result, status = search(options, console, kernels.select)
    assert status == 0
    assert result["within"]
    assert named(result) == result["bisection"]["culprits"] == []
    assert len(result["bisection"]["steps"]) == 1
    assert "fused (all) is within the tolerance of 2" in console.file.getvalue()
    assert all(row["fused"] is not None for row in result["ops"])


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("op", ["swiglu", "mlp"])
def test_a_fault_is_named_among_real_kernels(options, console, op, dtype):
    def faulty(x, *rest, **keywords):
        return getattr(kernels.TRITON, op)(Scaled.apply(x, 1.0, 1.01), *rest, **keywords)

    options = replace(options, dtype=dtype, n_layers=2)
    result, status = search(options, console, planting({1: {op: faulty}}, kernels.TRITON))
    assert status == 1
    assert result["bisection"]["culprits"] == named(result) == [f"{op}@1"]


@needs_kernels
def test_the_kernels_are_within_the_tolerance_in_half_precision(options, console):
    assert measure(replace(options, dtype="float16"), console)["within"]


# --------------------------------------------------------------------------------------------------------------- result


def test_the_map_has_a_row_for_each_tensor_of_each_call(options, console, tmp_path):
    options.json, options.kernels = str(tmp_path / "parity.json"), "rope@1"
    result = measure(options, console, planting({}))
    assert json.loads((tmp_path / "parity.json").read_text()) == result
    calls = list(dict.fromkeys((row["layer"], row["call"]) for row in result["ops"]))
    layer = ["attention_norm", "rope", "attention", "ffn_norm", "swiglu", "mlp"]
    assert calls == [("out", "embedding")] + [(i, call) for i in range(3) for call in layer] + [
        ("out", "final_norm"),
        ("out", "linear_cross_entropy"),
    ]
    assert all(
        {row["pass"] for row in result["ops"] if row["call"] == call} == {"output", "gradient"} for call in layer
    )
    fused = [row for row in result["ops"] if row["fused"] is not None]
    assert {(row["layer"], row["call"]) for row in fused} == {(1, "rope")}
    assert all(row["ratio"] == 1 for row in fused)  # the twin itself
    assert {row["layer"] for row in result["model"]} == {"in", 0, 1, 2, "out"}


def test_the_table_shows_the_worst_tensor_of_each_call_and_marks_what_is_beyond(console):
    where = {"layer": 1, "call": "rope"}
    figures = {"plain": 1e-7, "fused": 2e-7, "ratio": 2.0, "excess": 0.4}
    rows = [
        where | {"pass": "output", "tensor": "q"} | figures,
        where | {"pass": "output", "tensor": "k"} | figures | {"ratio": 30.0, "excess": 6.0},
        where | {"pass": "gradient", "tensor": "q"} | dict.fromkeys(figures) | {"plain": 1e-7},
    ]
    console.print(op_table(rows, tolerance=2.0))
    line = next(line for line in console.file.getvalue().splitlines() if "rope" in line)
    assert line.replace("│", " ").split() == [
        "1",
        "rope",
        "k",
        "1.0e-07",
        "2.0e-07",
        "30.00",
        "!",
        "q",
        "1.0e-07",
        "off",
    ]


def test_the_worst_row_is_one_without_a_number_before_all_others():
    rows = [{"excess": excess, "plain": 1.0} for excess in (3.0, float("nan"), float("inf"), 1.0)]
    assert worst(rows) is rows[1]
    assert worst([rows[0], rows[3]]) is rows[0]
    assert worst([{"excess": None, "plain": p} for p in (1.0, 2.0)])["plain"] == 2.0


def test_without_kernels_the_errors_of_plain_alone_are_shown(options, console):
    result = measure(replace(options, kernels="none"), console)
    assert result["within"]
    assert all(row["fused"] is None for row in result["ops"] + result["model"])


# -------------------------------------------------------------------------------------------------------------- options


def test_layers_and_length_are_those_asked_for(options, console):
    result = measure(replace(options, n_layers=1, max_seq_len=5), console, planting({}))
    assert (result["n_layers"], result["max_seq_len"]) == (1, 5)
    assert {row["layer"] for row in result["ops"]} == {0, "out"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
        ({"n_layers": -1}, "--n-layers is -1; it must be at least 0"),
        ({"tolerance": 0.5}, "--tolerance is 0.5; it must be at least 1"),
        ({"tolerance": float("nan")}, "--tolerance is nan; it must be at least 1"),
        ({"kernels": "gelu"}, "--kernels: .*unknown switch 'gelu'"),
        ({"kernels": "rope@7"}, "layer 7 is out of range; allowed: 0 to 2"),
    ],
)
def test_mistakes_in_the_options_are_named(options, console, changes, message):
    with pytest.raises(UserError, match=message):
        measure(replace(options, **changes), console)


def test_an_unknown_preset_is_named(console):
    with pytest.raises(UserError, match="--preset is 'gpt2'; allowed: reference"):
        measure(Parity(preset="gpt2"), console)


def test_bfloat16_is_refused_where_the_interpreter_would_get_it_wrong(options, console, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match=r"--dtype is bfloat16, .*allowed with it: float32, float16"):
        measure(replace(options, dtype="bfloat16"), console)
    assert measure(replace(options, dtype="bfloat16", kernels="none"), console)["dtype"] == "bfloat16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_or_the_interpreter_the_ways_on_are_named(options, console, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        measure(options, console)
