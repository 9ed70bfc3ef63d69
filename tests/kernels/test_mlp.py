"""The feed-forward as one op: its numbers, in any shape and compiled, what it serves and what it refuses."""

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernels
from kernels import grammar, launch
from kernels.launch import INTERPRETED, TARGETS
from kernels.linear import linear
from kernels.mlp import op as mlp_op
from kernels.mlp.op import mlp_serves, mlp_torch, mlp_triton, on_any_rows
from kernels.mlp.tiles import TILES, Tile
from tests.support import kernel_testing as kt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TWINS = [mlp_torch, mlp_triton]

GRID = [
    # rows, D, F, dtype, layout of x, of the upstream gradient
    (1, 1, 1, FP32, "dense", "dense"),  # the least there is
    (150, 1, 100, BF16, "strided", "expanded"),
    (70, 5, 3, FP32, "strided", "transposed"),
    (9, 5, 768, FP16, "transposed", "dense"),
    (65, 36, 40, FP16, "transposed", "strided"),  # a row past a tile of the interpreter's
    (150, 36, 100, FP32, "dense", "expanded"),  # several tiles, the last not full; two steps of F, the same
    (300, 96, 100, FP16, "strided", "strided"),  # of a GPU's too
    (5, 96, 768, BF16, "dense", "transposed"),
    (33, 160, 1, FP32, "dense", "dense"),  # 128 + 32 columns
    (2, 160, 768, FP16, "dense", "dense"),
    (66, 257, 40, FP32, "strided", "strided"),  # one column past 256
    (7, 257, 100, BF16, "transposed", "transposed"),
    (9, 288, 768, FP32, "dense", "expanded"),  # the reference
    (10, 288, 768, BF16, "strided", "dense"),
    (129, 288, 3, FP16, "dense", "transposed"),
]


def case(rows, dim, width, dtype=FP32, weight_dtype=FP32):
    """x and the weights, of numbers that `dtype` holds, and the gradient of the output."""
    x = kt.tensor(*([rows] if isinstance(rows, int) else rows), dim, dtype=dtype)
    gate_up = kt.tensor(2 * width, dim, dtype=dtype, seed=1, scale=dim**-0.5)
    down = kt.tensor(dim, width, dtype=dtype, seed=2, scale=width**-0.5)
    inputs = kt.differentiable(x, gate_up.to(weight_dtype), down.to(weight_dtype))
    return inputs, kt.tensor(*x.shape, dtype=dtype, seed=4)


def apart(x, gate_up_weight, down_weight):
    """The library's products and SwiGLU's kernel."""
    return linear(kernels.TRITON.swiglu(linear(x, gate_up_weight, None)), down_weight, None)


def name(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("rows", "dim", "width", "dtype", "layout", "upstream_layout"), GRID, ids=name)
def test_it_is_as_exact_as_torch_and_close_to_float64(rows, dim, width, dtype, layout, upstream_layout):
    (x, *weights), dout = case(rows, dim, width, dtype)
    inputs = [*kt.differentiable(kt.LAYOUTS[layout](x.detach())), *weights]
    upstream = [kt.LAYOUTS[upstream_layout](dout)]
    exact = kt.run(mlp_torch, kt.double(inputs), kt.double(upstream))
    twin = kt.run(mlp_torch, inputs, upstream)
    with kt.poisoned():
        actual = kt.run(mlp_triton, inputs, upstream)
    numbers = zip(*(outputs + gradients for outputs, gradients in (actual, twin, exact)), strict=True)
    for is_gradient, (a, t, e) in zip((False, True, True, True), numbers, strict=True):
        # The interpreter truncates y and then what comes of it: a bias, which sums over rows add up.
        truncates = INTERPRETED and dtype == BF16
        if not truncates or not is_gradient:
            kt.assert_as_good_as_torch(a, t, e, is_gradient)
        assert kt.relative_rms(a, e) <= kt.RELATIVE_RMS[dtype] * (2 if truncates else 1)
        assert a.is_contiguous()


def test_the_twin_is_the_formula_and_exact_in_float64():
    (x, gate_up, down), dout = case(3, 8, 5)
    x, gate_up, down, dout = (t.detach().double() for t in (x, gate_up, down, dout))
    (out,), gradients = kt.run(mlp_torch, kt.differentiable(x, gate_up, down), [dout])
    gate, up = x @ gate_up[:5].T, x @ gate_up[5:].T
    sigmoid = 1 / (1 + (-gate).exp())
    y, dy = gate * sigmoid * up, dout @ down
    dgate_up = torch.cat([dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid], 1)
    exact = [y @ down.T, dgate_up @ gate_up, dgate_up.T @ x, dout.T @ y]
    for actual, wanted in zip([out, *gradients], exact, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_it_is_at_least_as_exact_as_the_products_and_swiglu_apart(dtype):
    inputs, dout = case(70, 36, 100, dtype)
    exact = kt.run(mlp_torch, kt.double(inputs), kt.double([dout]))
    in_turn = kt.run(apart, inputs, [dout])
    actual = kt.run(mlp_triton, inputs, [dout])
    for a, b, e in zip(*(run[0] + run[1] for run in (actual, in_turn, exact)), strict=True):
        assert kt.relative_rms(a, e) <= 1.1 * kt.relative_rms(b, e) + 2e-7


def test_a_run_repeats_to_the_last_bit():
    inputs, dout = case(130, 36, 100, FP16)
    first, second = (kt.run(mlp_triton, inputs, [dout]) for _ in range(2))
    kt.assert_same_bits(first[0] + first[1], second[0] + second[1])


def test_rows_are_computed_alike_wherever_they_stand():
    (x, *weights), _ = case(130, 36, 40, FP16)
    whole = mlp_triton(x, *weights)
    assert torch.equal(mlp_triton(x[77:78], *weights), whole[77:78])
    assert torch.equal(mlp_triton(x.flip(0), *weights), whole.flip(0))


def test_infinity_and_nan_come_out_where_they_do_in_torch():
    special = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 100.0, -100.0, 1e30]
    x = torch.tensor(special, device=kt.DEVICE)[:, None]
    upstream = torch.tensor([1.0, torch.inf, 1.0, torch.inf, torch.nan, -torch.inf, 1.0, 1.0], device=kt.DEVICE)[
        :, None
    ]
    for gate, up in product((1.0, -0.5, 0.0, torch.inf, torch.nan), (1.0, 0.0, -torch.inf)):
        weights = torch.tensor([[gate], [up]], device=kt.DEVICE), torch.tensor([[-2.0]], device=kt.DEVICE)
        inputs = kt.differentiable(x, *weights)
        twin, actual = (kt.run(op, inputs, [upstream]) for op in TWINS)
        for a, t in zip(actual[0] + actual[1], twin[0] + twin[1], strict=True):
            torch.testing.assert_close(a, t, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    (x, *weights), dout = case(70, 36, 40)
    (clean,), (clean_dx, *_) = kt.run(mlp_triton, [x, *weights], [dout])
    x = x.detach().clone()
    x[66, 3] = bad
    (out,), (dx, *_) = kt.run(mlp_triton, kt.differentiable(x, *weights), [dout])
    others = torch.arange(70, device=kt.DEVICE) != 66
    assert torch.equal(out[others], clean[others])
    assert torch.equal(dx[others], clean_dx[others])
    assert not out[66].isfinite().any()


@pytest.mark.parametrize("op", TWINS)
def test_large_float16_magnitudes_are_rounded_once_between_the_products(op):
    # silu(gate) · up is past float16's range of 65504 where up is rounded to it before; x · w just below it.
    x = torch.tensor([[60_000.0, 0.5], [-60_000.0, 0.25], [30.0, 60_000.0]], dtype=FP16, device=kt.DEVICE)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=kt.DEVICE), torch.tensor([[0.5], [2.0]], device=kt.DEVICE)
    inputs = kt.differentiable(x, *weights)
    exact = kt.run(mlp_torch, kt.double(inputs))[0][0]
    out = op(*inputs)
    fits = exact.abs() < 65_504
    torch.testing.assert_close(out[fits].double(), exact[fits], rtol=2e-3, atol=0)
    assert not out[~fits].isfinite().any()


@pytest.mark.parametrize("gate_and_up", [(1e5, 0.25), (-1e5, 0.25), (0.25, 1e5), (0.25, -1e5)])
def test_what_float16_cannot_keep_makes_a_gradient_that_is_not_finite(gate_and_up):
    # The forward pass needs no rounded gate and up, and may be finite. The scaler must yet see that the backward pass does.
    x = torch.full((1, 1), 64.0, dtype=FP16, device=kt.DEVICE)
    gate_up = torch.tensor(gate_and_up, device=kt.DEVICE)[:, None] / 64
    inputs = kt.differentiable(x, gate_up, torch.full((1, 1), 0.01, device=kt.DEVICE))
    (out,), (dx, *_) = kt.run(mlp_triton, inputs, [torch.ones_like(x)])
    assert out.isfinite().all()
    assert not dx.isfinite().any()


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 140),
    dim=st.integers(1, 70),
    width=st.integers(1, 140),
    gap=st.integers(0, 9),
    step=st.integers(1, 3),
    dtype=st.sampled_from([FP32, FP16]),
)
def test_any_shape_and_strides_agree_with_torch(rows, dim, width, gap, step, dtype):
    (_, *weights), dout = case(rows, dim, width, dtype)
    x = kt.tensor(rows, dim * step + gap, dtype=dtype, seed=3)[:, gap::step]
    inputs = kt.differentiable(x, *weights)
    twin = kt.run(mlp_torch, inputs, [dout])
    with kt.poisoned():
        actual = kt.run(mlp_triton, inputs, [dout])
    for a, t in zip(actual[0] + actual[1], twin[0] + twin[1], strict=True):
        bound = 5e-3 if dtype == FP16 else 1e-5
        torch.testing.assert_close(a, t, rtol=bound, atol=bound * max(1.0, t.abs().amax().item()))


# -------------------------------------------------------------------------------------------------- shapes and strides


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("op", TWINS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_an_empty_batch_gives_empty_outputs_and_weights_zero_gradients(op, shape, dtype):
    inputs, dout = case(shape, 36, 18, dtype)
    (out,), (dx, *of_weights) = kt.run(op, inputs, [dout])
    assert out.shape == dx.shape == (*shape, 36)
    for gradient, weight in zip(of_weights, inputs[1:], strict=True):
        assert torch.equal(gradient, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("op", TWINS)
def test_leading_dimensions_of_any_number_are_rows(op, dtype):
    (x, *weights), dout = case((2, 3, 4), 20, 18, dtype)
    rows, rows_gradients = kt.run(op, [x.detach().flatten(0, 2).requires_grad_(), *weights], [dout.flatten(0, 2)])
    out, gradients = kt.run(op, [x, *weights], [dout])
    kt.assert_same_bits([out[0].flatten(0, 2), gradients[0].flatten(0, 2), *gradients[1:]], rows + rows_gradients)
    one, one_gradients = kt.run(op, [x.detach()[0, 0, 0].requires_grad_(), *weights], [dout[0, 0, 0]])
    row, row_gradients = kt.run(op, [x.detach()[0, 0, :1].requires_grad_(), *weights], [dout[0, 0, :1]])
    kt.assert_same_bits([one[0][None], one_gradients[0][None], *one_gradients[1:]], row + row_gradients)
    if op is mlp_triton:
        assert torch.equal(op(x[:, 1:], *weights), out[0][:, 1:])  # no one stride spans its rows


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_weights_of_any_strides(layout):
    (x, *weights), dout = case(5, 36, 18)
    weights = [kt.LAYOUTS[layout](w.detach()) for w in weights]
    dense = kt.run(mlp_triton, kt.differentiable(x, *(w.contiguous() for w in weights)), [dout])
    actual = kt.run(mlp_triton, kt.differentiable(x, *weights), [dout])
    kt.assert_same_bits(actual[0] + actual[1], dense[0] + dense[1])


@pytest.mark.parametrize(
    "rows_of_a_program",
    [None, pytest.param(1, marks=pytest.mark.skipif(not INTERPRETED, reason="a GPU multiplies tiles"))],
)
def test_offsets_past_two_to_the_31_elements_do_not_wrap(monkeypatch, rows_of_a_program):
    if rows_of_a_program:  # then it is the offset of a program that is so large, and else of a row within it
        for table in TILES.values():
            monkeypatch.setitem(table, "interpreter", Tile(rows_of_a_program, 64, 4, 2))
    (x, *weights), dout = case(3, 36, 18, FP16)
    x = x.detach()
    far = kt.run(mlp_triton, kt.differentiable(kt.far_apart(x), *weights), [kt.far_apart(dout)])
    near = kt.run(mlp_triton, kt.differentiable(x, *weights), [dout])
    kt.assert_same_bits(far[0] + far[1], near[0] + near[1])


# ---------------------------------------------------------------------------------------------------------- compilation


def compiled_case(batch):
    return case((batch, 3), 20, 18)[0]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", TWINS)
def test_compiles_into_one_graph(op, dynamic):
    cases = [compiled_case(batch) for batch in (4, 7)[: 1 + dynamic]]
    kt.assert_compiles(lambda x, *w: op(x * 2, *w) + x, cases, "aot_eager", dynamic, exact=op is mlp_triton)


@pytest.mark.slow
@pytest.mark.parametrize("op", TWINS)
def test_inductor_compiles_it_into_one_graph(op):
    cases = [compiled_case(batch) for batch in (4, 7)]
    kt.assert_compiles(lambda x, *w: op(x * 2, *w) + x, cases, "inductor", True, exact=False)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", TWINS)
def test_a_compiled_step_adds_to_the_sums_as_an_eager_one_does(op, backend):
    (x, *weights), dout = case(5, 20, 18, FP16)
    copies = tuple(w.detach().half() for w in weights)

    def step(x, sums):
        return op(x * 2, *weights, compute_weights=copies, gradient_sums=sums) * 2

    totals = []
    torch._dynamo.reset()
    for function in (step, torch.compile(step, backend=backend, fullgraph=True)):
        sums = tuple(torch.ones_like(w) for w in weights)
        for _ in range(2):
            function(x, sums).backward(dout)
        assert all(w.grad is None for w in weights)
        totals.append(sums)
    for eager, compiled in zip(*totals, strict=True):
        assert (eager - 1).abs().max() > 1
        rounding = 1e-5 if backend == "aot_eager" else 1e-2  # Inductor rounds to float16 where it likes
        torch.testing.assert_close(compiled, eager, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_the_registered_ops_keep_pytorchs_rules(dtype):
    ops = torch.ops.triton_llama
    inputs, dout = case((2, 3), 20, 18, dtype, weight_dtype=dtype)
    inputs = [t.detach() for t in inputs]
    for keep in (False, True):
        torch.library.opcheck(ops.mlp.default, (*inputs, keep))
    gate_up = ops.mlp(*inputs, True)[1]
    torch.library.opcheck(ops.mlp_backward.default, (dout, *inputs[1:], gate_up))


# ---------------------------------------------------------------------------------------------------- what it serves


def on_machine(monkeypatch, arch):
    """What the kernels serve is asked as it is on a GPU of this architecture."""
    monkeypatch.setattr(mlp_op, "_any_rows", False)
    monkeypatch.setattr(mlp_op, "target_at", lambda device: TARGETS[arch])
    monkeypatch.setattr(mlp_op, "check_usable", lambda op, device: None)


@pytest.mark.parametrize("arch", TARGETS)
def test_the_kernels_serve_machines_whose_products_wait_for_memory(monkeypatch, arch):
    on_machine(monkeypatch, arch)
    is_served = arch in ("sm_90", "sm_100")
    x = torch.empty(12_288, 16, dtype=BF16)
    assert mlp_serves(x, 16) is is_served
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1 if mlp_serves(x, 16) else x, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros_like(x)), torch.full_like(x, is_served))


@pytest.mark.parametrize(
    ("dim", "hidden_dim", "rows", "itemsize", "is_served"),
    [
        (288, 768, 12_288, 2, True),  # the reference, and as few rows as may be
        (16, 16, 12_288, 2, True),
        (288, 768, 12_287, 2, False),
        (288, 768, 12_288, 4, False),
        (288, 768, 10**9, 8, False),
        (304, 768, 12_288, 2, False),
        (280, 768, 12_288, 2, False),  # rows that are no multiples of 32 bytes
        (288, 776, 12_288, 2, False),
        (288, 2**20, 12_288, 2, True),
    ],
)
def test_the_kernels_serve_narrow_models_of_many_aligned_rows_in_half_precision(
    monkeypatch, dim, hidden_dim, rows, itemsize, is_served
):
    assert grammar.mlp_serves(dim, hidden_dim, rows, itemsize) is is_served
    on_machine(monkeypatch, "sm_90")
    x = torch.empty(rows, dim, dtype={2: BF16, 4: FP32, 8: torch.float64}[itemsize], device="meta")
    assert mlp_serves(x, hidden_dim) is is_served
    assert mlp_serves(x[None, :, None], hidden_dim) is is_served


def test_where_no_kernel_runs_they_say_so_before_the_machine_is_asked(monkeypatch):
    monkeypatch.setattr(mlp_op, "_any_rows", False)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert not mlp_serves(torch.empty(12_287, 16, dtype=BF16), 16)
    with pytest.raises(RuntimeError, match="mlp: a Triton kernel was given tensors on the CPU"):
        mlp_serves(torch.empty(12_288, 16, dtype=BF16), 16)


def test_on_any_rows_they_serve_all_that_they_can_compute(monkeypatch):
    monkeypatch.setattr(mlp_op, "_any_rows", False)
    with on_any_rows():
        assert mlp_serves(torch.empty(1, 1), 1)
        with on_any_rows():
            assert mlp_serves(torch.empty(1, 288), 7)
        assert mlp_serves(torch.empty(1, 288), 7)
        assert not mlp_serves(torch.empty(1, 289), 768)
    assert not mlp_serves(torch.empty(1, 288), 768)


def test_a_wider_model_is_the_twins():
    (x, *weights), _ = case(2, 289, 8)
    assert mlp_torch(x, *weights).shape == (2, 289)
    with pytest.raises(ValueError, match=r"mlp: x has shape \(2, 289\), wanted \(\.\.\., D\) with D at most 288"):
        mlp_triton(x, *weights)


def test_float64_is_for_the_reference_only():
    (x, *weights), _ = case(2, 8, 8)
    assert mlp_torch(x.double(), *weights).dtype == torch.float64
    with pytest.raises(ValueError, match=r"mlp: x has dtype torch.float64, wanted torch.float32 or"):
        mlp_triton(x.double(), *weights)


@pytest.mark.parametrize("op", TWINS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x is a list, wanted a tensor"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\), wanted \(\.\.\., D\) with D at least 1"),
        ({"x": torch.ones(2, 0)}, r"x has shape \(2, 0\), wanted \(\.\.\., D\) with D at least 1"),
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, "x has dtype torch.int32, wanted torch.float32 or"),
        ({"x": torch.ones(2, 9)}, r"down_weight has shape \(8, 6\), wanted \(9, F\)"),
        ({"down_weight": None}, "down_weight is a NoneType, wanted a tensor"),
        ({"down_weight": torch.ones(6)}, r"down_weight has shape \(6,\), wanted \(8, F\)"),
        ({"down_weight": torch.ones(6, 8)}, r"down_weight has shape \(6, 8\), wanted \(8, F\)"),
        ({"down_weight": torch.ones(8, 0)}, r"down_weight has shape \(8, 0\), wanted \(D, F\) with F at least 1"),
        ({"down_weight": torch.ones(8, 6).half()}, "down_weight has dtype torch.float16, wanted torch.float32"),
        ({"down_weight": torch.ones(8, 6, device="meta")}, "down_weight is on meta, wanted (cpu|cuda)"),
        ({"gate_up_weight": torch.ones(6, 8)}, r"gate_up_weight has shape \(6, 8\), wanted \(12, 8\)"),
        ({"gate_up_weight": torch.ones(8, 12)}, r"gate_up_weight has shape \(8, 12\), wanted \(12, 8\)"),
        (
            {"gate_up_weight": torch.ones(12, 8).double()},
            "gate_up_weight has dtype torch.float64, wanted torch.float32",
        ),
        ({"compute_weights": None}, "compute_weights is a NoneType, wanted a pair"),
        ({"compute_weights": torch.ones(2, 12, 8)}, "compute_weights is a Tensor, wanted a pair"),
        ({"compute_weights": (None,)}, "compute_weights is 1 of them, wanted a pair"),
        ({"compute_weights": (None, torch.ones(6, 8))}, r"compute_weights\[1\] has shape \(6, 8\), wanted \(8, 6\)"),
        (
            {"compute_weights": (torch.ones(12, 8).half(), None)},
            r"compute_weights\[0\] has dtype torch.float16, wanted",
        ),
        ({"gradient_sums": (None, None, None)}, "gradient_sums is 3 of them, wanted a pair"),
        ({"gradient_sums": (torch.ones(8, 12), None)}, r"gradient_sums\[0\] has shape \(8, 12\), wanted \(12, 8\)"),
        ({"gradient_sums": (None, torch.ones(8, 6).half())}, r"gradient_sums\[1\] has dtype torch.float16, wanted"),
        ({"gradient_sums": (7, None)}, r"gradient_sums\[0\] is a int, wanted a tensor"),
    ],
)
def test_bad_input_is_refused_with_what_came_and_what_was_wanted(op, change, message):
    def here(value):
        return value.to(kt.DEVICE) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value

    arguments = {"x": torch.ones(2, 8), "gate_up_weight": torch.ones(12, 8), "down_weight": torch.ones(8, 6)} | change
    arguments = {k: tuple(map(here, v)) if isinstance(v, tuple) else here(v) for k, v in arguments.items()}
    with pytest.raises(ValueError, match=f"mlp: {message}"):
        op(**arguments)
