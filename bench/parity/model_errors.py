"""The errors of a whole model: loss and gradients with any selection of kernels, held against float64."""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import kernels
from bench.parity.op_errors import FLOOR, Call, figures, record
from kernels import grammar
from model import Llama, huggingface
from training.config import TrainConfig
from training.step.optimizer import LossScale

Select = Callable[[str, int], Sequence[kernels.Ops]]


class Models:
    """One batch, one model that can be given any kernels, and what float64 and the torch twins make of the two.

    config: shape, batch and seed. select: what gives each place its ops for a spec, in place of `kernels.select`.
    """

    def __init__(self, config: TrainConfig, device: torch.device, dtype: torch.dtype, select: Select = kernels.select):
        self.config = config
        self.select = select
        torch.manual_seed(config.seed)
        with device:
            self.model = Llama(config.shape(), kernels.select("none", config.n_layers), dtype)
        _draw_weights(self.model)
        tokens = torch.randint(config.vocab_size, (config.batch_size, config.max_seq_len + 1)).to(device)
        self.tokens, self.targets = tokens[:, :-1], tokens[:, 1:]
        self.scale = 1.0
        self.exact = self.run_exact()
        self.scale = float(LossScale(dtype == torch.float16, device).scale)
        self.plain = self.run("none")
        while self.scale > 1 and not all(x.isfinite().all() for x in self.plain.values()):  # as training lowers it
            self.scale /= 2
            self.plain = self.run("none")

    def run(self, spec: str) -> dict[str, Tensor]:
        """The loss and the gradients, by canonical name, with these kernels on."""
        self.model.ops = tuple(self.select(spec, self.config.n_layers))
        return self._gradients(self.model)

    def run_exact(self) -> dict[str, Tensor]:
        """The loss and the gradients in float64."""
        return self._gradients(_in_float64(self.model))

    def errors(self, spec: str) -> list[dict]:
        """A row for the loss and one for each parameter's gradient: `layer`, `pass`, `tensor` and the figures of `figures`."""
        fused = self.run(spec) if any(grammar.parse(spec, self.config.n_layers)) else {}
        floor = FLOOR[self.model.compute_dtype]
        return [
            _where(name) | figures(exact, self.plain[name], fused.get(name), floor)
            for name, exact in self.exact.items()
        ]

    def calls(self) -> list[Call]:
        """Every call of an op in the plain model's forward pass, with its upstream gradients."""
        return record(self.model, lambda: self._gradients(self.model))

    def _gradients(self, model: Llama) -> dict[str, Tensor]:
        loss = model(self.tokens, self.targets, reduction="sum") / self.targets.numel()
        (loss * self.scale).backward()
        gradients = {name: p.grad / self.scale for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return {"loss": loss.detach()} | huggingface.unpack(model.config, gradients)


@torch.no_grad()
def _draw_weights(model: Llama) -> None:
    """Matrices of deviation 1 / sqrt(inputs), norm weights around 1, all of them numbers that the compute dtype has."""
    for p in model.parameters():
        drawn = torch.randn_like(p) * p.shape[1] ** -0.5 if p.ndim == 2 else 1 + 0.1 * torch.randn_like(p)
        p.copy_(drawn.to(model.compute_dtype))
    model.refresh_compute_weights()


def _in_float64(model: Llama) -> Llama:
    """The torch twins with the same weights in float64, a dtype that `Llama` has for no other purpose."""
    with model.cos.device:
        exact = Llama(model.config, kernels.select("none", model.config.n_layers))
    exact.load_state_dict(model.state_dict())
    exact.double()
    exact.compute_dtype = torch.float64
    return exact


def _where(name: str) -> dict[str, int | str]:
    """Where a canonical name belongs: its layer, or `in` and `out` for what comes before and after the layers."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    tensor = name.removesuffix(".weight").rpartition(".")[2]
    place = int(layer[1]) if layer else "in" if tensor == "embed_tokens" else "out"
    return {"layer": place, "pass": "output" if name == "loss" else "gradient", "tensor": tensor}
