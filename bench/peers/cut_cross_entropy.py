"""Cut cross-entropy, under the signature of `kernels.Ops`: an optional peer, `pip install '.[bench]'`.

https://github.com/apple/ml-cross-entropy, arXiv:2411.09009, 25.1 or newer. Called with its defaults, by which it leaves
out what is too small for the gradient's dtype. Its backward adds up under locks: the same inputs may give other bits.
"""

import importlib.util
from collections.abc import Callable

from torch import Tensor


def installed() -> bool:
    """Whether it is there; this does not import it."""
    return importlib.util.find_spec("cut_cross_entropy") is not None


def ops() -> dict[str, Callable]:
    """The op that it has, by our name for it."""
    from cut_cross_entropy import linear_cross_entropy as cut

    def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
    ) -> Tensor:
        return cut(hidden, weight.to(hidden.dtype), targets, ignore_index=ignore_index, reduction=reduction)

    return {"linear_cross_entropy": linear_cross_entropy}
