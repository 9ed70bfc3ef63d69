"""The machine code of one launch, built and read with no GPU.

`specialize` turns a launch that `kernels.launch.record_launches` saw into what Triton's launcher would compile for it, by
Triton's own binder: which arguments are constants, which are multiples of 16, which tensors are aligned. `build` compiles
that and reads the result: the cubin with the disassemblers that come inside Triton, AMD's code in its assembly.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bench.machine_code.disassembly import KINDS, Instruction, read_amdgcn, read_sass
from kernels.launch import INTERPRETED, LaunchRecord, Target


@dataclass(frozen=True)
class MachineCode:
    """What a kernel came to on one architecture."""

    registers: int
    """Registers of a thread; on AMD its vector registers."""
    stack: int
    """Bytes of local memory a thread; more than 0 means that registers are spilled to it."""
    shared: int
    """Bytes of shared memory a program."""
    warps: int
    """Warps a program."""
    programs: int
    """Programs that are resident on a multiprocessor together."""
    occupancy: float
    """Their warps, as a share of those a multiprocessor can hold."""
    widest_load: int
    """Bytes of the widest load from global memory; 0 where there is none."""
    widest_store: int
    """Bytes of the widest store to global memory; 0 where there is none."""
    matrix: dict[str, int]
    """Matrix instructions in the code, by kind: HMMA, HGMMA (Hopper), UTCHMMA (tcgen05, Blackwell), MFMA (AMD)."""
    instructions: dict[str, int]
    """All instructions, by the kinds of `bench.disassembly`."""
    loads: dict[str, int]
    """Bytes of the narrowest load through each pointer argument that is loaded from."""
    stores: dict[str, int]
    """Bytes of the narrowest store through each pointer argument that is stored to."""


# -------------------------------------------------------------------------------------------------------------- compile


@dataclass(frozen=True)
class Specialized:
    """A kernel with everything that decides its code."""

    source: Any
    """Triton's ASTSource."""
    options: Any
    """Triton's options of the backend: warps, stages, architecture."""
    target: Target

    @cached_property
    def key(self) -> str:
        """Equal for launches that run the same code."""
        return f"{self.source.hash()} {self.options.hash()}"

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants by name: sizes, tiles, and arguments that Triton made constant."""
        names = list(self.source.signature)
        return {names[at]: value for (at,), value in self.source.constants.items()}


def specialize(launched: LaunchRecord, target: Target) -> Specialized:
    """What Triton would compile for a launch. Needs Triton, and kernels that were not defined in its interpreter."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    assert not INTERPRETED
    kernel, backend = launched.kernel, make_backend(_gpu_target(target))
    options = {"num_warps": launched.num_warps, "num_stages": launched.num_stages}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = bind(**launched.arguments, **options)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, given)
    return Specialized(ASTSource(kernel, signature, constants, attributes), options, target)


def compile_specialized(specialized: Specialized) -> Any:
    """Triton's CompiledKernel, from its cache where it is there. Raises what Triton and its assemblers raise."""
    import triton

    target = _gpu_target(specialized.target)
    return triton.compile(specialized.source, target=target, options=vars(specialized.options))


def build(specialized: Specialized) -> MachineCode:
    """Compile and read. Raises what Triton and its assemblers raise."""
    pointers = [name for name, kind in specialized.source.signature.items() if kind != "constexpr"]
    compiled = compile_specialized(specialized)
    loads, stores = narrowest_accesses(compiled.asm["llir"], pointers)
    code = read_compiled(compiled, specialized.target, loads, stores)
    # AMD loads what is one value for all threads into scalar registers, by instructions that are not read here.
    assert specialized.target.backend == "hip" or bool(loads) == (code.widest_load > 0), "not all loads were read"
    assert bool(stores) == (code.widest_store > 0), "not all stores were read"
    return code


def read_compiled(compiled: Any, target: Target, loads: dict[str, int], stores: dict[str, int]) -> MachineCode:
    """What Triton's CompiledKernel came to; loads and stores as in MachineCode."""
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    read = _read_cubin(compiled.asm["cubin"]) if target.backend == "cuda" else _read_amdgcn(compiled.asm["amdgcn"])
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
    programs = resident_programs(target, warps, read["registers"], shared, tensor_memory)
    return MachineCode(
        **read,
        shared=shared,
        warps=warps,
        programs=programs,
        occupancy=programs * warps / LIMITS[target.arch].warps,
        loads=loads,
        stores=stores,
    )


def _gpu_target(target: Target) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(target.backend, target.arch, target.warp_size)


# ------------------------------------------------------------------------------------------------------------ occupancy


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor (on AMD: compute unit) holds at once."""

    warps: int
    programs: int
    """Of more than one warp; of one warp each there can be 32."""
    shared: int
    """Bytes of shared memory."""
    reserved: int
    """Bytes of it that each program takes beside its own."""
    unit: int
    """Bytes that a program's own share is rounded up to."""


# fmt: off
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD's CDNA 3 ISA guide and, for the 16
# barriers that limit the programs, LLVM's AMDGPU backend.
LIMITS = {
    80:       Limits(warps=64, programs=32, shared=164 << 10, reserved=1024, unit=128),
    90:       Limits(warps=64, programs=32, shared=228 << 10, reserved=1024, unit=128),
    100:      Limits(warps=64, programs=32, shared=228 << 10, reserved=1024, unit=128),
    "gfx942": Limits(warps=32, programs=16, shared=64 << 10,  reserved=0,    unit=512),
}
# fmt: on

# The same on all of them: four quarters, each with 512 registers a lane, dealt out to a warp eight at a time.
QUARTERS, QUARTER_REGISTERS, REGISTER_UNIT = 4, 512, 8
TENSOR_MEMORY = 512
"""Columns of tensor memory of a multiprocessor, where there is one (sm_100)."""


def resident_programs(target: Target, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """How many programs a multiprocessor holds at once, by registers, warps, shared and tensor memory; 0 if not one.

    warps: of a program, registers: of a thread, shared: bytes of a program, tensor_memory: columns of a program.
    """
    limits = LIMITS[target.arch]
    fitting_warps = QUARTERS * (QUARTER_REGISTERS // _round_up(max(registers, 1), REGISTER_UNIT))
    counts = [min(fitting_warps, limits.warps) // warps, limits.programs if warps > 1 else 32]
    if shared + limits.reserved:
        counts.append(limits.shared // (_round_up(shared, limits.unit) + limits.reserved))
    if tensor_memory:
        counts.append(TENSOR_MEMORY // tensor_memory)
    return min(counts)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


# ---------------------------------------------------------------------------------------------------------- disassembly


def disassemble(compiled: Any) -> list[Instruction]:
    """The instructions of what `compile_specialized` gave, with branches and stacks."""
    from triton import knobs

    if "amdgcn" in compiled.asm:
        return read_amdgcn(compiled.asm["amdgcn"])
    text = _run_on(compiled.asm["cubin"], knobs.nvidia.nvdisasm.path, "-c", "-gp")
    return read_sass(text, compiled.asm["ptx"])


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    from triton import knobs

    text = _run_on(cubin, knobs.nvidia.cuobjdump.path, "-res-usage", "-sass")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack), **_summary(read_sass(text))}


def _run_on(cubin: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def _read_amdgcn(text: str) -> dict[str, Any]:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
    return {"registers": registers, "stack": stack, **_summary(read_amdgcn(text))}


def _summary(instructions: list[Instruction]) -> dict[str, Any]:
    kinds = Counter(x.kind for x in instructions)
    matrix = Counter(
        "MFMA" if "mfma" in x.opcode else x.opcode.split(".")[0] for x in instructions if x.kind == "matrix"
    )
    widest = {
        f"widest_{verb}": max((x.width for x in instructions if x.kind == f"global {verb}"), default=0)
        for verb in ("load", "store")
    }
    return {"matrix": dict(matrix), "instructions": {kind: kinds[kind] for kind in KINDS if kinds[kind]}, **widest}


# ------------------------------------------------------------------------------------------------- accesses by argument

_POINTER = re.compile(r"ptr addrspace\([18]\) (?:\w+ )*(%[\w.]+)")  # global memory, or an AMD buffer in it
_PHI = re.compile(r"\[ (%[\w.]+), ")
_TYPE = r"(?:<(\d+) x )?(i\d+|half|bfloat|float|double)>?"
_ACCESSES = (
    re.compile(r"(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d+))?\.[bfsu](\d+) "),  # NVIDIA's: assembly
    re.compile(r"(cp\.async)\.c[ag]\.shared\.global[^\[]*\[[^]]*\], \[[^]]*\], ()(\w+)"),
    re.compile(r"raw\.ptr\.buffer\.(load|store)\.(?:v(\d+))?(?:i|f|bf)(\d+)\("),  # AMD's
    re.compile(rf"= (load) {_TYPE}, ptr addrspace\(1\)"),
    re.compile(rf"^  (store) {_TYPE} .*ptr addrspace\(1\)"),
)
_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}


def narrowest_accesses(llvm_ir: str, arguments: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the narrowest load and of the narrowest store through each pointer argument, where there is one.

    Read in LLVM's IR, where every address can be followed back to the arguments it is computed from; an access there is
    one instruction of the machine code. arguments: the names of the kernel's arguments, constants left out.
    """
    lines = llvm_ir[llvm_ir.index("\ndefine ") + 1 :].splitlines()
    parameters = re.findall(r"(%\w+)[,)]", lines[0])
    names = dict(zip(parameters, arguments, strict=False))  # Triton adds pointers of its own after the kernel's
    bases: dict[str, list[str]] = {}
    narrowest: dict[str, dict[str, int]] = {"load": {}, "store": {}}
    accesses = []
    for line in lines[1 : lines.index("}")]:
        pointers = _POINTER.findall(line)
        if access := next(filter(None, (pattern.search(line) for pattern in _ACCESSES)), None):
            accesses.append((access, pointers[-1]))
        elif defined := re.match(r"  (%[\w.]+) = ", line):
            bases[defined[1]] = _PHI.findall(line) if "phi ptr addrspace" in line else pointers
    for access, pointer in accesses:
        kind = "store" if access[1] in ("st", "store") else "load"
        for argument in _origins(pointer, bases, parameters):
            found = narrowest[kind].setdefault(names.get(argument, argument), 1 << 30)
            narrowest[kind][names.get(argument, argument)] = min(found, _bytes(access))
    return narrowest["load"], narrowest["store"]


def _origins(pointer: str, bases: dict[str, list[str]], parameters: list[str]) -> set[str]:
    """The parameters that an address is computed from."""
    seen, reached, ahead = set(), set(), [pointer]
    while ahead:
        value = ahead.pop()
        if value in parameters:
            reached.add(value)
        elif value not in seen:
            seen.add(value)
            ahead += bases.get(value, [])
    assert reached, f"{pointer} leads to no argument"
    return reached


def _bytes(access: re.Match) -> int:
    operation, count, size = access.groups()
    if operation == "cp.async":
        return int(size, 0)
    return int(count or 1) * (_BITS.get(size) or int(size.lstrip("i"))) // 8
