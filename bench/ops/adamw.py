"""The sheet of AdamW, on the flat parameters of a whole model. Variants beside the common ones:

torch-fused, torch-foreach    torch.optim.AdamW, its gradients scaled before and the copies written after
"""

import functools
from collections.abc import Callable

import torch

from bench.ops.sheet import Case, Peer, Sheet, kernel, twins
from kernels.adamw import adamw_torch, adamw_triton
from model.flops import Cost, matmul_parameters, parameters
from training.config import TrainConfig


def adamw(c: TrainConfig, dtype: torch.dtype, device: torch.device) -> Case:
    """Values, gradients and both moments read, all but the gradients written, and in half precision the matrices' copies."""
    shape = c.shape()
    n = parameters(shape)
    n_decayed = n - (2 * c.n_layers + 1) * c.dim  # all but the norms
    values, gradients, exp_avg = (torch.randn(n, device=device) for _ in range(3))
    exp_avg_sq = torch.rand(n, device=device)
    copies = None if dtype == torch.float32 else torch.empty(matmul_parameters(shape), dtype=dtype, device=device)
    step, lr, factor, skip = (torch.full((), x, device=device) for x in (100.0, 1e-4, 1.0, 0.0))
    arguments = (values, gradients, exp_avg, exp_avg_sq, copies, step, lr, factor, skip)
    n_bytes = 7 * values.nbytes + (0 if copies is None else copies.nbytes)
    keywords = {"n_decayed": n_decayed, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    return Case(f"{n}", arguments, {"update": Cost(n_bytes)}, keywords)


def torch_adamw(case: Case, **implementation: bool) -> Callable:
    """`torch.optim.AdamW` on the buffers of the case, with the two groups of `training.optimizer`."""
    values, gradients, exp_avg, exp_avg_sq, copies, step, lr, factor, _ = case.arguments
    options, n = case.keywords, case.keywords["n_decayed"]
    groups = []
    for part, decay in ((slice(n), options["weight_decay"]), (slice(n, None), 0.0)):
        parameter = torch.nn.Parameter(values[part])
        parameter.grad = gradients[part]
        groups.append({"params": [parameter], "weight_decay": decay})
    betas = (options["beta1"], options["beta2"])
    on_gpu = values.is_cuda
    lr = lr if on_gpu else lr.item()
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=options["eps"], capturable=on_gpu, **implementation)
    for group, part in zip(optimizer.param_groups, (slice(n), slice(n, None)), strict=True):
        moments = {"exp_avg": exp_avg[part], "exp_avg_sq": exp_avg_sq[part]}
        optimizer.state[group["params"][0]] = {"step": step.clone(), **moments}

    def update(*_: object, **__: object) -> None:
        gradients.mul_(factor)
        optimizer.step()
        if copies is not None:
            copies.copy_(values[: copies.numel()])

    return update


SHEETS = {
    "adamw": Sheet(
        adamw,
        {
            **twins(adamw_torch),
            "torch-fused": Peer(functools.partial(torch_adamw, fused=True)),
            "torch-foreach": Peer(functools.partial(torch_adamw, foreach=True)),
            **kernel(adamw_triton),
        },
        sizes=("reference", "124m", "llama3.2-1b"),
        calls=lambda c: 0,
    ),
}
