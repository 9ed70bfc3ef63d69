"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) for the matrices of the layers, AdamW for the rest.

For each matrix W (m, n) with gradient g, momentum μ, learning rate lr and weight decay λ:

    M ← μ M + (1 - μ) g
    O = orthogonalized(μ M + (1 - μ) g)                    U Vᵀ of its singular values' decomposition, nearly, in bfloat16
    W ← (1 - lr λ) W - lr · 0.2 √max(m, n) · O

The factor 0.2 √max(m, n) makes an update as large as AdamW's usually are (Liu et al., 2025, arXiv:2502.16982), so that one learning
rate, schedule and decay serve both. q, k, v and gate, up are matrices of their own here, though each group is packed into one.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model import Llama, huggingface
from training.config import TrainConfig
from training.step.flat import FlatParameters

if TYPE_CHECKING:
    from training.step.optimizer import AdamW


def matrices(model: Llama) -> list[str]:
    """The parameters that Muon updates, by name: those of the layers that are no vectors."""
    return [name for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2]


class Muon:
    """The two of them over the model's flat parameters, of which Muon's come first. `update` does not wait for the device.

    `torch.optim.Muon` takes its learning rate on the host, and cannot skip an update that the device says to skip. So it gets a
    rate of 1, no momentum and no decay, and orthogonalizes; the rest of the formula is a pass or two over all matrices at once.

    flat: made with `matrices(model)` as its leading parameters. rest: AdamW of what follows them.

    Attributes:
        lr: 0-d float32 on the device: the learning rate, to be filled before an update.
        state: as an optimizer's: `exp_avg`, which is M, of Muon's parameters; what AdamW has of the others.
    """

    def __init__(self, flat: FlatParameters, config: TrainConfig, rest: "AdamW"):
        self.flat, self.rest = flat, rest
        self.momentum, self.weight_decay = config.momentum, config.weight_decay
        names = matrices(flat.model)
        self.state = rest.state | {
            flat.model.get_parameter(name): {"exp_avg": flat.view(rest.exp_avg, name)} for name in names
        }
        # Second moments, which Muon has none of, are laid out as the parameters are: its place among them holds the updates.
        self.updates = rest.exp_avg_sq[: rest.start]
        shape = flat.model.config
        places = huggingface.unpack(shape, {name: flat.view(rest.exp_avg_sq, name) for name in names})
        gradients = huggingface.unpack(shape, {name: flat.view(flat.gradients, name) for name in names})
        parameters = [nn.Parameter(place) for place in places.values()]
        self._orthogonalize = torch.optim.Muon(
            parameters, lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
        )
        for parameter, gradient in zip(parameters, gradients.values(), strict=True):
            parameter.grad = gradient
            self._orthogonalize.state[parameter]["momentum_buffer"] = (
                gradient  # without momentum it would be a copy of that
            )

    @property
    def lr(self) -> Tensor:
        """The learning rate of both."""
        return self.rest.lr

    @torch.no_grad()
    def update(self, factor: Tensor, skip: Tensor) -> None:
        """As `AdamW.update`; the gradients are overwritten."""
        flat, n = self.flat, self.rest.start
        skipped = skip.bool()
        gradients, values, average = flat.gradients[:n], flat.values[:n], self.rest.exp_avg[:n]
        gradients.mul_(factor)
        average.copy_(torch.where(skipped, average, average.lerp(gradients, 1 - self.momentum)))
        gradients.lerp_(average, self.momentum)
        self.updates.zero_()
        self._orthogonalize.step()
        values.copy_(torch.where(skipped, values, values * (1 - self.lr * self.weight_decay) + self.lr * self.updates))
        if flat.copies is not None:
            flat.copies[:n].copy_(values)
        self.rest.update(factor, skip)
