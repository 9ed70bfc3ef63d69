"""RoPE and attention as one op: the bits of the two apart, whatever runs, and one packed gradient."""

from dataclasses import replace

import pytest
import torch

import kernels
from kernels.attention import backward
from kernels.attention.rope_attention import rope_attention_triton
from kernels.launch import target_of
from kernels.ops import InTurn
from tests.kernels.test_rope import tables
from tests.support import kernel_testing as kt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
APART = InTurn(kernels.TRITON.rope, kernels.TRITON.attention)
TWINS = InTurn(kernels.TORCH.rope, kernels.TORCH.attention)


def case(batch, time, heads, k_heads, width, dtype=FP32):
    """qkv and the tables, and the gradient of o."""
    qkv = kt.tensor(batch, time, (heads + 2 * k_heads) * width, dtype=dtype)
    return [*kt.differentiable(qkv), *tables(time, width)], kt.tensor(batch, time, heads, width, dtype=dtype, seed=1)


def call(op, heads, k_heads, first_key=None):
    return lambda qkv, cos, sin: op(qkv, cos, sin, heads, k_heads, first_key)


def documents(batch, time, length):
    """A first_key of documents of `length` tokens."""
    starts = torch.arange(time, dtype=torch.int32, device=kt.DEVICE) // length * length
    return starts.expand(batch, time).contiguous()


GRID = [
    # B, T, H, Hkv, D, dtype, length of documents
    (2, 70, 8, 4, 36, FP32, None),  # the reference; a block of queries more than one
    (1, 33, 8, 4, 36, FP16, 10),
    (1, 9, 4, 2, 36, BF16, None),
    (1, 70, 4, 1, 64, FP32, 31),  # one kv head for all
    (2, 20, 3, 3, 64, FP16, None),
    (1, 17, 2, 1, 80, FP32, None),  # two tiles of the head dim, and no power of two
    (1, 12, 2, 2, 128, FP16, 5),
    (1, 5, 2, 1, 256, FP32, None),
    (3, 1, 2, 1, 16, FP32, None),  # one token
]


@pytest.mark.parametrize(("batch", "time", "heads", "k_heads", "width", "dtype", "length"), GRID, ids=str)
def test_bits_are_those_of_rope_and_attention_apart(batch, time, heads, k_heads, width, dtype, length):
    inputs, do = case(batch, time, heads, k_heads, width, dtype)
    first_key = length and documents(batch, time, length)
    apart = kt.run(call(APART, heads, k_heads, first_key), inputs, [do])
    with kt.poisoned():
        actual = kt.run(call(rope_attention_triton, heads, k_heads, first_key), inputs, [do])
    for a, b in zip(actual, apart, strict=True):
        kt.assert_same_bits(a, b)
    assert actual[1][0].is_contiguous()


@pytest.mark.parametrize("sizes", [(2, 33, 8, 4, 36, FP32), (1, 20, 4, 2, 64, FP16)], ids=str)
def test_it_is_as_exact_as_the_twins_and_close_to_float64(sizes):
    *_, heads, k_heads, _, _ = sizes
    inputs, do = case(*sizes)
    exact = kt.run(call(TWINS, heads, k_heads), kt.double(inputs), kt.double([do]))
    twin = kt.run(call(kernels.TORCH.rope_attention, heads, k_heads), inputs, [do])
    actual = kt.run(call(kernels.TRITON.rope_attention, heads, k_heads), inputs, [do])
    for (a,), (t,), (e,), is_gradient in zip(actual, twin, exact, (False, True), strict=True):
        kt.assert_as_good_as_torch(a, t, e, is_gradient)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_any_strides_of_qkv_and_of_the_gradient(layout):
    (qkv, cos, sin), do = case(2, 20, 4, 2, 36, FP16)
    plain = kt.run(call(rope_attention_triton, 4, 2), [qkv, cos, sin], [kt.LAYOUTS[layout](do)])
    of_view = kt.run(
        call(APART, 4, 2), [kt.LAYOUTS["strided"](qkv.detach()).requires_grad_(), cos, sin], [kt.LAYOUTS[layout](do)]
    )
    for a, b in zip(plain, of_view, strict=True):
        kt.assert_same_bits(a, b)


def test_a_kv_head_that_several_programs_would_share_is_done_by_one(monkeypatch):
    # Apart, the sums of such a head are float32 parts that are added afterwards: too late to be turned back as they are stored.
    monkeypatch.setattr(backward, "target_of", lambda x: replace(target_of(x), multiprocessors=10_000))
    inputs, do = case(1, 20, 4, 1, 16)
    _, (apart,) = kt.run(call(APART, 4, 1), inputs, [do])
    with kt.poisoned():
        _, (actual,) = kt.run(call(rope_attention_triton, 4, 1), inputs, [do])
    torch.testing.assert_close(actual, apart)


def test_a_run_repeats_to_the_last_bit():
    inputs, do = case(2, 70, 8, 4, 36, FP16)
    first, second = (kt.run(call(rope_attention_triton, 8, 4, documents(2, 70, 30)), inputs, [do]) for _ in range(2))
    kt.assert_same_bits(first[0] + first[1], second[0] + second[1])


@pytest.mark.parametrize(("batch", "time"), [(0, 3), (2, 0)])
def test_an_empty_batch(batch, time):
    inputs, do = case(batch, time, 4, 2, 16)
    (o,), (dqkv,) = kt.run(call(rope_attention_triton, 4, 2), inputs, [do])
    assert o.shape == do.shape
    assert dqkv.shape == (batch, time, 128)


def test_a_second_derivative_raises():
    (qkv, cos, sin), do = case(1, 5, 2, 1, 16)
    (dqkv,) = torch.autograd.grad(rope_attention_triton(qkv, cos, sin, 2, 1), qkv, do, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward"):
        (dqkv.sum() + qkv.sum()).backward()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "first_key"])
def test_compiles_into_one_graph(backend, dynamic, is_packed):
    def function(x, weight, cos, sin, first_key):
        return rope_attention_triton(x @ weight, cos, sin, 4, 2, first_key if is_packed else None) * 2

    weight = kt.tensor(16, 128, seed=9).requires_grad_()
    cases = [
        [kt.tensor(b, t, 16).requires_grad_(), weight, *tables(t, 16), documents(b, t, 4)]
        for b, t in [(2, 5), (3, 7)][: 1 + dynamic]
    ]
    kt.assert_compiles(function, cases, backend, dynamic, exact=backend == "aot_eager")


def test_the_registered_op_keeps_pytorchs_rules():
    (qkv, cos, sin), do = case(1, 5, 4, 2, 16)
    q, k, v = kernels.TRITON.rope(qkv.detach(), cos, sin, 4, 2)
    o, lse = torch.ops.triton_llama.attention.default(q, k, v, None)
    arguments = (do, q, k, v, o, lse, None, cos, sin)
    torch.library.opcheck(torch.ops.triton_llama.attention_backward.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.ones(3, 128)}, r"qkv has shape \(3, 128\), wanted \(B, T, "),
        ({"qkv": torch.ones(2, 3, 127)}, r"qkv has shape \(2, 3, 127\)"),
        ({"qkv": torch.ones(2, 3, 8 * 14), "cos": torch.ones(3, 7), "sin": torch.ones(3, 7)}, "qkv has head dim 14"),
        ({"n_heads": 3, "n_kv_heads": 2, "qkv": torch.ones(2, 3, 7 * 16)}, "n_heads is 3, wanted a multiple of .*, 2"),
        ({"sin": torch.ones(2, 8)}, r"sin has shape \(2, 8\), wanted \(3, 8\)"),
        ({"first_key": torch.zeros(2, 3)}, r"first_key has dtype torch.float32, wanted torch.int32"),
        ({"first_key": torch.zeros(3, dtype=torch.int32)}, r"first_key has shape \(3,\), wanted \(2, 3\)"),
        ({"first_key": [[0]]}, "first_key is a list, wanted a tensor"),
    ],
)
def test_bad_input_is_refused_with_what_came_and_what_was_wanted(change, message):
    arguments = {"qkv": torch.ones(2, 3, 128), "cos": torch.ones(3, 8), "sin": torch.ones(3, 8)}
    arguments |= {"n_heads": 4, "n_kv_heads": 2, "first_key": None} | change
    arguments = {name: x.to(kt.DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=f"rope_attention: {message}"):
        rope_attention_triton(**arguments)


def test_selections_have_the_one_kernel_where_both_switches_are_on():
    both, no_rope, no_attention, out = kernels.select("all,-rope@1,-attention@2", 3)
    assert both.rope_attention is rope_attention_triton
    assert no_rope.rope_attention == InTurn(kernels.TORCH.rope, kernels.TRITON.attention)
    assert no_attention.rope_attention == InTurn(kernels.TRITON.rope, kernels.TORCH.attention)
    assert out.rope_attention == TWINS == kernels.TORCH.rope_attention


def test_a_replaced_op_is_the_one_that_is_used():
    def other(*arguments):
        raise AssertionError

    assert replace(kernels.TRITON, rope=other).rope_attention == InTurn(other, kernels.TRITON.attention)
    assert replace(kernels.TORCH, attention=other).rope_attention == InTurn(kernels.TORCH.rope, other)
    assert replace(kernels.TORCH, rope_attention=other).rope_attention is other
