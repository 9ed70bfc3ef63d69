"""quack's norms, under the signatures of `kernels.Ops`: an optional peer, `pip install quack-kernels`.

https://github.com/Dao-AILab/quack, 0.6 or newer, for Hopper and what came after it. It compiles with NVIDIA's CuTe DSL.
"""

import importlib.util
from collections.abc import Callable

from torch import Tensor


def installed() -> bool:
    """Whether it is there; this does not import it."""
    return importlib.util.find_spec("quack") is not None


def ops() -> dict[str, Callable]:
    """Each op that quack has, by our name for it."""
    from quack import rmsnorm

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rmsnorm(x, weight, eps=eps)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)

    return {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm}
