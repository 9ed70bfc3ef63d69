import pytest
import torch

from kernels.attention.op import attention_torch
from learn import attention
from tests.support import kernel_testing as kt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

STEPS = [attention.step1, attention.step2, attention.step3, attention.step4, attention.step5]

GRID = [
    # batch, time, query heads, key heads, head dim, dtype
    (1, 1, 1, 1, 16, FP32),
    (2, 65, 2, 1, 16, FP32),  # a block of keys with one key in it
    (1, 128, 2, 2, 32, FP16),
    (1, 200, 4, 2, 36, FP32),  # past one block of queries; a head dim that is padded
    (1, 70, 4, 1, 64, BF16),
]


def name(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else getattr(value, "__name__", None)


def packed(batch, time, q_heads, k_heads, head_dim, dtype):
    """Views of one tensor, q, k and v next to each other, as the model's projection makes them."""
    qkv = kt.tensor(batch, time, q_heads + 2 * k_heads, head_dim, dtype=dtype)
    return qkv.split([q_heads, k_heads, k_heads], 2)


@pytest.mark.parametrize(("batch", "time", "q_heads", "k_heads", "head_dim", "dtype"), GRID, ids=name)
@pytest.mark.parametrize("step", STEPS, ids=name)
def test_each_step_is_close_to_float64(step, batch, time, q_heads, k_heads, head_dim, dtype):
    q, k, v = packed(batch, time, q_heads, k_heads, head_dim, dtype)
    exact = attention_torch(q.double(), k.double(), v.double())
    with kt.poisoned():
        o = step(q, k, v)
    assert o.shape == exact.shape
    assert o.dtype == dtype
    assert o.is_contiguous()
    assert kt.relative_rms(o, exact) <= kt.RELATIVE_RMS[dtype]


@pytest.mark.parametrize("step", STEPS, ids=name)
def test_a_later_key_changes_nothing_before_it(step):
    q, k, v = packed(1, 130, 2, 1, 16, FP32)
    before = step(q, k, v)
    k, v = k.clone(), v.clone()
    k[:, 100:], v[:, 100:] = 50.0, -50.0
    after = step(q, k, v)
    kt.assert_same_bits([before[:, :100]], [after[:, :100]])
    assert (before[:, 100:] - after[:, 100:]).abs().max() > 1
