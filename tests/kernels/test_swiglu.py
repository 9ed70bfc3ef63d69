import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.swiglu import swiglu_torch, swiglu_triton
from tests.support import kernel_testing as kt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Not the full product: each width, row count, dtype and layout appears, each pair that could interact at least once.
GRID = [
    # rows, F, dtype, input's layout, upstream gradient's layout
    (1, 1, FP32, "dense", "dense"),  # the least there is
    (300, 1, FP16, "strided", "expanded"),
    (5, 3, FP32, "transposed", "dense"),
    (300, 36, FP32, "dense", "transposed"),  # up starts at a multiple of 4 only
    (33, 64, FP16, "strided", "strided"),  # one block of 64
    (9, 768, FP32, "dense", "expanded"),  # the reference: three blocks of 256
    (10, 768, BF16, "strided", "dense"),
    (5, 1000, FP16, "dense", "strided"),  # no block divides it: padded to 1024
    (7, 1000, BF16, "transposed", "transposed"),
    (3, 2816, FP32, "strided", "dense"),  # eleven blocks of 256
    (2, 4100, FP16, "dense", "dense"),  # padded, and more than one block
    (2, 16384, FP32, "dense", "dense"),
]


def name(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.mark.parametrize(("rows", "width", "dtype", "layout", "upstream_layout"), GRID, ids=name)
def test_swiglu_is_as_exact_as_torch_and_close_to_float64(rows, width, dtype, layout, upstream_layout):
    inputs = kt.differentiable(kt.LAYOUTS[layout](kt.tensor(rows, 2 * width, dtype=dtype, scale=2.0)))
    upstream = [kt.LAYOUTS[upstream_layout](kt.tensor(rows, width, dtype=dtype, seed=1))]
    exact, exact_grads = kt.run(swiglu_torch, kt.double(inputs), kt.double(upstream))
    twin, twin_grads = kt.run(swiglu_torch, inputs, upstream)
    with kt.poisoned():
        actual, grads = kt.run(swiglu_triton, inputs, upstream)
    kt.assert_matches(actual[0], twin[0], exact[0])
    kt.assert_matches(grads[0], twin_grads[0], exact_grads[0], backward=True)


def test_the_first_half_is_the_gate():
    gate_up = torch.tensor([[0.0, 2.0, 5.0, 7.0]], device=kt.DEVICE)
    expected = torch.tensor([[0.0, 7 * 2 / (1 + torch.tensor(-2.0).exp().item())]], device=kt.DEVICE)
    for op in (swiglu_torch, swiglu_triton):
        torch.testing.assert_close(op(gate_up), expected)


@pytest.mark.parametrize("op", [swiglu_torch, swiglu_triton])
def test_large_float16_magnitudes_are_rounded_once(op):
    # silu(gate) is past float16's range of 65504 only if it is kept in float16 before it is scaled by up.
    gate_up = torch.tensor([[60_000.0, -60_000.0, 30.0, 0.001, 100.0, 0.25]], dtype=FP16, device=kt.DEVICE)
    torch.testing.assert_close(op(gate_up), swiglu_torch(gate_up.double()).half(), rtol=1e-3, atol=0)


def test_infinity_and_nan_come_out_where_they_do_in_torch():
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 100.0, -100.0, 1e30], device=kt.DEVICE)
    inputs = kt.differentiable(torch.cartesian_prod(special, special))
    upstream = [torch.ones(64, 1, device=kt.DEVICE)]
    twin, twin_grads = kt.run(swiglu_torch, inputs, upstream)
    actual, grads = kt.run(swiglu_triton, inputs, upstream)
    for a, t in zip(actual + grads, twin + twin_grads, strict=True):
        torch.testing.assert_close(a, t, equal_nan=True)


def test_a_run_repeats_to_the_last_bit():
    inputs, upstream = kt.differentiable(kt.tensor(40, 2 * 288, dtype=FP16)), [kt.tensor(40, 288, dtype=FP16, seed=1)]
    first, second = (kt.run(swiglu_triton, inputs, upstream) for _ in range(2))
    kt.assert_same_bits(first[0] + first[1], second[0] + second[1])


@pytest.mark.parametrize("shape", [(0, 36), (3, 0, 36)])
def test_an_empty_batch_gives_empty_outputs(shape):
    upstream = [kt.tensor(*shape[:-1], 18)]
    for op in (swiglu_torch, swiglu_triton):
        outputs, grads = kt.run(op, kt.differentiable(kt.tensor(*shape)), upstream)
        assert outputs[0].shape == upstream[0].shape
        assert grads[0].shape == shape


def test_leading_dimensions_of_any_number_are_rows():
    gate_up = kt.tensor(2, 3, 4, 36)
    rows = swiglu_triton(gate_up.flatten(0, 2))
    assert torch.equal(swiglu_triton(gate_up).flatten(0, 2), rows)
    assert torch.equal(swiglu_triton(gate_up[0, 0, 0]), rows[0])
    assert torch.equal(swiglu_triton(gate_up[:, 1:]), rows.view(2, 3, 4, 18)[:, 1:])  # no one stride spans its rows


def test_offsets_past_two_to_the_31_elements_do_not_wrap():
    gate_up, upstream = kt.far_apart(kt.tensor(3, 36, dtype=FP16)), [kt.tensor(3, 18, dtype=FP16, seed=1)]
    far, near = (kt.run(swiglu_triton, kt.differentiable(rows), upstream) for rows in (gate_up, gate_up.clone()))
    kt.assert_same_bits(far[0] + far[1], near[0] + near[1])


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 300),
    gap=st.integers(0, 9),
    step=st.integers(1, 3),
    dtype=st.sampled_from([FP32, FP16]),
)
def test_any_shape_and_strides_agree_with_torch(rows, width, gap, step, dtype):
    gate_up = kt.tensor(rows, 2 * width * step + gap, dtype=dtype)[:, gap::step]
    inputs, upstream = kt.differentiable(gate_up), [kt.tensor(rows, width, dtype=dtype, seed=3)]
    twin, twin_grads = kt.run(swiglu_torch, inputs, upstream)
    with kt.poisoned():
        actual, grads = kt.run(swiglu_triton, inputs, upstream)
    for a, t in zip(actual + grads, twin + twin_grads, strict=True):
        torch.testing.assert_close(a, t)


def case(rows):
    return kt.differentiable(kt.tensor(rows, 5, 72))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", [swiglu_torch, swiglu_triton])
def test_compiles_into_one_graph(op, dynamic):
    cases = [case(4), case(7)] if dynamic else [case(4)]
    kt.assert_compiles(op, cases, "aot_eager", dynamic, exact=op is swiglu_triton)


@pytest.mark.slow
@pytest.mark.parametrize("op", [swiglu_torch, swiglu_triton])
def test_inductor_compiles_it_into_one_graph(op):
    kt.assert_compiles(op, [case(4), case(7)], "inductor", True, exact=False)


def test_the_registered_ops_keep_pytorchs_rules():
    ops = torch.ops.triton_llama
    (gate_up,) = case(2)
    torch.library.opcheck(ops.swiglu.default, (gate_up,))
    torch.library.opcheck(ops.swiglu_backward.default, (kt.tensor(2, 5, 36), gate_up.detach()))


def test_float64_is_for_the_reference_only():
    gate_up = torch.ones(2, 8, dtype=torch.float64, device=kt.DEVICE)
    assert swiglu_torch(gate_up).dtype == torch.float64
    with pytest.raises(ValueError, match=r"swiglu: gate_up has dtype torch.float64, wanted torch.float32 or"):
        swiglu_triton(gate_up)


@pytest.mark.parametrize("op", [swiglu_torch, swiglu_triton])
@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        ([1.0, 2.0], r"swiglu: gate_up is a list, wanted a tensor"),
        (torch.tensor(1.0), r"swiglu: gate_up has shape \(\), wanted \(\.\.\., 2F\) with F at least 1"),
        (torch.ones(2, 0), r"swiglu: gate_up has shape \(2, 0\), wanted \(\.\.\., 2F\) with F at least 1"),
        (torch.ones(2, 7), r"swiglu: gate_up has shape \(2, 7\), wanted \(\.\.\., 2F\) with F at least 1"),
        (torch.ones(2, 8, dtype=torch.int32), r"swiglu: gate_up has dtype torch.int32, wanted torch.float32 or"),
    ],
)
def test_bad_input_is_refused_with_what_came_and_what_was_wanted(op, gate_up, message):
    with pytest.raises(ValueError, match=message):
        op(gate_up)
