"""What the compiler makes of a step, read with no GPU: what LEARN.md's tables hold.

A step runs on tensors of the meta device while `kernels.launch.record_launches` writes down its launches, and each of these is
built for an H100 (sm_90) as `bench.machine_code` does it. Needs Triton, and kernels that were not defined in its interpreter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bench.machine_code.build import (
    LIMITS,
    MachineCode,
    Specialized,
    build,
    compile_specialized,
    disassemble,
    specialize,
)
from bench.machine_code.loops import find_loops, hottest
from kernels.launch import TARGETS, LaunchRecord, record_launches

TARGET = TARGETS["sm_90"]


@dataclass(frozen=True)
class Figures:
    """Of one step at one size. Where it launches several kernels, each figure but the sums is that of the worst."""

    launches: int
    bytes: int
    """Bytes of the tensors that the launches read and write, each once a launch."""
    instructions: float
    """Instructions of threads for each element or score, summed over the launches: those of the hottest loop, or all
    where there is no loop. 0 where they are not asked for.
    """
    programs: int
    """Programs of a launch."""
    tile: dict[str, int]
    """BLOCK_* of the last launch."""
    registers: int
    """Of a thread."""
    resident: tuple[int, int]
    """Programs on a multiprocessor at once, and the warps of each."""
    load: int
    """Bytes of the narrowest load of an input's rows."""

    @property
    def occupancy(self) -> float:
        """Resident warps, as a share of those that a multiprocessor can hold."""
        programs, warps = self.resident
        return programs * warps / LIMITS[TARGET.arch].warps


def measure(run: Callable[[], object], inputs: tuple[str, ...], units: int = 0) -> Figures:
    """The figures of what `run` launches on meta tensors.

    inputs: parameters of the kernels whose loads count as `load`. units: elements or scores that a launch without a loop
    works on; a pass of a loop works on BLOCK_M × BLOCK_N of them.
    """
    with record_launches(TARGET) as launches:
        run()
    specialized = [specialize(launched, TARGET) for launched in launches]
    codes = [build(each) for each in specialized]
    worst = min(codes, key=lambda code: code.occupancy)
    tensors = [x for launched in launches for x in launched.arguments.values() if isinstance(x, Tensor)]
    return Figures(
        launches=len(launches),
        bytes=sum(x.nbytes for x in tensors),
        instructions=sum(map(_instructions, launches, specialized, codes, [units] * len(codes))) if units else 0.0,
        programs=min(math.prod(launched.grid) for launched in launches),
        tile={name: n for name, n in launches[-1].arguments.items() if name.startswith("BLOCK_")},
        registers=max(code.registers for code in codes),
        resident=(worst.programs, worst.warps),
        load=min(code.loads[name] for code in codes for name in inputs if name in code.loads),
    )


def _instructions(launched: LaunchRecord, specialized: Specialized, code: MachineCode, units: int) -> float:
    """Instructions of a thread, matrix ones left out, times the threads, over what these work on together."""
    threads = code.warps * TARGET.warp_size
    compiled = compile_specialized(specialized)
    if "scf.for" in compiled.asm["ttir"]:
        instructions = disassemble(compiled)
        hot = hottest(find_loops(instructions), instructions)
        counted = sum(instructions[at].kind != "matrix" for at in hot.body)
        return counted * threads / (launched.arguments["BLOCK_M"] * launched.arguments["BLOCK_N"])
    # Control is left out: past the end of a kernel stand jumps and NOPs that no thread comes to.
    counted = sum(n for kind, n in code.instructions.items() if kind not in ("matrix", "control"))
    return counted * threads * math.prod(launched.grid) / units
