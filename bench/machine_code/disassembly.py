"""Machine code as a list of instructions: NVIDIA's SASS and AMD's assembly, each with its kind and its place in the source.

The place is what LLVM writes behind each `.loc` of the assembly: the line, and the lines that it was inlined into. SASS has
no such comments; `nvdisasm -gp` names for each instruction the line of the PTX that it was made of, and that has them.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

Stack = tuple[tuple[str, int], ...]
"""File names and lines, the innermost call first; empty where nothing is known."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel."""

    text: str
    """Predicate, opcode with its modifiers, operands."""
    opcode: str
    target: int | None = None
    """Where it branches to, as a place in the list."""
    falls_through: bool = True
    """Whether the next instruction can follow it."""
    stack: Stack = ()

    @property
    def kind(self) -> str:
        """One of KINDS."""
        # Placed where a wait is needed, and never carried out.
        return "control" if self.text.startswith("@!PT ") else _kind(self.opcode)

    @property
    def width(self) -> int:
        """Bytes a thread, of a load or store of global memory."""
        return _width(self.opcode)


# ---------------------------------------------------------------------------------------------------------------- kinds

# Of SASS (modifiers left out, but for those named) and of AMD's instructions. What none of them matches is an integer one:
# addresses, indices, logic, predicates, moves, constants, and the conversion of bfloat16 to float32, which is a shift.
_KINDS = {
    "matrix": (r"\w+MMA", r"v_s?mfmac?_\w+"),
    "global load": (r"LDG|LDGSTS", r"(?:global|buffer|flat)_load_\w+"),
    "global store": (r"STG", r"(?:global|buffer|flat)_store_\w+"),
    "shared load": (r"LDS|LDSM", r"ds_read\w*"),
    "shared store": (r"STS|STSM", r"ds_write\w*"),
    "tensor memory": (r"LDTM|STTM|UTCCP", ""),
    "local memory": (r"LDL|STL", r"scratch_\w+"),
    "atomic": (r"ATOM\w*|RED", r"\w+_atomic_\w+"),
    "shuffle": (r"SHFL|C?REDUX", r"ds_\w*permute\w*|ds_swizzle\w*|v_permlane\w*|\w+_dpp"),
    "barrier": (
        r"\w*BAR|SYNCS|FENCE|WARPGROUP|WARPSYNC|ARRIVES|NANOSLEEP",
        r"s_barrier|s_waitcnt\w*|s_sleep|buffer_(?:wb|inv)\w*",
    ),
    "conversion": (r"U?[FI]2[FI]P?|FRND|HADD2\.F32", r"v_cvt_\w+"),
    "special": (r"MUFU", r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_\w+"),
    "float": (
        r"[FHD](?:ADD|MUL|FMA|MNMX|SETP?|SEL|CHK|SWZADD)\d?",
        r"v_\w+_(?:bf16|f16|f32|f64)(?:_\w+)?",
    ),
    "control": (r"BRA|BRX|EXIT|CALL|RET|BSSY|BSYNC|NOP|BPT", r"s_c?branch\w*|s_endpgm|s_nop|s_setpc\w*"),
}
KINDS = (*_KINDS, "integer")
"""Special: exponentials, logarithms, roots and reciprocals. A barrier is all that waits."""

_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_AMD_WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@functools.cache
def _kind(opcode: str) -> str:
    for kind, (sass, amd) in _KINDS.items():
        if re.fullmatch(rf"(?:{sass})(?:\..*)?|{amd}", opcode):
            return kind
    return "integer"


def _width(opcode: str) -> int:
    if opcode[0].isupper():
        return max((_WIDTHS.get(modifier, 0) for modifier in opcode.split(".")), default=0) or 4
    size = opcode.split("_", 2)[2]
    return _AMD_WIDTHS.get(size) or (1 if "byte" in size else 2)


# ----------------------------------------------------------------------------------------------------------------- read


@dataclass(frozen=True)
class _Syntax:
    label: re.Pattern
    instruction: re.Pattern
    """Of its text, with its opcode."""
    target: re.Pattern
    last: re.Pattern
    """What nothing falls through."""


_SASS = _Syntax(
    label=re.compile(r"(\.L_x_\d+):"),
    instruction=re.compile(r"\s+/\*[0-9a-f]+\*/\s+((?:@!?\w+\s+)?([A-Z][\w.]*)[^;]*)"),
    target=re.compile(r"BRA\b.*`\((\.L_x_\d+)\)"),
    last=re.compile(
        r"BRA\S*\s+`|EXIT|RET"
    ),  # a conditional branch has a predicate before it or an operand before the label
)
_AMDGCN = _Syntax(
    label=re.compile(r"(\.LBB\w+):"),
    instruction=re.compile(r"\t(([a-z]\w+)[^;]*)"),
    target=re.compile(r"s_c?branch\w*\s+(\.LBB\w+)"),
    last=re.compile(r"s_branch|s_endpgm|s_setpc"),
)
_PTX_LINE = re.compile(r'//## File "\.nv_debug_ptx_txt", line (\d+)')
_FRAME = re.compile(r"([^\s:]+):(\d+):\d+")


def read_sass(text: str, ptx: str = "") -> list[Instruction]:
    """The instructions that `cuobjdump -sass` or `nvdisasm -c` prints: the second one with branches, and, with -gp, stacks."""
    stack, stacks, lines = (), _stacks(ptx), []
    for line in text.splitlines():
        if place := _PTX_LINE.search(line):
            stack = stacks[int(place[1]) - 1]
        lines.append((line, stack))
    return _read(lines, _SASS)


def read_amdgcn(text: str) -> list[Instruction]:
    """The instructions of AMD's assembly."""
    return _read(zip(text.splitlines(), _stacks(text), strict=True), _AMDGCN)


def _stacks(assembly: str) -> list[Stack]:
    """The stack in force at each line of PTX or of AMD's assembly."""
    stack, stacks = (), []
    for line in assembly.splitlines():
        if line.lstrip().startswith(".loc"):
            stack = tuple((file, int(at)) for file, at in _FRAME.findall(line) if int(at))
        stacks.append(stack)
    return stacks


def _read(lines: Iterable[tuple[str, Stack]], syntax: _Syntax) -> list[Instruction]:
    labels: dict[str, int] = {}
    found: list[tuple[str, str, Stack]] = []
    for line, stack in lines:
        if label := syntax.label.match(line):
            labels[label[1]] = len(found)
        elif instruction := syntax.instruction.match(line):
            found.append((" ".join(instruction[1].split()), instruction[2], stack))
    targets = [syntax.target.search(text) for text, _, _ in found]
    return [
        Instruction(text, opcode, labels[target[1]] if target else None, not syntax.last.match(text), stack)
        for (text, opcode, stack), target in zip(found, targets, strict=True)
    ]
