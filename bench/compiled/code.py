"""The machine code of what a step launches, Inductor's kernels and ours as Inductor passes them on, and the bytes that they move.

Inductor may give a kernel several configurations (tile, warps) and choose among them on the GPU, by time; all of them are built.
Bytes are those of the tensors that the machine code loads from and stores to, each element once, whatever a cache then spares.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers

from bench.compiled.record import Call, Eager, Generated, Shape
from bench.machine_code.build import MachineCode, build, narrowest_accesses, read_compiled, specialize
from bench.roofline.launches import tensor_bytes
from kernels.launch import LaunchRecord, Target


@dataclass(frozen=True)
class Code:
    """What a kernel came to, in each configuration that it may run in."""

    configurations: tuple[MachineCode, ...]

    def figures(self, name: str) -> list[int]:
        """Least and most of a figure of MachineCode, or the one."""
        found = {getattr(code, name) for code in self.configurations}
        return sorted({min(found), max(found)})

    @property
    def loads(self) -> set[str]:
        """Arguments that are loaded from."""
        return {name for code in self.configurations for name in code.loads}

    @property
    def stores(self) -> set[str]:
        """Arguments that are stored to."""
        return {name for code in self.configurations for name in code.stores}


def build_all(calls: list[Call], target: Target) -> list[tuple[Call, Code | None]]:
    """The calls with their bytes, and the code of those that are Triton's. Each kernel is built once.

    One after another: Python 3.11 now and then fails to parse two kernels at a time ("AST constructor recursion depth mismatch").
    """
    triton_helpers.set_driver_to_gpu = lambda: None  # Inductor's kernels ask for the GPU's driver as they are imported
    works = {_key(call): call for call in calls if call.kernel is not None}
    codes = {key: _build(call, target) for key, call in works.items()}
    found = [(call, codes.get(_key(call)) if call.kernel is not None else None) for call in calls]
    return [(call if code is None else _with_bytes(call, code), code) for call, code in found]


def _key(call: Call) -> Any:
    """Equal for launches that run the same code."""
    if isinstance(call.kernel, Generated):
        return call.kernel
    return call.name, tuple(
        sorted((name, str(x)) for name, x in call.kernel.arguments.items())
    ) if call.kernel else None


def _build(call: Call, target: Target) -> Code:
    if isinstance(call.kernel, Eager):
        return Code((build(specialize(_launched(call.kernel), target)),))
    tuner = getattr(PyCodeCache.load(call.kernel.source.replace("\\'\\'\\'", "'''")), call.kernel.name)
    compiled = [tuner._precompile_config(configuration).kernel for configuration in tuner.configs]
    return Code(tuple(read_compiled(x, target, *_accesses(call.kernel, x)) for x in compiled))


def _accesses(kernel: Generated, compiled: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Arguments that are loaded from and stored to, with bytes of the narrowest access; 0 in Inductor's kernels.

    Those name them in each load and store, and may keep addresses in shared memory, where they can't be followed.
    """
    if not kernel.is_ours:
        names = (dict.fromkeys(re.findall(rf"tl\.{verb}\((\w+)", kernel.source), 0) for verb in ("load", "store"))
        return tuple(names)
    pointers = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    return narrowest_accesses(compiled.asm["llir"], pointers)


def _launched(eager: Eager) -> LaunchRecord:
    arguments = {name: x.meta() if isinstance(x, Shape) else x for name, x in eager.arguments.items()}
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    return LaunchRecord(eager.kernel, eager.grid, arguments, **options)


# ---------------------------------------------------------------------------------------------------------------- bytes


def _with_bytes(call: Call, code: Code) -> Call:
    return replace(call, read=_moved(call, code.loads, "load"), written=_moved(call, code.stores, "store"))


def _moved(call: Call, names: Iterable[str], verb: str) -> int:
    """Bytes of those tensors that are loaded from, or stored to."""
    by_memory: dict[tuple[int, int], int] = {}
    for name in names:
        if name in call.tensors:
            shape = call.tensors[name]
            memory = shape.memory
            by_memory[memory] = by_memory.get(memory, 0) + _bytes(call, name, shape, verb)
    return sum(min(moved, size) for (_, size), moved in by_memory.items())


def _bytes(call: Call, name: str, shape: Shape, verb: str) -> int:
    whole = tensor_bytes(shape.meta())
    if not call.points:
        return whole
    times = len(re.findall(rf"tl\.{verb}\({re.escape(name)}\b", call.kernel.source))
    return min(whole, max(times, 1) * call.points * shape.dtype.itemsize)
