"""One optimizer step: forward and backward of the micro-steps, clip, update. Nothing in it waits for the device.

What a step reads is copied into tensors that stay where they are, and what it writes stays too: parameters, gradients, moments,
copies, scale and result. So the step can be captured as a CUDA graph (capture.py) and replayed. It is, on one GPU with
Triton kernels; plain PyTorch stays what its users run, and with many processes or on a CPU the same function runs as it is.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from model import Llama
from training.config import TrainConfig
from training.distributed import World
from training.step.capture import Captured
from training.step.optimizer import LossScale, flatten, make_optimizer

MicroBatch = tuple[Tensor, Tensor, Tensor | None]
"""(tokens, targets, first_key or None), each (B, T)."""


@dataclass(frozen=True)
class StepResult:
    """What a step reports, as 0-d tensors on the device: reading one waits for the step."""

    loss: Tensor
    """Mean loss in nats over the valid tokens of the whole global batch."""
    grad_norm: Tensor
    """Global norm of the gradient of that loss, before clipping."""
    skipped: Tensor
    """1 where the loss or the norm was not finite and nothing was updated."""


class Trainer:
    """The model with its optimizer and loss scale: everything that a step changes."""

    def __init__(self, model: Llama, config: TrainConfig, world: World, *, capture: bool | None = None):
        """`capture`, if given, decides in `config.capture`'s place, for plain PyTorch too."""
        self._set_up(model, config, world)
        self.flat = flatten(model, config)
        self.optimizer = make_optimizer(self.flat, config)
        wanted = config.capture and config.uses_triton() if capture is None else capture
        self.captures = wanted and self.device.type == "cuda" and world.size == 1
        self._stream = torch.cuda.Stream(self.device) if self.captures else None
        # One graph for all layers: compiled layer by layer, each distinct selection of kernels would be a graph of its own.
        self.loss_sum = (
            torch.compile(self._loss_sum, fullgraph=True, dynamic=False) if config.compile else self._loss_sum
        )

    def _set_up(self, model: Llama, config: TrainConfig, world: World) -> None:
        """What every trainer has, however its parameters lie."""
        self.model = model
        self.device = model.cos.device
        self.loss_scale = LossScale(model.compute_dtype == torch.float16, self.device)
        self.grad_clip = config.grad_clip
        self.world = world
        self.captures = False
        self._stream: torch.cuda.Stream | None = None
        self._micro_batches: list[MicroBatch] = []
        self._valid_tokens = torch.ones((), device=self.device)
        self._result = torch.zeros(3, device=self.device)
        self._run = self._step

    def _loss_sum(
        self, tokens: Tensor, targets: Tensor, first_key: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        return self.model(tokens, targets, first_key, reduction="sum", scale=scale)

    def step(self, micro_batches: Iterable[MicroBatch], valid_tokens: int, lr: float) -> StepResult:
        """Update the parameters from this process's micro-batches.

        valid_tokens: targets that count in the global batch, over all processes and micro-steps, so that any cut of it gives
        the same gradient. lr: learning rate of this update.
        """
        self._receive(list(micro_batches))
        self._valid_tokens.fill_(max(1, valid_tokens))
        self.optimizer.lr.fill_(lr)
        self._run()
        return StepResult(*self._result.clone())

    def _receive(self, micro_batches: list[MicroBatch]) -> None:
        """Copy the micro-batches to where the step reads them, without waiting where they come from pinned memory."""
        kept = self._micro_batches
        if _shapes(micro_batches) != _shapes(kept):
            self._micro_batches = kept = [
                tuple(x if x is None else torch.empty_like(x, device=self.device) for x in batch)
                for batch in micro_batches
            ]
            self._run = Captured(self._step, self._stream) if self.captures else self._step
        for batch, place in zip(micro_batches, kept, strict=True):
            for x, y in zip(batch, place, strict=True):
                if x is not None:
                    y.copy_(x, non_blocking=True)

    def state(self) -> list[Tensor]:
        """All that a step changes and a later one reads: not copied, each once, always in the same order."""
        flat, scale = self.flat, self.loss_scale
        of_optimizer = [x for state in self.optimizer.state.values() for x in state.values()]
        tensors = [flat.values, scale.scale, scale.growth_tracker, *of_optimizer]
        if flat.copies is not None:
            tensors.append(flat.copies)
        return list({id(x): x for x in tensors}.values())

    def replay(self, micro_batches: Iterable[MicroBatch], valid_tokens: int) -> Tensor:
        """The passes of a step again as they are written, neither compiled nor captured: to be watched op by op.

        Writes this process's part of the gradients, and changes nothing else. Returns its part of the loss, 0-d.
        """
        self._receive(list(micro_batches))
        self._valid_tokens.fill_(max(1, valid_tokens))
        if self._stream is None:
            return self._differentiate(self._loss_sum) / self._valid_tokens
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._differentiate(self._loss_sum) / self._valid_tokens
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _differentiate(self, loss_sum: Callable[..., Tensor]) -> Tensor:
        """Fill the gradients with those of the micro-batches, times the loss scale. Returns the sum of their losses."""
        self._clear_gradients()
        loss = torch.zeros((), device=self.device)
        factor = self.loss_scale.scale / self._valid_tokens
        for i, micro_batch in enumerate(self._micro_batches, start=1):
            self._before_passes(last=i == len(self._micro_batches))
            of_micro_batch = loss_sum(*micro_batch, factor)
            of_micro_batch.backward(factor)
            loss += of_micro_batch.detach()
        self._finish_gradients()
        return loss

    def _step(self) -> None:
        """The step, from tensors that stay in their places to such tensors."""
        loss_scale = self.loss_scale.scale
        loss = self._differentiate(self.loss_sum)
        self.world.sum(loss)
        loss /= self._valid_tokens

        grad_norm = self._total_gradient() / loss_scale
        skip = (~(grad_norm + loss).isfinite()).float()
        factor = 1 / loss_scale
        if self.grad_clip:
            factor *= (self.grad_clip / (grad_norm + 1e-6)).clamp(max=1)
        self.optimizer.update(factor, skip)
        self.loss_scale.update(skip)
        torch.stack([loss, grad_norm, skip], out=self._result)

    def _clear_gradients(self) -> None:
        self.flat.clear_gradients()

    def _before_passes(self, last: bool) -> None:
        """Called before the passes of each micro-step; last: whether it is the step's last."""

    def _finish_gradients(self) -> None:
        self.flat.finish_gradients()

    def _total_gradient(self) -> Tensor:
        """Let every process have the gradient of all of them. Returns its norm, 0-d float32."""
        self.world.sum(self.flat.gradients)
        return torch.linalg.vector_norm(self.flat.gradients)

    def gradients(self) -> dict[str, Tensor]:
        """What this process has of the gradients, by the parameters' names."""
        return {name: self.flat.view(self.flat.gradients, name) for name, _ in self.model.named_parameters()}

    def here(self, parameter: Tensor) -> Tensor:
        """What this process has of a parameter, in place: all of it."""
        return parameter.detach()

    def rows(self, parameter: Tensor) -> slice:
        """The rows that this process has of a parameter."""
        return slice(0, parameter.shape[0])

    def savable(self, here: Tensor, parameter: Tensor) -> Tensor:
        """A tensor of the parameter's shape for a checkpoint, from what this process has of it."""
        return here

    def whole_model(self) -> AbstractContextManager[Llama]:
        """Entered by every process, gives each the model as it is now, for it alone to generate from, until it is left."""
        return nullcontext(self.model)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """Mean loss in nats over the valid tokens of the batches of all processes."""
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        try:
            for tokens, targets, first_key in batches:
                valid = int((targets != -100).sum())
                total += torch.tensor([float(self.loss_sum(tokens, targets, first_key)), valid], dtype=torch.float64)
        finally:
            self.model.train()
        self.world.sum(total)
        return float(total[0] / total[1].clamp(min=1))


def _shapes(micro_batches: list[MicroBatch]) -> list[list[torch.Size | None]]:
    return [[None if x is None else x.shape for x in batch] for batch in micro_batches]
