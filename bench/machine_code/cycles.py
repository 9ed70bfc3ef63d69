"""How many cycles of a multiprocessor a program takes, counted in Hopper's machine code (sm_90).

Three parts of a multiprocessor are counted apart, each as if it were always fed:

    matrix   its tensor cores: 2,048 multiplications of half precision a cycle; or, where that is longer, the 128 bytes a cycle of
             shared memory that a product reads
    issue    its four schedulers, each of which issues one instruction of a warp a cycle: all but matrix instructions
    special  its 16 units for exponentials and reciprocals, of which a warp's instruction takes 32 results

The numbers are of NVIDIA's "H100 Tensor Core GPU Architecture" and of the CUDA C++ Programming Guide ("Arithmetic Instructions").
That nothing overlaps and nothing waits is both wrong: `counted` shows what measured kernels make of the sum.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bench.machine_code.disassembly import Instruction
from bench.machine_code.loops import find_loops, works

SCHEDULERS = 4
PRODUCTS = 2048
"""Multiplications of half precision with float32 sums, a cycle: 989.4 TFLOP/s at 1.83 GHz on 132 multiprocessors."""
SHARED_BYTES = 128
SPECIAL_UNITS = 16

_GROUP_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")  # of four warps together
_WARP_PRODUCT = re.compile(r"HMMA\.(\d+)(8)(\d+)\.")  # 16816: 16×8×16
_ROWS_IN_SHARED = re.compile(r"HGMMA\S*\s+R\d+,\s*gdesc")  # no register between the sum and the descriptor


@dataclass(frozen=True)
class Cycles:
    """Cycles that each part of a multiprocessor is busy."""

    matrix: float = 0.0
    issue: float = 0.0
    special: float = 0.0

    def __add__(self, other: "Cycles") -> "Cycles":
        return Cycles(self.matrix + other.matrix, self.issue + other.issue, self.special + other.special)

    def __mul__(self, times: float) -> "Cycles":
        return Cycles(self.matrix * times, self.issue * times, self.special * times)

    @property
    def total(self) -> float:
        """One after another."""
        return self.matrix + self.issue + self.special


def cycles(instructions: Iterable[Instruction], warps: int) -> Cycles:
    """What a program of so many warps takes to carry out each of these once. ValueError for a matrix instruction not known."""
    matrix = issue = special = 0.0
    for instruction in instructions:
        if instruction.kind == "matrix":
            matrix += _matrix_cycles(instruction, warps)
        elif not instruction.text.startswith("@!PT "):  # those are never carried out
            issue += warps / SCHEDULERS
            special += 32 * warps / SPECIAL_UNITS if instruction.kind == "special" else 0
    return Cycles(matrix, issue, special)


def _matrix_cycles(instruction: Instruction, warps: int) -> float:
    if match := _GROUP_PRODUCT.match(instruction.opcode + "."):
        m, n, k = map(int, match.groups())
        read = 2 * n * k + (2 * m * k if _ROWS_IN_SHARED.search(instruction.text) else 0)
        return max(m * n * k / PRODUCTS, read / SHARED_BYTES) * warps / 4
    if match := _WARP_PRODUCT.match(instruction.opcode + "."):
        m, n, k = map(int, match.groups())
        return m * n * k / PRODUCTS * warps
    raise ValueError(f"{instruction.opcode} is no product whose cycles are known")


def in_loops(instructions: list[Instruction]) -> tuple[list[Instruction], list[list[Instruction]]]:
    """What is in no loop with products, and the bodies of those that are not inside another one, in their order."""
    found = [loop for loop in find_loops(instructions) if loop.depth == 1 and works(loop, instructions)]
    loops = [loop.body for loop in found if any(instructions[at].kind == "matrix" for at in loop.body)]
    inside = {at for body in loops for at in body}
    outside = [instruction for at, instruction in enumerate(instructions) if at not in inside]
    return outside, [[instructions[at] for at in body] for body in loops]
