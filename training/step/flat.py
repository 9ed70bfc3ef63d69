"""A model's parameters in one buffer, their gradients in another, the compute-dtype copies in a third.

What goes over all of them is then one pass over flat memory: the norm, the sum over processes, the update, the zeroing. And
nothing moves between steps, so that a captured CUDA graph finds everything where it was.
"""

from collections.abc import Collection
from math import prod

import torch
from torch import Tensor

from kernels.launch import target_of
from kernels.rms_norm import gradient_row_count
from model import Llama

ALIGNMENT = 64
"""Elements. Every parameter and every copy starts at a multiple of it: 128 bytes in half precision."""


class FlatParameters:
    """Moves the model's parameters into flat buffers; each parameter, gradient and copy becomes a view of its place there.

    The order: matrices that have a copy in the compute dtype, other matrices, vectors. So the copies are `values[: C]` rounded,
    element by element, and what weight decay acts on comes first. Gaps between parameters hold zeros and stay so.

    leading: names of matrices that come before all others, as an optimizer of their own wants them.

    Attributes:
        values: (N,) float32, the parameters.
        gradients: (N,) float32, zeros at first; backward passes add to it, but for some norms'.
        norm_rows: (n, R, D) float32, zeros at first: where n norms sum the gradients of a step, `rms_norm`'s `gradient_rows`.
        copies: (C,) of the compute dtype; None in float32, where there are none.
        n_decayed: the first n_decayed elements belong to matrices, the others to vectors.
        n_leading: the first n_leading elements belong to the leading matrices.
        starts: where each parameter begins, by its name.
    """

    def __init__(self, model: Llama, leading: Collection[str] = ()):
        self.model = model
        copies = model.compute_copies()
        named = sorted(
            model.named_parameters(),
            key=lambda item: (item[0] not in copies, item[1].ndim < 2, item[0] not in leading),
        )
        self.starts: dict[str, int] = {}
        size = n_copied = self.n_decayed = self.n_leading = 0
        for name, parameter in named:
            self.starts[name] = size
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            n_copied = size if name in copies else n_copied
            self.n_leading = size if name in leading else self.n_leading
            self.n_decayed = size if parameter.ndim >= 2 else self.n_decayed
        like = named[0][1]
        self.values = torch.zeros(size, dtype=like.dtype, device=like.device)
        self.gradients = torch.zeros_like(self.values)
        self.copies = None
        if copies:
            self.copies = torch.zeros(n_copied, dtype=model.compute_dtype, device=like.device)
        with torch.no_grad():
            for name, parameter in named:
                self.view(self.values, name).copy_(parameter)
                parameter.data = self.view(self.values, name)
                parameter.grad = self.view(self.gradients, name)
        for name, weight in model.weights().items():
            weight.bind(self.view(self.copies, name) if name in copies else None, self.view(self.gradients, name))
        model.refresh_compute_weights()
        self.norm_rows, self._norms = self._bind_norms()

    def _bind_norms(self) -> tuple[Tensor, list[Tensor]]:
        """Rows for the norms that can use them, (n, R, D), and the gradients that the sums of the rows belong to."""
        names, width, device = self.model.norms_with_rows(), self.model.config.dim, self.values.device
        n_rows = gradient_row_count(width, target_of(self.values)) if names else 0
        rows = torch.zeros((len(names), n_rows, width), device=device)
        self.model.bind_norm_gradient_rows(dict(zip(names, rows.unbind(), strict=True)))
        return rows, [self.view(self.gradients, name) for name in names]

    def clear_gradients(self) -> None:
        """What a step begins with."""
        self.gradients.zero_()
        self.norm_rows.zero_()

    def finish_gradients(self) -> Tensor:
        """Bring what backward passes have left elsewhere into `gradients`, which is returned."""
        if self._norms:
            torch._foreach_add_(self._norms, list(self.norm_rows.sum(1).unbind()))
        return self.gradients

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """The place of a parameter in a buffer laid out as `values` is, in the parameter's shape."""
        shape = self.model.get_parameter(name).shape
        return buffer[self.starts[name] :][: prod(shape)].view(shape)
