"""What each op is measured against: the variants of `bench.ops`, one table of them an op.

    eager, compiled           the torch twin, as it is and under torch.compile. Of the loss head: the matmul and
                              F.cross_entropy that people write, which hold all logits; the twin, in chunks, is `twin`
    sdpa-flash, -cudnn, -efficient, -mask    F.scaled_dot_product_attention, held to one backend; with a dense mask
    flex                      FlexAttention, compiled, with a block mask
    varlen                    torch.nn.attention.varlen, FlashAttention over documents end to end
    F.linear_cross_entropy    torch 2.13's, with its chunks; without them it is `eager`
    torch-fused, torch-foreach    torch.optim.AdamW, its gradients scaled before and the copies written after
    liger                     Liger-Kernel's op
    triton                    the kernel here

Masks and whatever else a model makes once for all its layers are made outside of the time. Keys and values are repeated,
inside of it, where a backend takes no grouped queries.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from bench.ops.cases import Case
from bench.peers import liger
from kernels.adamw import adamw_torch, adamw_triton


@dataclass(frozen=True)
class Peer:
    """One way to compute an op."""

    make: Callable[[Case], Callable]
    """The function to be called with the arguments of a case."""
    needs_gpu: bool = False
    deterministic: bool = True
    """Whether it runs while torch's deterministic algorithms are on; if not, they are lifted for it alone."""


# -------------------------------------------------------------------------------------------------------------- attention


def sdpa(backend: SDPBackend, *, grouped: bool = True) -> Callable:
    """Causal attention by one backend of SDPA, for (B, T, heads, D); `grouped`: it takes fewer heads of keys than of queries."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = _heads_first(q, k, v, repeat=not grouped)
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return o.transpose(1, 2)

    return attention


def sdpa_mask(case: Case) -> Callable:
    """SDPA with a dense mask of the documents, made here; on a GPU by the one fast backend that takes a mask."""
    first_key = case.arguments[3]
    position = torch.arange(first_key.shape[1], device=first_key.device)
    mask = (position >= first_key.unsqueeze(-1)) & (position <= position.unsqueeze(-1))  # [B, query, key]
    mask = mask.unsqueeze(1)

    def attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor) -> Tensor:
        q, k, v = _heads_first(q, k, v, repeat=True)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if q.is_cuda else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attention


def flex(case: Case) -> Callable:
    """FlexAttention, compiled, with a causal mask that ends at the documents' edges where there are documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, _, _, *packed = case.arguments
    batch, length = q.shape[:2]

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    def causal_in_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= packed[0][b, query])

    if packed:
        mask = create_block_mask(causal_in_document, batch, None, length, length, device=q.device)
    else:
        mask = create_block_mask(causal, None, None, length, length, device=q.device)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None = None) -> Tensor:
        q, k, v = _heads_first(q, k, v)
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return attention


def varlen(case: Case) -> Callable:
    """FlashAttention of torch over documents of any lengths, laid end to end."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = document_starts(case.arguments[3])

    def attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor) -> Tensor:
        rows = (x.flatten(0, 1) for x in (q, k, v))
        causal, grouped = (-1, 0), q.shape[2] != k.shape[2]
        o = varlen_attn(*rows, starts, starts, longest, longest, window_size=causal, enable_gqa=grouped)
        return o.unflatten(0, q.shape[:2])

    return attention


def document_starts(first_key: Tensor) -> tuple[Tensor, int]:
    """Where each document begins in the flattened batch, and the end of the last, int32; and the longest one's length."""
    position = torch.arange(first_key.shape[1], device=first_key.device)
    starts = (first_key == position).flatten().nonzero().flatten()
    starts = F.pad(starts, (0, 1), value=first_key.numel()).int()
    return starts, int(starts.diff().max())


def _heads_first(*tensors: Tensor, repeat: bool = False) -> list[Tensor]:
    """(B, T, heads, D) as views (B, heads, T, D); `repeat`: with as many heads of keys and values as of queries, in copies."""
    q, *others = (x.transpose(1, 2) for x in tensors)
    group = q.shape[1] // others[0].shape[1]
    return [q, *(x.repeat_interleave(group, dim=1) if repeat and group > 1 else x for x in others)]


# --------------------------------------------------------------------------------------------------- loss head, optimizer


def unchunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss head as people write it: logits of the whole batch, held three times when it is differentiated."""
    return F.cross_entropy(hidden @ weight.T, targets)


def torch_linear_cross_entropy(case: Case) -> Callable:
    """`F.linear_cross_entropy` with the chunks that torch chooses."""
    return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


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


# ----------------------------------------------------------------------------------------------------------------- tables


def _always(function: Callable) -> Callable[[Case], Callable]:
    return lambda case: function


def _twins(function: Callable) -> dict[str, Peer]:
    """`eager` and `compiled`."""
    return {
        "eager": Peer(_always(function)),
        "compiled": Peer(lambda case: torch.compile(function, fullgraph=True, dynamic=False)),
    }


def _kernel(function: Callable) -> dict[str, Peer]:
    return {"triton": Peer(_always(function), needs_gpu=True)}


def _liger(op: str) -> dict[str, Peer]:
    return {"liger": Peer(lambda case: liger.ops()[op], needs_gpu=True)}


_FLEX = {"flex": Peer(flex, needs_gpu=True)}

PEERS: dict[str, dict[str, Peer]] = {
    op: _twins(getattr(kernels.TORCH, op)) | _liger(op) | _kernel(getattr(kernels.TRITON, op))
    for op in ("rms_norm", "add_rms_norm", "rope", "swiglu")
}
PEERS["attention"] = {
    **_twins(kernels.TORCH.attention),
    "sdpa-flash": Peer(_always(sdpa(SDPBackend.FLASH_ATTENTION))),
    "sdpa-cudnn": Peer(_always(sdpa(SDPBackend.CUDNN_ATTENTION)), needs_gpu=True, deterministic=False),
    "sdpa-efficient": Peer(_always(sdpa(SDPBackend.EFFICIENT_ATTENTION, grouped=False)), needs_gpu=True),
    **_FLEX,
    **_kernel(kernels.TRITON.attention),
}
PEERS["packed_attention"] = {
    **_twins(kernels.TORCH.attention),
    "sdpa-mask": Peer(sdpa_mask),
    **_FLEX,
    "varlen": Peer(varlen, needs_gpu=True),
    **_kernel(kernels.TRITON.attention),
}
PEERS["embedding"] = _twins(kernels.TORCH.embedding) | _kernel(kernels.TRITON.embedding)
PEERS["linear_cross_entropy"] = {
    **_twins(unchunked),
    "twin": Peer(_always(kernels.TORCH.linear_cross_entropy)),
    "F.linear_cross_entropy": Peer(torch_linear_cross_entropy),
    **_liger("linear_cross_entropy"),
    **_kernel(kernels.TRITON.linear_cross_entropy),
}
PEERS["adamw"] = {
    **_twins(adamw_torch),
    "torch-fused": Peer(functools.partial(torch_adamw, fused=True)),
    "torch-foreach": Peer(functools.partial(torch_adamw, foreach=True)),
    **_kernel(adamw_triton),
}
"""By op, by variant, in the order in which they are shown."""

VARIANTS = tuple(dict.fromkeys(variant for peers in PEERS.values() for variant in peers))


def why_absent(op: str, variant: str, device: torch.device) -> str | None:
    """Why a variant can't be timed here, if it can't."""
    if variant == "liger" and not liger.installed():
        return "not installed"
    return "no GPU" if PEERS[op][variant].needs_gpu and device.type != "cuda" else None


class Contender:
    """One variant of an op on the arguments of a case. Making it runs its passes once: what fails, fails here."""

    def __init__(self, op: str, variant: str, case: Case):
        peer = PEERS[op][variant]
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
