"""One optimizer step: forward and backward of the micro-steps, clip, update. Nothing in it waits for the device."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model import Llama
from training.config import TrainConfig
from training.distributed import World
from training.optimizer import LossScale, make_optimizer


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

    def __init__(self, model: Llama, config: TrainConfig, world: World):
        self.model = model
        self.optimizer = make_optimizer(model, config)
        self.loss_scale = LossScale(model.compute_dtype == torch.float16, model.cos.device)
        self.grad_clip = config.grad_clip
        self.world = world
        self.parameters = list(model.parameters())
        # One graph for all layers: compiled layer by layer, each distinct selection of kernels would be a graph of its own.
        self.loss_sum = (
            torch.compile(self._loss_sum, fullgraph=True, dynamic=False) if config.compile else self._loss_sum
        )

    def _loss_sum(self, tokens: Tensor, targets: Tensor, first_key: Tensor | None) -> Tensor:
        return self.model(tokens, targets, first_key, reduction="sum")

    def step(
        self, micro_batches: Iterable[tuple[Tensor, Tensor, Tensor | None]], valid_tokens: int, lr: float
    ) -> StepResult:
        """Update the parameters from this process's micro-batches.

        micro_batches: (tokens, targets, first_key or None), each (B, T). valid_tokens: targets that count in the global batch,
        over all processes and micro-steps, so that any cut of it gives the same gradient. lr: learning rate of this update.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.model.cos.device)
        scale = self.loss_scale.scale / max(1, valid_tokens)
        for tokens, targets, first_key in micro_batches:
            loss_sum = self.loss_sum(tokens, targets, first_key)
            (loss_sum * scale).backward()
            loss += loss_sum.detach()
        grads = [p.grad for p in self.parameters]
        self.world.sum([loss, *grads])
        loss /= max(1, valid_tokens)

        grad_norm = torch.nn.utils.get_total_norm(grads) / self.loss_scale.scale
        found_inf = (~(grad_norm.isfinite() & loss.isfinite())).float()
        factor = 1 / self.loss_scale.scale
        if self.grad_clip:
            factor = factor * (self.grad_clip / (grad_norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(grads, factor)
        self.optimizer.found_inf = found_inf  # the fused update leaves everything as it is where this is 1
        self.optimizer.step()
        self.loss_scale.update(found_inf)
        self.model.refresh_compute_weights()
        return StepResult(loss, grad_norm, found_inf)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> float:
        """Mean loss in nats over the valid tokens of the batches of all processes."""
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for tokens, targets, first_key in batches:
            valid = int((targets != -100).sum())
            total += torch.tensor([float(self.loss_sum(tokens, targets, first_key)), valid], dtype=torch.float64)
        self.model.train()
        total = total.to(self.model.cos.device) if self.world.size > 1 else total
        self.world.sum([total])
        return float(total[0] / total[1].clamp(min=1))
