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


def case(batch, time, heads, k_heads, width, dtype=FP32, layout="dense", upstream_layout="dense"):
    """qkv and the tables, then the gradients of q, k and v."""
    qkv = kt.tensor(batch, time, (heads + 2 * k_heads) * width, dtype=dtype)
    shapes = [(batch, time, n, width) for n in (heads, k_heads, k_heads)]
    upstream = [kt.tensor(*shape, dtype=dtype, seed=i + 1) for i, shape in enumerate(shapes)]
    inputs = [*kt.differentiable(kt.LAYOUTS[layout](qkv)), *tables(time, width)]
    return inputs, [kt.LAYOUTS[upstream_layout](dy) for dy in upstream]


def of_heads(op, heads, k_heads):
    """The op as a function of its tensors."""
    return lambda qkv, cos, sin: op(qkv, cos, sin, heads, k_heads)


def values_of(qkv, heads, k_heads):
    """The values in a packed qkv, or their gradient in its gradient."""
    return qkv.unflatten(-1, (heads + 2 * k_heads, -1))[:, :, heads + k_heads :]


# Not the full product: each shape, dtype and layout appears, each pair that could interact at least once.
GRID = [
    # B, T, H, Hkv, D, dtype, layout of qkv, layout of the upstream gradients
    (1, 1, 1, 1, 2, FP32, "dense", "dense"),  # the least there is
    (2, 9, 3, 1, 6, FP16, "dense", "expanded"),  # heads that are no power of two
    (2, 33, 8, 4, 36, FP32, "dense", "dense"),  # the reference: half a head is 18 wide
    (2, 17, 8, 4, 36, FP16, "dense", "transposed"),
    (1, 20, 8, 4, 36, BF16, "dense", "dense"),
    (3, 5, 12, 12, 64, FP32, "strided", "expanded"),  # 124m
    (3, 5, 4, 4, 64, FP16, "transposed", "strided"),
    (1, 6, 5, 5, 200, FP16, "dense", "transposed"),  # a wide head that is no power of two
    (2, 4, 24, 8, 128, FP32, "dense", "strided"),  # llama3.2-3b
    (1, 3, 64, 1, 256, FP32, "transposed", "dense"),  # the widest, one k head for all: many tiles of q's heads
    (4, 3, 2, 6, 16, FP32, "strided", "transposed"),  # more heads in k than in q
    (1, 300, 1, 1, 16, FP32, "expanded", "strided"),  # many positions to a tile
]


def assert_agree(inputs, upstream, heads, k_heads):
    """The kernel is as good as torch's own against float64, and passes v and its gradient through untouched."""
    twin_op, op = of_heads(rope_torch, heads, k_heads), of_heads(rope_triton, heads, k_heads)
    (*exact, _), (exact_gradient,) = kt.run(twin_op, kt.double(inputs), kt.double(upstream))
    (*twin, _), (twin_gradient,) = kt.run(twin_op, inputs, upstream)
    with kt.poisoned():
        (*actual, v), (gradient,) = kt.run(op, inputs, upstream)
    for a, t, e in zip([*actual, gradient], [*twin, twin_gradient], [*exact, exact_gradient], strict=True):
        kt.assert_matches(a, t, e)
    kt.assert_same_bits([v], [values_of(inputs[0].detach(), heads, k_heads)])
    kt.assert_same_bits([values_of(gradient, heads, k_heads)], [upstream[2]])


@pytest.mark.parametrize(
    ("batch", "time", "heads", "k_heads", "width", "dtype", "layout", "upstream_layout"),
    GRID,
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_rope_is_as_exact_as_torch_and_close_to_float64(
    batch, time, heads, k_heads, width, dtype, layout, upstream_layout
):
    assert_agree(*case(batch, time, heads, k_heads, width, dtype, layout, upstream_layout), heads, k_heads)


@pytest.mark.parametrize("layout", kt.LAYOUTS)
@pytest.mark.parametrize("upstream_layout", kt.LAYOUTS)
def test_any_strides_of_qkv_and_of_the_gradients(layout, upstream_layout):
    assert_agree(*case(2, 5, 4, 2, 16, FP32, layout, upstream_layout), 4, 2)


@pytest.mark.parametrize("op", [rope_torch, rope_triton])
def test_pairs_are_half_a_head_apart_and_turn_towards_the_second(op):
    # A quarter turn: (first half, second half) becomes (-second half, first half).
    qkv = kt.tensor(1, 1, (2 + 2 * 1) * 8)
    cos, sin = torch.zeros(1, 4, device=kt.DEVICE), torch.ones(1, 4, device=kt.DEVICE)
    q, k, v = op(qkv, cos, sin, 2, 1)
    heads = qkv.unflatten(-1, (4, 8))
    turned = torch.cat((-heads[..., 4:], heads[..., :4]), dim=-1)
    for actual, expected in zip((q, k, v), (turned[:, :, :2], turned[:, :, 2:3], heads[:, :, 3:]), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("op", [rope_torch, rope_triton])
def test_values_are_a_view(op):
    (qkv, cos, sin), _ = case(2, 3, 4, 2, 8)
    _, _, v = op(qkv, cos, sin, 4, 2)
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert v.storage_offset() == 6 * 8
    assert torch.equal(v, values_of(qkv, 4, 2))


def test_float64_tables_are_used_as_such_by_the_twin():
    qkv = kt.tensor(1, 50, 3 * 4).double()
    q, _, _ = rope_torch(qkv, *tables(50, 4, torch.float64), 1, 1)
    assert not torch.equal(q, rope_torch(qkv, *tables(50, 4), 1, 1)[0])
    torch.testing.assert_close(q[:, :, 0].square().sum(-1), qkv[..., :4].square().sum(-1), rtol=1e-14, atol=0)


def test_large_float16_magnitudes_and_infinities_come_out_as_in_torch():
    qkv = kt.tensor(1, 4, (2 + 2 * 1) * 8, dtype=FP16)
    qkv[0, 1, :8], qkv[0, 2, 11], qkv[0, 3, 17] = 45_000.0, torch.inf, torch.nan
    inputs = [*kt.differentiable(qkv), *tables(4, 8)]
    twin, _ = kt.run(of_heads(rope_torch, 2, 1), inputs)
    actual, _ = kt.run(of_heads(rope_triton, 2, 1), inputs)
    for a, t in zip(actual, twin, strict=True):
        torch.testing.assert_close(a, t, equal_nan=True)


def test_gradients_of_values_pass_unchanged_infinities_and_signed_zeros_too():
    inputs, upstream = case(1, 4, 2, 1, 8)
    upstream[2][0, 0, 0, :3] = torch.tensor([torch.inf, torch.nan, -0.0])
    _, (gradient,) = kt.run(of_heads(rope_triton, 2, 1), inputs, upstream)
    kt.assert_same_bits([values_of(gradient, 2, 1)], [upstream[2]])


def test_a_run_repeats_to_the_last_bit():
    inputs, upstream = case(2, 9, 8, 4, 36, FP16)
    first, second = (kt.run(of_heads(rope_triton, 8, 4), inputs, upstream) for _ in range(2))
    kt.assert_same_bits(first[0] + first[1], second[0] + second[1])


@pytest.mark.parametrize(
    "used", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)], ids=lambda used: str(used)
)
def test_an_output_that_nobody_uses_gives_zeros(used):
    inputs, upstream = case(1, 5, 4, 2, 16)
    upstream = [dy if use else None for dy, use in zip(upstream, used, strict=True)]
    _, (expected,) = kt.run(of_heads(rope_torch, 4, 2), inputs, upstream)
    with kt.poisoned():
        _, (actual,) = kt.run(of_heads(rope_triton, 4, 2), inputs, upstream)
    torch.testing.assert_close(actual, expected)
    for part, use in zip(actual.unflatten(-1, (8, 16)).split((4, 2, 2), dim=2), used, strict=True):
        assert use or not part.any()


def test_the_backward_can_be_differentiated_again_and_again():
    (qkv, cos, sin), weights = case(1, 3, 2, 1, 8)

    def derivatives(op):
        """Of sum(w y^3), the first three by turns, each through the whole of the one before."""
        outputs = op(qkv, cos, sin, 2, 1)
        of = sum((w * y**3).sum() for w, y in zip(weights, outputs, strict=True))
        found = []
        for _ in range(3):
            (of,) = torch.autograd.grad(of, qkv, create_graph=True)
            found.append(of)
            of = (of * of.detach().cos()).sum()
        return found

    for actual, expected in zip(derivatives(rope_triton), derivatives(rope_torch), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("batch", "time"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("op", [rope_torch, rope_triton])
def test_an_empty_batch_gives_empty_outputs(op, batch, time):
    inputs, upstream = case(batch, time, 4, 2, 8)
    outputs, (gradient,) = kt.run(of_heads(op, 4, 2), inputs, upstream)
    assert [y.shape for y in outputs] == [dy.shape for dy in upstream]
    assert gradient.shape == (batch, time, 64)


def test_offsets_past_two_to_the_31_elements_do_not_wrap():
    (qkv, cos, sin), upstream = case(3, 3, 2, 1, 8, FP16)
    near = kt.run(of_heads(rope_triton, 2, 1), [qkv, cos, sin], upstream)
    far_qkv = kt.differentiable(kt.far_apart(qkv.detach()))
    far = kt.run(of_heads(rope_triton, 2, 1), [*far_qkv, cos, sin], [kt.far_apart(dy) for dy in upstream])
    kt.assert_same_bits(far[0] + far[1], near[0] + near[1])


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 12),
    heads=st.integers(1, 9),
    k_heads=st.integers(1, 9),
    half=st.integers(1, 70),
    layout=st.sampled_from(sorted(kt.LAYOUTS)),
    dtype=st.sampled_from([FP32, FP16]),
)
def test_any_shape_and_strides_agree_with_torch(batch, time, heads, k_heads, half, layout, dtype):
    inputs, upstream = case(batch, time, heads, k_heads, 2 * half, dtype, layout)
    twin, twin_grads = kt.run(of_heads(rope_torch, heads, k_heads), inputs, upstream)
    with kt.poisoned():
        actual, grads = kt.run(of_heads(rope_triton, heads, k_heads), inputs, upstream)
    for a, t in zip(actual + grads, twin + twin_grads, strict=True):
        torch.testing.assert_close(a, t)


def in_a_layer(op):
    """After a product and before something else, as in the model."""

    def function(x, weight, cos, sin):
        q, k, v = op(x @ weight, cos, sin, 4, 2)
        return q, k, v * 2

    return function


def layer_case(batch, time):
    return [*kt.differentiable(kt.tensor(batch, time, 16), kt.tensor(16, 64, seed=9)), *tables(time, 8)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", [rope_torch, rope_triton])
def test_compiles_into_one_graph(op, dynamic):
    cases = [layer_case(2, 5), layer_case(3, 7)] if dynamic else [layer_case(2, 5)]
    kt.assert_compiles(in_a_layer(op), cases, "aot_eager", dynamic, exact=op is rope_triton)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", [rope_torch, rope_triton])
def test_inductor_compiles_it_into_one_graph(op, dynamic):
    cases = [layer_case(2, 5), layer_case(3, 7)] if dynamic else [layer_case(2, 5)]
    kt.assert_compiles(in_a_layer(op), cases, "inductor", dynamic, exact=False)


def test_the_registered_ops_keep_pytorchs_rules():
    (qkv, cos, sin), upstream = case(2, 3, 4, 2, 8)
    torch.library.opcheck(torch.ops.triton_llama.rope.default, (qkv.detach(), cos, sin, 4, 2))
    torch.library.opcheck(torch.ops.triton_llama.rope_backward.default, (*kt.differentiable(*upstream), cos, sin))


def test_float64_is_for_the_twin_only():
    (qkv, cos, sin), _ = case(1, 3, 2, 1, 8)
    assert rope_torch(qkv.double(), cos, sin, 2, 1)[0].dtype == torch.float64
    with pytest.raises(ValueError, match=r"rope: qkv has dtype torch.float64, wanted torch.float32 or"):
        rope_triton(qkv.double(), cos, sin, 2, 1)


QKV, TABLE = torch.ones(2, 3, 64), torch.ones(3, 4)


@pytest.mark.parametrize("op", [rope_torch, rope_triton])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QKV, TABLE, None, 4, 2), r"rope: sin is a NoneType, wanted a tensor"),
        ((QKV[0], TABLE, TABLE, 4, 2), r"rope: qkv has shape \(3, 64\), wanted \(B, T, \(H \+ 2 Hkv\) D\)"),
        (
            (QKV[..., :63], TABLE, TABLE, 4, 2),
            r"rope: qkv has shape \(2, 3, 63\), wanted \(B, T, \(4 \+ 2 · 2\) D\) with D",
        ),
        ((QKV[..., :56], TABLE, TABLE, 4, 2), r"qkv has shape \(2, 3, 56\), .* with D even and at least 2"),
        ((QKV[..., :0], TABLE, TABLE, 4, 2), r"qkv has shape \(2, 3, 0\), .* with D even and at least 2"),
        ((QKV, TABLE, TABLE, 0, 2), r"rope: n_heads is 0, wanted at least 1"),
        ((QKV, TABLE, TABLE, 4, -2), r"rope: n_kv_heads is -2, wanted at least 1"),
        ((QKV, TABLE[:2], TABLE, 4, 2), r"rope: cos has shape \(2, 4\), wanted \(3, 4\)"),
        ((QKV, TABLE, TABLE[:, :3], 4, 2), r"rope: sin has shape \(3, 3\), wanted \(3, 4\)"),
        ((QKV, TABLE, TABLE, 2, 1), r"rope: cos has shape \(3, 4\), wanted \(3, 8\)"),  # heads of 16 are other heads
        ((QKV.half(), TABLE.half(), TABLE, 4, 2), r"rope: cos has dtype torch.float16, wanted torch.float32"),
        ((QKV, TABLE, TABLE.double(), 4, 2), r"rope: sin has dtype torch.float64, wanted torch.float32"),
        ((QKV, TABLE.clone().requires_grad_(), TABLE, 4, 2), r"rope: cos requires a gradient, wanted a constant table"),
        ((QKV, TABLE, TABLE.to("meta"), 4, 2), r"rope: sin is on meta, wanted "),
    ],
)
def test_bad_input_is_refused_with_what_came_and_what_was_wanted(op, arguments, message):
    arguments = [t.to(kt.DEVICE) if isinstance(t, torch.Tensor) and t.device.type == "cpu" else t for t in arguments]
    with pytest.raises(ValueError, match=message):
        op(*arguments)
