"""Why a step was skipped: the op of the layer that first gave a value that is not finite, and whether its kernel is to blame.

A step is a function of its number and of the parameters, and a skipped one leaves those as they were. So it is done again here op
by op, uncompiled and uncaptured, and every value is looked at on its way. The first op that gives one that is not finite is then
done twice more with what it was given: by its torch twin, and in float64.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels import TORCH
from kernels.ops import OUTPUTS
from training.config import TrainConfig
from training.device import seed_step
from training.distributed import World
from training.log.metrics import Metrics
from training.progress import Progress, UnderWay
from training.step.trainer import MicroBatch, Trainer
from training.step.watch import PRODUCTS, SUMS, Call, Sight, watching

_BEFORE = 3  # ops whose largest values are told


class Skips:
    """Explains the first skipped steps of a run, `explain_skips` of them. Every process calls it; the main one has the metrics.

    load: the micro-batches of a step that fall to this process, on the CPU, and how many of their targets count.
    """

    def __init__(
        self,
        config: TrainConfig,
        trainer: Trainer,
        load: Callable[[int], tuple[Sequence[MicroBatch], int]],
        progress: Progress,
        world: World,
        metrics: Metrics | None,
    ):
        self._config, self._trainer, self._load = config, trainer, load
        self._progress, self._world, self._metrics = progress, world, metrics
        self._left, self._seen = config.explain_skips, progress.skipped

    def explain(self, under_way: UnderWay) -> None:
        """Explain the step that was skipped, if one has been since the last call."""
        if self._progress.skipped == self._seen or not self._left:
            return
        under_way.finish()
        new, self._seen = self._progress.skipped - self._seen, self._progress.skipped
        in_a_row = self._progress.skipped_in_a_row
        if not in_a_row:  # the step after it was under way already, and has changed the parameters
            under_way.lag = 0
            self._note(["a step was skipped; the next one that is will be explained"])
            return
        self._left -= 1
        # Those in a row all had the same parameters: the first new one of them is explained, with the loss scale that it had.
        back = min(in_a_row, new)
        step = self._progress.step - back
        micro_batches, valid = self._load(step)
        (valid,) = self._world.totals(valid, at=f"the explanation of step {step}")
        scale = self._trainer.loss_scale.scale
        halvings = 2.0**back if self._trainer.loss_scale.enabled else 1.0
        scale.mul_(halvings)
        devices = [self._trainer.device] if self._trainer.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if self._config.dropout:
                seed_step(self._config.seed, step, self._world.rank)
            # The passes of shares of a model are all processes' or none's; and a sum may be spoilt by what another one's op gave.
            found = _of_parameters(self._trainer)
            if not any(self._world.gather(bool(found))):
                found, loss = _of_ops(self._trainer, micro_batches, valid)
                if not any(self._world.gather(bool(found))):
                    found = _of_sums(self._trainer, loss)
        scale.div_(halvings)
        by_rank = self._world.gather(found)
        rank = next((rank for rank, of in enumerate(by_rank) if of), 0)
        of_rank = f" (rank {rank})" if self._world.size > 1 else ""
        lines = by_rank[rank] or [_not_again(self._config, self._trainer)]
        self._note([f"step {step} was skipped; done again op by op, from the same parameters{of_rank}:", *lines])

    def _note(self, lines: list[str]) -> None:
        if self._metrics:
            self._metrics.note("\n  ".join(lines))


def _of_parameters(trainer: Trainer) -> list[str]:
    """What is not finite in the parameters that this process has, or in their copies."""
    model = trainer.model
    for name, p in model.named_parameters():
        here = trainer.here(p)
        if _bad(here):
            return [
                f"the parameter {name} itself has {_count(here)}",
                "go on from an earlier checkpoint: --init-from resume --which",
            ]
    copies, dtype = model.compute_copies(), model.compute_dtype
    for name in model.weights():
        here = trainer.here(model.get_parameter(name))
        if _bad(copies[name] if copies else here.to(dtype)):  # of shares FSDP gathers copies, anew in each pass
            limit = torch.finfo(dtype).max
            return [f"the parameter {name} is up to {_largest(here):.3g}, more than {_name(dtype)} holds ({limit:.3g})"]
    return []


def explain(trainer: Trainer, micro_batches: Sequence[MicroBatch], valid_tokens: int) -> list[str]:
    """What is not finite first in this process's part of a step, in lines for the log; none where all is finite.

    Writes the gradients, and leaves everything else of the trainer as it is.
    """
    if found := _of_parameters(trainer):
        return found
    found, loss = _of_ops(trainer, micro_batches, valid_tokens)
    return found or _of_sums(trainer, loss)


def _of_ops(trainer: Trainer, micro_batches: Sequence[MicroBatch], valid_tokens: int) -> tuple[list[str], Tensor]:
    """What an op gave that is not finite, and the loss."""
    first = _First()
    with watching(trainer.model, first.see):
        loss = trainer.replay(micro_batches, valid_tokens)
    return _lines(first.found, trainer) if first.found else [], loss


def _of_sums(trainer: Trainer, loss: Tensor) -> list[str]:
    """What is not finite though all that the ops gave is."""
    if _bad(loss):
        return [f"the loss is {loss.item()}, though all that the ops give is finite"]
    gradients = {name: gradient for name, gradient in trainer.gradients().items() if gradient.numel()}
    for name, gradient in reversed(gradients.items()):
        if _bad(gradient):
            return [f"the gradient of {name}, summed over the step, has {_count(gradient)}; all else is finite"]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients.values()))))
    if _bad(norm):
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        return [f"the gradient is finite, up to {largest:.3g}, and its norm is more than float32 holds"]
    return []


@dataclass(frozen=True)
class _Found:
    """The first sight of what is not finite."""

    sight: Sight
    name: str
    tensor: Tensor
    before: tuple[str, ...]
    given: str


class _First:
    """Looks for it, and keeps what was seen just before."""

    def __init__(self):
        self.found: _Found | None = None
        self._before: deque[str] = deque(maxlen=_BEFORE)
        self._given = ""

    def see(self, sight: Sight) -> None:
        if self.found:
            return
        for name, x in sight.tensors.items():
            if _bad(x):
                sight = replace(sight, call=replace(sight.call, arguments=_kept(sight.call.arguments)))
                self.found = _Found(sight, name, x.detach().clone(), tuple(self._before), self._given)
                return
        sizes = ", ".join(f"{name} {_largest(x):.3g}" for name, x in sight.tensors.items() if name not in SUMS)
        if sight.gives:
            self._before.append(f"{sight.call} {sizes}")
        else:
            self._given = sizes


def _kept(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call, copied: what FSDP gathers is freed after its layer's pass, and reading it then is a fault."""

    def copied(x: Any) -> Any:
        return _copy(x, x.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: copied(x) for name, x in arguments.items() if name not in SUMS}


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The values as a tensor of its own, which wants a gradient if x does, and in the dtype in which x does."""
    copy = x.detach().clone().to(dtype).requires_grad_(x.requires_grad)
    if x.is_leaf and dtype == x.dtype:
        copy.grad_dtype = x.grad_dtype
    return copy


def _lines(found: _Found, trainer: Trainer) -> list[str]:
    sight, call = found.sight, found.sight.call
    what = "gives" if sight.gives else "is given"
    lines = [f"first not finite: {call}, {sight.direction}, {what} {found.name}: {_count(found.tensor)}"]
    if sight.gives and found.given:
        lines.append(f"the largest magnitudes that it is given: {found.given}")
    if found.before:
        lines.append(f"and before that: {'; '.join(found.before)}")
    return [*lines, *_blame(found, trainer)] if sight.gives else lines


def _blame(found: _Found, trainer: Trainer) -> list[str]:
    """Whether the kernel or the mathematics did it: by the twin, and by float64."""
    sight, call = found.sight, found.sight.call
    place = f"{call.op}@{call.layer}"

    def again(function: Callable, double: bool = False) -> list[Tensor]:
        results = _again(function, sight, double)
        return [results[found.name]] if found.name in results else list(results.values())

    twin = None if call.op in PRODUCTS else getattr(TORCH, call.op)
    if twin is not None and call.function is not twin:
        results = again(twin)
        if not any(map(_bad, results)):
            switch = {"add_rms_norm": "rms_norm", "rope_attention": "attention"}.get(call.op, call.op)
            return [
                f"its torch twin gives finite values, up to {max(map(_largest, results)):.3g}: the kernel is to blame; "
                f"-{switch}@{call.layer} in --kernels leaves it out, and python -m bench.parity --bisect examines it"
            ]
        lines = [f"its torch twin gives the same kind of values: what {place} is given is to blame, and not its kernel"]
    else:
        lines = []
    exact = max(map(_largest, again(_in_float64(call), double=True)))
    dtype, computed = found.tensor.dtype, trainer.model.compute_dtype
    limit = torch.finfo(dtype).max
    if not exact < torch.inf:
        return [*lines, "in float64 it is not finite either"]
    if exact <= limit:
        on_the_way = f"what {_name(computed)} rounds or cannot hold on the way is to blame"
        lines.append(f"in float64 it is finite, up to {exact:.3g}: {on_the_way}")
    else:
        lines.append(f"in float64 it is up to {exact:.3g}, more than {_name(dtype)} holds ({limit:.3g})")
    if sight.backward and trainer.loss_scale.enabled:
        lines.append(
            "the loss scale of the step made it so large, and has been halved since, as float16 needs now and then"
        )
    return lines


def _in_float64(call: Call) -> Callable:
    return (lambda x, weight: linear(x, weight)) if call.op in PRODUCTS else getattr(TORCH, call.op)


@torch.enable_grad()
def _again(function: Callable, sight: Sight, double: bool = False) -> dict[str, Tensor]:
    """What a function makes of a call's arguments: its results, or where the sight is of a backward pass their gradients.

    By the names that the sight has for them.
    """
    arguments = dict(sight.call.arguments)
    if double:
        compute_weight = arguments.pop("compute_weight", None)
        if compute_weight is not None:  # what was read in the weight's stead
            arguments["weight"] = compute_weight.detach().requires_grad_(arguments["weight"].requires_grad)
        copies = arguments.pop("compute_weights", (None, None))
        for name, copy in zip(("gate_up_weight", "down_weight"), copies, strict=True):
            if copy is not None:
                arguments[name] = copy.detach().requires_grad_(arguments[name].requires_grad)
        arguments = {name: torch.float64 if isinstance(x, torch.dtype) else x for name, x in arguments.items()}
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.is_floating_point() and name != "scale":
            arguments[name] = _copy(x, torch.float64 if double else x.dtype)
    result = function(**arguments)
    names, upstream = OUTPUTS.get(sight.call.op, ("y",)), sight.call.upstream
    outputs = dict(zip(names, [result] if isinstance(result, Tensor) else result, strict=True))
    if not sight.backward:
        return {name: y.detach() for name, y in outputs.items()}
    used = {name: y for name, y in outputs.items() if name in upstream}
    wanted = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    gradients = torch.autograd.grad(
        list(used.values()),
        list(wanted.values()),
        [upstream[name].to(y.dtype) for name, y in used.items()],
        allow_unused=True,
    )
    of = zip(wanted, gradients, strict=True)
    return {f"gradient of {name}": gradient for name, gradient in of if gradient is not None}


def _not_again(config: TrainConfig, trainer: Trainer) -> str:
    if config.compile:
        return "all is finite so: what torch.compile made of it rounds otherwise, or is to blame (--no-compile)"
    return "all is finite this time: a kernel that is not deterministic, or hardware that fails? --check-steps 100 watches for that"


def _bad(x: Tensor) -> bool:
    # Detached: what autograd kept of this would be missed where the pass is done again (activation checkpointing).
    return not bool(x.detach().isfinite().all())


def _count(x: Tensor) -> str:
    n = int((~x.isfinite()).sum())
    return f"{n:,} of {x.numel():,} values not finite" if x.numel() > 1 else f"it is {x.item()}"


def _largest(x: Tensor) -> float:
    return x.detach().abs().max().item() if x.numel() else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
