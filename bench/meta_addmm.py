"""The meta kernel of `addmm(..., out_dtype=, out=)`, which torch 2.11 lacks: importing this adds it, for runs on the meta device.

torch 2.11 sends the call to a decomposition that takes the dtype for `beta` and raises TypeError. On a GPU the call is right.
"""

import warnings

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("aten", "IMPL")  # a registration lasts as long as its library


def _broken() -> bool:
    x = torch.empty(1, 1, dtype=torch.bfloat16, device="meta")
    out = x.float()
    try:
        torch.addmm(out, x, x, out_dtype=torch.float32, out=out)
    except TypeError:
        return True
    return False


def _addmm(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta=1, alpha=1, out: Tensor) -> Tensor:
    return out


if _broken():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden is what is wanted
        _LIBRARY.impl("addmm.dtype_out", _addmm, "Meta", allow_override=True)
