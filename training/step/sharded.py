"""The step of a model whose parameters are shared out: the same figures as `Trainer`, from units that FSDP gathers and scatters.

The optimizer works on each process's rows as plain tensors (torch's fused update on DTensors takes three times as long). Norms are
whole on every process, and what is updated from equal gradients by equal sums stays equal.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from model import Llama
from training.config import TrainConfig
from training.distributed import World
from training.sharding import Shared, local, rows, units
from training.step.optimizer import MOMENTS
from training.step.trainer import MicroBatch, Trainer


class ShardedAdamW:
    """AdamW by torch's fused update over this process's rows; matrices decay, norms do not. `update` does not wait for the device.

    Attributes:
        lr: 0-d float32 on the device: the learning rate, to be filled before an update.
        state: as an optimizer's, by parameter: "step", and the moments of the rows that are here.
    """

    def __init__(self, model: Llama, config: TrainConfig):
        self.lr = torch.tensor(config.learning_rate, device=model.cos.device)
        self.betas, self.weight_decay = (config.beta1, config.beta2), config.weight_decay
        self.parameters = list(model.parameters())
        self.state = {
            p: {"step": torch.zeros((), device=self.lr.device)}
            | {moment: torch.zeros_like(local(p.detach())) for moment in MOMENTS}
            for p in self.parameters
        }

    def gradients(self) -> list[Tensor]:
        """Of the rows that are here, in the order of `parameters`."""
        return [local(p.grad) for p in self.parameters]

    @torch.no_grad()
    def update(self, factor: Tensor, skip: Tensor) -> None:
        """Update the rows from their gradients times `factor`; as `optimizer.AdamW.update`."""
        beta1, beta2 = self.betas
        gradients = self.gradients()
        torch._foreach_mul_(gradients, factor)
        for vectors in (False, True):
            of = [(p, g) for p, g in zip(self.parameters, gradients, strict=True) if (p.ndim < 2) == vectors]
            here = [(p, g) for p, g in of if g.numel()]  # of few rows and many processes some have none
            if not here:
                continue
            states = [self.state[p] for p, _ in here]
            adamw(
                [local(p.detach()) for p, _ in here],
                [g for _, g in here],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                fused=True,
                capturable=self.lr.is_cuda,
                found_inf=skip,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=self.lr,
                weight_decay=0.0 if vectors else self.weight_decay,
                eps=1e-8,
                maximize=False,
            )


class ShardedTrainer(Trainer):
    """`Trainer` for a model of `sharding.sharded_model`: the same `step` and `evaluate`, which every process calls."""

    def __init__(self, model: Llama, config: TrainConfig, world: World):
        self._set_up(model, config, world)
        self.optimizer = ShardedAdamW(model, config)
        self.loss_sum = self._loss_sum
        if config.compile:
            # A graph a layer: FSDP gathers and frees between them.
            for layer in model.layers:
                layer.compile(fullgraph=True, dynamic=False)
        self._norms = [p for p in model.parameters() if not isinstance(p, DTensor)]
        self._norm_gradients = torch.zeros(sum(p.numel() for p in self._norms), device=self.device)
        for p, view in zip(self._norms, self._norm_gradients.split([p.numel() for p in self._norms]), strict=True):
            p.grad = view
        mesh = next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh
        self._replicas = mesh.size() // mesh["shard"].size()

    def _clear_gradients(self) -> None:
        for p in self.optimizer.parameters:
            if isinstance(p, DTensor):
                p.grad = None
        self._norm_gradients.zero_()

    def _before_passes(self, last: bool) -> None:
        # Replicas are summed once a step; shards are scattered every time, or gradients would be whole on every process.
        if self._replicas > 1:
            self.model.set_requires_all_reduce(last)

    def _finish_gradients(self) -> None:
        pass

    def state(self) -> list[Tensor]:
        """As in `Trainer`, of the rows that are here."""
        parameters, scale = self.optimizer.parameters, self.loss_scale
        of_optimizer = [x for state in self.optimizer.state.values() for x in state.values()]
        return [*map(self.here, parameters), scale.scale, scale.growth_tracker, *of_optimizer]

    def replay(self, micro_batches: Iterable[MicroBatch], valid_tokens: int) -> Tensor:
        """As in `Trainer`; the gradients of matrices are those of all processes."""
        with torch.compiler.set_stance("force_eager"):
            return super().replay(micro_batches, valid_tokens)

    def gradients(self) -> dict[str, Tensor]:
        """As in `Trainer`."""
        return {name: local(p.grad) for name, p in self.model.named_parameters()}

    def here(self, parameter: Tensor) -> Tensor:
        """The rows of a parameter that this process has, in place."""
        return local(parameter.detach())

    def rows(self, parameter: Tensor) -> slice:
        """Which these are."""
        return rows(parameter)

    def savable(self, here: Tensor, parameter: Tensor) -> Tensor | Shared:
        """As in `Trainer`; gathered when it is written."""
        return Shared(here, parameter) if isinstance(parameter, DTensor) else here

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[Llama]:
        """As in `Trainer`, gathered: the layers in the compute dtype, the ends in float32."""
        model = self.model
        try:
            for unit in units(model):
                unit.unshard()
            # A module of its own, without FSDP's hooks: they keep count of passes, which must be the same on all processes.
            with torch.device("meta"):
                whole = Llama(model.config, model.ops, model.compute_dtype, copies=False)
            whole.load_state_dict(dict(model.named_parameters()), assign=True)
            whole.cos, whole.sin = model.cos, model.sin
            yield whole
        finally:
            self._free()

    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """As in `Trainer`."""
        try:
            return super().evaluate(batches)
        finally:
            self._free()

    def _free(self) -> None:
        """Keep nothing gathered, which a pass without a backward pass leaves."""
        for unit in units(self.model):
            unit.reshard()

    def _total_gradient(self) -> Tensor:
        self.world.sum(self._norm_gradients)
        shards = [local(p.grad) for p in self.optimizer.parameters if isinstance(p, DTensor)]
        squares = torch.stack(torch._foreach_norm(shards)).square().sum() / self._replicas
        self.world.sum(squares)
        return (squares + self._norm_gradients.square().sum()).sqrt()
