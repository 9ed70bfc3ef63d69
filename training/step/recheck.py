"""Every N-th step twice: hardware that computes wrong now and then, or a kernel with a race, is noticed and named.

A step has the same bits each time it is made from the same state. So the state is kept, the step made twice, and what the two
gave compared to the bit before it counts: loss, gradients, norm, parameters and moments. Where they differ a third one tells which
of the two stands alone. Op by op (neither compiled nor captured) every result of every op is compared as well, by a checksum of its
bits; of a compiled or captured step the gradients are, in the order in which they are made, and the ops of further replays.

For a checked step that takes the memory of another set of parameters, moments and gradients, and half as much again.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from model import Llama
from training.config import TrainConfig
from training.device import seed_step
from training.distributed import World
from training.progress import Progress
from training.step.trainer import MicroBatch, StepResult, Trainer
from training.step.watch import Sight, watching

_OF_A_LAYER = ("w_down.weight", "w_gate_up.weight", "ffn_norm", "wo.weight", "wqkv.weight", "attention_norm")
"""Parameters in the order in which a backward pass comes by."""


class StepDiffersError(Exception):
    """A step that was made twice from the same state gave two things. The state is as it was before it."""


@dataclass(frozen=True)
class _Made:
    """What one making of a step gave: checksums, by what they are of, in the order in which it was made."""

    result: StepResult
    sums: dict[str, Tensor]
    """0-d int64, on the device."""

    def first_other(self, other: "_Made") -> tuple[int, str, str] | None:
        """Of what differs in another making the first: its place in the order, its name and that of what agrees before it."""
        names = list(self.sums)
        mine, its = (torch.stack(list(made.sums.values())).tolist() for made in (self, other))
        for i, (a, b) in enumerate(zip(mine, its, strict=True)):
            if a != b:
                return i, names[i], names[i - 1] if i else ""
        return None


class Rechecked:
    """A trainer of which every `check_steps`-th step is made twice. Every process calls it."""

    def __init__(self, config: TrainConfig, trainer: Trainer, progress: Progress, world: World):
        self._config, self._trainer = config, trainer
        self._progress, self._world = progress, world
        self._op_by_op = not (config.compile or trainer.captures)

    def step(self, micro_batches: Sequence[MicroBatch], valid_tokens: int, lr: float) -> StepResult:
        """As `Trainer.step`. StepDiffersError, in all processes, where it differs in one: with what, where and which of the two."""
        if (self._progress.step + 1) % self._config.check_steps:
            return self._trainer.step(micro_batches, valid_tokens, lr)
        batch = (list(micro_batches), valid_tokens, lr)
        state = self._trainer.state()
        before = [x.clone() for x in state]

        def make() -> _Made:
            torch._foreach_copy_(state, before)
            return self._make(*batch)

        first, second = make(), make()
        differs = first.first_other(second)
        if not self._world.totals(differs is not None, at=f"the check of step {self._progress.step}")[0]:
            return second.result
        third = make()
        places = self._world.gather(differs)
        again = self._world.gather(None if self._op_by_op else self._again(before, state, batch))
        torch._foreach_copy_(state, before)
        raise StepDiffersError(self._told((first, second, third), places, again))

    def _make(self, micro_batches: list[MicroBatch], valid_tokens: int, lr: float) -> _Made:
        trainer, sums = self._trainer, {}

        def see(sight: Sight) -> None:
            if sight.gives:
                for name, x in sight.tensors.items():
                    self._add(sums, f"{sight.call}, {sight.direction}, {name}", x)

        if self._config.dropout:
            seed_step(self._config.seed, self._progress.step, self._world.rank)
        with _gradients_kept(trainer) as kept:
            if self._op_by_op:
                with watching(trainer.model, see):
                    result = trainer.step(micro_batches, valid_tokens, lr)
            else:
                result = trainer.step(micro_batches, valid_tokens, lr)
        self._add(sums, "the loss", result.loss)
        gradients = kept[0] if kept else trainer.gradients()
        for name in _in_backward_order(trainer.model):
            self._add(sums, f"the gradient of {name}", gradients[name])
        self._add(sums, "the gradient's norm", result.grad_norm)
        for name in _in_backward_order(trainer.model):
            self._add(sums, f"the parameter {name}", trainer.here(trainer.model.get_parameter(name)))
        for i, x in enumerate(trainer.state()):
            self._add(sums, f"the optimizer's state ({i})", x)
        return _Made(result, sums)

    def _again(self, before: list[Tensor], state: list[Tensor], batch: tuple) -> str:
        """The first op that differs between replays op by op; nothing where they agree: then it happens now and then."""
        micro_batches, valid_tokens, _ = batch
        replays = []
        for _ in range(3):
            torch._foreach_copy_(state, before)
            sums: dict[str, Tensor] = {}

            def see(sight: Sight, sums: dict = sums) -> None:
                if sight.gives:
                    for name, x in sight.tensors.items():
                        self._add(sums, f"{sight.call}, {sight.direction}, {name}", x)

            if self._config.dropout:
                seed_step(self._config.seed, self._progress.step, self._world.rank)
            with watching(self._trainer.model, see):
                loss = self._trainer.replay(micro_batches, valid_tokens)
            replays.append(_Made(StepResult(loss, loss, loss), sums))
        found = replays[0].first_other(replays[1]) or replays[1].first_other(replays[2])
        return found[1] if found else ""

    def _told(self, made: tuple[_Made, _Made, _Made], places: list, again: list) -> str:
        first, second, third = made
        rank = min((place[0], rank) for rank, place in enumerate(places) if place)[1]
        _, where, agrees = places[rank]
        of_rank = f" of rank {rank}" if self._world.size > 1 else ""
        losses = f"loss {first.result.loss.item():.9g} and {second.result.loss.item():.9g}"
        norms = f"gradient norm {first.result.grad_norm.item():.9g} and {second.result.grad_norm.item():.9g}"
        place = f"first in {where}{of_rank}" + (f", after {agrees} agreed" if agrees else "")
        words = [
            f"step {self._progress.step}, made twice from the same state, differs (--check-steps): {losses}, {norms}",
            place,
        ]
        if not self._op_by_op:
            words.append(f"op by op it differs first in {again[rank]}" if again[rank] else "replays op by op agree")
        alone = "first" if not second.first_other(third) else "second" if not first.first_other(third) else ""
        if alone:
            words.append(f"a third one agrees with the other: the {alone} was wrong, once")
        else:
            words.append("a third one is like neither: it differs every time")
        words.append("a kernel with a race, or hardware that fails; saved as it was before the step")
        return "; ".join(words)

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
        """A checksum under a name of its own: the same op is called in every micro-batch."""
        turn, unique = 1, name
        while unique in sums:
            turn += 1
            unique = f"{name} (call {turn})"
        sums[unique] = _checksum(x)


def _checksum(x: Tensor) -> Tensor:
    """0-d int64 of the bits and their places; integers add up to the same in any order."""
    of_size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = x.detach().contiguous().view(of_size[x.element_size()]).flatten().long()
    return (bits * (torch.arange(bits.numel(), device=bits.device) % 65521 + 1)).sum()


def _in_backward_order(model: Llama) -> list[str]:
    """The names of the parameters, the embedding last: a tied head adds to it first, and the look-up in the end."""
    layers = [f"layers.{i}.{name}" for i in reversed(range(len(model.layers))) for name in _OF_A_LAYER]
    return [*([] if model.head is None else ["head.weight"]), "final_norm", *layers, "embedding.weight"]


@contextmanager
def _gradients_kept(trainer: Trainer):
    """Gives a list that gets the gradients of a step as they were before the update, which may scale them; none if captured."""
    kept: list[dict[str, Tensor]] = []
    update = trainer.optimizer.update

    def keep(factor: Tensor, skip: Tensor) -> None:
        kept.append({name: gradient.clone() for name, gradient in trainer.gradients().items()})
        update(factor, skip)

    if not trainer.captures:
        trainer.optimizer.update = keep
    try:
        yield kept
    finally:
        if not trainer.captures:
            del trainer.optimizer.update
