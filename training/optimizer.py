"""AdamW over the model's parameters, and the loss scale of float16."""

import torch
from torch import Tensor

from model import Llama
from training.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: Llama, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101), one pass over all parameters; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)


def moments(model: Llama, optimizer: torch.optim.AdamW) -> dict[str, dict[str, Tensor]]:
    """The two moments by parameter name: zeros before the first update."""
    state = optimizer.state
    return {
        moment: {
            name: state[p][moment] if moment in state[p] else torch.zeros_like(p)
            for name, p in model.named_parameters()
        }
        for moment in MOMENTS
    }


def updates(model: Llama, optimizer: torch.optim.AdamW) -> int:
    """Updates made so far, skipped ones not counted: what AdamW's bias correction counts."""
    state = optimizer.state[next(model.parameters())]
    return int(state["step"]) if "step" in state else 0


@torch.no_grad()
def restore(model: Llama, optimizer: torch.optim.AdamW, saved: dict[str, dict[str, Tensor]], updates: int) -> None:
    """Put back what `moments` and `updates` gave."""
    for name, p in model.named_parameters():
        state = {moment: saved[moment][name].to(p.device) for moment in MOMENTS}
        optimizer.state[p] = {"step": torch.tensor(float(updates), device=p.device)} | state


class LossScale:
    """The scale of the loss, which keeps float16 gradients from rounding to zero: `torch.amp.GradScaler`'s rule and state.

    It doubles after `GROWTH_INTERVAL` updates in a row and halves when a gradient is not finite. All of it stays on the device:
    GradScaler itself asks the device whether to step, once an optimizer step. Disabled (other dtypes) it stays 1.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, enabled: bool, device: torch.device):
        self.enabled = enabled
        self.scale = torch.full((), 65536.0 if enabled else 1.0, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Adjust the scale; found_inf: float32 of one element, 1 where the update was skipped."""
        if self.enabled:
            torch._amp_update_scale_(self.scale, self.growth_tracker, found_inf, 2.0, 0.5, self.GROWTH_INTERVAL)

    def state_dict(self) -> dict[str, float | int]:
        """The scale and the updates since it last changed; this waits for the device."""
        return {"scale": float(self.scale), "growth_tracker": int(self.growth_tracker)}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Put back what `state_dict` gave, in place."""
        self.scale.fill_(state["scale"])
        self.growth_tracker.fill_(state["growth_tracker"])
