"""Llama 3: pre-norm RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases (https://arxiv.org/abs/2407.21783).

The residual stream r is in the compute dtype. Each norm but the first takes in the branch b before it, in one op:

    r = embedding(tokens)
    layer:  y, r = add_rms_norm(b, r)            b = wo attention(rope(wqkv y))       (the first layer: y = rms_norm(r))
            y, r = add_rms_norm(b, r)            b = w_down swiglu(w_gate_up y)       (mlp(y) where that is one kernel)
    y, _ = add_rms_norm(b, r)                    loss = linear_cross_entropy(y, head)

A layer reads no parameters but its own and is called as a module: what gathers, frees or recomputes a layer hooks in there.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import TORCH, TRITON, Ops
from kernels.mlp.op import mlp_serves
from model.config import RECOMPUTE, LlamaConfig
from model.linear import Embedding, Head, Linear, Weight, read_out
from model.recompute import again
from model.rope import rope_tables

INIT_STD = 0.02

NormGradientRows = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""`gradient_rows` for the two norms of a layer, each in a tuple that is empty where there are none."""


class Layer(nn.Module):
    """One layer: the norm that opens it, attention, the second norm, the feed-forward. recompute: as in `Llama`."""

    def __init__(self, config: LlamaConfig, copy_dtype: torch.dtype, recompute: str = "none"):
        super().__init__()
        self.recompute = recompute
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.norm_eps, self.dropout = config.norm_eps, config.dropout
        self.attention_norm = nn.Parameter(torch.ones(config.dim))
        self.wqkv = Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim, copy_dtype)
        self.wo = Linear(config.dim, config.dim, copy_dtype)
        self.ffn_norm = nn.Parameter(torch.ones(config.dim))
        self.w_gate_up = Linear(config.dim, 2 * config.hidden_dim, copy_dtype)
        self.w_down = Linear(config.hidden_dim, config.dim, copy_dtype)
        self.norm_gradient_rows: NormGradientRows = ((), ())

    def __getstate__(self) -> dict:
        """What a copy of the model is made from: what is bound is a trainer's, and stays with this one."""
        return self.__dict__ | {"norm_gradient_rows": ((), ())}

    def forward(
        self,
        ops: Ops,
        branch: Tensor | None,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        first_key: Tensor | None = None,
        to_sum: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The feed-forward branch, and the residual stream that it has yet to be added to: (B, T, dim) each.

        ops: of this layer. branch: of the layer before, which the norm that opens this one adds to residual; None in the first.
        cos, sin: (T, head_dim / 2) float32. first_key: as in `Llama.forward`. to_sum: as in `Linear`.
        """
        attention_rows, ffn_rows = self.norm_gradient_rows if to_sum else ((), ())

        def attention_half(branch: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
            if branch is None:
                y = ops.rms_norm(residual, self.attention_norm, self.norm_eps, *attention_rows)
            else:
                y, residual = ops.add_rms_norm(branch, residual, self.attention_norm, self.norm_eps, *attention_rows)
            return self._dropped(self.attend(ops, y, cos, sin, first_key, to_sum)), residual

        def feed_forward_half(branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            y, residual = ops.add_rms_norm(branch, residual, self.ffn_norm, self.norm_eps, *ffn_rows)
            return self._dropped(self.feed_forward(ops, y, to_sum)), residual

        def whole(branch: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
            return feed_forward_half(*attention_half(branch, residual))

        draws = self.dropout > 0
        if self.recompute == "full":
            return again(whole, branch, residual, draws=draws)
        if self.recompute == "selective":
            return again(feed_forward_half, *attention_half(branch, residual), draws=draws)
        return whole(branch, residual)

    def attend(
        self, ops: Ops, y: Tensor, cos: Tensor, sin: Tensor, first_key: Tensor | None, to_sum: bool = False
    ) -> Tensor:
        """The attention branch, (B, T, dim) -> (B, T, dim). to_sum: as in `Linear`."""
        o = ops.rope_attention(self.wqkv(y, to_sum), cos, sin, self.n_heads, self.n_kv_heads, first_key)
        return self.wo(o.flatten(-2), to_sum)

    def feed_forward(self, ops: Ops, y: Tensor, to_sum: bool = False) -> Tensor:
        """The SwiGLU branch, (B, T, dim) -> (B, T, dim). to_sum: as in `Linear`."""
        if ops.mlp is TORCH.mlp or not mlp_serves(y, self.w_down.weight.shape[1]):
            return self.w_down(ops.swiglu(self.w_gate_up(y, to_sum)), to_sum)
        up, down = self.w_gate_up, self.w_down
        copies = up.compute_weight, down.compute_weight
        sums = (up.gradient_sum, down.gradient_sum) if to_sum else (None, None)
        return ops.mlp(y, up.weight, down.weight, compute_weights=copies, gradient_sums=sums)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Llama(nn.Module):
    """The model. Parameters are float32; activations and the copies of the weights they meet are `compute_dtype`.

    config: its shape. ops: `n_layers + 1` of them, from `kernels.select`; the last is for the embedding, the final norm and the
    loss head. recompute: none, selective or full: what a layer computes again in the backward pass (model/recompute.py).
    copies: whether weights have copies in the compute dtype; without them they are read as they are, in whatever dtype.
    After anything but the forward pass has written parameters (an optimizer, a checkpoint), call `refresh_compute_weights`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        ops: Sequence[Ops],
        compute_dtype: torch.dtype = torch.float32,
        *,
        recompute: str = "none",
        copies: bool = True,
    ):
        super().__init__()
        config.check()
        if recompute not in RECOMPUTE:
            raise ValueError(f"Llama: recompute is {recompute!r}, wanted one of {', '.join(RECOMPUTE)}")
        if len(ops) != config.n_layers + 1:
            raise ValueError(
                f"Llama: ops has {len(ops)} entries, wanted n_layers + 1 = {config.n_layers + 1} (kernels.select)"
            )
        if compute_dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"Llama: compute_dtype is {compute_dtype}, wanted torch.float32, torch.bfloat16 or torch.float16"
            )
        self.config = config
        self.ops = tuple(ops)
        self.compute_dtype = compute_dtype
        copy_dtype = compute_dtype if copies else torch.float32
        # The embedding is read row by row: it has a copy only where it is the head as well.
        looked_up = copy_dtype if config.tie_embeddings else torch.float32
        self.embedding = Embedding(config.vocab_size, config.dim, looked_up)
        self.head = None if config.tie_embeddings else Head(config.vocab_size, config.dim, copy_dtype)
        self.layers = nn.ModuleList(Layer(config, copy_dtype, recompute) for _ in range(config.n_layers))
        self.final_norm = nn.Parameter(torch.ones(config.dim))
        self.final_norm_gradient_rows: tuple[Tensor, ...] = ()
        cos, sin = rope_tables(config)
        device = self.embedding.weight.device  # the meta device included, where a 405B model is counted
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)
        self.reset_parameters()

    def __getstate__(self) -> dict:
        """As `Layer.__getstate__`."""
        return self.__dict__ | {"final_norm_gradient_rows": ()}

    def bind_norm_gradient_rows(self, rows: dict[str, Tensor]) -> None:
        """Let the norms' ops add the gradients of these weights, by the names of `norms_with_rows`, to these rows."""
        self.final_norm_gradient_rows = tuple(rows[name] for name in ("final_norm",) if name in rows)
        for i, layer in enumerate(self.layers):
            names = (f"layers.{i}.attention_norm", f"layers.{i}.ffn_norm")
            layer.norm_gradient_rows = tuple((rows[name],) if name in rows else () for name in names)

    def norms_with_rows(self) -> list[str]:
        """The norm weights whose op can add a gradient to `gradient_rows`: where Triton's kernel is chosen."""
        chosen = [ops.rms_norm is TRITON.rms_norm for ops in self.ops]
        names = [
            f"layers.{i}.{norm}"
            for i in range(len(self.layers))
            if chosen[i]
            for norm in ("attention_norm", "ffn_norm")
        ]
        return names + ["final_norm"] * chosen[-1]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start from `initial_values`."""
        for name, value in self.initial_values():
            self.get_parameter(name).copy_(value)
        self.refresh_compute_weights()

    def initial_values(self, device: torch.device | None = None) -> Iterator[tuple[str, Tensor]]:
        """The parameters' names and what each starts from, whole and float32 on the device, its own if none is given.

        Norms are ones, matrices normal with deviation 0.02, the two that write the residual stream by 1/sqrt(2 * n_layers) of that.
        Drawn one after another from the device's generator, so that whoever keeps a part of each has part of the same model.
        """
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            value = torch.ones(parameter.shape, device=device or parameter.device)
            if parameter.ndim > 1:
                value.normal_(std=residual_std if name.endswith(("wo.weight", "w_down.weight")) else INIT_STD)
            yield name, value

    def weights(self) -> dict[str, Weight]:
        """The matrices by the names of their parameters."""
        return {f"{name}.weight": module for name, module in self.named_modules() if isinstance(module, Weight)}

    def compute_copies(self) -> dict[str, Tensor]:
        """The compute-dtype copies by the name of the parameter that each is of; none in float32."""
        copies = {name: weight.compute_weight for name, weight in self.weights().items()}
        return {name: copy for name, copy in copies.items() if copy is not None}

    @torch.no_grad()
    def refresh_compute_weights(self) -> None:
        """Write the compute-dtype copies from the parameters, in place: their storage never moves."""
        copies = self.compute_copies()
        if copies:
            torch._foreach_copy_(list(copies.values()), [self.get_parameter(name) for name in copies])

    @property
    def output(self) -> Weight:
        """The (vocab_size, dim) matrix of the output head: the embedding where they are tied."""
        return self.embedding if self.head is None else self.head

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        first_key: Tensor | None = None,
        reduction: str = "mean",
        scale: Tensor | None = None,
    ) -> Tensor:
        """Loss if targets are given, else logits.

        tokens: (B, T) int64, T at most max_seq_len. targets: (B, T) int64, -100 where a position does not count.
        first_key: (B, T) int32, the first token each token may see (packed documents, windows); None: all before it.
        reduction: "mean" over targets that count, or "sum". scale: 0-d float32, the very tensor with which the loss's `backward`
        will be called, once, where that is known by now: the loss head then scales its gradients where they are made. With
            it the pass is a trainer's, and gradients may go to the sums that a trainer has bound. Without it autograd gets all.
        Returns a 0-d float32 loss in nats, or logits (B, T, V) float32.
        """
        hidden = self.hidden(tokens, first_key, scale is not None)
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(
                f"Llama: targets has shape {tuple(targets.shape)}, tokens has {tuple(tokens.shape)}; they must be equal"
            )
        if self.head is None:
            return read_out(self.embedding, self.ops[-1], hidden, targets, reduction, scale)
        return self.head(self.ops[-1], hidden, targets, reduction, scale)

    def hidden(self, tokens: Tensor, first_key: Tensor | None = None, to_sum: bool = False) -> Tensor:
        """The final norm's output (B, T, dim), which the output head reads. to_sum: as in `Linear`."""
        config, ops = self.config, self.ops
        if tokens.ndim != 2 or tokens.shape[1] > config.max_seq_len:
            raise ValueError(
                f"Llama: tokens has shape {tuple(tokens.shape)}, wanted (B, T) with T at most {config.max_seq_len}"
            )
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        residual = self.embedding(ops[-1], tokens, self.compute_dtype, to_sum)
        if config.dropout:
            residual = F.dropout(residual, config.dropout, self.training)
        branch = None
        for layer, its_ops in zip(self.layers, ops[:-1], strict=True):
            branch, residual = layer(its_ops, branch, residual, cos, sin, first_key, to_sum)
        final_rows = self.final_norm_gradient_rows if to_sum else ()
        y, _ = ops[-1].add_rms_norm(branch, residual, self.final_norm, config.norm_eps, *final_rows)
        return y
