"""A training step as a GPU would be given it, launch by launch, without one.

`Trainer.step` runs on tensors of a GPU that is not there (`bench.compiled.without_gpu`), which have shapes and no numbers. The
first time `torch.compile` makes its graphs. Then every launch is written down in order: what Inductor wrote runs as it is, with its
kernels replaced by a note of their arguments; all calls that reach PyTorch's dispatcher are seen on their way; and the ops that
Inductor cannot look into are looked into.
"""

import bisect
import os
import re
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from bench.compiled import without_gpu
from bench.roofline.launches import ACCUMULATION, GLUE, UPDATE, call_bytes, flash_attention, tensor_bytes
from kernels import Ops
from kernels.attention.op import attention_torch
from kernels.launch import NAMESPACE
from model import Llama
from model.flops import step_costs
from training.config import TrainConfig
from training.device import set_determinism
from training.distributed import World
from training.step.trainer import Trainer

ROOT = Path(__file__).parents[2]

PARTS = ("start", "forward", "backward", "update")
"""Start and update are once a step, forward and backward once a micro-step, and so are two additions: of its loss, and of what
autograd gives back as a tensor, to the gradient."""
KINDS = {
    "kernel": "Triton, written here",
    "generated": "Triton, by Inductor",
    "copy": "in compiled code what moves or casts, and computes nothing",
    "product": "a matrix product of a library",
    "attention": "scaled_dot_product_attention of a library",
    "fallback": "in compiled code a call of PyTorch's own kernels",
    "eager": "outside of compiled code a call of PyTorch's own kernels",
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmm_"}
MOVES = {
    "clone",
    "copy",
    "copy_",
    "_to_copy",
    "cat",
    "expand",
    "permute",
    "transpose",
    "t",
    "view",
    "_unsafe_view",
    "reshape",
}
MOVES |= {
    "slice",
    "split",
    "split_with_sizes",
    "unsqueeze",
    "squeeze",
    "select",
    "constant_pad_nd",
    "as_strided",
    "unflatten",
}
"""Calls of PyTorch that compute nothing."""


DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.int64: "i64", torch.int32: "i32"}


@dataclass(frozen=True)
class Shape:
    """A tensor as a launch was given it."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    memory: tuple[int, int] = (0, 0)
    """A number of its storage, and the bytes of that: of a tensor that is given twice no byte is counted twice."""

    @classmethod
    def of(cls, x: Tensor) -> "Shape":
        """Its shape."""
        storage = x.untyped_storage()
        sizes, strides = tuple(map(int, x.shape)), tuple(map(int, x.stride()))
        return cls(x.dtype, sizes, strides, (storage._cdata, int(storage.nbytes())))

    def meta(self) -> Tensor:
        """A tensor of that shape, without memory."""
        return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device="meta")

    def __str__(self) -> str:
        return f"{DTYPES.get(self.dtype, str(self.dtype).removeprefix('torch.'))}[{', '.join(map(str, self.sizes))}]"


@dataclass
class Call:
    """One launch. A call of a library counts as one, though some launch several kernels."""

    part: str
    kind: str
    name: str
    """The kernel's function, or the call as PyTorch names it."""
    op: str
    """What it is done for: an op of `model.flops`, or what is between them."""
    origins: tuple[str, ...]
    """Of what Inductor generated, the calls that it computes."""
    site: str
    """The line of this project that asked for it, where that is known."""
    tensors: dict[str, Shape]
    """By argument; of a library call the inputs by number and `out`."""
    read: int = 0
    written: int = 0
    """Bytes. Of Triton's kernels not known before their code is built."""
    kernel: Any = field(default=None, repr=False)
    """What to build: a Generated, or an Eager."""
    points: int = 0
    """Of what Inductor generated: the points that it computes something for. A pointer is read so often at most, for each time that
    the code loads from it: fewer bytes than the tensor's where only a slice of it, or what an index finds in it, is read."""

    @property
    def title(self) -> str:
        """What the launch is, alike for launches that do the same to the same shapes and in other versions of the code."""
        if self.kind == "kernel":
            return self.name
        read = " ".join(str(shape) for name, shape in self.tensors.items() if "out" not in name)
        written = " ".join(str(shape) for name, shape in self.tensors.items() if "out" in name)
        if self.kernel is not None:
            return f"{', '.join(self.origins)} -> {written}"
        return f"{self.name} {read}{' -> ' * bool(read)}{written}".strip()


@dataclass(frozen=True)
class Generated:
    """A kernel as Inductor wrote it, ours among them: it copies those."""

    name: str
    source: str

    @property
    def is_ours(self) -> bool:
        """Whether a person wrote it."""
        return "custom_kernel=True" in self.source


@dataclass(frozen=True)
class Eager:
    """A kernel that is launched by its own launcher."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """Tensors as their Shape."""


# ----------------------------------------------------------------------------------------------------------- the process


class _Process:
    """What the hooks of `without_gpu` write to. There is one, as they are there for good."""

    def __init__(self) -> None:
        self.modules: dict[str, list[tuple[int, Any]]] = {}
        """Code that Inductor wrote: by its file name, the graph's node from a line on."""
        self.text: dict[str, list[str]] = {}
        self.seen: _Seen | None = None

    def load(self, graph: Any, code: Any) -> types.ModuleType:
        """Run what Inductor wrote as a module whose allocations and views are of tensors without numbers."""
        name = f"<graph {len(self.modules)}>"
        self.modules[name] = list(code.line_map)
        self.text[name] = code.value.splitlines()
        module = types.ModuleType(name)
        module.__file__ = name
        exec(compile(code.value, name, "exec"), vars(module))
        module.empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
            size, stride, dtype=dtype, device="cuda"
        )
        module.reinterpret_tensor = lambda x, size, stride, offset: torch.as_strided(
            x, size, stride, x.storage_offset() + offset
        )
        module.assert_size_stride = module.assert_alignment = lambda *_: None
        graph.cache_key, graph.cache_path, graph.cache_linemap = name, os.devnull, []  # read, and not used
        return module

    def launch(self, kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        """A launch outside of Inductor's code."""
        if self.seen is not None:
            self.seen.eager(kernel, grid, arguments)

    def place(self) -> tuple[Any, list[str]] | None:
        """The node of the graph that the running line of generated code belongs to, and the lines above it."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if name in self.modules:
                lines = self.modules[name]
                at = bisect.bisect_right([line for line, _ in lines], frame.f_lineno) - 1
                return (lines[at][1] if at >= 0 else None), self.text[name][
                    max(0, frame.f_lineno - 6) : frame.f_lineno - 1
                ]
            frame = frame.f_back
        return None


_process: _Process | None = None


def prepare(gpu: str) -> None:
    """Give this process the GPU. UserError where its torch can't be given one."""
    global _process
    if _process is None:
        without_gpu.require()
        _process = _Process()
        without_gpu.pretend(gpu, without_gpu.Hooks(_process.load, _process.launch))
        AsyncCompile.triton = lambda self, name, source, **_: _Kernel(Generated(name, source))
        AsyncCompile.wait = lambda self, scope: None


class _Kernel:
    """Stands for a kernel in the code that Inductor wrote."""

    def __init__(self, generated: Generated):
        self.generated = generated

    def run(self, *arguments: Any, stream: int) -> None:
        if _process.seen is not None:
            _process.seen.generated(self.generated, arguments)


# ---------------------------------------------------------------------------------------------------------------- record


def record(config: TrainConfig, packed: bool = False) -> tuple[list[Call], int]:
    """The launches of a step of one micro-step, and how many one of two has, after `prepare`.

    packed: with a `first_key`, as packed documents have.
    """
    set_determinism(config.deterministic)
    config = replace(config, compile=True, capture=False, device="cuda")
    # What comes from outside has numbers: the RoPE tables, which are made on the CPU.
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of addresses that tensors without numbers lack, of float32 products, of caches
        torch._dynamo.reset()
        with torch.device("cuda"):
            model = Llama(config.shape(), _ops(config, packed), torch.bfloat16)
            tokens = torch.empty(config.batch_size, config.max_seq_len, dtype=torch.int64)
            targets = torch.empty_like(tokens)  # not the same tensor: the code is compiled for two
            first_key = torch.empty(tokens.shape, dtype=torch.int32) if packed else None
        trainer = Trainer(model, config, World())
        batch = (tokens, targets, first_key)
        trainer.optimizer.update = lambda *_: None  # nothing in it is compiled, and not all of torch's could run
        trainer.step([batch], tokens.numel(), config.learning_rate)
        del trainer.optimizer.update
        graphs = len(_process.modules)
        loss_sum, seen = trainer.loss_sum, []
        for micro_steps in (1, 2):
            _process.seen = _Seen(set(step_costs(config.shape(), 1, 1)))
            trainer.loss_sum = _process.seen.forward(loss_sum)
            seen.append(_process.seen)
            try:
                with _process.seen:
                    trainer.step([batch] * micro_steps, micro_steps * tokens.numel(), config.learning_rate)
            finally:
                _process.seen = None
    assert len(_process.modules) == graphs, "the second step was compiled again"
    one, two = (found.calls for found in seen)
    return one, len(two)


def _ops(config: TrainConfig, packed: bool) -> list[Ops]:
    """Those of the run, with SDPA's flash kernel where it would choose it: it asks the device, in C++."""
    ops = kernels.select(config.kernel_spec, config.n_layers)
    if packed:
        return ops
    return [replace(x, attention=flash_attention) if x.attention is attention_torch else x for x in ops]


class _Seen(TorchDispatchMode):
    """Writes down every launch while it is on."""

    def __init__(self, ops: set[str]):
        super().__init__()
        self.calls: list[Call] = []
        self._ops = ops
        self._part = "start"

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo may run what it has compiled."""
        return True

    def forward(self, loss_sum: Callable) -> Callable:
        """`loss_sum`, whose launches are the forward part; what follows is the backward one as long as autograd runs."""

        def run(*arguments: Any) -> Tensor:
            self._part = "forward"
            loss = loss_sum(*arguments)
            self._part = "update"
            return loss

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:  # an op of ours that Inductor can't look into: its launcher
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        only_numbers = "out" in kwargs or not func._schema.returns  # then there is nothing to do here
        out = kwargs.get("out") if only_numbers else func(*args, **kwargs)
        moved = call_bytes(func, args, kwargs, out)
        if moved is not None:
            self._library(func, args, kwargs, out, moved)
        return out

    def _library(self, func: Any, args: tuple, kwargs: dict, out: Any, moved: int) -> None:
        name = func._schema.name.partition("::")[2]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        given = [x for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)]
        tensors = {str(i): Shape.of(x) for i, x in enumerate(given) if not any(x is y for y in made)}
        tensors |= {f"out{i or ''}": Shape.of(x) for i, x in enumerate(made)}
        written = min(moved, sum(map(tensor_bytes, made)) or moved // 2)
        call = self._call(_kind(name, in_graph := _process.place() is not None), name, tensors)
        assert in_graph or call.kind != "fallback"
        self.calls.append(replace(call, read=moved - written, written=written))

    def generated(self, kernel: Generated, arguments: tuple) -> None:
        """A launch in compiled code."""
        given = dict(zip(parameters(kernel), arguments, strict=False))
        tensors = {name: Shape.of(x) for name, x in given.items() if isinstance(x, Tensor)}
        call = self._call("kernel" if kernel.is_ours else "generated", kernel.name, tensors)
        if call.origins and set(call.origins) <= MOVES:
            call.kind = "copy"
        points = prod(x for name, x in given.items() if name.endswith("numel"))
        self.calls.append(replace(call, kernel=kernel, points=0 if kernel.is_ours else points))

    def eager(self, kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        """A launch outside of compiled code, or in an op that compiled code calls."""
        arguments = {name: Shape.of(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Shape)}
        call = self._call("kernel", kernel.__name__, tensors)
        self.calls.append(replace(call, kernel=Eager(kernel, grid, arguments)))

    def _call(self, kind: str, name: str, tensors: dict[str, Shape]) -> Call:
        node = torch._C._current_autograd_node()
        part = self._part if node is None else "backward"
        place = _process.place()
        if place is None:
            accumulates = node is not None and node.name().endswith("AccumulateGrad")
            return Call(part, kind, name, ACCUMULATION if accumulates else UPDATE, (), "", tensors)
        node, above = place
        sources, origins = _comment(above)
        if (
            kind == "generated"
        ):  # the line belongs to the last of the nodes that were fused; the first one says what it is for
            named = {x.name: x for x in node.graph.nodes if "triton_kernel" not in x.name} if node is not None else {}
            node = next((named[name] for name in sources if name in named), node)
        meta = node.meta if node is not None else {}
        frames, original = _frames(meta.get("stack_trace") or ""), str(meta.get("original_aten", ""))
        origins = origins if kind == "generated" else ()
        op = next((op for op in self._ops if kind == "kernel" and name.startswith(f"_{op}_")), None)
        op = op or self._op(frames, (*origins, original))
        return Call(part, kind, name, op, origins, _site(frames), tensors)

    def _op(self, frames: list[tuple[str, int]], origins: tuple[str, ...]) -> str:
        """By the innermost line of this project that is in the file of an op, or by the calls that were compiled."""
        for file, _ in reversed(frames):
            name = Path(file).with_suffix("").parts
            found = next((part for part in name[:2][::-1] if part in self._ops), None)
            if found:
                return found
        return "embedding" if any("embedding" in origin for origin in origins) else GLUE


def _kind(name: str, in_graph: bool) -> str:
    if name in PRODUCTS:
        return "product"
    if "attention" in name:
        return "attention"
    if not in_graph:
        return "eager"
    return "copy" if name in MOVES else "fallback"


def _frames(stack_trace: str) -> list[tuple[str, int]]:
    """The lines of this project in a stack, outermost first, as (file, number)."""
    found = re.findall(r'File "([^"]+)", line (\d+)', stack_trace)
    return [(str(Path(file).relative_to(ROOT)), int(line)) for file, line in found if Path(file).is_relative_to(ROOT)]


def _site(frames: list[tuple[str, int]]) -> str:
    """The innermost line of the model, which says more than one of an op."""
    of_model = [f"{file}:{line}" for file, line in frames if file.startswith("model/llama")] or [
        f"{file}:{line}" for file, line in frames
    ]
    return of_model[-1] if of_model else ""


def _comment(above: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The nodes and the calls that Inductor names in the comment above a launch."""
    comments = [
        match for line in above if (match := re.search(r"Source Nodes: \[(.*)\], Original ATen: \[(.*)\]", line))
    ]
    if not comments:
        return (), ()
    nodes, calls = (tuple(name for name in group.split(", ") if name) for group in comments[-1].groups())
    # What Inductor adds to the graph itself comes from no call: the clone of what a kernel is taken to write is such.
    calls = calls or tuple(re.sub(r"(_default)?(_\d+)?$", "", name) for name in nodes)
    return nodes, tuple(name.removeprefix("aten.") for name in calls)


def parameters(kernel: Generated) -> list[str]:
    """The parameters that a launch gives values for: those that are not constants."""
    signature = re.search(rf"^def {re.escape(kernel.name)}\((.*?)\):", kernel.source, re.S | re.M)
    assert signature, f"no function {kernel.name} in what Inductor wrote"
    words = re.sub(r"#.*", "", signature[1]).split(",")
    return [word.split(":")[0].strip() for word in words if word.strip() and "constexpr" not in word]
