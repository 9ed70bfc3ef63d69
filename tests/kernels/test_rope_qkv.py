"""The packed form: `rope` of the queries and keys in one qkv, whose gradient is written once."""

from dataclasses import replace

import pytest
import torch

import kernels
from kernels.rope import split_qkv
from tests.kernels.test_rope import tables
from tests.support import kernel_testing as kt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SPLIT = replace(kernels.TRITON, rope=lambda *arguments: kernels.TRITON.rope(*arguments))
"""The same kernel given q and k apart, as anything but Triton's own rope is called."""


def case(batch, time, heads, k_heads, width, dtype=FP32):
    """qkv and the tables, then the gradients of q, k and v."""
    qkv = kt.tensor(batch, time, (heads + 2 * k_heads) * width, dtype=dtype)
    shapes = [(batch, time, n, width) for n in (heads, k_heads, k_heads)]
    upstream = [kt.tensor(*shape, dtype=dtype, seed=i + 1) for i, shape in enumerate(shapes)]
    return [*kt.differentiable(qkv), *tables(time, width)], upstream


def packed(ops, heads, k_heads):
    return lambda qkv, cos, sin: ops.rope_qkv(qkv, cos, sin, heads, k_heads)


@pytest.mark.parametrize(
    "sizes",
    [
        (2, 33, 8, 4, 36, FP32),  # the reference
        (2, 17, 8, 4, 36, FP16),
        (1, 9, 8, 4, 36, BF16),
        (1, 7, 3, 1, 6, FP16),  # heads that are no power of two, half a head of 3
        (3, 5, 12, 12, 64, FP32),
        (1, 3, 64, 1, 256, FP32),  # many tiles of q's heads
        (1, 300, 1, 1, 16, FP32),  # many positions to a tile
        (1, 1, 1, 1, 2, FP32),
    ],
    ids=str,
)
def test_bits_are_those_of_q_and_k_apart(sizes):
    *_, heads, k_heads, _, _ = sizes
    inputs, upstream = case(*sizes)
    apart, (dqkv_apart,) = kt.run(packed(SPLIT, heads, k_heads), inputs, upstream)
    with kt.poisoned():
        outputs, (dqkv,) = kt.run(packed(kernels.TRITON, heads, k_heads), inputs, upstream)
    kt.assert_same_bits([*outputs, dqkv], [*apart, dqkv_apart])
    assert dqkv.is_contiguous()


@pytest.mark.parametrize("sizes", [(2, 9, 8, 4, 36, FP32), (2, 5, 4, 2, 16, FP16)], ids=str)
def test_it_agrees_with_torch(sizes):
    *_, heads, k_heads, _, _ = sizes
    inputs, upstream = case(*sizes)
    exact, (exact_gradient,) = kt.run(packed(kernels.TORCH, heads, k_heads), kt.double(inputs), kt.double(upstream))
    twin, (twin_gradient,) = kt.run(packed(kernels.TORCH, heads, k_heads), inputs, upstream)
    actual, (gradient,) = kt.run(packed(kernels.TRITON, heads, k_heads), inputs, upstream)
    for a, t, e in zip([*actual[:2], gradient], [*twin[:2], twin_gradient], [*exact[:2], exact_gradient], strict=True):
        kt.assert_matches(a, t, e)


def test_values_are_a_view():
    (qkv, cos, sin), _ = case(2, 3, 4, 2, 8)
    _, _, v = kernels.TRITON.rope_qkv(qkv, cos, sin, 4, 2)
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert torch.equal(v, split_qkv(qkv, 4, 2)[2])


def test_gradients_of_values_pass_unchanged_infinities_and_signed_zeros_too():
    inputs, upstream = case(1, 4, 2, 1, 8)
    upstream[2][0, 0, 0, :3] = torch.tensor([torch.inf, torch.nan, -0.0])
    _, (dqkv,) = kt.run(packed(kernels.TRITON, 2, 1), inputs, upstream)
    kt.assert_same_bits([split_qkv(dqkv, 2, 1)[2]], [upstream[2]])


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_any_strides_of_the_gradients(layout):
    inputs, upstream = case(2, 5, 4, 2, 16)
    upstream = [kt.LAYOUTS[layout](dy) for dy in upstream]
    _, expected = kt.run(packed(SPLIT, 4, 2), inputs, upstream)
    with kt.poisoned():
        _, actual = kt.run(packed(kernels.TRITON, 4, 2), inputs, upstream)
    kt.assert_same_bits(actual, expected)


@pytest.mark.parametrize("used", [(True, False, False), (False, False, True), (True, True, False)], ids=str)
def test_outputs_that_nobody_uses_get_no_gradient(used):
    inputs, upstream = case(1, 5, 4, 2, 16)
    upstream = [dy if use else None for dy, use in zip(upstream, used, strict=True)]
    _, expected = kt.run(packed(SPLIT, 4, 2), inputs, upstream)
    with kt.poisoned():
        _, actual = kt.run(packed(kernels.TRITON, 4, 2), inputs, upstream)
    assert torch.equal(actual[0], expected[0])  # not the bits: a rotated zero has a sign


@pytest.mark.parametrize(("batch", "time"), [(0, 3), (2, 0)])
def test_an_empty_batch(batch, time):
    inputs, upstream = case(batch, time, 4, 2, 8)
    outputs, (dqkv,) = kt.run(packed(kernels.TRITON, 4, 2), inputs, upstream)
    assert [y.shape for y in outputs] == [dy.shape for dy in upstream]
    assert dqkv.shape == (batch, time, 64)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend, dynamic):
    def function(x, weight, cos, sin):
        q, k, v = kernels.TRITON.rope_qkv(x @ weight, cos, sin, 4, 2)
        return q, k, v * 2

    weight = kt.tensor(16, 64, seed=9).requires_grad_()
    cases = [[kt.tensor(b, t, 16).requires_grad_(), weight, *tables(t, 8)] for b, t in [(2, 5), (3, 7)][: 1 + dynamic]]
    kt.assert_compiles(function, cases, backend, dynamic, exact=backend == "aot_eager")


def test_the_registered_op_keeps_pytorchs_rules():
    _, upstream = case(2, 3, 4, 2, 8)
    op = torch.ops.triton_llama.rope_qkv_backward.default
    torch.library.opcheck(op, (*upstream, *tables(3, 8)))


@pytest.mark.parametrize("ops", [kernels.TORCH, kernels.TRITON], ids=["torch", "triton"])
@pytest.mark.parametrize("shape", [(2, 3, 63), (3, 64)], ids=str)
def test_a_width_that_the_heads_do_not_divide_is_refused(ops, shape):
    with pytest.raises(ValueError, match=r"rope_qkv: qkv has shape .* with 4 heads of queries and 2 of keys"):
        ops.rope_qkv(kt.tensor(*shape), *tables(3, 8), 4, 2)


def test_a_replaced_rope_is_the_one_that_is_used():
    (qkv, cos, sin), _ = case(1, 3, 4, 2, 8)
    ops = replace(kernels.TRITON, rope=lambda q, k, cos, sin: (2 * q, 3 * k))
    q, k, v = split_qkv(qkv, 4, 2)
    for actual, expected in zip(ops.rope_qkv(qkv, cos, sin, 4, 2), (2 * q, 3 * k, v), strict=True):
        assert torch.equal(actual, expected)
