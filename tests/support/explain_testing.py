"""What the tests of the explanation of skipped steps share."""

from dataclasses import replace

import torch

from tests.support.step_testing import micro_batches
from training.step.explain import explain
from training.step.trainer import MicroBatch, Trainer
from training.step.watch import watching

FEW = {"count": 1, "rows": 2, "length": 16}
"""A step's micro-batches where kernels are interpreted."""


def plant(trainer: Trainer, layer: int, **ops) -> None:
    """Give one layer other ops."""
    model = trainer.model
    model.ops = tuple(replace(of, **ops) if place == layer else of for place, of in enumerate(model.ops))


def explained(trainer: Trainer, **batch) -> str:
    """What is not finite first in a step of such micro-batches."""
    batches = [(t.to(trainer.device), y.to(trainer.device), first_key) for t, y, first_key in micro_batches(0, **batch)]
    return "\n".join(explain(trainer, batches, sum(t.numel() for _, t, _ in batches)))


def assert_watching_changes_no_bit(trainer: Trainer, micro_batches: list[MicroBatch]) -> None:
    """Neither of the loss nor of a gradient, in float32 even where FSDP gathers what they are of in half precision."""

    def passes() -> list[torch.Tensor]:
        loss = trainer.replay(micro_batches, 64)
        return [x.nan_to_num() for x in (loss, *trainer.gradients().values())]

    unwatched = passes()
    with watching(trainer.model, lambda sight: None):
        watched = passes()
    assert all(map(torch.equal, watched, unwatched))
    assert all(map(torch.equal, passes(), unwatched))
