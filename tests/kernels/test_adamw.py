import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.adamw import _elements, adamw_launch, adamw_torch, adamw_triton
from kernels.launch import TARGETS, tl, triton
from tests.support import kernel_testing as kt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
OPTIONS = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
BUFFERS = ("values", "gradients", "exp_avg", "exp_avg_sq")


def scalar(x, dtype=FP32):
    return torch.tensor(float(x), dtype=dtype, device=kt.DEVICE)


def start(n, n_copied=None, dtype=FP16, step=0.0, lr=0.1, factor=0.5, seed=0):
    """Arguments of an update: moments as of one before. A learning rate so high that a wrong update shows in the values."""
    arguments = {name: kt.tensor(n, seed=seed + i) for i, name in enumerate(BUFFERS)}
    arguments["exp_avg_sq"].square_()
    arguments["copies"] = None if n_copied is None else torch.zeros(n_copied, dtype=dtype, device=kt.DEVICE)
    return arguments | {"step": scalar(step), "lr": scalar(lr), "factor": scalar(factor), "skip": scalar(0)}


def in_float64(arguments):
    return {name: x.double() if x is not None and x.dtype == FP32 else clone(x) for name, x in arguments.items()}


def clone(x):
    return x if x is None else x.clone()


def copied(arguments):
    return {name: clone(x) for name, x in arguments.items()}


def tensors(arguments):
    return [x.flatten() for x in arguments.values() if x is not None]


def assert_copies_are_rounded(copies, values):
    kt.assert_same_bits([copies], [values[: copies.numel()].to(copies.dtype)])


# ----------------------------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize(
    ("n", "n_copied", "dtype", "n_decayed", "step"),
    [
        (1, 1, FP16, 1, 0),  # the least there is
        (1, None, FP32, 0, 3),
        (5, 3, BF16, 4, 1),
        (2047, 2047, FP16, 2047, 0),
        (2048, 0, FP16, 1024, 7),
        (2049, 2048, BF16, 2048, 0),  # one element more than a tile
        (6000, 5000, FP16, 3001, 0),  # what decays, what is copied and the tiles end in different places
        (6000, 100, BF16, 6000, 100),
        (6144, None, FP32, 4097, 10_000),
    ],
)
def test_five_updates_are_as_exact_as_torch_and_close_to_float64(n, n_copied, dtype, n_decayed, step):
    actual = start(n, n_copied, dtype, step)
    twin, exact = copied(actual), in_float64(actual)
    options = OPTIONS | {"n_decayed": n_decayed}
    for update in range(5):
        gradients = kt.tensor(n, seed=10 + update)
        for op, arguments in ((adamw_triton, actual), (adamw_torch, twin), (adamw_torch, exact)):
            arguments["gradients"].copy_(gradients)
            arguments["lr"].mul_(0.9)
            with kt.poisoned():
                op(**arguments, **options)
        kt.assert_same_bits([actual["gradients"]], [gradients])
    for name in ("values", "exp_avg", "exp_avg_sq"):
        kt.assert_matches(actual[name], twin[name], exact[name])
    assert actual["step"] == twin["step"] == exact["step"] == step + 5
    if n_copied:
        assert_copies_are_rounded(actual["copies"], actual["values"])
        assert_copies_are_rounded(twin["copies"], twin["values"])


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(1, 5000),
    copied_share=st.floats(0, 1),
    decayed_share=st.floats(0, 1),
    offset=st.integers(0, 9),
)
def test_any_sizes_agree_with_torch_and_leave_their_neighbours(n, copied_share, decayed_share, offset):
    near, kept = start(n, int(n * copied_share)), {}
    for name, x in near.items():
        if x is not None and x.dim():
            kept[name] = torch.full((n + 4096,), 7.0, dtype=x.dtype, device=x.device)
            kept[name][offset : offset + x.numel()] = x
    far = near | {name: x[offset : offset + near[name].numel()] for name, x in kept.items()}
    far = {name: x if name in kept else clone(x) for name, x in far.items()}
    options = OPTIONS | {"n_decayed": int(n * decayed_share)}
    adamw_torch(**near, **options)
    adamw_triton(**far, **options)
    for name, x in kept.items():
        tolerance = {"rtol": 2e-3, "atol": 1e-3} if x.dtype == FP16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(far[name], near[name], **tolerance)
        assert (x[:offset] == 7).all()
        assert (x[offset + near[name].numel() :] == 7).all()


@pytest.mark.parametrize("before", [0, 9999])
def test_in_float64_the_reference_is_torchs_adamw(before):
    n, n_decayed, weight_decay, beta2 = 50, 30, 0.1, 0.999
    arguments = in_float64(start(n, step=before))
    parameters = [p.clone() for p in arguments["values"].split([n_decayed, n - n_decayed])]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, beta2), weight_decay=weight_decay)
    moments = [arguments[moment].split([n_decayed, n - n_decayed]) for moment in ("exp_avg", "exp_avg_sq")]
    for p, m, v in zip(parameters, *moments, strict=True):
        optimizer.state[p] = {"step": torch.tensor(float(before)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    for update in range(10):
        lr = 0.1 / (update + 1)
        arguments["lr"].fill_(lr)
        arguments["gradients"].copy_(kt.tensor(n, seed=update))
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(parameters, arguments["gradients"].split([n_decayed, n - n_decayed]), strict=True):
            p.grad = g * arguments["factor"]
        optimizer.step()
        options = {"n_decayed": n_decayed, "weight_decay": weight_decay, "beta1": 0.9, "beta2": beta2, "eps": 1e-8}
        adamw_torch(**arguments, **options)
    torch.testing.assert_close(arguments["values"], torch.cat(parameters), rtol=0, atol=1e-12)
    for moment in ("exp_avg", "exp_avg_sq"):
        expected = torch.cat([optimizer.state[p][moment] for p in parameters])
        torch.testing.assert_close(arguments[moment], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("beta2", [0.95, 0.999, 0.99999])
@pytest.mark.parametrize("step", [0, 1, 50, 1000, 10**6])
def test_the_bias_correction_is_exact_from_the_first_update_on(step, beta2):
    # m 1, v 1 and gradients of 1 stay; the update is then lr sqrt(1 - beta2^t) / (1 - beta1^t) and nothing else
    for op in (adamw_triton, adamw_torch):
        arguments = start(4, step=step, lr=1.0, factor=1.0)
        arguments["values"].zero_()
        for name in ("gradients", "exp_avg", "exp_avg_sq"):
            arguments[name].fill_(1.0)
        op(**arguments, **OPTIONS | {"n_decayed": 4, "beta2": beta2, "eps": 0.0})
        expected = -((1 - beta2 ** (step + 1)) ** 0.5) / (1 - OPTIONS["beta1"] ** (step + 1))
        # 1e-6: a GPU's square root and division are within 2 ulp each; with 1 - beta2 in float32 it would be 1e-5
        assert arguments["values"].tolist() == pytest.approx([expected] * 4, rel=1e-6, abs=0)


def test_hundreds_of_updates_do_not_bend_the_moments_one_way():
    # beta2 and 1 - beta2, each rounded to float32, do not add up to 1: by 1e-5 of the second moment in the end.
    actual = start(2000, lr=0.0, factor=1.0)
    exact = in_float64(actual)
    for update in range(300):
        for op, arguments in ((adamw_triton, actual), (adamw_torch, exact)):
            arguments["gradients"].copy_(kt.tensor(2000, seed=update))
            op(**arguments, **OPTIONS | {"n_decayed": 0, "beta2": 0.999})
    assert abs((actual["exp_avg_sq"].double() / exact["exp_avg_sq"] - 1).mean().item()) <= 5e-8
    assert abs((actual["exp_avg"].double() - exact["exp_avg"]).mean().item()) <= 5e-8


def test_without_averages_each_update_sees_its_own_gradient_alone():
    for op in (adamw_triton, adamw_torch):
        arguments = start(5, factor=1.0, lr=1.0)
        before = arguments["values"].clone()
        op(**arguments, n_decayed=0, weight_decay=0.0, beta1=0.0, beta2=0.0, eps=0.0)
        torch.testing.assert_close(arguments["values"], before - arguments["gradients"].sign(), rtol=1e-6, atol=1e-6)


def test_gaps_of_zeros_stay_zeros():
    arguments = start(3000, 3000)
    for name in BUFFERS:
        arguments[name][100:200] = 0
    for _ in range(3):
        adamw_triton(**arguments, **OPTIONS, n_decayed=150)
    for name in (*BUFFERS, "copies"):
        kt.assert_same_bits([arguments[name][100:200]], [torch.zeros_like(arguments[name][100:200])])


# ------------------------------------------------------------------------------------------------------------- skipping


@pytest.mark.parametrize("op", [adamw_triton, adamw_torch])
@pytest.mark.parametrize("step", [0, 5])
def test_a_skipped_update_leaves_every_bit_whatever_the_gradients_are(op, step):
    arguments = start(3000, 2000, step=step)
    arguments["gradients"][::3] = torch.nan
    arguments["gradients"][1::3] = torch.inf
    arguments["factor"].fill_(torch.nan)
    arguments["exp_avg"][7] = torch.nan
    arguments["copies"].fill_(3.0)  # not what the values round to
    arguments["skip"].fill_(1)
    before = copied(arguments)
    op(**arguments, **OPTIONS, n_decayed=2500)
    kt.assert_same_bits(tensors(arguments), tensors(before))
    arguments["skip"].fill_(0)
    op(**arguments, **OPTIONS, n_decayed=2500)
    assert arguments["step"] == step + 1


@pytest.mark.parametrize("op", [adamw_triton, adamw_torch])
def test_nothing_to_update_still_counts(op):
    arguments = start(0, 0)
    op(**arguments, **OPTIONS, n_decayed=0)
    assert arguments["step"] == 1


# --------------------------------------------------------------------------------------------- bits, offsets, launching


def test_the_same_bits_each_time():
    first = start(5000, 4000)
    second = copied(first)
    for arguments in (first, second):
        adamw_triton(**arguments, **OPTIONS, n_decayed=3000)
    kt.assert_same_bits(tensors(first), tensors(second))


@triton.jit
def _probe_kernel(out_ptr, program_ptr, BLOCK_N: tl.constexpr):
    index = _elements(tl.load(program_ptr), BLOCK_N)
    tl.store(out_ptr + tl.arange(0, BLOCK_N), index)


def test_elements_past_two_to_the_31_are_counted_on():
    program = torch.tensor(2**21, dtype=torch.int32, device=kt.DEVICE)  # a program's number is an int32
    out = torch.zeros(2048, dtype=torch.int64, device=kt.DEVICE)
    _probe_kernel[(1,)](out, program, BLOCK_N=2048)
    assert torch.equal(out.cpu(), 2**32 + torch.arange(2048))


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("n", [1, 2048, 2049, 8_483_616, 405_853_388_800])
def test_a_launch_covers_every_element_once(arch, n):
    launch = adamw_launch(n, TARGETS[arch])
    (programs,), block = launch.grid, launch.tiles["BLOCK_N"]
    assert (programs - 1) * block < n <= programs * block
    assert programs < 2**31
    assert launch.num_warps * TARGETS[arch].warp_size * 8 == block


def test_the_registration_says_what_is_written():
    arguments = [*start(100, 50).values(), 60, *OPTIONS.values()]
    torch.library.opcheck(torch.ops.triton_llama.adamw.default, tuple(arguments))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_update_reads_what_the_device_holds_when_it_is_replayed():
    plain, captured = start(5000, 4000), start(5000, 4000)
    options = OPTIONS | {"n_decayed": 3000}
    adamw_triton(**plain, **options)
    adamw_triton(**captured, **options)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_triton(**captured, **options)
    for lr, skip in ((0.3, 0), (0.2, 1), (0.1, 0)):
        for arguments in (plain, captured):
            arguments["lr"].fill_(lr)
            arguments["skip"].fill_(skip)
        adamw_triton(**plain, **options)
        graph.replay()
        kt.assert_same_bits(tensors(plain), tensors(captured))


# ------------------------------------------------------------------------------------------------------------ bad input


def zeros(*shape, **options):
    return torch.zeros(shape, **{"device": kt.DEVICE} | options)


@pytest.mark.parametrize("op", [adamw_triton, adamw_torch])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": zeros(4, 5)}, r"values has shape \(4, 5\), wanted \(N\)"),
        ({"values": zeros(20, dtype=FP16)}, "values has dtype torch.float16, wanted torch.float32"),
        ({"gradients": zeros(21)}, r"gradients has shape \(21,\), wanted \(20\)"),
        ({"exp_avg": zeros(20, dtype=BF16)}, "exp_avg has dtype torch.bfloat16, wanted torch.float32"),
        ({"exp_avg_sq": zeros(20, device="meta")}, "exp_avg_sq is on meta, wanted"),
        ({"gradients": zeros(40)[::2]}, "gradients has stride 2, wanted a dense tensor"),
        ({"copies": zeros(21, dtype=FP16)}, "copies has 21 elements, wanted at most 20"),
        ({"copies": zeros(10)}, "copies has dtype torch.float32, wanted torch.bfloat16 or torch.float16"),
        ({"copies": zeros(20, dtype=FP16)[::2]}, "copies has stride 2, wanted a dense tensor"),
        ({"lr": 0.1}, "lr is a float, wanted a tensor"),
        ({"factor": zeros(1)}, r"factor has shape \(1,\), wanted \(\)"),
        ({"skip": zeros(dtype=torch.bool)}, "skip has dtype torch.bool, wanted torch.float32"),
        ({"step": zeros(dtype=torch.int64)}, "step has dtype torch.int64, wanted torch.float32"),
        ({"n_decayed": 21}, "n_decayed is 21, wanted 0 to 20"),
        ({"n_decayed": -1}, "n_decayed is -1, wanted 0 to 20"),
    ],
)
def test_bad_input_is_refused_with_what_came_and_what_was_wanted(op, changed, message):
    with pytest.raises(ValueError, match=f"adamw: {message}"):
        op(**start(20, 10) | OPTIONS | {"n_decayed": 10} | changed)


def test_the_kernel_leaves_float64_to_the_reference():
    with pytest.raises(ValueError, match=r"adamw: values has dtype torch\.float64, wanted torch\.float32"):
        adamw_triton(**in_float64(start(20)), **OPTIONS, n_decayed=10)
