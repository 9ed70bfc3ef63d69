"""A small model that trains in a second: what the tests of whole training steps share."""

import torch

import kernels
from model import Llama
from tests.support import kernel_testing as kt
from training.config import TrainConfig
from training.distributed import World
from training.step.trainer import Trainer

TINY = {"vocab_size": 300, "max_seq_len": 32, "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96}


def make_trainer(dtype=torch.float32, spec="none", seed=0, device="cpu", recompute="none", **options) -> Trainer:
    """A fresh model, the same on every device, and its optimizer; options as in training/config.py."""
    config = TrainConfig(**TINY | options)
    torch.manual_seed(seed)
    model = Llama(config.shape(), kernels.select(spec, config.n_layers), dtype, recompute=recompute)
    return Trainer(model.to(device), config, World())


def micro_batches(step: int, count: int = 2, rows: int = 4, length: int = 32):
    """Micro-batches of a step, on the CPU: sequences that count up modulo something, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(300, (count * rows, 1), generator=generator)
    stride = torch.randint(1, 4, (count * rows, 1), generator=generator)
    tokens = (first + stride * torch.arange(length + 1)) % 300
    return [(t[:, :-1], t[:, 1:], None) for t in tokens.split(rows)]


def to_device(batches):
    """Micro-batches where kernels are tested: on the GPU, where there is one."""
    return [(tokens.to(kt.DEVICE), targets.to(kt.DEVICE), first_key) for tokens, targets, first_key in batches]


def train(trainer: Trainer, steps: int, lr: float = 1e-3, **batch) -> list[float]:
    """Losses of so many steps from step 0."""
    losses = []
    for step in range(steps):
        batches = micro_batches(step, **batch)
        valid = sum(int((targets != -100).sum()) for _, targets, _ in batches)
        losses.append(trainer.step(batches, valid, lr).loss.item())
    return losses
