"""The gate of `bench.machine_code` on every kernel, and on planted ones that it must catch.

Machine code cannot be built in a process that has Triton's interpreter on, as this one may: both run in another. Run as a
program, this file builds the planted kernels and prints what the gate says of them.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench.machine_code.__main__ import MachineCodeOptions, check
from bench.machine_code.build import build, resident_programs, specialize
from bench.machine_code.rows import faults
from kernels.launch import HAVE_TRITON, TARGETS, LaunchRecord, tl, triton
from model.config import PRESETS
from training.errors import UserError

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="Triton has no build for this machine")


# -------------------------------------------------------------------------------------------------------- in a process


def run(*arguments, **variables):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ = {**inherited, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True)


def built(path, *options):
    """The rows of a sweep; the test fails, with the faults, where the gate does."""
    done = run("-m", "bench.machine_code", "--json", str(path), *options)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    return json.loads(path.read_text())["rows"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The smallest rows, with the odd head dim, on one architecture of each maker."""
    path = tmp_path_factory.mktemp("machine_code") / "rows.json"
    return built(path, "--preset", "reference", "--arch", "sm_90", "gfx942")


@needs_triton
def test_every_kernel_passes_the_gate_at_the_smallest_sizes(rows):
    assert {row["arch"] for row in rows} == {"sm_90", "gfx942"}
    for row in rows:
        assert row["code"]["programs"] >= 1
        assert row["code"]["loads"], row["name"]
        assert row["code"]["stores"], row["name"]


@needs_triton
def test_the_widest_rows_that_are_held_in_registers_at_once_pass_the_gate(tmp_path):
    rows = built(tmp_path / "rows.json", "--preset", "llama3.1-70b", "--kernel", "add_rms_norm")
    assert {row["arch"] for row in rows} == set(TARGETS)


@needs_triton
def test_every_kernel_there_is_has_a_row(rows):
    files = (ROOT / "kernels").rglob("*.py")
    kernel = re.compile(r"^def (\w+_kernel)\(", re.MULTILINE)
    written = {name for file in files for name in kernel.findall(file.read_text(encoding="utf-8"))}
    assert {row["kernel"] for row in rows} == written


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)  # more than 600 kernels: three minutes on two idle cores
def test_every_kernel_passes_the_gate_at_the_sizes_of_every_preset(tmp_path):
    rows = built(tmp_path / "rows.json")
    assert {row["arch"] for row in rows} == set(TARGETS)
    assert {preset for row in rows for preset in row["presets"]} == set(PRESETS)


@needs_triton
def test_an_unknown_kernel_is_refused_with_the_known_ones_also_where_the_interpreter_is_on():
    done = run(
        "-m", "bench.machine_code", "--kernel", "flux", "--preset", "reference", "--arch", "sm_90", TRITON_INTERPRET="1"
    )
    assert done.returncode == 2
    assert "--kernel is 'flux', which is in none of: rms_norm forward, rms_norm backward" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": ["sm_90", "sm_9"]}, "--arch is 'sm_9'; allowed: sm_80, sm_90, sm_100, gfx942"),
        ({"preset": ["8b"]}, "--preset is '8b'; allowed: reference, .*llama3.1-8b"),
        ({"jobs": 0}, "--jobs is 0; it must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        check(MachineCodeOptions(**options))


# ------------------------------------------------------------------------------------------------------------ occupancy


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "tensor_memory", "programs"),
    [
        ("sm_90", 4, 32, 0, 0, 16),  # 64 warps
        ("sm_90", 1, 32, 0, 0, 32),  # 32 programs
        ("sm_90", 4, 33, 0, 0, 12),  # 40 registers a thread, 12 warps a quarter
        ("sm_90", 8, 255, 0, 0, 1),
        ("sm_90", 16, 255, 0, 0, 0),
        ("sm_90", 4, 32, 113 * 1024, 0, 2),  # two of 113 + 1 KB fill 228
        ("sm_90", 4, 32, 113 * 1024 + 1, 0, 1),
        ("sm_90", 4, 32, 227 * 1024, 0, 1),
        ("sm_80", 4, 32, 163 * 1024, 0, 1),
        ("sm_80", 4, 32, 163 * 1024 + 1, 0, 0),
        ("sm_100", 4, 32, 0, 256, 2),  # columns of tensor memory
        ("gfx942", 4, 64, 0, 0, 8),  # 32 warps
        ("gfx942", 4, 65, 0, 0, 7),
        ("gfx942", 2, 32, 0, 0, 16),
        ("gfx942", 1, 32, 0, 0, 32),
        ("gfx942", 4, 32, 32 * 1024, 0, 2),
    ],
)
def test_resident_programs_are_limited_by_registers_warps_shared_and_tensor_memory(
    arch, warps, registers, shared, tensor_memory, programs
):
    assert resident_programs(TARGETS[arch], warps, registers, shared, tensor_memory) == programs


# -------------------------------------------------------------------------------------------------------------- planted


@triton.jit
def scaled_copy(x_ptr, y_ptr, x_step, y_step, N: tl.constexpr):
    """Holds all of x until it knows the sum. A step that is not the constant 1 keeps accesses one element wide."""
    cols = tl.arange(0, N)
    x = tl.load(x_ptr + cols * x_step).to(tl.float32)
    tl.store(y_ptr + cols * y_step, (x * tl.sum(x)).to(y_ptr.dtype.element_ty))


@triton.jit
def product(a_ptr, b_ptr, c_ptr, n_blocks, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, cols, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    c = tl.zeros([M, N], tl.float32)
    for block in range(n_blocks):
        a = tl.load(a_ptr + rows * 4096 + block * K + inner[None, :])
        b = tl.load(b_ptr + (block * K + inner[:, None]) * 4096 + cols)
        c = tl.dot(a, b, c)
    tl.store(c_ptr + rows * N + cols, c.to(c_ptr.dtype.element_ty))


@triton.jit
def nothing(x_ptr, y_ptr, N: tl.constexpr):
    """As a compiler that loses a kernel's body would have it."""


def copy_of(n, warps=4, x_step=1, y_step=1, row=4096, dtype=torch.bfloat16):
    x, y = (torch.empty(8, row, dtype=dtype, device="meta") for _ in range(2))
    return LaunchRecord(
        scaled_copy, (1,), {"x_ptr": x, "y_ptr": y, "x_step": x_step, "y_step": y_step, "N": n}, warps, 1
    )


X = torch.empty(8, 4096, dtype=torch.bfloat16, device="meta")


@triton.jit
def tile(x_ptr, y_ptr, x_step, BLOCK_F: tl.constexpr, BLOCK_D2: tl.constexpr):
    at = tl.arange(0, BLOCK_F)[:, None] * 4096 + tl.arange(0, BLOCK_D2)[None, :] * x_step
    tl.store(y_ptr + at, tl.load(x_ptr + at))


def tile_copy(**blocks):
    """A copy, an element at a time, of a tile whose size is named as the feed-forward's smallest one is, by 8 warps."""
    return LaunchRecord(tile, (1,), {"x_ptr": X, "y_ptr": X, "x_step": 2, **blocks}, 8, 1)


def product_of(stages):
    a, b, c = (torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta") for _ in range(3))
    arguments = {"a_ptr": a, "b_ptr": b, "c_ptr": c, "n_blocks": 48, "M": 128, "N": 128, "K": 64}
    return LaunchRecord(product, (1,), arguments, 4, stages)


def planted_on(target):
    amd = target.backend == "hip"  # 512 registers a thread, not 255, and other instructions past 2 GiB
    return {
        "sound": copy_of(4096),
        "spilling": copy_of(32768 if amd else 8192, warps=1, dtype=torch.float32),
        "narrow loads": copy_of(4096, x_step=2),
        "narrow stores": copy_of(4096, y_step=2),
        "narrow and unaligned": copy_of(4096, x_step=2, y_step=2, row=36),
        "empty": replace(copy_of(4096), kernel=nothing, arguments={"x_ptr": X, "y_ptr": X, "N": 4096}),
        "small tile": tile_copy(BLOCK_F=16, BLOCK_D2=32),
        "large tile": tile_copy(BLOCK_F=32, BLOCK_D2=64),
        "product": product_of(stages=2),
        "product with too many stages": product_of(stages=8),
        **({"sound past 2 GiB": copy_of(4096, row=1 << 31)} if amd else {}),
    }


def judged(case):
    arch, name, launched = case
    code = build(specialize(launched, TARGETS[arch]))
    return {"arch": arch, "name": name, "faults": faults(code, launched, TARGETS[arch]), **asdict(code)}


def plant():
    """What the gate says of each planted kernel on each architecture."""
    cases = [(arch, *planted) for arch, target in TARGETS.items() for planted in planted_on(target).items()]
    with ThreadPoolExecutor(2) as pool:
        print(json.dumps([*pool.map(judged, cases)]))


@pytest.fixture(scope="module")
def planted():
    done = run(__file__)
    assert done.returncode == 0, done.stderr
    return {(said["arch"], said["name"]): said for said in json.loads(done.stdout)}


@needs_triton
@pytest.mark.parametrize(("arch", "name"), [*((arch, "sound") for arch in TARGETS), ("gfx942", "sound past 2 GiB")])
def test_a_sound_kernel_has_no_fault(planted, arch, name):
    code = planted[arch, name]
    assert code["faults"] == []
    assert code["loads"] == {"x_ptr": 16}
    assert code["stores"] == {"y_ptr": 16}
    assert (code["widest_load"], code["widest_store"]) == (16, 16)
    assert code["matrix"] == {}


@needs_triton
@pytest.mark.parametrize("arch", TARGETS)
def test_the_gate_catches_a_spilling_kernel(planted, arch):
    code = planted[arch, "spilling"]
    assert code["stack"] > 0
    assert [fault.split(":")[0] for fault in code["faults"]] == ["spills"]


@needs_triton
@pytest.mark.parametrize("arch", TARGETS)
def test_the_gate_catches_narrow_loads_and_stores_of_aligned_rows_by_argument(planted, arch):
    loads, stores = planted[arch, "narrow loads"], planted[arch, "narrow stores"]
    assert loads["faults"] == ["loads x_ptr 2 bytes at a time, although its rows are aligned to 16"]
    assert (loads["widest_load"], loads["widest_store"]) == (2, 16)
    assert stores["faults"] == ["stores y_ptr 2 bytes at a time, although its rows are aligned to 16"]
    assert (stores["widest_load"], stores["widest_store"]) == (16, 2)


@needs_triton
@pytest.mark.parametrize("arch", TARGETS)
def test_the_gate_catches_a_kernel_whose_body_is_gone(planted, arch):
    assert planted[arch, "empty"]["faults"] == ["stores nothing: the compiler has lost its body"]


@needs_triton
@pytest.mark.parametrize("arch", TARGETS)
def test_a_tile_of_less_than_16_bytes_a_thread_may_be_loaded_in_what_there_is(planted, arch):
    """256 threads have 4 bytes each of 16×32 elements, 512 threads (AMD's) 2; of 32×64 16 and 8."""
    small, large = planted[arch, "small tile"], planted[arch, "large tile"]
    least = {"gfx942": (2, 8)}.get(arch, (4, 16))
    assert small["loads"] == {"x_ptr": 2}
    assert any(fault.startswith("loads x_ptr 2 bytes") for fault in small["faults"]) == (least[0] > 2)
    assert any(fault.startswith("loads x_ptr 2 bytes") for fault in large["faults"])


@needs_triton
@pytest.mark.parametrize("arch", TARGETS)
def test_the_gate_lets_narrow_accesses_to_unaligned_rows_pass(planted, arch):
    code = planted[arch, "narrow and unaligned"]
    assert code["loads"] == {"x_ptr": 2}
    assert code["stores"] == {"y_ptr": 2}
    assert code["faults"] == []


@needs_triton
@pytest.mark.parametrize("arch", TARGETS)
def test_the_gate_catches_a_kernel_that_wants_more_shared_memory_than_there_is(planted, arch):
    code = planted[arch, "product with too many stages"]
    assert any(fault.startswith("wants") and "bytes of shared memory" in fault for fault in code["faults"])
    assert code["programs"] == 0


@needs_triton
@pytest.mark.parametrize(("arch", "kind"), [*zip(TARGETS, ("HMMA", "HGMMA", "UTCHMMA", "MFMA"), strict=True)])
def test_matrix_instructions_are_counted_by_kind(planted, arch, kind):
    code = planted[arch, "product"]
    assert list(code["matrix"]) == [kind]
    assert code["loads"] == {"a_ptr": 16, "b_ptr": 16}


if __name__ == "__main__":
    plant()
