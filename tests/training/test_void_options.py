"""Options that make each other void are told, and those that do not are not."""

import pytest
import torch

from kernels.launch import TARGETS
from kernels.mlp import op as mlp_op
from training.config import RUNS, TrainConfig, defaults
from training.step.schedule import learning_rate
from training.void_options import remarks


@pytest.mark.parametrize("preset", ["reference", *RUNS])
def test_of_the_presets_nothing_is_told(preset):
    assert remarks(defaults(preset)) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"max_iters": 200},
            "--warmup-iters 1000 is not less than --max-iters 200: the learning rate only rises, to 0.0001 of 0.0005",
        ),
        ({"max_iters": 1000}, "to 0.0005 of 0.0005, and never decays"),
        ({"min_lr": 5e-4}, "--min-lr is --learning-rate, 0.0005: the learning rate never decays"),
        ({"decay_lr": False}, "throughout; --warmup-iters 1000 has no effect"),
        (
            {"decay_lr": False, "warmup_iters": 0, "min_lr": 1e-4, "schedule": "wsd", "decay_iters": 5},
            "--min-lr 0.0001, --schedule wsd, --decay-iters 5 have no effect",
        ),
        ({"decay_iters": 5}, "--decay-iters 5 has no effect: --schedule cosine decays all along"),
        ({"schedule": "wsd", "max_iters": 4, "warmup_iters": 0}, "a fifth of --max-iters 4, which is no step"),
        ({"schedule": "wsd", "max_iters": 1200}, "--warmup-iters 1000 ends within the last 240 steps of 1200"),
        ({"sample_prompt": "Once", "sample_tokens": 0}, "--sample-prompt has no effect: --sample-tokens is 0"),
        ({"which": "best"}, "--which best has no effect: --init-from is scratch"),
        ({"check_steps": 100_001}, "--check-steps 100001 has no effect: the run has --max-iters 100000 steps"),
        ({"momentum": 0.9}, "--momentum 0.9 has no effect: --optimizer is adamw"),
        ({"wandb_run_name": "mine"}, "--wandb-run-name has no effect without --wandb-log"),
    ],
)
def test_what_is_void_is_told(options, told):
    (remark,) = remarks(TrainConfig(**options))
    assert told in remark


@pytest.mark.parametrize(
    "options",
    [
        {"max_iters": 1001},
        {"max_iters": 1250, "schedule": "wsd"},
        {"decay_lr": False, "warmup_iters": 0},
        {"schedule": "wsd", "decay_iters": 5},
        {"which": "best", "init_from": "resume"},
        {"sample_prompt": "Once"},
        {"check_steps": 100_000},
        {"momentum": 0.9, "optimizer": "muon"},
    ],
)
def test_what_has_its_effect_is_not_told(options):
    assert remarks(TrainConfig(**options)) == []


def test_what_is_told_of_the_schedule_is_what_it_does():
    rising = TrainConfig(max_iters=200)
    assert learning_rate(rising, 199) == pytest.approx(1e-4)
    flat = TrainConfig(schedule="wsd", max_iters=4, warmup_iters=0)
    assert {learning_rate(flat, step) for step in range(4)} == {5e-4}
    jumping = TrainConfig(schedule="wsd", max_iters=1200)
    assert [learning_rate(jumping, step) for step in (999, 1000)] == pytest.approx([5e-4, 5e-4 * 5 / 6])


WIDE = {"dim": 304, "n_heads": 8, "n_kv_heads": 4}


@pytest.mark.parametrize("kernels", ["mlp", "swiglu, m lp@1", "all,-mlp,mlp@1", "mlp,-swiglu@0"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (WIDE, "--dim 304, hidden width 832, --dtype auto and 32,768 tokens"),
        ({"ffn_dim": 776}, "--dim 288, hidden width 776, --dtype auto and 32,768 tokens"),
        ({"dtype": "float32"}, "--dim 288, hidden width 768, --dtype float32 and 32,768 tokens"),
        ({"batch_size": 47}, "--dim 288, hidden width 768, --dtype auto and 12,032 tokens"),
    ],
)
def test_a_feed_forward_that_no_kernel_is_meant_for_is_told(monkeypatch, kernels, options, told):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wanted = "--dim up to 288, multiples of 16, half precision and micro-steps of 12,288 tokens or more"
    assert remarks(TrainConfig(kernels=kernels, **options)) == [
        f"--kernels {kernels}: mlp has no effect but swiglu's; it is for {wanted}, and this run has {told}"
    ]


def test_in_the_interpreter_the_feed_forwards_kernel_is_for_whatever_is_narrow(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert remarks(TrainConfig(kernels="mlp", dtype="float32", batch_size=1, ffn_dim=777)) == []
    told = "--kernels mlp: mlp has no effect but swiglu's; it is for --dim up to 288, and this run has --dim 304"
    assert remarks(TrainConfig(kernels="mlp", **WIDE)) == [told]


@pytest.mark.parametrize("kernels", ["all", "all,-mlp", "mlp,none", "mlp,-swiglu", "swiglu", "-mlp"])
def test_a_feed_forwards_kernel_that_nobody_named_is_not_told(monkeypatch, kernels):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert remarks(TrainConfig(kernels=kernels, **WIDE)) == []


def test_a_feed_forwards_kernel_that_serves_is_not_told(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert remarks(TrainConfig(kernels="mlp@0", batch_size=48)) == []


@pytest.mark.parametrize(("arch", "told"), [("sm_80", 1), ("gfx942", 1), ("sm_90", 0), ("sm_100", 0)])
def test_a_machine_that_the_feed_forwards_kernel_is_not_for_is_told(monkeypatch, arch, told):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(mlp_op, "target_at", lambda device: TARGETS[arch])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the GPU")
    gpus = "GPUs such as H100 and B200 (sm_90, sm_100)"
    said = f"--kernels mlp: mlp has no effect but swiglu's; it is for {gpus}, and this run has the GPU"
    assert remarks(TrainConfig(kernels="mlp"), torch.device("cuda", 0)) == [said] * told
    assert remarks(TrainConfig(kernels="all"), torch.device("cuda", 0)) == []
