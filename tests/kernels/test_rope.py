import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.rope import rope_torch, rope_triton
from tests.support import kernel_testing as kt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def tables(time, width, dtype=FP32):
    """Cosines and sines of rotary positions 0 .. time-1 (base 10000), computed in float64."""
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(time, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().to(kt.DEVICE, dtype), angles.sin().to(kt.DEVICE, dtype)


def dense(batch, time, heads, k_heads, width, dtype, seed=0):
    return [kt.tensor(batch, time, n, width, dtype=dtype, seed=seed + i) for i, n in enumerate((heads, k_heads))]


def packed(batch, time, heads, k_heads, width, dtype, seed=0):
    """q and k as the model has them: slices of one packed qkv."""
    qkv = kt.tensor(batch, time, (heads + 2 * k_heads) * width, dtype=dtype, seed=seed)
    q, k, _ = qkv.split((heads * width, k_heads * width, k_heads * width), dim=-1)
    return [q.unflatten(-1, (heads, width)), k.unflatten(-1, (k_heads, width))]


def transposed(*sizes, seed=0):
    """Heads before positions in memory, as other attention layouts have them."""
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in dense(*sizes, seed=seed)]


def sparse(*sizes, seed=0):
    """A last dimension that is not dense."""
    return [kt.transposed(x) for x in dense(*sizes, seed=seed)]


def expanded(*sizes, seed=0):
    """Every stride 0."""
    return [kt.expanded(x) for x in dense(*sizes, seed=seed)]


# Not the full product: each shape, dtype and layout appears, each pair that could interact at least once.
GRID = [
    # B, T, H, Hkv, D, dtype, inputs, upstream gradients
    (1, 1, 1, 1, 2, FP32, dense, dense),  # the least there is
    (2, 9, 3, 1, 6, FP16, packed, expanded),  # heads that are no power of two
    (2, 33, 8, 4, 36, FP32, packed, dense),  # the reference: half a head is 18 wide
    (2, 17, 8, 4, 36, FP16, packed, transposed),
    (1, 20, 8, 4, 36, BF16, packed, dense),
    (3, 5, 12, 12, 64, FP32, packed, expanded),  # 124m
    (3, 5, 4, 4, 64, FP16, transposed, packed),
    (1, 6, 5, 5, 200, FP16, packed, sparse),  # a wide head that is no power of two
    (2, 4, 24, 8, 128, FP32, packed, dense),  # llama3.2-3b
    (1, 3, 64, 1, 256, FP32, sparse, dense),  # the widest, one k head for all: many tiles of q's heads
    (4, 3, 2, 6, 16, FP32, dense, transposed),  # more heads in k than in q
    (1, 300, 1, 1, 16, FP32, expanded, packed),  # many positions to a tile
]


def name(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("batch", "time", "heads", "k_heads", "width", "dtype", "layout", "upstream"), GRID, ids=name)
def test_rope_is_as_exact_as_torch_and_close_to_float64(batch, time, heads, k_heads, width, dtype, layout, upstream):
    sizes = (batch, time, heads, k_heads, width, dtype)
    inputs = [*kt.differentiable(*layout(*sizes)), *tables(time, width)]
    upstream = upstream(*sizes, seed=2)
    exact, exact_grads = kt.run(rope_torch, kt.double(inputs), kt.double(upstream))
    twin, twin_grads = kt.run(rope_torch, inputs, upstream)
    with kt.poisoned():
        actual, grads = kt.run(rope_triton, inputs, upstream)
    for a, t, e in zip(actual + grads, twin + twin_grads, exact + exact_grads, strict=True):
        kt.assert_matches(a, t, e)


@pytest.mark.parametrize("op", [rope_torch, rope_triton])
def test_pairs_are_half_a_head_apart_and_turn_towards_the_second(op):
    # A quarter turn: (first half, second half) becomes (-second half, first half).
    q, k = kt.tensor(1, 1, 2, 8), kt.tensor(1, 1, 1, 8, seed=1)
    cos, sin = torch.zeros(1, 4, device=kt.DEVICE), torch.ones(1, 4, device=kt.DEVICE)
    for rotated, x in zip(op(q, k, cos, sin), (q, k), strict=True):
        assert torch.equal(rotated, torch.cat((-x[..., 4:], x[..., :4]), dim=-1))


def test_float64_tables_are_used_as_such_by_the_reference():
    q, k = (x.double() for x in dense(1, 50, 1, 1, 4, FP32))
    exact = rope_torch(q, k, *tables(50, 4, torch.float64))
    assert not torch.equal(exact[0], rope_torch(q, k, *tables(50, 4))[0])
    lengths = [x.square().sum(-1) for x in (exact[0], q)]
    torch.testing.assert_close(*lengths, rtol=1e-14, atol=0)


def test_large_float16_magnitudes_and_infinities_come_out_as_in_torch():
    q, k = dense(1, 4, 2, 1, 8, FP16)
    q[0, 1, 0], q[0, 2, 1, 3], k[0, 3, 0, 1] = 45_000.0, torch.inf, torch.nan
    inputs = [*kt.differentiable(q, k), *tables(4, 8)]
    twin, _ = kt.run(rope_torch, inputs)
    actual, _ = kt.run(rope_triton, inputs)
    for a, t in zip(actual, twin, strict=True):
        torch.testing.assert_close(a, t, equal_nan=True)


def test_a_run_repeats_to_the_last_bit():
    inputs = [*kt.differentiable(*packed(2, 9, 8, 4, 36, FP16)), *tables(9, 36)]
    first, second = (kt.run(rope_triton, inputs, dense(2, 9, 8, 4, 36, FP16, seed=2)) for _ in range(2))
    kt.assert_same_bits(first[0] + first[1], second[0] + second[1])


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["q", "k"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["q", "k", "both"])
def test_q_and_k_are_differentiated_each_for_itself(used, wanted):
    q, k = (x.requires_grad_(want) for x, want in zip(dense(2, 5, 4, 2, 16, FP32), wanted, strict=True))
    upstream = [dy if use else None for dy, use in zip(dense(2, 5, 4, 2, 16, FP32, seed=2), used, strict=True)]
    _, twin = kt.run(rope_torch, [q, k, *tables(5, 16)], upstream)
    with kt.poisoned():
        _, grads = kt.run(rope_triton, [q, k, *tables(5, 16)], upstream)
    assert [a is None for a in grads] == [t is None for t in twin]
    for a, t in zip(grads, twin, strict=True):
        if t is not None:
            torch.testing.assert_close(a, t)


def test_the_backward_can_be_differentiated_again():
    q, k, cos, sin = *kt.differentiable(*dense(1, 3, 2, 1, 8, FP32)), *tables(3, 8)
    (dq,) = torch.autograd.grad(rope_triton(q, k, cos, sin)[0].square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(dq.sum(), q)
    torch.testing.assert_close(second, torch.full_like(q, 2.0))  # a rotation keeps the square: its gradient is 2q


@pytest.mark.parametrize("shape", [(0, 3, 2, 1), (2, 0, 2, 1), (1, 3, 0, 0)])
def test_an_empty_batch_gives_empty_outputs(shape):
    sizes = (*shape, 8, FP32)
    for op in (rope_torch, rope_triton):
        outputs, grads = kt.run(op, [*kt.differentiable(*dense(*sizes)), *tables(shape[1], 8)], dense(*sizes))
        assert [x.shape for x in outputs] == [x.shape for x in grads] == [x.shape for x in dense(*sizes)]


def test_offsets_past_two_to_the_31_elements_do_not_wrap():
    q, k = (kt.far_apart(x) for x in dense(3, 3, 2, 1, 8, FP16))
    upstream = dense(3, 3, 2, 1, 8, FP16, seed=2)
    far = kt.run(rope_triton, [*kt.differentiable(q, k), *tables(3, 8)], upstream)
    near = kt.run(rope_triton, [*kt.differentiable(q.clone(), k.clone()), *tables(3, 8)], upstream)
    kt.assert_same_bits(far[0] + far[1], near[0] + near[1])


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 12),
    heads=st.integers(1, 9),
    k_heads=st.integers(1, 9),
    half=st.integers(1, 70),
    layout=st.sampled_from([dense, packed, transposed, sparse, expanded]),
    dtype=st.sampled_from([FP32, FP16]),
)
def test_any_shape_and_strides_agree_with_torch(batch, time, heads, k_heads, half, layout, dtype):
    sizes = (batch, time, heads, k_heads, 2 * half, dtype)
    inputs, upstream = [*kt.differentiable(*layout(*sizes)), *tables(time, 2 * half)], dense(*sizes, seed=2)
    twin, twin_grads = kt.run(rope_torch, inputs, upstream)
    with kt.poisoned():
        actual, grads = kt.run(rope_triton, inputs, upstream)
    for a, t in zip(actual + grads, twin + twin_grads, strict=True):
        torch.testing.assert_close(a, t)


def on_packed(op):
    """From the packed qkv, as in the model, so that its split is in the graph too."""

    def function(qkv, cos, sin):
        q, k, v = qkv.split((4 * 8, 2 * 8, 2 * 8), dim=-1)
        q, k = op(q.unflatten(-1, (4, 8)), k.unflatten(-1, (2, 8)), cos, sin)
        return q, k, v * 2

    return function


def case(batch, time):
    return [*kt.differentiable(kt.tensor(batch, time, 64)), *tables(time, 8)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", [rope_torch, rope_triton])
def test_compiles_into_one_graph(op, dynamic):
    cases = [case(2, 5), case(3, 7)] if dynamic else [case(2, 5)]
    kt.assert_compiles(on_packed(op), cases, "aot_eager", dynamic, exact=op is rope_triton)


@pytest.mark.slow
@pytest.mark.parametrize("op", [rope_torch, rope_triton])
def test_inductor_compiles_it_into_one_graph(op):
    kt.assert_compiles(on_packed(op), [case(2, 5), case(3, 7)], "inductor", True, exact=False)


def test_the_registered_op_keeps_pytorchs_rules():
    q, k = kt.differentiable(*packed(2, 3, 4, 2, 8, FP32))
    torch.library.opcheck(torch.ops.triton_llama.rope.default, (q, k, *tables(3, 8), False))


def test_float64_is_for_the_reference_only():
    q, k = (x.double() for x in dense(1, 3, 2, 1, 8, FP32))
    assert rope_torch(q, k, *tables(3, 8))[0].dtype == torch.float64
    with pytest.raises(ValueError, match=r"rope: q has dtype torch.float64, wanted torch.float32 or"):
        rope_triton(q, k, *tables(3, 8))


Q, K, TABLE = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 2, 8), torch.ones(3, 4)


@pytest.mark.parametrize("op", [rope_torch, rope_triton])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q, K, TABLE, None), r"rope: sin is a NoneType, wanted a tensor"),
        ((Q[0], K, TABLE, TABLE), r"rope: q has shape \(3, 4, 8\), wanted \(B, T, H, D\)"),
        (
            (Q[..., :7], K, TABLE, TABLE),
            r"q has shape \(2, 3, 4, 7\), wanted \(B, T, H, D\) with D even and at least 2",
        ),
        ((Q, K[:, :2], TABLE, TABLE), r"rope: k has shape \(2, 2, 2, 8\), wanted \(2, 3, Hkv, 8\)"),
        ((Q, K[..., :6], TABLE, TABLE), r"rope: k has shape \(2, 3, 2, 6\), wanted \(2, 3, Hkv, 8\)"),
        ((Q, K, TABLE[:2], TABLE), r"rope: cos has shape \(2, 4\), wanted \(3, 4\)"),
        ((Q, K, TABLE, TABLE[:, :3]), r"rope: sin has shape \(3, 3\), wanted \(3, 4\)"),
        ((Q, K.half(), TABLE, TABLE), r"rope: k has dtype torch.float16, wanted torch.float32"),
        ((Q.half(), K.half(), TABLE.half(), TABLE), r"rope: cos has dtype torch.float16, wanted torch.float32"),
        ((Q, K, TABLE, TABLE.double()), r"rope: sin has dtype torch.float64, wanted torch.float32"),
        ((Q, K, TABLE.clone().requires_grad_(), TABLE), r"rope: cos requires a gradient, wanted a constant table"),
        ((Q, K, TABLE, TABLE.to("meta")), r"rope: sin is on meta, wanted "),
    ],
)
def test_bad_input_is_refused_with_what_came_and_what_was_wanted(op, arguments, message):
    arguments = [t.to(kt.DEVICE) if isinstance(t, torch.Tensor) and t.device.type == "cpu" else t for t in arguments]
    with pytest.raises(ValueError, match=message):
        op(*arguments)
