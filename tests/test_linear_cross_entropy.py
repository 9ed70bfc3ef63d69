"""The torch twin of the loss head: against float64 written out, in chunks, in half precision, with nothing to count."""

import pytest
import torch
import torch.nn.functional as F

from kernels import TORCH, linear_cross_entropy

HALF = [torch.bfloat16, torch.float16]


def inputs(n=37, d=24, v=101, dtype=torch.float32, weight_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) / d**0.5).to(weight_dtype or dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=generator)
    targets[::5] = -100
    return hidden, weight, targets


def exact(hidden, weight, targets, reduction="mean", ignore_index=-100):
    """Loss and gradients in float64 by autograd over all logits."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(h @ w.T, targets, ignore_index=ignore_index, reduction=reduction)
    return loss, *torch.autograd.grad(loss, (h, w))


def relative(x, wanted):
    return ((x.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [1, 5, 37, 1000], ids=lambda r: f"chunks of {r}")
def test_chunks_of_any_size_give_the_loss_and_gradients_of_the_whole(monkeypatch, reduction, rows):
    monkeypatch.setattr("kernels.linear_cross_entropy.chunk_rows", lambda vocab_size: rows)
    hidden, weight, targets = inputs()
    loss = TORCH.linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    dh, dw = torch.autograd.grad(loss, (hidden, weight), torch.tensor(3.0))
    wanted, wanted_dh, wanted_dw = exact(hidden, weight, targets, reduction)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert relative(loss, wanted) < 1e-6
    assert relative(dh, 3 * wanted_dh) < 2e-6
    assert relative(dw, 3 * wanted_dw) < 2e-6
    assert (dh[::5] == 0).all()


def test_float64_is_a_reference():
    hidden, weight, targets = inputs(dtype=torch.float64)
    loss = TORCH.linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, exact(hidden, weight, targets)[0], atol=0, rtol=1e-14)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("master", [False, True], ids=["half weight", "float32 weight"])
def test_half_precision_is_no_worse_than_autograd_over_all_logits(dtype, master):
    weight_dtype = torch.float32 if master else dtype
    hidden, weight, targets = inputs(n=200, v=500, dtype=dtype, weight_dtype=weight_dtype)
    loss = TORCH.linear_cross_entropy(hidden, weight, targets)
    dh, dw = torch.autograd.grad(loss, (hidden, weight))
    assert (dh.dtype, dw.dtype) == (dtype, weight_dtype)
    used = weight.detach().to(dtype)
    wanted = exact(hidden, used, targets)
    h, w = hidden.detach().requires_grad_(), used.clone().requires_grad_()
    plain = F.cross_entropy((h @ w.T).float(), targets)
    plain_dh, plain_dw = torch.autograd.grad(plain, (h, w))
    for x, other, right in ((loss, plain, wanted[0]), (dh, plain_dh, wanted[1]), (dw, plain_dw, wanted[2])):
        floor = torch.finfo(dtype).eps if x.dtype == dtype else 1e-6
        assert relative(x.detach(), right.detach()) <= 2 * relative(other.detach(), right.detach()) + floor


def test_float16_gradients_of_a_large_batch_survive():
    # p / N is about 1e-9 here, far below float16's smallest number: scaled before the product, all but the targets' would vanish.
    hidden, weight, targets = inputs(n=4096, d=16, v=2000, dtype=torch.float16, weight_dtype=torch.float32)
    targets.fill_(7)
    for scale in (1.0, 65536.0):
        loss = TORCH.linear_cross_entropy(hidden, weight, targets)
        _, dw = torch.autograd.grad(loss * scale, (hidden, weight))
        wanted = exact(hidden, weight.detach().half(), targets)[2] * scale
        others = torch.arange(2000) != 7
        assert relative(dw[others], wanted[others]) < 2e-3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n", [0, 4])
def test_nothing_to_count_gives_zero_and_zero_gradients(n, reduction):
    hidden, weight, targets = inputs(n=n)
    targets.fill_(-100)
    loss = TORCH.linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_ignore_index_may_be_a_token():
    hidden, weight, targets = inputs()
    targets[:] = 3
    targets[::2] = 50
    loss = TORCH.linear_cross_entropy(hidden, weight, targets, ignore_index=3)
    assert relative(loss, exact(hidden, weight, targets, ignore_index=3)[0]) < 1e-6


def test_ignored_rows_may_hold_anything():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        hidden[::5] = torch.nan
    loss = TORCH.linear_cross_entropy(hidden, weight, targets)
    assert loss.isfinite()


def test_only_one_input_needs_a_gradient():
    hidden, weight, targets = inputs()
    both = torch.autograd.grad(TORCH.linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    (dh,) = torch.autograd.grad(TORCH.linear_cross_entropy(hidden, weight.detach(), targets), hidden)
    (dw,) = torch.autograd.grad(TORCH.linear_cross_entropy(hidden.detach(), weight, targets), weight)
    assert torch.equal(dh, both[0])
    assert torch.equal(dw, both[1])


def test_a_call_without_gradients_computes_none(monkeypatch):
    hidden, weight, targets = inputs()
    monkeypatch.setattr(linear_cross_entropy, "_matmul_float32", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        TORCH.linear_cross_entropy(hidden, weight, targets)
    TORCH.linear_cross_entropy(hidden.detach(), weight.detach(), targets)


def test_inputs_and_upstream_gradients_are_left_alone():
    hidden, weight, targets = inputs()
    before = [x.detach().clone() for x in (hidden, weight, targets)]
    upstream = torch.tensor(2.0)
    loss = TORCH.linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, weight, targets), strict=True))
    assert upstream == 2


def test_strided_hidden():
    _, weight, targets = inputs()
    wide = torch.randn(37, 48)
    view = wide[:, ::2]
    assert torch.equal(
        TORCH.linear_cross_entropy(view, weight, targets),
        TORCH.linear_cross_entropy(view.contiguous(), weight, targets),
    )


def test_the_logits_of_a_large_batch_are_never_held():
    n, v = 4096, 40_000  # all logits: 655 MB
    hidden, weight = torch.randn(n, 4), torch.randn(v, 4)
    largest = 0  # bytes of the largest tensor made

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel() * out.element_size())
            return out

    with Watch(), torch.no_grad():
        TORCH.linear_cross_entropy(hidden, weight, torch.zeros(n, dtype=torch.int64))
    assert 0 < largest <= linear_cross_entropy.CHUNK_BYTES


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(monkeypatch, dynamic):
    monkeypatch.setattr("kernels.linear_cross_entropy.chunk_rows", lambda vocab_size: 10)
    compiled = torch.compile(TORCH.linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (37, 21):
        hidden, weight, targets = inputs(n=n)
        for reduction in ("mean", "sum"):
            loss = compiled(hidden, weight, targets, reduction=reduction)
            grads = torch.autograd.grad(loss, (hidden, weight))
            wanted = TORCH.linear_cross_entropy(hidden, weight, targets, reduction=reduction)
            torch.testing.assert_close(loss, wanted)
            for got, right in zip(grads, torch.autograd.grad(wanted, (hidden, weight)), strict=True):
                torch.testing.assert_close(got, right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden must have shape \(N, D\), got \(2, 3, 4\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight has shape \(5, 3\), wanted \(V, D\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets has shape \(3,\)"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "targets has dtype torch.int32, wanted torch.int64"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.int64)}, "hidden has dtype torch.int64"),
        ({"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, "weight has dtype torch.bfloat16"),
        ({"weight": torch.zeros(5, 4, device="meta")}, "weight is on meta, hidden is on cpu"),
        ({"reduction": "none"}, "reduction is 'none', wanted one of 'mean', 'sum'"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="linear_cross_entropy: " + message):
        TORCH.linear_cross_entropy(**arguments | change)
