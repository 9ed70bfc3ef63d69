import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

import kernels
from bench.ops import attention
from bench.ops.attention import document_starts, sdpa
from bench.ops.catalogue import SHEETS, VARIANTS
from bench.ops.contender import Contender
from bench.ops.sheet import Peer, of_newer_torch
from bench.peers import cut_cross_entropy, liger, quack
from kernels.launch import INTERPRETED
from training.config import TrainConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL_PEERS = [sheet.peers for sheet in SHEETS.values()]
FP32, BF16 = torch.float32, torch.bfloat16
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Heads of 16, attention's least.
SMALL = TrainConfig(
    max_seq_len=6, batch_size=2, dim=64, n_heads=4, n_kv_heads=2, ffn_dim=24, vocab_size=256, n_layers=1
)

HALF_PRECISION_ONLY = {"sdpa-flash", "sdpa-cudnn", "varlen"} if DEVICE == CUDA else set()

needs_kernels = pytest.mark.skipif(not (INTERPRETED or DEVICE == CUDA), reason="needs a GPU or the interpreter")


def case_of(op, dtype=torch.float32):
    torch.manual_seed(0)
    return SHEETS[op].case(SMALL, dtype, DEVICE)


def results(function, case):
    """Outputs and gradients, if any are wanted; of an op that returns nothing, the buffers that it leaves."""
    outputs = function(*case.arguments, **case.keywords)
    if outputs is None:
        return [x for x in case.arguments if x is not None and x.ndim]
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not case.wanted:
        return [*outputs]
    torch.manual_seed(1)
    upstream = [torch.randn(y.shape, device=y.device, dtype=y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, case.wanted, upstream)]


def check_same(op, make, dtype=torch.float32):
    expected = results(SHEETS[op].peers["eager"].make(case_of(op, dtype)), case_of(op, dtype))
    case = case_of(op, dtype)
    actual = results(make(case), case)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    if op == "adamw":  # one update moves a parameter by 1e-4, and weight decay by 1e-5 of itself
        tolerance = {"rtol": 1e-6, "atol": 1e-6}
    for a, e in zip(actual, expected, strict=True):
        atol = tolerance["atol"]
        if (
            op == "mlp" and dtype == torch.float32
        ):  # its weights are of unit size here: terms of a thousand add up to one of 1
            atol = max(atol, 1e-6 * e.abs().max().item())
        torch.testing.assert_close(a, e, rtol=tolerance["rtol"], atol=atol)


# ------------------------------------------------------------------------------------------------ they compute one thing


@needs_kernels
@pytest.mark.parametrize("op", [op for op in SHEETS if op != "linear_cross_entropy"])
def test_the_kernel_computes_what_the_twin_computes(op):
    check_same(op, SHEETS[op].peers["triton"].make)


@pytest.mark.parametrize("op", ["attention", "linear_cross_entropy", "adamw", "packed_attention", "decode_attention"])
def test_peers_that_run_here_compute_what_the_twin_computes(op):
    here = [
        v
        for v, peer in SHEETS[op].peers.items()
        if v not in ("eager", "compiled", "triton") and not peer.why_absent(DEVICE, FP32)
    ]
    assert len(here) >= 1
    for variant in here:
        dtype = torch.bfloat16 if variant in HALF_PRECISION_ONLY else torch.float32
        check_same(op, SHEETS[op].peers[variant].make, dtype=dtype)


@pytest.mark.parametrize("grouped", [True, False])
def test_sdpa_with_and_without_grouped_queries_computes_what_the_twin_computes(grouped):
    seen = []

    def watched(q, k, v):
        seen.append(k.shape)
        return sdpa(SDPBackend.MATH, grouped=grouped)(q, k, v)

    check_same("attention", lambda case: watched)
    assert seen == [(2, 6, 2, 16)]


@pytest.mark.parametrize("op", ["attention", "packed_attention"])
def test_flex_attention_computes_what_the_twin_computes(op, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = case_of(op)
    arguments = [x.detach() for x in case.arguments]  # on a CPU it has no backward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is slow uncompiled
        actual = attention.flex(case)(*arguments)
    torch.testing.assert_close(actual, SHEETS[op].peers["eager"].make(case)(*case.arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("op", [op for op in SHEETS if "liger" in SHEETS[op].peers])
def test_liger_computes_what_the_twin_computes(op):
    pytest.importorskip("liger_kernel")
    check_same(op, SHEETS[op].peers["liger"].make)


def test_quack_and_cut_cross_entropy_are_called_by_their_names_for_things(monkeypatch):
    """By stand-ins: neither runs here."""

    def rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False):
        if residual is None:
            return kernels.TORCH.rms_norm(x, weight, eps)
        outputs = kernels.TORCH.add_rms_norm(x, residual, weight, eps)
        return outputs if prenorm else outputs[0]

    def cut(e, c, targets, ignore_index=-100, softcap=None, reduction="mean"):
        return torch.nn.functional.cross_entropy(e @ c.T, targets, ignore_index=ignore_index, reduction=reduction)

    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace(rmsnorm=rmsnorm))
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", SimpleNamespace(linear_cross_entropy=cut))
    for op, variant in (
        ("rms_norm", "quack"),
        ("add_rms_norm", "quack"),
        ("linear_cross_entropy", "cut-cross-entropy"),
    ):
        check_same(op, SHEETS[op].peers[variant].make)


def test_documents_laid_end_to_end():
    first_key = torch.tensor([[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 4, 4]], dtype=torch.int32)
    starts, longest = document_starts(first_key)
    assert starts.tolist() == [0, 2, 5, 6, 10, 12]
    assert starts.dtype == torch.int32
    assert longest == 4


# ----------------------------------------------------------------------------------------------------------- who is there


def test_the_peers_that_the_goals_name_are_there():
    assert {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex", "compiled"} <= set(SHEETS["attention"].peers)
    assert {"sdpa-mask", "flex"} <= set(SHEETS["packed_attention"].peers)
    assert {"eager", "compiled", "F.linear_cross_entropy", "liger"} <= set(SHEETS["linear_cross_entropy"].peers)
    assert all("triton" in peers and "eager" in peers for peers in ALL_PEERS)
    assert all(set(peers) <= set(VARIANTS) for peers in ALL_PEERS)


def test_who_is_absent_is_known_with_the_reason(monkeypatch):
    def why_absent(op, variant, device, dtype=BF16):
        return SHEETS[op].peers[variant].why_absent(device, dtype)

    assert why_absent("swiglu", "triton", CPU) == "no GPU"
    assert why_absent("attention", "flex", CPU) == "no GPU"
    assert why_absent("attention", "flex", CUDA) == ""
    assert why_absent("attention", "eager", CPU) == ""
    packages = (("liger", liger), ("quack", quack), ("cut-cross-entropy", cut_cross_entropy))
    for variant, package in packages:
        op = next(op for op, sheet in SHEETS.items() if variant in sheet.peers)
        monkeypatch.setattr(package, "installed", lambda: False)
        assert why_absent(op, variant, CUDA) == "not installed"
        monkeypatch.setattr(package, "installed", lambda: True)
        assert why_absent(op, variant, CPU) == "no GPU"
        assert why_absent(op, variant, CUDA) == ""
    assert why_absent("linear_cross_entropy", "cut-cross-entropy", CUDA, FP32) == "half only"


def test_what_the_installed_torch_has_not_yet_is_absent_by_name(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    peer = Peer(lambda case: None, lacks=of_newer_torch(is_there=False))
    assert peer.why_absent(CUDA, BF16) == "not in torch 2.11.0"
    assert Peer(lambda case: None, lacks=of_newer_torch(is_there=True)).why_absent(CUDA, BF16) == ""
    lacking = SHEETS["linear_cross_entropy"].peers["F.linear_cross_entropy"].lacks()
    assert bool(lacking) == (not hasattr(torch.nn.functional, "linear_cross_entropy"))


# -------------------------------------------------------------------------------------------------------------- contender


def put(monkeypatch, op, function, **options):
    monkeypatch.setitem(SHEETS[op].peers, "eager", Peer(lambda case: function, **options))


def test_each_backward_goes_through_a_forward_of_its_own(monkeypatch):
    calls = []
    put(monkeypatch, "swiglu", lambda x: calls.append(1) or torch.tanh(x))
    contender = Contender("swiglu", "eager", case_of("swiglu"))
    before = len(calls)
    for _ in range(2):
        contender.prepare("forward")
        contender.prepare("backward")
        contender.run("backward")
    assert len(calls) - before == 2
    with pytest.raises(RuntimeError):
        contender.run("backward")


def test_a_pass_is_what_its_name_says(monkeypatch):
    wanted = []

    def function(hidden, weight, targets):
        wanted.append(torch.is_grad_enabled())
        return (hidden.sum() + weight.sum()).float()

    put(monkeypatch, "linear_cross_entropy", function)
    contender = Contender("linear_cross_entropy", "eager", case_of("linear_cross_entropy"))
    wanted.clear()
    contender.run("evaluation")
    contender.run("both")
    contender.run("forward")
    assert wanted == [False, True, True]


def test_a_loss_has_one_as_its_upstream_gradient_as_backward_would_give(monkeypatch):
    put(monkeypatch, "linear_cross_entropy", lambda hidden, weight, targets: (hidden + weight.sum()).sum())
    contender = Contender("linear_cross_entropy", "eager", case_of("linear_cross_entropy"))
    contender._outputs = contender.forward()
    assert torch.equal(contender.backward()[0], torch.ones(12, 64, device=DEVICE))


def test_only_what_has_no_deterministic_form_is_spared_determinism(monkeypatch, determinism_put_back):
    assert {v for peers in ALL_PEERS for v, peer in peers.items() if not peer.deterministic} == {"sdpa-cudnn"}
    seen = []

    def function(x):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return x * 2

    torch.use_deterministic_algorithms(True)
    for deterministic in (True, False):
        put(monkeypatch, "swiglu", function, deterministic=deterministic)
        Contender("swiglu", "eager", case_of("swiglu")).run("forward")
        assert set(seen) == {deterministic}
        assert torch.are_deterministic_algorithms_enabled()
        seen.clear()


def test_what_fails_fails_when_it_is_made(monkeypatch):
    def function(x):
        raise RuntimeError("no kernel")

    put(monkeypatch, "swiglu", function)
    with pytest.raises(RuntimeError, match="no kernel"):
        Contender("swiglu", "eager", case_of("swiglu"))


def test_torchs_update_writes_the_copies_too():
    case = SHEETS["adamw"].case(replace(SMALL, vocab_size=300), torch.bfloat16, DEVICE)
    before = case.arguments[0].clone()
    Contender("adamw", "torch-fused", case)
    values, copies = case.arguments[0], case.arguments[4]
    assert not torch.equal(values, before)
    assert torch.equal(copies, values[: copies.numel()].bfloat16())
