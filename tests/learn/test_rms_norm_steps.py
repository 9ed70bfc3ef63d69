import pytest
import torch

from kernels.rms_norm import rms_norm_torch
from learn import rms_norm
from tests.support import kernel_testing as kt

EPS = 1e-5
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

STEPS = [rms_norm.step1, rms_norm.step2, rms_norm.step3, rms_norm.step4, rms_norm.step5]
BACKWARDS = [rms_norm.backward1, rms_norm.backward2]

GRID = [
    # rows, width, dtype, layout
    (5, 1, FP32, "dense"),
    (1, 3, FP16, "strided"),
    (33, 72, FP32, "dense"),  # narrow rows: 16 a program, the last program's not all there
    (9, 288, FP16, "strided"),
    (9, 288, BF16, "dense"),
    (3, 1000, FP16, "dense"),  # aligned to 16 bytes but not to 16 elements
    (2, 2048, FP32, "strided"),
]


def name(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else getattr(value, "__name__", None)


@pytest.mark.parametrize(("rows", "width", "dtype", "layout"), GRID, ids=name)
@pytest.mark.parametrize("step", STEPS, ids=name)
def test_each_step_is_as_exact_as_torch_and_close_to_float64(step, rows, width, dtype, layout):
    x, weight = kt.LAYOUTS[layout](kt.tensor(rows, width, dtype=dtype)), kt.tensor(width, seed=1)
    exact, twin = rms_norm_torch(x.double(), weight.double(), EPS), rms_norm_torch(x, weight, EPS)
    before = x.clone()
    with kt.poisoned():
        y = step(x, weight, EPS)
    kt.assert_matches(y, twin, exact)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("rows", "width", "dtype", "layout"), GRID, ids=name)
@pytest.mark.parametrize("backward", BACKWARDS, ids=name)
def test_each_backward_is_as_exact_as_torch_and_close_to_float64(backward, rows, width, dtype, layout):
    x, weight = kt.differentiable(kt.LAYOUTS[layout](kt.tensor(rows, width, dtype=dtype)), kt.tensor(width, seed=1))
    dy = kt.tensor(rows, width, dtype=dtype, seed=2)
    exact = kt.run(lambda *a: rms_norm_torch(*a, EPS), kt.double([x, weight]), [dy.double()])[1]
    twin = kt.run(lambda *a: rms_norm_torch(*a, EPS), [x, weight], [dy])[1]
    rstd = (x.detach().float().square().mean(1) + EPS).rsqrt()
    with kt.poisoned():
        dx, dweight = backward(dy, x.detach(), weight.detach(), rstd)
    check = kt.assert_as_good_as_torch if width == 1 else kt.assert_matches  # at 1, dx is a difference of equals
    check(dx, twin[0], exact[0], backward=True)
    kt.assert_sum_matches(dweight, exact[1], rows)


def test_the_weight_gradient_has_the_same_bits_each_time():
    x, dy = kt.tensor(70, 36), kt.tensor(70, 36, seed=1)
    inputs = dy, x, kt.tensor(36, seed=2), x.square().mean(1).rsqrt()
    kt.assert_same_bits(rms_norm.backward2(*inputs), rms_norm.backward2(*inputs))
