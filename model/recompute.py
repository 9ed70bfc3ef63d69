"""Activation checkpointing: what a layer computes again in the backward pass, so that it need not be kept until then.

    none        nothing; every activation is kept
    selective   the feed-forward's norm, w_gate_up's product and SwiGLU: of its half only the inputs are kept
    full        the whole layer, up to the input of w_down; only the layer's inputs are kept

Where the feed-forward is one kernel (kernels/mlp) that runs again, w_down's product in it.

The same numbers are computed again in the same order, so gradients are equal to the bit. What a trainer's pass adds to
`gradient_sum` is added in the backward pass, which runs once: nothing is added twice. What is kept and what is computed again in
figures: model/activations.py. MFU counts neither (model/flops.py).
"""

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def again(
    function: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor | None, draws: bool
) -> tuple[Tensor, Tensor]:
    """`function(*tensors)`, which keeps the tensors alone and runs a second time in the backward pass.

    draws: whether it draws random numbers (dropout), which are then the same in both.
    """
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=draws)
