"""One variant of an op at work on a case: its passes, each ready to be timed by itself."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.ops.catalogue import SHEETS
from bench.ops.sheet import Case


class Contender:
    """One variant of an op on the arguments of a case. Making it runs its passes once: what fails, fails here."""

    def __init__(self, op: str, variant: str, case: Case):
        peer = SHEETS[op].peers[variant]
        self._function = functools.partial(peer.make(case), *case.arguments, **case.keywords)
        self._wanted = case.wanted
        self._deterministic = peer.deterministic
        self._outputs: tuple[Tensor, ...] = ()
        if self._wanted:
            # Of its own, as Liger writes into them; 1 for a loss, as `loss.backward()` has it.
            self._upstream = [torch.randn_like(y) if y.ndim else torch.ones_like(y) for y in self.forward()]
        for direction in case.costs:
            self.prepare(direction)
            self.run(direction)

    def prepare(self, direction: str) -> None:
        """A forward pass for `backward` to go back through: a fresh one for each, as some free or overwrite what they saved."""
        if direction == "backward":
            self._outputs = self.forward()

    def run(self, direction: str) -> None:
        """A pass of `Case.costs`, or `both`."""
        if direction in ("evaluation", "update"):
            with torch.no_grad():
                self.forward()
        elif direction == "forward":
            self.forward()
        else:
            if direction == "both":
                self._outputs = self.forward()
            self.backward()

    def forward(self) -> tuple[Tensor, ...]:
        """What the op returns; as in training, with what it saves, unless gradients are off."""
        with self._determinism():
            outputs = self._function()
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def backward(self) -> tuple[Tensor, ...]:
        """The gradients of all inputs that want one, back through the last forward pass."""
        with self._determinism():
            gradients = torch.autograd.grad(self._outputs, self._wanted, self._upstream)
        self._outputs = ()
        return gradients

    @contextlib.contextmanager
    def _determinism(self) -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(before and self._deterministic)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
