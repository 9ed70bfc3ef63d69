"""The plan's memory against the peak of small runs: two processes, every tensor of a step followed."""

import json

import pytest

from kernels.launch import HAVE_TRITON
from tests.support.run_testing import finish, start_many

CODE = """
import gc, json, os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch
import kernels
from tests.support.live_bytes import LiveBytes
from training.config import TrainConfig
from training.distributed import joined
from training.plan.costs import layout, memory
from training.sharding import local
from training.step.start import new_trainer

SHAPE = dict(max_seq_len=16, dim=64, n_layers=4, n_heads=2, n_kv_heads=1, ffn_dim=160, device="cpu", kernels="all,-adamw")

def batches():
    draw = lambda: torch.randint(256, (4, 16))
    return [(draw(), draw(), None) for _ in range(2)]

def measure(world, config):
    trainer = new_trainer(config, world, torch.device("cpu"), torch.float32)
    trainer.step(batches(), 128, 1e-3)
    gc.collect()
    with LiveBytes() as live:
        trainer.step(batches(), 128, 1e-3)
    gradients = 4 * sum(local(p).numel() for p in trainer.model.parameters() if p.ndim == 2)
    found = memory(config.shape(), layout("fsdp", 2, 2), 64, config.activation_checkpointing, 2, 4)
    return live.peak, found.kept + found.at_the_peak + gradients

torch.set_num_threads(1)
with joined(TrainConfig(**SHAPE, gradient_accumulation_steps=4)) as world:
    ratios = []
    for tied, vocab, mode in ((True, 256, "none"), (True, 4096, "full"), (False, 4096, "selective")):
        config = TrainConfig(
            **SHAPE, vocab_size=vocab, tie_embeddings=tied, parallel="fsdp", activation_checkpointing=mode
        )
        ratios.append(measure(world, config))
    if world.is_main:
        print(json.dumps(ratios))
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed here")
def test_the_peak_of_a_step_is_near_the_computed_one():
    """0.72 to 1.12 of it when it was written: on a CPU one layer is in flight and not two, and chunks have 128 rows at least."""
    results = [finish(process) for process in start_many([], 2, CODE)]
    assert [result.status for result in results] == [0, 0], results
    for peak, computed in json.loads(results[0].out):
        assert 0.6 < peak / computed < 1.25
