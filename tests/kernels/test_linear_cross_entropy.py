"""Both twins of the loss head: against float64, in chunks, in half precision, with nothing to count, and what they hold."""

import pytest
import torch
import torch.nn.functional as F

from kernels.linear_cross_entropy import chunked as kernel_file
from kernels.linear_cross_entropy import op as file
from kernels.linear_cross_entropy.chunked import CHUNK_BYTES
from kernels.linear_cross_entropy.op import linear_cross_entropy_torch, linear_cross_entropy_triton
from tests.support import kernel_testing as kt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
both_twins = pytest.mark.parametrize(
    "op", [linear_cross_entropy_torch, linear_cross_entropy_triton], ids=["torch", "triton"]
)


def inputs(n=37, d=24, v=101, dtype=FP32, weight_dtype=None):
    hidden = kt.tensor(n, d, dtype=dtype).requires_grad_()
    weight = kt.tensor(v, d, dtype=weight_dtype or dtype, seed=1, scale=d**-0.5).requires_grad_()
    targets = torch.randint(v, (n,), generator=torch.Generator().manual_seed(2)).to(kt.DEVICE)
    targets[::5] = -100
    return hidden, weight, targets


def exact(hidden, weight, targets, reduction="mean", ignore_index=-100, upstream=1.0):
    """Loss and gradients in float64 by autograd over all logits."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(h @ w.T, targets, ignore_index=ignore_index, reduction=reduction)
    return loss.detach(), *torch.autograd.grad(loss * upstream, (h, w))


def value_and_grads(op, hidden, weight, targets, upstream=1.0, **options):
    with kt.poisoned():
        loss = op(hidden, weight, targets, **options)
        grads = torch.autograd.grad(loss, (hidden, weight), torch.tensor(upstream, device=kt.DEVICE))
    assert loss.shape == ()
    assert loss.dtype == FP32
    assert [x.dtype for x in grads] == [hidden.dtype, weight.dtype]
    return loss.detach(), *grads


def relative(x, wanted):
    return ((x.double() - wanted).norm() / wanted.norm()).item()


def assert_equal(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def chunks_of(monkeypatch):
    """Makes chunks of so many rows."""

    def set_rows(rows):
        monkeypatch.setattr(file, "chunk_rows", lambda *sizes: rows)
        monkeypatch.setattr(kernel_file, "tiled_chunk_rows", lambda *sizes: rows)

    return set_rows


# ------------------------------------------------------------------------------------------------------------- exactness


@both_twins
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [1, 5, 37, 1000], ids=lambda r: f"chunks of {r}")
def test_chunks_of_any_size_give_the_loss_and_gradients_of_the_whole(op, chunks_of, reduction, rows):
    chunks_of(rows)
    hidden, weight, targets = inputs()
    actual = value_and_grads(op, hidden, weight, targets, upstream=3.0, reduction=reduction)
    wanted = exact(hidden, weight, targets, reduction, upstream=3.0)
    assert relative(actual[0], wanted[0]) < 1e-6
    assert relative(actual[1], wanted[1]) < 2e-6
    assert relative(actual[2], wanted[2]) < 2e-6
    assert (actual[1][::5] == 0).all()


@both_twins
@pytest.mark.parametrize("v", [1, 2, 16, 500, 8195], ids=lambda v: f"{v} tokens")  # blocks of the kernel have 4096
def test_any_vocabulary(op, v):
    hidden, weight, targets = inputs(n=6, d=7, v=v)
    actual, wanted = value_and_grads(op, hidden, weight, targets), exact(hidden, weight, targets)
    for x, right in zip(actual, wanted, strict=True):
        torch.testing.assert_close(x.double(), right, rtol=1e-5, atol=1e-7)


@both_twins
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("master", [False, True], ids=["half weight", "float32 weight"])
def test_half_precision_is_no_worse_than_autograd_over_all_logits(op, chunks_of, dtype, master):
    chunks_of(64)
    hidden, weight, targets = inputs(n=150, v=500, dtype=dtype, weight_dtype=FP32 if master else dtype)
    actual = value_and_grads(op, hidden, weight, targets)
    used = weight.detach().to(dtype)
    wanted = exact(hidden, used, targets)
    h, w = hidden.detach().requires_grad_(), used.clone().requires_grad_()
    plain = F.cross_entropy((h @ w.T).float(), targets)
    plain = (plain.detach(), *torch.autograd.grad(plain, (h, w)))
    for x, other, right in zip(actual, plain, wanted, strict=True):
        floor = torch.finfo(dtype).eps if x.dtype == dtype else 1e-6
        assert relative(x, right) <= 2 * relative(other, right) + floor


@both_twins
def test_float16_gradients_of_a_batch_survive_the_mean_and_a_gradscaler(op):
    # p / N is about 1e-6 here, and has three bits in float16: scaled before the product, the sums would be wrong by percents.
    hidden, weight, targets = inputs(n=512, d=16, v=2000, dtype=FP16, weight_dtype=FP32)
    targets.fill_(7)
    others = torch.arange(2000) != 7
    wanted = exact(hidden, weight.detach().half(), targets)[2][others]
    for scale in (1.0, 65536.0):
        dw = value_and_grads(op, hidden, weight, targets, upstream=scale)[2]
        assert relative(dw[others], wanted * scale) < 2e-3


def test_float16_probabilities_below_its_normal_numbers_survive():
    hidden = torch.tensor([[4.0]], dtype=FP16, device=kt.DEVICE, requires_grad=True)
    weight = (
        torch.tensor([[4.0], [0.0], [0.25]], dtype=FP16, device=kt.DEVICE).float().requires_grad_()
    )  # p: 1, 1e-7, 3e-7
    targets = torch.tensor([0], device=kt.DEVICE)
    dw = value_and_grads(linear_cross_entropy_triton, hidden, weight, targets)[2]
    assert relative(dw[1:], exact(hidden, weight, targets)[2][1:]) < 1e-3


@both_twins
def test_infinite_and_nan_logits_come_out_as_in_torch(op):
    hidden, weight, targets = inputs(n=4, d=2, v=5)
    targets[:] = torch.tensor([0, 1, 2, 3])
    for bad in (torch.nan, torch.inf):
        with torch.no_grad():
            hidden[2] = bad
        assert op(hidden, weight, targets).isnan()
    with torch.no_grad():
        hidden[2], weight[4] = 1.0, torch.tensor([-1e38, -1e38])  # a logit of -2e38: a probability of 0
    torch.testing.assert_close(
        op(hidden[2:3], weight, targets[2:3]).double(), exact(hidden[2:3], weight, targets[2:3])[0]
    )


def test_float64_is_a_reference():
    hidden, weight, targets = inputs(dtype=torch.float64)
    loss = linear_cross_entropy_torch(hidden, weight, targets)
    torch.testing.assert_close(loss, exact(hidden, weight, targets)[0], atol=0, rtol=1e-14)
    with pytest.raises(ValueError, match=r"hidden has dtype torch\.float64"):
        linear_cross_entropy_triton(hidden, weight, targets)


# --------------------------------------------------------------------------------------------------------------- targets


@both_twins
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n", [0, 4])
def test_nothing_to_count_gives_zero_and_zero_gradients(op, n, reduction):
    hidden, weight, targets = inputs(n=n)
    targets.fill_(-100)
    loss, dh, dw = value_and_grads(op, hidden, weight, targets, reduction=reduction)
    assert loss == 0
    assert torch.equal(dh, torch.zeros_like(hidden))
    assert torch.equal(dw, torch.zeros_like(weight))


@both_twins
@pytest.mark.parametrize("ignored", [3, 1])
def test_ignore_index_may_be_a_token(op, ignored):
    hidden, weight, targets = inputs()
    targets[:] = ignored
    targets[::2] = 50
    loss = op(hidden, weight, targets, ignore_index=ignored)
    assert relative(loss, exact(hidden, weight, targets, ignore_index=ignored)[0]) < 1e-6


@both_twins
def test_ignored_rows_may_hold_anything(op):
    hidden, weight, targets = inputs()
    with torch.no_grad():
        hidden[::5] = torch.nan
    assert op(hidden, weight, targets).isfinite()


def test_a_target_past_the_vocabulary_makes_its_row_nan_and_touches_no_other(chunks_of):
    chunks_of(8)
    hidden, weight, targets = inputs()
    bad = torch.tensor([1, 9, 36], device=kt.DEVICE)
    ignored = targets.index_fill(0, bad, -100)
    targets[bad] = torch.tensor([101, -1, 2**40], device=kt.DEVICE)
    loss, dh, dw = value_and_grads(linear_cross_entropy_triton, hidden, weight, targets, reduction="sum")
    assert loss.isnan()
    assert dw.isnan().all()
    assert dh[bad].isnan().all()
    dh[bad] = 0
    assert torch.equal(dh, value_and_grads(linear_cross_entropy_triton, hidden, weight, ignored, reduction="sum")[1])


# ---------------------------------------------------------------------------------------------- arguments and gradients


@both_twins
def test_the_compute_weight_is_read_and_the_weight_gets_the_gradient(op):
    hidden, weight, targets = inputs(dtype=FP16, weight_dtype=FP32)
    expected = value_and_grads(op, hidden, weight, targets)
    copy = weight.detach().half().requires_grad_()
    unread = torch.full_like(weight, torch.nan, requires_grad=True)
    assert_equal(value_and_grads(op, hidden, unread, targets, compute_weight=copy), expected)
    op(hidden, unread, targets, compute_weight=copy).backward()
    assert copy.grad is None
    assert torch.equal(unread.grad, expected[2])


@both_twins
def test_only_one_input_needs_a_gradient(op):
    hidden, weight, targets = inputs()
    _, dh, dw = value_and_grads(op, hidden, weight, targets)
    assert torch.equal(torch.autograd.grad(op(hidden, weight.detach(), targets), hidden)[0], dh)
    assert torch.equal(torch.autograd.grad(op(hidden.detach(), weight, targets), weight)[0], dw)
    assert torch.equal(torch.autograd.grad(op(hidden, weight, targets), hidden)[0], dh)


@both_twins
def test_a_call_without_gradients_computes_none(op, monkeypatch):
    hidden, weight, targets = inputs()
    expected = op(hidden, weight, targets)
    products = []
    monkeypatch.setattr(file, "_matmul_float32", lambda *_: pytest.fail("a gradient was computed"))
    multiply = kernel_file._multiply
    monkeypatch.setattr(kernel_file, "_multiply", lambda *args, **out: (products.append(1), multiply(*args, **out)))
    with torch.no_grad():
        assert op(hidden, weight, targets) == expected
    assert op(hidden.detach(), weight.detach(), targets) == expected
    assert len(products) == (2 if op is linear_cross_entropy_triton else 0)  # the logits of each call


@both_twins
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_inputs_and_upstream_gradients_are_left_alone_and_a_second_backward_gives_the_same_bits(op, dtype):
    hidden, weight, targets = inputs(dtype=dtype)
    before = [x.detach().clone() for x in (hidden, weight, targets)]
    upstream = torch.tensor(2.0, device=kt.DEVICE)
    loss = op(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), upstream, retain_graph=True)
    copies = [x.clone() for x in first]
    second = torch.autograd.grad(loss, (hidden, weight), upstream)
    assert_equal(first, second)
    assert_equal(first, copies)
    assert_equal(before, (hidden.detach(), weight.detach(), targets))
    assert upstream == 2


@both_twins
@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_strided_inputs(op, layout):
    hidden, weight, targets = inputs()
    change = kt.LAYOUTS[layout]
    h, w = (change(x.detach()).requires_grad_() for x in (hidden, weight))
    t = torch.stack([targets, targets], 1)[:, 0]
    dense = (h.detach().contiguous().requires_grad_(), w.detach().contiguous().requires_grad_(), targets)
    for a, b in zip(value_and_grads(op, h, w, t), value_and_grads(op, *dense), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_the_same_bits_each_time(chunks_of, dtype):
    chunks_of(8)
    args = inputs(dtype=dtype)
    assert_equal(*(value_and_grads(linear_cross_entropy_triton, *args) for _ in range(2)))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@both_twins
def test_compiles_into_one_graph(op, chunks_of, dynamic):
    chunks_of(10)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (37, 21):
        args = inputs(n=n, dtype=FP16, weight_dtype=FP32)
        for reduction in ("mean", "sum"):
            actual = value_and_grads(compiled, *args, reduction=reduction)
            for a, b in zip(actual, value_and_grads(op, *args, reduction=reduction), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.slow
@both_twins
def test_inductor_compiles_it_into_one_graph(op, chunks_of):
    chunks_of(10)
    hidden, weight, targets = inputs()
    kt.assert_compiles(lambda h, w: op(h, w, targets), [(hidden, weight)], "inductor", dynamic=False, exact=False)


def test_the_torch_twin_never_holds_the_logits_of_a_large_batch():
    hidden, weight, targets = torch.randn(4096, 4), torch.randn(40_000, 4), torch.zeros(4096, dtype=torch.int64)
    largest = 0  # bytes of the largest tensor made; all logits have 655 MB

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel() * out.element_size())
            return out

    with Watch(), torch.no_grad():
        linear_cross_entropy_torch(hidden, weight, targets)
    assert 0 < largest <= CHUNK_BYTES


# ---------------------------------------------------------------------------------------------------------------- errors


@both_twins
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden must have shape \(N, D\), got \(2, 3, 4\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight has shape \(5, 3\), wanted \(V, D\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets has shape \(3,\)"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "targets has dtype torch.int32, wanted torch.int64"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.int64)}, "hidden has dtype torch.int64"),
        ({"weight": torch.zeros(5, 4, dtype=BF16)}, "weight has dtype torch.bfloat16"),
        ({"weight": torch.zeros(5, 4, device="meta")}, "weight is on meta, hidden is on cpu"),
        (
            {"compute_weight": torch.zeros(5, 4, dtype=BF16)},
            r"compute_weight has shape \(5, 4\) and dtype torch.bfloat16",
        ),
        ({"compute_weight": torch.zeros(4, 4)}, r"compute_weight has shape \(4, 4\) .*, wanted weight's \(5, 4\)"),
        ({"compute_weight": torch.zeros(5, 4, device="meta")}, "compute_weight is on meta, hidden is on cpu"),
        ({"hidden": [[0.0]]}, "hidden is a list, wanted a tensor"),
        ({"targets": [0, 1]}, "targets is a list, wanted a tensor"),
        ({"scale": 0.5}, "scale is a float, wanted a tensor"),
        ({"reduction": "none"}, "reduction is 'none', wanted one of 'mean', 'sum'"),
    ],
)
def test_bad_input_is_refused_by_name(op, change, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="linear_cross_entropy: " + message):
        op(**arguments | change)
