"""Errors of single ops: what is recorded of a run, and what is made of it."""

import math
from dataclasses import replace

import pytest
import torch

import kernels
from bench.parity.op_errors import FLOOR, figures, measure_call, record, relative_error
from kernels.launch import INTERPRETED
from model import Llama, LlamaConfig

SHAPE = LlamaConfig(
    vocab_size=300, max_seq_len=8, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=48, tie_embeddings=False
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN_RUN_KERNELS = INTERPRETED or torch.cuda.is_available()
NAMES = ["attention_norm", "rope", "attention", "ffn_norm", "swiglu", "mlp"]


def make_model():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return Llama(SHAPE, kernels.select("none", 2))


def train_step(model):
    tokens = torch.arange(24, device=DEVICE).view(3, 8)
    return lambda: model(tokens, tokens + 1).backward()


@pytest.fixture(scope="module")
def calls():
    model = make_model()
    return record(model, train_step(model))


def find(calls, place, name):
    (call,) = (call for call in calls if (call.place, call.name) == (place, name))
    return call


def rows(call, fused):
    return {(row["pass"], row["tensor"]): row for row in measure_call(call, fused)}


# -------------------------------------------------------------------------------------------------------------- records


def test_every_call_is_recorded_under_the_name_of_its_norm(calls):
    assert [call.name for call in calls if call.place == 0] == NAMES
    assert [call.name for call in calls if call.place == 1] == NAMES
    assert [call.name for call in calls if call.place == 2] == ["embedding", "final_norm", "linear_cross_entropy"]
    assert find(calls, 0, "attention_norm").op == "rms_norm"
    assert find(calls, 1, "attention_norm").op == find(calls, 2, "final_norm").op == "add_rms_norm"
    assert find(calls, 1, "ffn_norm").switch == "rms_norm"


def test_arguments_keep_the_strides_that_the_model_gives_them(calls):
    qkv, cos, _, heads, kv_heads = find(calls, 1, "rope").arguments
    assert qkv.stride() == (8 * 64, 64, 1)
    assert (heads, kv_heads) == (2, 1)
    assert qkv.requires_grad
    assert qkv.is_leaf
    assert not cos.requires_grad
    v = find(calls, 1, "attention").arguments[2]
    assert v.stride() == (8 * 64, 64, 16, 1)  # a slice of packed [q, k, v], of 2 + 1 + 1 heads of 16
    assert v.is_leaf


def test_upstream_gradients_are_those_from_outside_the_op(calls):
    # What comes back to the sum of one norm is what the next one gives to its residual, and the sum's part in y is not in it.
    before, after = find(calls, 0, "ffn_norm"), find(calls, 1, "attention_norm")
    x, residual, weight, eps = after.arguments
    y, summed = kernels.TORCH.add_rms_norm(x, residual, weight, eps)
    (wanted,) = torch.autograd.grad([y, summed], [residual], after.upstream)
    torch.testing.assert_close(before.upstream[1], wanted)
    assert find(calls, 2, "final_norm").upstream[1] is None  # nobody reads the last sum


def test_of_a_feed_forward_that_is_one_op_the_part_in_it_is_recorded_too(calls):
    swiglu, mlp = find(calls, 1, "swiglu"), find(calls, 1, "mlp")
    x, gate_up_weight, down_weight = mlp.arguments
    torch.testing.assert_close(swiglu.arguments[0], x @ gate_up_weight.T)
    torch.testing.assert_close(swiglu.upstream[0], mlp.upstream[0] @ down_weight)


def test_a_recorded_run_is_the_plain_run_and_leaves_the_model_as_it_was():
    recorded, plain = make_model(), make_model()
    ops = recorded.ops
    record(recorded, train_step(recorded))
    train_step(plain)()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(recorded.parameters(), plain.parameters(), strict=True))
    with pytest.raises(ZeroDivisionError):
        record(recorded, lambda: 1 / 0)
    assert recorded.ops is ops


# --------------------------------------------------------------------------------------------------------------- errors


def test_each_output_and_gradient_has_a_row(calls):
    tensors = {call.name: list(rows(call, None)) for call in calls if call.place != 0}
    gradients = [("gradient", name) for name in ("x", "residual", "weight")]
    assert tensors["ffn_norm"] == [("output", "y"), ("output", "summed"), *gradients]
    assert tensors["rope"] == [*(("output", name) for name in "qkv"), ("gradient", "qkv")]
    assert tensors["swiglu"] == [("output", "y"), ("gradient", "gate_up")]
    assert tensors["attention"] == [("output", "o"), *(("gradient", name) for name in "qkv")]
    matrices = ("gate_up_weight", "down_weight")
    assert tensors["mlp"] == [("output", "out"), *(("gradient", name) for name in ("x", *matrices))]
    assert tensors["linear_cross_entropy"] == [("output", "loss"), ("gradient", "hidden"), ("gradient", "weight")]


def test_the_twin_itself_is_exactly_as_wrong_as_plain(calls):
    for call in calls:
        for row in measure_call(call, getattr(kernels.TORCH, call.op)):
            # v of rope is a view, and a row of the embedding a row: here each token occurs once
            is_copied = (call.op, row["tensor"]) == ("rope", "v") or call.op == "embedding"
            assert row["plain"] == 0 if is_copied else 0 < row["plain"] < FLOOR[torch.float32]
            assert (row["fused"], row["ratio"]) == (row["plain"], 1.0)


def test_without_a_kernel_only_plain_is_measured(calls):
    row = rows(find(calls, 0, "swiglu"), None)["output", "y"]
    assert row["plain"] > 0
    assert row["fused"] is row["ratio"] is row["excess"] is None


@pytest.mark.skipif(not CAN_RUN_KERNELS, reason="needs a GPU or the interpreter")
def test_the_kernels_are_as_exact_as_plain(calls):
    ops = kernels.select("all", 2)
    for call in calls:
        for row in measure_call(call, getattr(ops[call.place], call.op)):
            assert row["excess"] < 2, (call.name, row)


class WrongGradient(torch.autograd.Function):
    """x, with a gradient wrong by a thousandth."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return 1.001 * dx


def test_an_error_is_that_of_the_tensor_that_is_wrong(calls):
    twin = kernels.TORCH.add_rms_norm

    def wrong_sum(x, residual, weight, eps):
        y, summed = twin(x, residual, weight, eps)
        return y, summed + 0.001 * summed.detach()  # the value and not the gradient

    def wrong_weight_gradient(x, residual, weight, eps):
        return twin(x, residual, WrongGradient.apply(weight), eps)

    for fault, at in ((wrong_sum, ("output", "summed")), (wrong_weight_gradient, ("gradient", "weight"))):
        found = rows(find(calls, 1, "ffn_norm"), fault)
        assert found.pop(at)["fused"] == pytest.approx(0.001, rel=1e-3)
        assert all(row["ratio"] == 1 for row in found.values())


def test_a_kernel_that_overwrites_its_input_does_not_spoil_what_it_is_held_against(calls):
    call = find(calls, 0, "swiglu")
    call = replace(call, arguments=tuple(x.detach().clone().requires_grad_() for x in call.arguments))
    row = rows(call, lambda gate_up: kernels.TORCH.swiglu(gate_up.detach().zero_().requires_grad_() + 0 * gate_up))
    assert row["output", "y"]["fused"] == pytest.approx(1)
    assert row["output", "y"]["plain"] < 1e-6


def test_a_relative_error_is_a_root_mean_square():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2).double()) == 0
    assert relative_error(torch.ones(2), torch.zeros(2).double()) == math.inf
    assert math.isnan(relative_error(torch.tensor([math.nan, 4.0]), exact))


def test_small_errors_of_plain_count_as_the_floor():
    exact, x = (torch.ones(1, dtype=torch.float64) * value for value in (1, 1 + 1e-6))
    assert figures(exact, exact + 1e-9, x, 1e-7) == pytest.approx(
        {"plain": 1e-9, "fused": 1e-6, "ratio": 1e3, "excess": 10}, rel=1e-5
    )
    assert figures(exact, exact + 1e-5, x, 1e-7)["excess"] == pytest.approx(0.1)
    assert figures(exact, exact, x, 1e-7)["ratio"] == math.inf
    assert math.isnan(figures(exact, exact, x * math.nan, 1e-7)["excess"])


def test_two_that_miss_an_exact_zero_are_equally_wrong():
    exact, x = torch.zeros(1, dtype=torch.float64), torch.ones(1)
    assert figures(exact, x, x / 2, 1e-7) == {"plain": math.inf, "fused": math.inf, "ratio": 1, "excess": 1}
    assert figures(exact, x, 0 * x, 1e-7)["excess"] == 0
    assert figures(exact, 0 * x, x, 1e-7)["excess"] == math.inf
