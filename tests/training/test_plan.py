"""The plan's closed forms against counts of models that are built, a table worked out before it, and measured runs."""

import math
import re
import subprocess
import sys

import pytest
import torch

import kernels
from model import Llama
from model.config import PRESETS, preset
from model.flops import parameters
from tests.support.run_testing import ROOT
from training.errors import UserError
from training.hardware import GPUS, LINKS
from training.plan.__main__ import Plan, report
from training.plan.costs import layer_matrices, layout, memory, traffic

GB = 1e9
TOKENS = 8192


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan_that_fits_or_says_what_would(name):
    for gpus, parallel in ((8, "ddp"), (8, "fsdp"), (512, "hsdp"), (512, "fsdp")):
        lines = report(Plan(preset=name, gpus=gpus, parallel=parallel))
        fits = any(line.startswith("torchrun") for line in lines)
        assert fits != any(line.startswith("what would fit: ") for line in lines)
    assert fits or name == "llama3.1-405b"


def test_a_layers_matrices_are_counted_as_they_are_built():
    config = preset("llama3.1-8b")
    with torch.device("meta"):
        model = Llama(config, kernels.select("none", config.n_layers))
    assert layer_matrices(config) == sum(p.numel() for p in model.layers[3].parameters() if p.ndim == 2)


@pytest.mark.parametrize(
    ("name", "ddp", "kept", "kept_full"),
    [
        ("124m", 2.2, 2.4, 0.3),
        ("llama3.2-1b", 22, 9.9, 1.1),
        ("llama3.2-3b", 58, 20.7, 2.8),
        ("llama3.1-8b", 144, 36.5, 4.3),
    ],
)
def test_it_agrees_with_the_table_that_was_worked_out_for_the_design(name, ddp, kept, kept_full):
    """which left out the rotated queries and keys: 5 to 14% of what is kept."""
    config = preset(name)
    found = memory(config, layout("ddp", 8, 8), TOKENS, "none")
    assert found.always == pytest.approx(ddp * GB, rel=0.05)
    assert found.kept == pytest.approx(kept * GB, rel=0.15)
    full = memory(config, layout("ddp", 8, 8), TOKENS, "full")
    assert full.kept == pytest.approx(kept_full * GB, rel=0.12)
    assert memory(config, layout("fsdp", 64, 8), TOKENS, "full").always == pytest.approx(
        16 * parameters(config) / 64, rel=0.05
    )


def test_bytes_on_the_links():
    config = preset("llama3.1-8b")
    p, ends = parameters(config), config.vocab_size * config.dim
    layers = 32 * layer_matrices(config)
    one = traffic(config, layout("fsdp", 8, 8), 3)
    assert one.between == 0
    assert one.within == pytest.approx(3 * 7 / 8 * (8 * layers + 24 * ends))
    many = traffic(config, layout("fsdp", 64, 8), 1)
    assert many.within == pytest.approx(7 * many.between)
    both = traffic(config, layout("hsdp", 64, 8), 3)
    assert both.within == pytest.approx(one.within)
    assert both.between == pytest.approx(2 * 7 / 8 * 4 * p / 8)
    ddp = traffic(config, layout("ddp", 64, 8), 5)
    assert ddp.within + ddp.between == pytest.approx(2 * 63 / 64 * 4 * p)


def test_links_are_of_gpus_in_the_table():
    assert LINKS.keys() <= {gpu.name for gpu in GPUS}


def test_70b_shared_out_within_machines_does_not_fit_and_over_all_of_them_does():
    lines = report(Plan(preset="llama3.1-70b", gpus=256, parallel="hsdp"))
    assert lines[-1] == "what would fit: --parallel fsdp --activation-checkpointing full on the same GPUs"
    lines = report(Plan(preset="llama3.1-70b", gpus=256, parallel="fsdp"))
    assert lines[-1].startswith("torchrun --nnodes 32 ")
    assert "--activation-checkpointing full" in lines[-1]
    assert "--sample-tokens 0" in lines[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"preset": "llama3.1-70b", "gpus": 3},
            "--parallel fsdp --activation-checkpointing full on 64 of .* .--gpus 64.",
        ),
        (
            {"preset": "llama3.1-70b", "gpus": 32768, "parallel": "ddp"},
            "--parallel fsdp --activation-checkpointing full on the same GPUs",
        ),
        ({"batch_size": 100}, "--batch-size 8 --activation-checkpointing full"),
        (
            {"batch_size": 5, "activation_checkpointing": "selective"},
            "--batch-size 3 --activation-checkpointing selective",
        ),
        (
            {"max_seq_len": 131072},
            "--parallel fsdp --activation-checkpointing full --max-seq-len 65536 on the same GPUs",
        ),
    ],
)
def test_what_would_fit_is_the_nearest(options, words):
    """Fewer sequences at a time; more GPUs, which fill their machines; shorter sequences."""
    assert re.fullmatch(f"what would fit: {words}", report(Plan(**options))[-1])


def test_one_gpu_keeps_the_whole_model():
    config = preset("124m")
    assert memory(config, layout("fsdp", 1, 8), TOKENS, "none") == memory(config, layout("ddp", 1, 8), TOKENS, "none")
    assert "--parallel fsdp (one GPU keeps the whole model)" in report(Plan(preset="124m", gpus=1))[0]


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"preset": "smoke", "gpus": 2}, "1 micro-step of 16 x 128 tokens a GPU, 4,096 in all"),
        ({"preset": "124m", "gpus": 1}, "3 micro-steps of 171 x 1,024 tokens a GPU, 525,312 in all"),
        ({"tokens_per_step": 1}, "1 micro-step of 1 x 8,192 tokens a GPU, 65,536 in all"),
        ({"preset": "smoke", "tokens_per_step": 2**21}, "2 micro-steps of 1024 x 128 tokens a GPU, 2,097,152 in all"),
    ],
)
def test_a_step_has_the_tokens_asked_for(options, step):
    """though larger micro-batches would fit: the learning rate is the one for that many."""
    assert f"a step        {step}" in report(Plan(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "huge"}, "--preset is 'huge'; allowed: reference"),
        ({"gpu": "H101"}, "--gpu is 'H101'; those with bfloat16 .*H100 SXM"),
        ({"gpus": 12}, "--gpus 12 is not a multiple of --gpus-per-machine 8"),
        ({"parallel": "hsdp"}, "--gpus 8 are on one; say --parallel fsdp"),
        ({"mfu": 40.0}, "--mfu is 40.0; it must be between 0 and 1"),
        ({"batch_size": -1}, "--batch-size is -1; it must be from 0 .0: chosen here. to 1099511627776"),
        ({"gpus": 0}, "--gpus is 0; it must be from 1 to 1099511627776"),
        ({"tokens_per_step": 10**400}, "--tokens-per-step is 10+; it must be from 0"),
        ({"network_gb_s": math.inf}, "--network-gb-s is inf; it must be positive and finite"),
    ],
)
def test_what_is_wrong_is_told(options, words):
    with pytest.raises(UserError, match=words):
        report(Plan(**options))


def test_the_command_prints_it_without_torch():
    code = (
        "import sys, runpy; sys.argv = ['plan', *sys.argv[1:]]\n"
        "try: runpy.run_module('training.plan', run_name='__main__')\n"
        "finally: print('torch' in sys.modules, 'triton' in sys.modules)"
    )
    words = [sys.executable, "-c", code, "--preset", "llama3.1-8b", "--gpus", "64", "--parallel", "hsdp"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
    assert "torchrun --nnodes 8 " in done.stdout
    done = subprocess.run([*words[:3], "--gpus", "9"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
