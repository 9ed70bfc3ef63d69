import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.launch import target_of
from kernels.rms_norm import (
    add_rms_norm_torch,
    add_rms_norm_triton,
    gradient_row_count,
    rms_norm_torch,
    rms_norm_triton,
)
from tests.support import kernel_testing as kt

EPS = 1e-5
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
MANY = kt.MANY_ROWS

# Not the full product: each width, row count, dtype and layout appears, each pair that could interact at least once.
GRID = [
    # rows, width, dtype, weight's dtype, input's layout, upstream gradient's layout
    (5, 1, FP32, FP32, "dense", "dense"),  # the narrowest
    (7, 1, FP16, FP32, "strided", "dense"),
    (1, 3, FP32, FP32, "dense", "expanded"),  # one row; fewer columns than a vector load has
    (300, 3, FP16, FP16, "transposed", "dense"),
    (33, 36, FP32, FP32, "strided", "dense"),  # a reference head; rows that are no multiple of a tile's
    (MANY, 64, FP16, FP32, "dense", "strided"),  # no padding at all; programs loop
    (MANY, 288, FP32, FP32, "dense", "dense"),  # the reference width, padded to 512; programs loop
    (64, 288, BF16, FP32, "dense", "expanded"),
    (17, 288, FP16, FP16, "strided", "transposed"),
    (9, 1000, FP16, FP32, "dense", "dense"),  # rows aligned to 16 bytes but not to 16 elements
    (20, 1000, BF16, BF16, "transposed", "strided"),
    (12, 4096, FP32, FP32, "strided", "expanded"),
    (7, 8192, FP16, FP32, "dense", "dense"),  # the widest row in one block
    (3, 8193, FP32, FP32, "dense", "transposed"),  # one past it: column loop with a ragged block of one
    (5, 8193, FP16, FP16, "strided", "dense"),
    (6, 16384, FP32, FP32, "dense", "strided"),  # column loop, more rows than programs
    (2, 16384, BF16, FP32, "dense", "dense"),
]


def name(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.mark.parametrize(("rows", "width", "dtype", "weight_dtype", "layout", "upstream_layout"), GRID, ids=name)
def test_rms_norm_is_as_exact_as_torch_and_close_to_float64(rows, width, dtype, weight_dtype, layout, upstream_layout):
    x, weight = kt.differentiable(
        kt.LAYOUTS[layout](kt.tensor(rows, width, dtype=dtype)), kt.tensor(width, dtype=weight_dtype, seed=1)
    )
    upstream = [kt.LAYOUTS[upstream_layout](kt.tensor(rows, width, dtype=dtype, seed=2))]
    exact, exact_grads = kt.run(lambda *a: rms_norm_torch(*a, EPS), kt.double([x, weight]), kt.double(upstream))
    twin, twin_grads = kt.run(lambda *a: rms_norm_torch(*a, EPS), [x, weight], upstream)
    with kt.poisoned():
        actual, grads = kt.run(lambda *a: rms_norm_triton(*a, EPS), [x, weight], upstream)
    kt.assert_matches(actual[0], twin[0], exact[0])
    check = kt.assert_as_good_as_torch if width == 1 else kt.assert_matches  # at 1, dx is a difference of equals
    check(grads[0], twin_grads[0], exact_grads[0], backward=True)
    if weight_dtype == FP32:
        kt.assert_sum_matches(grads[1], exact_grads[1], rows)
    else:
        kt.assert_matches(grads[1], twin_grads[1], exact_grads[1], backward=True)


# The residual's dtype in place of the weight's; summed's upstream gradient has the layout too.
ADD_GRID = [
    (5, 1, FP32, FP32, "dense", "dense"),
    (300, 3, FP16, FP32, "dense", "expanded"),
    (33, 36, FP16, FP16, "strided", "dense"),
    (MANY, 288, FP32, FP32, "strided", "strided"),
    (31, 288, BF16, FP32, "dense", "dense"),  # a residual stream in float32: two gradients of different dtypes
    (31, 288, BF16, BF16, "dense", "transposed"),
    (9, 1000, FP16, FP16, "transposed", "expanded"),
    (4, 4096, FP16, FP32, "dense", "transposed"),
    (5, 8192, FP32, FP32, "dense", "dense"),
    (3, 8193, FP16, FP32, "strided", "strided"),
    (4, 16384, FP16, FP16, "dense", "dense"),
]


@pytest.mark.parametrize(("rows", "width", "dtype", "residual_dtype", "layout", "upstream_layout"), ADD_GRID, ids=name)
def test_add_rms_norm_is_as_exact_as_torch_and_close_to_float64(
    rows, width, dtype, residual_dtype, layout, upstream_layout
):
    place, place_upstream = kt.LAYOUTS[layout], kt.LAYOUTS[upstream_layout]
    inputs = kt.differentiable(
        place(kt.tensor(rows, width, dtype=dtype)),
        place(kt.tensor(rows, width, dtype=residual_dtype, seed=1)),
        kt.tensor(width, seed=2),
    )
    upstream = [
        place_upstream(kt.tensor(rows, width, dtype=dtype, seed=3)),
        place_upstream(kt.tensor(rows, width, dtype=residual_dtype, seed=4)),
    ]
    exact, exact_grads = kt.run(lambda *a: add_rms_norm_torch(*a, EPS), kt.double(inputs), kt.double(upstream))
    twin, twin_grads = kt.run(lambda *a: add_rms_norm_torch(*a, EPS), inputs, upstream)
    with kt.poisoned():
        actual, grads = kt.run(lambda *a: add_rms_norm_triton(*a, EPS), inputs, upstream)
    for a, t, e in zip(actual, twin, exact, strict=True):
        kt.assert_matches(a, t, e)
    check = kt.assert_as_good_as_torch if width == 1 else kt.assert_matches
    for a, t, e in zip(grads[:2], twin_grads[:2], exact_grads[:2], strict=True):
        check(a, t, e, backward=True)
    kt.assert_as_good_as_torch(grads[2], twin_grads[2], exact_grads[2], backward=True)
    if residual_dtype == FP32:  # otherwise the sum's rounding is the larger part of the error
        kt.assert_sum_matches(grads[2], exact_grads[2], rows)


@pytest.mark.parametrize(
    ("norm", "add_norm"),
    [(rms_norm_torch, add_rms_norm_torch), (rms_norm_triton, add_rms_norm_triton)],
    ids=["torch", "triton"],
)
def test_the_sum_is_rounded_before_it_is_normalized(norm, add_norm):
    x, residual, weight = kt.tensor(40, 288, dtype=FP16), kt.tensor(40, 288, dtype=FP16, seed=1), kt.tensor(288, seed=2)
    y, summed = add_norm(x, residual, weight, EPS)
    assert torch.equal(summed, x + residual)
    assert torch.equal(y, norm(summed, weight, EPS))


@pytest.mark.parametrize("op", [rms_norm_torch, rms_norm_triton])
def test_large_float16_magnitudes_do_not_overflow_the_statistics(op):
    x = kt.tensor(6, 288, dtype=FP16).clamp(-3, 3) * 20_000  # squares past float16's range by far
    weight = torch.ones(288, device=kt.DEVICE)
    exact = rms_norm_torch(x.double(), weight, EPS)
    assert kt.relative_rms(op(x, weight, EPS), exact) <= kt.RELATIVE_RMS[FP16]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinity_and_nan_come_out_where_they_do_in_torch(value):
    x = kt.tensor(4, 36)
    x[1, 5] = value
    inputs = kt.differentiable(x, kt.tensor(4, 36, seed=1), kt.tensor(36, seed=2))
    upstream = [kt.tensor(4, 36, seed=3), kt.tensor(4, 36, seed=4)]
    twin, twin_grads = kt.run(lambda *a: add_rms_norm_torch(*a, EPS), inputs, upstream)
    actual, grads = kt.run(lambda *a: add_rms_norm_triton(*a, EPS), inputs, upstream)
    for a, t in zip(actual + grads, twin + twin_grads, strict=True):
        torch.testing.assert_close(a, t, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "width"), [(MANY, 288), (5, 8193)])
def test_a_run_repeats_to_the_last_bit(rows, width):
    x, residual = kt.tensor(rows, width, dtype=FP16), kt.tensor(rows, width, seed=1)
    inputs = kt.differentiable(x, residual, kt.tensor(width, seed=2))
    upstream = [kt.tensor(rows, width, dtype=FP16, seed=3), kt.tensor(rows, width, seed=4)]
    first, second = (kt.run(lambda *a: add_rms_norm_triton(*a, EPS), inputs, upstream) for _ in range(2))
    kt.assert_same_bits(first[0] + first[1], second[0] + second[1])


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["y", "summed"])
@pytest.mark.parametrize("residual_dtype", [FP16, FP32], ids=name)
def test_an_unused_output_contributes_nothing(used, residual_dtype):
    inputs = kt.differentiable(
        kt.tensor(6, 36, dtype=FP16), kt.tensor(6, 36, dtype=residual_dtype, seed=1), kt.tensor(36, seed=2)
    )
    upstream = [kt.tensor(6, 36, dtype=FP16, seed=3), kt.tensor(6, 36, dtype=residual_dtype, seed=4)]
    upstream = [dy if use else None for dy, use in zip(upstream, used, strict=True)]
    _, twin = kt.run(lambda *a: add_rms_norm_torch(*a, EPS), inputs, upstream)
    _, grads = kt.run(lambda *a: add_rms_norm_triton(*a, EPS), inputs, upstream)
    for a, t in zip(grads, twin, strict=True):
        if t is None:
            assert a is None
        else:
            torch.testing.assert_close(a, t, rtol=2e-3, atol=2e-3)
            assert a.dtype == t.dtype


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("residual_dtype", [FP16, FP32], ids=name)
def test_only_the_inputs_that_want_a_gradient_get_one(wanted, residual_dtype):
    inputs = [kt.tensor(6, 36, dtype=FP16), kt.tensor(6, 36, dtype=residual_dtype, seed=1), kt.tensor(36, seed=2)]
    inputs = [x.requires_grad_(bool(want)) for x, want in zip(inputs, wanted, strict=True)]
    upstream = [kt.tensor(6, 36, dtype=FP16, seed=3), kt.tensor(6, 36, dtype=residual_dtype, seed=4)]
    _, twin = kt.run(lambda *a: add_rms_norm_torch(*a, EPS), inputs, upstream)
    _, grads = kt.run(lambda *a: add_rms_norm_triton(*a, EPS), inputs, upstream)
    assert len(grads) == sum(wanted)
    for a, t in zip(grads, twin, strict=True):
        torch.testing.assert_close(a, t, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shape", [(0, 36), (3, 0, 36)])
def test_an_empty_batch_gives_empty_outputs_and_a_zero_weight_gradient(shape):
    inputs = kt.differentiable(kt.tensor(*shape), kt.tensor(*shape), kt.tensor(36))
    upstream = [kt.tensor(*shape), kt.tensor(*shape)]
    for op in (add_rms_norm_torch, add_rms_norm_triton):
        outputs, grads = kt.run(lambda *a, op=op: op(*a, EPS), inputs, upstream)
        assert [y.shape for y in outputs] == [torch.Size(shape)] * 2
        assert grads[0].shape == shape
        assert torch.equal(grads[2], torch.zeros_like(inputs[2]))


def test_leading_dimensions_of_any_number_are_rows():
    x, weight = kt.tensor(2, 3, 4, 36), kt.tensor(36)
    rows = rms_norm_triton(x.flatten(0, 2), weight, EPS)
    assert torch.equal(rms_norm_triton(x, weight, EPS).flatten(0, 2), rows)
    assert torch.equal(rms_norm_triton(x[0, 0, 0], weight, EPS), rows[0])
    assert torch.equal(rms_norm_triton(x[:, 1:], weight, EPS), rows.view_as(x)[:, 1:])  # no one stride spans its rows


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 300),
    gap=st.integers(0, 9),
    step=st.integers(1, 3),
    dtype=st.sampled_from([FP32, FP16]),
)
def test_any_shape_and_strides_agree_with_torch(rows, width, gap, step, dtype):
    x = kt.tensor(rows, width * step + gap, dtype=dtype)[:, gap::step]
    inputs = kt.differentiable(x, kt.tensor(rows, width, seed=1), kt.tensor(width, seed=2))
    upstream = [kt.tensor(rows, width, dtype=dtype, seed=3), kt.tensor(rows, width, seed=4)]
    twin, twin_grads = kt.run(lambda *a: add_rms_norm_torch(*a, EPS), inputs, upstream)
    with kt.poisoned():
        actual, grads = kt.run(lambda *a: add_rms_norm_triton(*a, EPS), inputs, upstream)
    for a, t in zip(actual + grads, twin + twin_grads, strict=True):
        torch.testing.assert_close(a, t, rtol=2e-3, atol=2e-3 if dtype == FP16 else 1e-4)


def test_offsets_past_two_to_the_31_elements_do_not_wrap():
    x = kt.far_apart(kt.tensor(3, 36, dtype=FP16))
    weight, upstream = kt.tensor(36), [kt.tensor(3, 36, dtype=FP16, seed=1)]
    far, near = (
        kt.run(lambda x: rms_norm_triton(x, weight, EPS), kt.differentiable(rows), upstream) for rows in (x, x.clone())
    )
    kt.assert_same_bits(far[0] + far[1], near[0] + near[1])


def case(rows, dtype=FP32):
    return kt.differentiable(kt.tensor(rows, 5, 36, dtype=dtype), kt.tensor(rows, 5, 36), kt.tensor(36))


def both(op_name):
    """The two norms in one function: their forwards and backwards in one graph."""
    norm, add_norm = {
        "torch": (rms_norm_torch, add_rms_norm_torch),
        "triton": (rms_norm_triton, add_rms_norm_triton),
    }[op_name]

    def function(x, residual, weight):
        y, summed = add_norm(x, residual, weight, EPS)
        return norm(y, weight, EPS), summed

    return function


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op_name", ["torch", "triton"])
def test_compiles_into_one_graph(op_name, dynamic):
    cases = [case(4), case(7)] if dynamic else [case(4)]
    kt.assert_compiles(both(op_name), cases, "aot_eager", dynamic, exact=op_name == "triton")


def test_the_width_is_a_number_in_a_graph_of_any_batch():
    """On a GPU torch 2.11 normalizes over a width that is no number: it takes the symbol's address."""
    widths = []

    def backend(graph, _):
        widths.extend(node.args[1][0] for node in graph.graph.nodes if "rms_norm" in str(node.target))
        return graph

    torch._dynamo.reset()
    torch.compile(both("torch"), backend=backend, fullgraph=True, dynamic=True)(*case(4))
    assert widths == [36, 36]


@pytest.mark.slow
@pytest.mark.parametrize("op_name", ["torch", "triton"])
def test_inductor_compiles_it_into_one_graph(op_name):
    kt.assert_compiles(both(op_name), [case(4), case(7)], "inductor", True, exact=False)


def test_the_registered_ops_keep_pytorchs_rules():
    ops = torch.ops.triton_llama
    x, residual, weight = case(2)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for added in (None, residual):
        torch.library.opcheck(ops.rms_norm.default, (x, added, weight, EPS, None), test_utils=checks)
    _, summed, rstd = (t.detach() for t in ops.rms_norm(x, residual, weight, EPS, None))
    for gradient_rows, *wants in (
        (None, True, False, True),
        (None, False, False, True),
        (rows_for(weight), True, True, True),
    ):
        arguments = (x.detach(), residual.detach(), summed, weight.detach(), rstd, gradient_rows, *wants)
        torch.library.opcheck(ops.rms_norm_backward.default, arguments)


# ------------------------------------------------------------------------------------------- gradients that a step keeps


def rows_for(weight, fill=0.0):
    """`gradient_rows` for a weight."""
    count = gradient_row_count(weight.shape[0], target_of(weight))
    return torch.full((count, weight.shape[0]), fill, device=weight.device)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("width", [36, 288, 8193])
def test_a_step_keeps_the_weights_gradient_in_rows(width, dtype):
    """Three passes, one of them longer than there are programs: the rows' sum is that of the gradients without them."""
    weight = kt.differentiable(kt.tensor(width, seed=1))[0]
    rows, total = rows_for(weight), torch.zeros(width, dtype=torch.float64, device=kt.DEVICE)
    for seed, n_rows in ((0, 5), (1, MANY if width == 288 else 7), (2, 1)):
        x, residual = kt.differentiable(*(kt.tensor(n_rows, width, dtype=dtype, seed=s) for s in (3 + seed, 6 + seed)))
        upstream = [kt.tensor(n_rows, width, dtype=dtype, seed=9 + seed + i) for i in range(2)]
        _, plain = kt.run(lambda *a: add_rms_norm_triton(*a, EPS), [x, residual, weight], upstream)
        total += plain[2]
        with kt.poisoned():
            _, grads = kt.run(lambda *a: add_rms_norm_triton(*a, EPS, rows), [x, residual, weight], upstream)
        assert grads[2] is None
        kt.assert_same_bits(grads[:2], plain[:2])
    kt.assert_sum_matches(rows.sum(0), total, MANY)


def test_what_is_in_the_rows_stays_where_nothing_is_added():
    x, weight = kt.differentiable(kt.tensor(0, 36), kt.tensor(36, seed=1))
    rows = rows_for(weight, fill=3.0)
    kt.run(lambda *a: rms_norm_triton(*a, EPS, rows), [x, weight], [kt.tensor(0, 36)])
    assert torch.equal(rows, rows_for(weight, fill=3.0))
    x = kt.tensor(4, 36).requires_grad_()  # the weight wants no gradient
    kt.run(lambda a: rms_norm_triton(a, weight.detach(), EPS, rows), [x], [kt.tensor(4, 36)])
    assert torch.equal(rows, rows_for(weight, fill=3.0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_are_added_to_under_compile(dynamic):
    weight = kt.differentiable(kt.tensor(36, seed=1))[0]
    eager, compiled = rows_for(weight), rows_for(weight)
    op = torch.compile(rms_norm_triton, fullgraph=True, dynamic=dynamic)
    for seed in range(2):
        x, dy = kt.tensor(6, 36, seed=2 + seed), kt.tensor(6, 36, seed=4 + seed)
        for chosen, rows in ((rms_norm_triton, eager), (op, compiled)):
            _, grads = kt.run(
                lambda *a, chosen=chosen, rows=rows: chosen(*a, EPS, rows), kt.differentiable(x, weight), [dy]
            )
            assert grads[1] is None
    assert eager.any()
    kt.assert_same_bits([eager], [compiled])


@pytest.mark.parametrize("op", [rms_norm_torch, rms_norm_triton])
def test_rows_that_do_not_fit_are_refused(op):
    x, weight = kt.tensor(4, 36), kt.tensor(36)
    rows = rows_for(weight)
    for wrong, message in (
        (rows[:, :35].contiguous(), r"rms_norm: gradient_rows has shape \(\d+, 35\), wanted \(R, 36\)"),
        (rows.half(), r"rms_norm: gradient_rows has dtype torch.float16, wanted torch.float32"),
        (
            torch.zeros(36, 4, device=kt.DEVICE).T,
            r"rms_norm: gradient_rows has strides \(1, 4\), wanted a dense tensor",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            op(x, weight, EPS, wrong)
    if op is rms_norm_triton:
        with pytest.raises(
            ValueError, match=r"rms_norm: gradient_rows has \d+ rows, wanted \d+ \(gradient_row_count\)"
        ):
            op(x, weight, EPS, torch.cat([rows, rows]))


@pytest.mark.parametrize("op", [rms_norm_torch, rms_norm_triton])
def test_float64_is_for_the_reference_only(op):
    x, weight = torch.ones(2, 8, dtype=torch.float64, device=kt.DEVICE), torch.ones(8, device=kt.DEVICE)
    if op is rms_norm_torch:
        assert op(x, weight, EPS).dtype == torch.float64
    else:
        with pytest.raises(ValueError, match=r"rms_norm: x has dtype torch.float64, wanted torch.float32 or"):
            op(x, weight, EPS)


X = torch.ones(2, 8)


@pytest.mark.parametrize("op", [add_rms_norm_torch, add_rms_norm_triton])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, X, [1.0]), r"add_rms_norm: weight is a list, wanted a tensor"),
        ((X[0, 0], X, X[0]), r"add_rms_norm: x has shape \(\), wanted \(\.\.\., D\) with D at least 1"),
        ((X[:, :0], X, X[0]), r"add_rms_norm: x has shape \(2, 0\), wanted \(\.\.\., D\) with D at least 1"),
        ((X, X[:1], X[0]), r"add_rms_norm: residual has shape \(1, 8\), wanted \(2, 8\)"),
        ((X, X[None], X[0]), r"add_rms_norm: residual has shape \(1, 2, 8\), wanted \(2, 8\)"),
        ((X, X, X[0, :7]), r"add_rms_norm: weight has shape \(7,\), wanted \(8\)"),
        ((X, X.half(), X[0]), r"residual has dtype torch.float16, wanted torch.float32"),
        ((X.half(), X.bfloat16(), X[0]), r"residual has dtype torch.bfloat16, wanted torch.float16 or torch.float32"),
        ((X, X, X[0].half()), r"weight has dtype torch.float16, wanted torch.float32"),
        ((X.int(), X, X[0]), r"x has dtype torch.int32, wanted torch.float32 or torch.bfloat16 or torch.float16"),
        ((X, X, X[0].to("meta")), r"add_rms_norm: weight is on meta, wanted "),
    ],
)
def test_bad_input_is_refused_with_what_came_and_what_was_wanted(op, arguments, message):
    arguments = [t.to(kt.DEVICE) if isinstance(t, torch.Tensor) and t.device.type == "cpu" else t for t in arguments]
    with pytest.raises(ValueError, match=message):
        op(*arguments, EPS)
