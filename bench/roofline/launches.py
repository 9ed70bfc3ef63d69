"""The launches of one training step and the bytes of their tensors, op by op, counted without a GPU.

`Trainer.step` itself runs, on tensors of the meta device, which have shapes and no numbers. Every call that reaches the
dispatcher and makes or changes a tensor is a launch, and so is every Triton kernel that `kernels.launch.record_launches` lists.
Views and bare allocations are none. A launch moves each of its tensors once: what it reads, what it writes, and both for what
it changes in place. Caches are not in the count, and neither is a second reading inside a kernel.

PyTorch's calls are those of eager mode: `torch.compile` joins elementwise ones, so a compiled step has fewer. Some calls (a fused
update of many tensors, the backward of a flash attention) launch more than one kernel and count as one.

A call belongs to the op that it was made in, or, in the backward pass, to the op that made the autograd node: nodes are numbered in
the order of their making. A Triton launch belongs to the op of its kernel's file.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.autograd import _get_sequence_nr
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench.meta_addmm  # noqa: F401 - torch 2.11 cannot run half-precision products on the meta device without it
import kernels
from kernels import Ops
from kernels.attention.op import attention_torch
from kernels.launch import NAMESPACE, TARGETS, LaunchRecord, record_launches
from kernels.mlp.op import mlp_torch
from kernels.ops import FIELDS, InTurn
from model import Llama
from model.linear import Linear
from training.config import TrainConfig
from training.distributed import World
from training.step.trainer import Trainer

GLUE = "between ops"
ACCUMULATION = "accumulation of gradients"
UPDATE = "optimizer"

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
OVERWRITING = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
INDEXED = {"embedding", "gather", "index_select", "scatter_", "index", "index_add_"}
"""Calls that read or write their first tensor only where an index points."""

COUNTED_AS = {op: switch for switch, ops in FIELDS.items() for op in ops} | {"rope_attention": "attention"}
"""The name that `model.flops` counts an op by: its switch, or of one that is two of them the one that does the most."""


@dataclass(frozen=True)
class Tally:
    """Launches, and bytes read and written by them."""

    launches: int = 0
    bytes: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.launches + other.launches, self.bytes + other.bytes)

    def __sub__(self, other: "Tally") -> "Tally":
        return Tally(self.launches - other.launches, self.bytes - other.bytes)

    def times(self, n: int) -> "Tally":
        """So many of it."""
        return Tally(n * self.launches, n * self.bytes)


def count(config: TrainConfig, spec: str, arch: str = "sm_90") -> dict[str, Tally]:
    """What a step in bfloat16 with the kernels of `spec` issues on an architecture, by op.

    Keys are the ops of `model.flops.step_costs`, what is done between them (casts, gradients put together), the accumulation of
    gradients, and under `optimizer` all that is outside of the model: clip, update, scale. Where `spec` names kernels, Triton must
    be installed and not in its interpreter.
    """
    one, two = (_step(config, spec, arch, n) for n in (1, 2))
    more = config.gradient_accumulation_steps - 1
    # What is done once a step is in both, and out of their difference.
    return {op: one.get(op, Tally()) + (two[op] - one.get(op, Tally())).times(more) for op in two}


def _step(config: TrainConfig, spec: str, arch: str, micro_steps: int) -> dict[str, Tally]:
    """The tallies of a step of so many micro-steps."""
    counter = _Counter()
    with torch.device("meta"):
        ops = [counter.label_ops(ops) for ops in kernels.select(spec, config.n_layers)]
        model = Llama(config.shape(), ops, torch.bfloat16)
        tokens = torch.empty(config.batch_size, config.max_seq_len, dtype=torch.int64)
    for module in model.modules():
        if isinstance(module, Linear):
            module.forward = counter.label("linear", module.forward)
    model.forward = counter.label(GLUE, model.forward)
    trainer = Trainer(model, replace(config, kernels=spec, compile=False), World())
    batch = [(tokens, tokens, None)] * micro_steps
    if spec == "none":
        with counter:
            trainer.step(batch, tokens.numel() * micro_steps, config.learning_rate)
    else:
        with record_launches(TARGETS[arch]) as counter.launched, counter:
            trainer.step(batch, tokens.numel() * micro_steps, config.learning_rate)
    counter.add_launched(set())
    return counter.tallies


def flash_attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None = None) -> Tensor:
    """What `attention_torch` does on a GPU: there SDPA chooses its flash kernel and pads heads to a multiple of 8.

    It asks the device, and of the meta device it expects nothing but the unfused form.
    """
    assert first_key is None
    width = q.shape[-1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if width % 8:
        q, k, v = (F.pad(x, (0, -width % 8)) for x in (q, k, v))
    o = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True, scale=width**-0.5)[0]
    return o[..., :width].transpose(1, 2).contiguous()


# ------------------------------------------------------------------------------------------------------------- the mode


class _Counter(TorchDispatchMode):
    """Sees every call below autograd and adds it to the tally of its op."""

    def __init__(self):
        super().__init__()
        self.tallies: dict[str, Tally] = {}
        self.launched: list[LaunchRecord] = []
        self._seen = 0  # launches of `launched` that are counted
        self._within = [UPDATE]
        self._op_of_node: dict[int, str] = {}

    def label(self, op: str, function: Callable) -> Callable:
        """`function`, whose calls, and those of its backward pass, belong to `op`."""

        @functools.wraps(function)
        def labelled(*args, **kwargs):
            with self._in(op):
                return function(*args, **kwargs)

        return labelled

    def label_ops(self, ops: Ops) -> Ops:
        """The ops, each of whose calls belongs to the op that `model.flops` counts it by."""
        if ops.attention is attention_torch:
            ops = replace(ops, attention=flash_attention)
        names = [name for names in FIELDS.values() for name in names]
        if not isinstance(ops.rope_attention, InTurn):
            names.append("rope_attention")
        if ops.mlp is mlp_torch:  # its products and SwiGLU, each by itself
            names.remove("mlp")
        return Ops(**{name: self.label(COUNTED_AS[name], getattr(ops, name)) for name in names})

    @contextmanager
    def _in(self, op: str) -> Iterator[None]:
        first = _get_sequence_nr()
        self._within.append(op)
        yield
        self._within.pop()
        for number in range(first, _get_sequence_nr()):
            self._op_of_node.setdefault(number, op)  # an op inside another has ended, and named its nodes, before

    def _op(self, func: Any) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            op = self._within[-1]
        elif node.name().endswith("AccumulateGrad"):
            op = ACCUMULATION
        else:
            op = self._op_of_node.get(node._sequence_nr(), UPDATE)
        return "embedding" if op == GLUE and "embedding" in func.__name__ else op

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op = self._op(func)
        if (
            func is torch.ops.triton_llama.add_product.default
        ):  # a linear map's, whoever asks: the feed-forward's kernel does too
            self._add("linear", call_bytes(func, args, kwargs, None))
            return None
        if func.namespace == NAMESPACE:  # the launcher: its kernels, and the copies that it makes for them
            self.add_launched(set())
            with self, self._in(op):
                out = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
            self.add_launched({_storage(x) for x, _, is_written in _arguments(func, args, kwargs) if is_written})
            return out
        # What only changes numbers has nothing to do here, and not all of it could run on the meta device.
        out = func(*args, **kwargs) if func._schema.returns else None
        moved = call_bytes(func, args, kwargs, out)
        if moved is not None:
            self._add(op, moved)
        return out

    def add_launched(self, changed: set[int]) -> None:
        """Count the Triton launches since the last time; `changed`: storages that they write where they have read."""
        for launched in self.launched[self._seen :]:
            file = launched.kernel.__module__.split(".")[1]
            op = next((switch for switch in FIELDS if file.startswith(switch)), UPDATE)
            self._add(op, launch_bytes(launched, changed))
        self._seen = len(self.launched)

    def _add(self, op: str, moved: int) -> None:
        self.tallies[op] = self.tallies.get(op, Tally()) + Tally(1, moved)


# ---------------------------------------------------------------------------------------------------------------- bytes


def call_bytes(func: Any, args: tuple, kwargs: dict, out: Any) -> int | None:
    """Bytes that a call of the dispatcher reads and writes; None where it launches nothing: a view, an allocation."""
    name = func._schema.name.partition("::")[2]
    arguments = _arguments(func, args, kwargs)
    given = {_storage(x) for x, _, _ in arguments}
    made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and _storage(x) not in given]
    written = [x for x, _, is_written in arguments if is_written] + made
    if name in ALLOCATIONS or not written:
        return None
    read = [x for x, is_read, _ in arguments if is_read]
    if name not in INDEXED:
        return sum(map(tensor_bytes, read + written))
    indexed = arguments[0][0]
    limit = max(tensor_bytes(x) for x in (*(x for x, _, _ in arguments[1:]), *made))
    return sum(min(tensor_bytes(x), limit) if x is indexed else tensor_bytes(x) for x in read + written)


def launch_bytes(launched: LaunchRecord, changed: set[int]) -> int:
    """Bytes of the tensors of a Triton launch; those whose storage is in `changed` are read and written."""
    tensors = [x for x in launched.arguments.values() if isinstance(x, Tensor)]
    return sum(tensor_bytes(x) * (2 if _storage(x) in changed else 1) for x in tensors)


def tensor_bytes(x: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: an expanded dim has one."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * x.element_size()


def _arguments(func: Any, args: tuple, kwargs: dict) -> list[tuple[Tensor, bool, bool]]:
    """The tensors that a call is given, those in lists too, each with whether the call reads it and writes it."""
    name = func._schema.name.partition("::")[2]
    values = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    found = []
    for place, argument in enumerate(func._schema.arguments):
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        overwritten = argument.is_out or (is_written and name in OVERWRITING)
        asked_for_its_shape = name.endswith("_like") or name.startswith("new_")
        times_zero = place == 0 and values.get("beta") == 0
        is_read = not (overwritten or asked_for_its_shape or times_zero)
        tensors = (x for x in tree_leaves(values.get(argument.name)) if isinstance(x, Tensor))
        found += [(x, is_read, is_written) for x in tensors]
    return found


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
