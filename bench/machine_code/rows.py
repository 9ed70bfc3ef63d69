"""The rows of `bench.machine_code`: each kernel as presets launch it on an architecture, and the faults in its code."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import bench.meta_addmm  # noqa: F401 - torch 2.11 cannot run the loss head's products on the meta device without it
from bench.machine_code.build import MachineCode, Specialized, build, specialize
from bench.ops.catalogue import SHEETS
from kernels.launch import TARGETS, LaunchRecord, Target, record_launches
from training.config import TrainConfig, defaults

META = torch.device("meta")
WIDE = 16
"""Bytes of the widest access that every architecture here has."""


MEASURED_SPILLS = {("_attention_dkdv_kernel", 128, 90): 64}
"""Bytes a thread that a kernel may spill at a head dim (None: it has none) and an architecture, where a GPU timed it faster than
what spills nothing. `bench.ops --tune` prints such lines.

dK and dV at head dim 128 on an H100 (T 4096, 32 and 8 heads): 2.17 ms in tiles of 64×64, 2.55 in tiles of 64×128.
"""


# ----------------------------------------------------------------------------------------------------------------- gate


def faults(code: MachineCode, launched: LaunchRecord, target: Target) -> list[str]:
    """What is wrong with the machine code of a launch, in words; nothing where nothing is."""
    found = []
    if not code.widest_store:
        found.append("stores nothing: the compiler has lost its body")
    if code.stack > MEASURED_SPILLS.get((launched.kernel.__name__, launched.arguments.get("HEAD_DIM"), target.arch), 0):
        found.append(f"spills: {code.stack} bytes a thread, at {code.registers} registers")
    if code.shared > target.shared_memory:
        found.append(f"wants {code.shared:,} bytes of shared memory; there are {target.shared_memory:,}")
    # AMD's backend stores a product as its lanes hold it, 8 bytes each: 64 of them write as much at once as 32 of 16.
    for verb, widths, least in (("loads", code.loads, WIDE), ("stores", code.stores, WIDE * 32 // target.warp_size)):
        least = min(least, _bytes_a_thread(launched, target))
        for name, width in widths.items():
            if width < least and _has_aligned_rows(launched.arguments.get(name)):
                found.append(f"{verb} {name} {width} bytes at a time, although its rows are aligned to {WIDE}")
    return found


def _bytes_a_thread(launched: LaunchRecord, target: Target) -> int:
    """Of the feed-forward's smallest tile, 16×32 columns of a weight: shared out among all threads that may be less than 16."""
    sizes = [launched.arguments.get(name, 0) for name in ("BLOCK_F", "BLOCK_D2")]
    return 2 * sizes[0] * sizes[1] // (launched.num_warps * target.warp_size) or WIDE


def _has_aligned_rows(argument: Any) -> bool:
    """Whether it is a half-precision tensor in which each row starts and ends at a multiple of 16 bytes."""
    if not isinstance(argument, Tensor) or argument.element_size() != 2 or argument.dim() == 0:
        return False
    *strides, last = argument.stride()
    elements = WIDE // argument.element_size()
    sizes = (argument.storage_offset(), argument.shape[-1], *strides)
    return last == 1 and all(size % elements == 0 for size in sizes)


# ----------------------------------------------------------------------------------------------------------------- rows


@dataclass
class Row:
    """A kernel as one or more presets launch it on one architecture."""

    arch: str
    case: str
    direction: str
    launched: LaunchRecord
    specialized: Specialized
    presets: list[str] = field(default_factory=list)
    code: MachineCode | None = None

    @property
    def kernel(self) -> str:
        """Its function's name, which a profile shows too."""
        return self.launched.kernel.__name__

    @property
    def name(self) -> str:
        """Op, direction, and the kernel's own name where it says more: `add_rms_norm backward`."""
        op = self.launched.kernel.__module__.partition(".")[2].split(".")[0]
        function = self.kernel.removeprefix(f"_{op}_").removesuffix("_kernel").strip("_")
        return " ".join(dict.fromkeys((self.case, self.direction, function)))

    @property
    def faults(self) -> list[str]:
        """What the gate says."""
        return faults(self.code, self.launched, TARGETS[self.arch])

    def result(self) -> dict[str, Any]:
        """The row for JSON."""
        names = ("name", "arch", "case", "direction", "kernel", "presets", "faults")
        return {name: getattr(self, name) for name in names} | {
            "constants": self.specialized.constants,
            "code": asdict(self.code),
        }

    def build(self) -> MachineCode:
        """Compile it and read its code. Raises what Triton and its assemblers raise."""
        try:
            return build(self.specialized)
        except Exception as error:
            error.add_note(f"while building {self.name} of {', '.join(self.presets)} for {self.arch}")
            raise


def launches(op: str, config: TrainConfig, target: Target) -> Iterator[tuple[str, LaunchRecord]]:
    """Each launch of an op at the sizes of a preset, with `forward` or `backward`."""
    with record_launches(target) as found:
        outputs = _run(op, config)
        n_forward = len(found)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [x for x in outputs if x is not None and x.requires_grad]
        if wanted:
            torch.autograd.backward(wanted, [torch.empty_like(x) for x in wanted])
    for i, launched in enumerate(found):
        yield "forward" if i < n_forward else "backward", launched


def _run(op: str, config: TrainConfig) -> Any:
    """The kernel, as its sheet has it."""
    sheet = SHEETS[op]
    if sheet.launched:
        return sheet.launched(config)
    case = sheet.case(config, torch.bfloat16, META)
    return sheet.peers["triton"].make(case)(*case.arguments, **case.keywords)


def record(archs: list[str], presets: list[str]) -> list[Row]:
    """Each code there is to build, once, forward before backward; nothing is built yet."""
    rows: dict[tuple[str, str, str, str], Row] = {}
    for arch in archs:
        for case in SHEETS:
            for preset in (p for p in presets if SHEETS[case].serves(defaults(p))):
                for direction, launched in launches(case, defaults(preset), TARGETS[arch]):
                    specialized = specialize(launched, TARGETS[arch])
                    new = Row(arch, case, direction, launched, specialized)
                    row = rows.setdefault((arch, case, direction, specialized.key), new)
                    if preset not in row.presets:
                        row.presets.append(preset)
    targets, cases = list(TARGETS), list(SHEETS)
    return sorted(
        rows.values(), key=lambda row: (targets.index(row.arch), cases.index(row.case), row.direction != "forward")
    )


def sizes(constants: dict[str, Any]) -> str:
    """The sizes that a kernel is compiled for: `D=288`."""
    return " ".join(f"{name}={n}" for name, n in _integers(constants) if not name.startswith("BLOCK"))


def tile(constants: dict[str, Any]) -> str:
    """The sizes of its tiles: `4×512`."""
    return "×".join(str(n) for name, n in _integers(constants) if name.startswith("BLOCK"))


def _integers(constants: dict[str, Any]) -> list[tuple[str, int]]:
    return [(name, n) for name, n in constants.items() if type(n) is int and name.isupper() and name != "ALIGNMENT"]
