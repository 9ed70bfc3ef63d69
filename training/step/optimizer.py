"""The optimizers over the model's flat parameters, AdamW by torch or by one kernel, and the loss scale of float16."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.adamw import adamw_triton
from model import Llama
from training.config import TrainConfig
from training.step.flat import FlatParameters
from training.step.muon import Muon, matrices

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """AdamW (https://arxiv.org/abs/1711.05101) as torch has it; matrices decay, norms do not.

    Nothing that it reads or writes ever moves, and `update` does not wait for the device.

    start: element of the flat buffers at which its parameters begin; what is before them is another's.

    Attributes:
        lr: 0-d float32 on the device: the learning rate, to be filled before an update.
        exp_avg, exp_avg_sq: (N,) float32, the moments, laid out as `flat.values` is; `state` holds views of them.
    """

    def __init__(self, flat: FlatParameters, config: TrainConfig, start: int = 0):
        self.flat, self.start = flat, start
        self.lr = torch.tensor(config.learning_rate, device=flat.values.device)
        mine = ((name, p) for name, p in flat.model.named_parameters() if flat.starts[name] >= start)
        # A state dict numbers the parameters in the order of the groups below: matrices first.
        named = dict(sorted(mine, key=lambda item: item[1].ndim < 2))
        groups = [
            {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas, on_gpu = (config.beta1, config.beta2), self.lr.is_cuda
        super().__init__(groups, betas=betas, eps=1e-8, fused=True, capturable=on_gpu)
        # The constructor would read a learning rate that lies on the device, to check that it is not negative: so it comes later.
        for group in self.param_groups:
            group["lr"] = self.lr
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(flat.values), torch.zeros_like(flat.values)
        for name, p in named.items():
            views = {moment: flat.view(getattr(self, moment), name) for moment in MOMENTS}
            self.state[p] = {"step": torch.zeros((), device=p.device)} | views

    @torch.no_grad()
    def update(self, factor: Tensor, skip: Tensor) -> None:
        """Update the parameters, and their copies in the compute dtype, from the gradients times `factor`.

        factor: 0-d float32. skip: 0-d float32; 1 to leave everything but the gradients as it is, else 0.
        """
        flat, start = self.flat, self.start
        flat.gradients[start:].mul_(factor)
        self.found_inf = skip  # torch's fused update looks for this attribute, and changes nothing where it is 1
        self.step()
        if flat.copies is not None:
            flat.copies[start:].copy_(flat.values[start : flat.copies.numel()])

    def state_dict(self) -> dict:
        """A copy of the state, of the form that `torch.optim.AdamW` has for the same two groups."""
        saved = super().state_dict()
        saved["state"] = {i: {key: x.clone() for key, x in state.items()} for i, state in saved["state"].items()}
        for group in saved["param_groups"]:
            group["lr"] = float(self.lr)
        return saved

    def load_state_dict(self, state_dict: dict) -> None:
        """Copy in place what `state_dict`, or that of a `torch.optim.AdamW` with the same groups, gave.

        The groups keep their options: those are the run's. ValueError, before anything is changed, for other parameters,
        other state (`amsgrad`), and updates that are not equally many for all parameters.
        """
        groups, state = self.param_groups, self.state
        try:
            super().load_state_dict(state_dict)
            loaded = self.state
        finally:
            self.param_groups, self.state = groups, state
        for i, (p, own) in enumerate(state.items()):
            loaded[p] = loaded.get(p) or {key: torch.zeros_like(x) for key, x in own.items()}  # before the first update
            found, wanted = ({key: tuple(x.shape) for key, x in of.items()} for of in (loaded[p], own))
            if found != wanted:
                raise ValueError(f"load_state_dict: parameter {i} has state of shapes {found}, wanted {wanted}")
        steps = {float(loaded[p]["step"]) for p in state}
        if len(steps) > 1:
            raise ValueError(
                f"load_state_dict: parameters were updated {sorted(steps)} times, wanted all equally often"
            )
        for p, own in state.items():
            for key, x in own.items():
                x.copy_(loaded[p][key])


class FusedAdamW(AdamW):
    """The same by `kernels.adamw`: gradients are scaled, moments and parameters updated and copies written in one pass."""

    def __init__(self, flat: FlatParameters, config: TrainConfig, start: int = 0):
        super().__init__(flat, config, start)
        self.count = torch.zeros_like(self.lr)  # updates made so far: one count, which all parameters share
        for state in self.state.values():
            state["step"] = self.count

    @torch.no_grad()
    def update(self, factor: Tensor, skip: Tensor) -> None:
        """As `AdamW.update`, but the gradients stay as they are."""
        flat, start, decayed = self.flat, self.start, self.param_groups[0]
        beta1, beta2 = decayed["betas"]
        adamw_triton(
            flat.values[start:],
            flat.gradients[start:],
            self.exp_avg[start:],
            self.exp_avg_sq[start:],
            None if flat.copies is None else flat.copies[start:],
            self.count,
            self.lr,
            factor,
            skip,
            n_decayed=flat.n_decayed - start,
            weight_decay=decayed["weight_decay"],
            beta1=beta1,
            beta2=beta2,
            eps=decayed["eps"],
        )

    def step(self, closure: None = None) -> None:
        """Not to be called: torch's own would count an update once a parameter."""
        raise NotImplementedError("FusedAdamW: call update(factor, skip)")


def flatten(model: Llama, config: TrainConfig) -> FlatParameters:
    """The model's parameters in the order that the optimizer of `config` wants."""
    return FlatParameters(model, leading=matrices(model) if config.optimizer == "muon" else ())


def make_optimizer(flat: FlatParameters, config: TrainConfig) -> AdamW | Muon:
    """What `config.optimizer` names; AdamW by its kernel where the switch `adamw` is on, else by torch. flat: from `flatten`."""
    kind = FusedAdamW if "adamw" in config.switches() else AdamW
    adamw = kind(flat, config, start=flat.n_leading)
    return Muon(flat, config, adamw) if config.optimizer == "muon" else adamw


def moments(model: Llama, optimizer: AdamW | Muon) -> dict[str, dict[str, Tensor]]:
    """The two moments by parameter name, not copied: zeros before the first update. Muon's matrices have the first one only."""
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    return {moment: {name: of[moment] for name, of in state.items() if moment in of} for moment in MOMENTS}


def updates(model: Llama, optimizer: AdamW | Muon) -> int:
    """Updates made so far, skipped ones not counted: what AdamW's bias correction counts. Waits for the device."""
    return int(optimizer.state[model.embedding.weight]["step"])


@torch.no_grad()
def restore(model: Llama, optimizer: AdamW | Muon, saved: Callable[[str, str], Tensor], updates: int) -> None:
    """Put back, in place, what `moments` and `updates` gave: of the same method, whatever computes it.

    saved: a moment of a parameter, by their two names.
    """
    for moment, named in moments(model, optimizer).items():
        for name, own in named.items():
            own.copy_(saved(moment, name))
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(updates)


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
