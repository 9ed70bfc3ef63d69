"""Where the gradients of the feed-forward go: to what asks for one, to a sum, or nowhere; and what is kept for them."""

from itertools import product

import pytest
import torch

from kernels.mlp import op as mlp_op
from kernels.mlp.op import mlp_triton
from tests.kernels.test_mlp import BF16, FP16, FP32, TWINS, case
from tests.support import kernel_testing as kt


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("op", TWINS)
@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3)), ids=str)
def test_only_what_requires_a_gradient_gets_one(op, wanted, dtype):
    inputs, dout = case(5, 20, 18, dtype)
    out, gradients = kt.run(op, inputs, [dout])
    some = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip(inputs, wanted, strict=True)]
    some_out, some_gradients = kt.run(op, some, [dout])
    kt.assert_same_bits(some_out + some_gradients, out + [g for g, on in zip(gradients, wanted, strict=True) if on])


@pytest.mark.parametrize("op", TWINS)
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_gradients_have_the_dtypes_of_their_inputs(op, dtype):
    full, dout = case(5, 20, 18, dtype)
    half, _ = case(5, 20, 18, dtype, weight_dtype=dtype)  # as FSDP gathers them
    of_full, of_half = (kt.run(op, inputs, [dout]) for inputs in (full, half))
    assert [g.dtype for g in of_full[1]] == [dtype, FP32, FP32]
    assert [g.dtype for g in of_half[1]] == [dtype] * 3
    kt.assert_same_bits(of_half[0] + of_half[1], of_full[0] + [g.to(dtype) for g in of_full[1]])


@pytest.mark.parametrize("op", TWINS)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_copies_stand_in_for_the_weights(op, dtype):
    (x, *weights), dout = case(5, 20, 18, dtype)
    copies = [(2 * w.detach()).to(dtype) for w in weights]
    by_copies = kt.run(lambda *i: op(*i, compute_weights=tuple(copies)), [x, *weights], [dout])
    by_weights = kt.run(op, kt.differentiable(x, *(2 * w.detach() for w in weights)), [dout])
    kt.assert_same_bits(by_copies[0] + by_copies[1], by_weights[0] + by_weights[1])
    one = kt.run(lambda *i: op(*i, compute_weights=(None, copies[1])), [x, *weights], [dout])
    by_weights = kt.run(op, kt.differentiable(x, weights[0], 2 * weights[1].detach()), [dout])
    kt.assert_same_bits(one[0] + one[1], by_weights[0] + by_weights[1])


@pytest.mark.parametrize("op", TWINS)
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)], ids=str)
def test_in_half_precision_gradients_are_added_to_their_sums_in_autograds_stead(op, dtype, given):
    inputs, dout = case(5, 20, 18, dtype)
    out, (dx, *of_weights) = kt.run(op, inputs, [dout])
    before = [kt.tensor(*g.shape, seed=5) for g in of_weights]
    sums = [x.clone() if on else None for x, on in zip(before, given, strict=True)]
    actual, (actual_dx, *left) = kt.run(lambda *i: op(*i, gradient_sums=tuple(sums)), inputs, [dout])
    kt.assert_same_bits([*actual, actual_dx], [*out, dx])
    for total, start, gradient, by_autograd in zip(sums, before, of_weights, left, strict=True):
        if total is None:
            kt.assert_same_bits([by_autograd], [gradient])
        else:
            assert by_autograd is None
            torch.testing.assert_close(total, start + gradient)


@pytest.mark.parametrize("op", TWINS)
@pytest.mark.parametrize("has_copies", [False, True])
def test_in_float32_the_sums_are_autograds(op, has_copies):
    inputs, dout = case(5, 20, 18)
    copies = tuple(w.detach().clone() if has_copies else None for w in inputs[1:])
    sums = tuple(torch.zeros_like(w) for w in inputs[1:])
    actual = kt.run(lambda *i: op(*i, compute_weights=copies, gradient_sums=sums), inputs, [dout])
    plain = kt.run(op, inputs, [dout])
    kt.assert_same_bits(actual[0] + actual[1], plain[0] + plain[1])
    assert not any(total.any() for total in sums)


def test_a_weight_without_a_gradient_leaves_its_sum_alone():
    (x, *weights), dout = case(5, 20, 18, FP16)
    for op in TWINS:
        sums = tuple(torch.zeros_like(w) for w in weights)
        frozen = [x, weights[0].detach(), weights[1]]
        kt.run(lambda *i, op=op, sums=sums: op(*i, gradient_sums=sums), frozen, [dout])
        assert not sums[0].any()
        assert sums[1].any()


def test_saved_are_x_the_copies_and_gate_and_up():
    (x, *weights), _ = case(5, 20, 18, FP16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp_triton(x, *weights)
    assert [(t.dtype, t.numel()) for t in saved] == [(FP16, n) for n in (5 * 20, 36 * 20, 20 * 18, 5 * 36)]


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3)), ids=str)
def test_gate_and_up_are_kept_only_for_a_backward_pass(monkeypatch, wanted):
    kept, kernel = [], mlp_op._mlp
    monkeypatch.setattr(mlp_op, "_mlp", lambda *arguments: kept.append(kernel(*arguments)) or kept[-1])
    inputs = [t.detach().requires_grad_(on) for t, on in zip(case(5, 20, 18)[0], wanted, strict=True)]
    out = mlp_triton(*inputs)
    with torch.no_grad():
        without = mlp_triton(*inputs)
    assert [tuple(gate_up.shape) for _, gate_up in kept] == [(5, 36) if any(wanted) else (0,), (0,)]
    assert torch.equal(out, without)
    assert out.requires_grad == any(wanted)
    assert not without.requires_grad


def test_a_graph_that_is_retained_gives_the_same_gradients_again():
    inputs, dout = case(70, 20, 18, FP16)
    out = mlp_triton(*inputs)
    first = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    kt.assert_same_bits(first, torch.autograd.grad(out, inputs, dout))


def test_a_second_derivative_raises_even_where_no_gradient_leads_to_the_upstream_one():
    inputs, dout = case(5, 20, 18)
    with pytest.raises(RuntimeError, match="mlp: its gradient cannot be differentiated again"):
        torch.autograd.grad(mlp_triton(*inputs), inputs, dout, create_graph=True)


def test_an_input_changed_before_the_backward_pass_is_noticed():
    for at in range(3):
        inputs, dout = case(5, 20, 18)
        out = mlp_triton(*inputs)
        with torch.no_grad():
            inputs[at].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(dout)
