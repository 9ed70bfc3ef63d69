"""`bench.machine_code --show`: the right loop is found in machine code, and its instructions are counted and placed.

The planted kernel is built in a process without Triton's interpreter, as in tests/test_machine_code.py: run as a program, this
file shows it on each architecture.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bench.machine_code.__main__ import MachineCodeOptions, run
from bench.machine_code.build import compile_specialized, disassemble, specialize
from bench.machine_code.disassembly import read_amdgcn, read_sass
from bench.machine_code.loops import find_loops, hottest, works
from bench.machine_code.rows import Row
from bench.machine_code.show import choose, counts, listing, opcodes, show, source_line
from kernels.launch import HAVE_TRITON, TARGETS, LaunchRecord, tl, triton
from training.errors import UserError

ROOT = Path(__file__).parents[2]
HERE = Path(__file__)

# ------------------------------------------------------------------------------------------------------------ by hand

# Two loops in one, the inner one with a wait whose second try was moved behind the end, and a trap after that.
SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
	//## File ".nv_debug_ptx_txt", line 3
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR17+0xc000], R4 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
	//## File ".nv_debug_ptx_txt", line 5
        /*0040*/              @!P1 LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/                   MUFU.EX2 R4, R4 ;
        /*0070*/                   HADD2.F32 R5, -RZ, R4.H0_H0 ;
        /*0080*/                   FADD R5, R5, R4.reuse ;
        /*0090*/                   BRA.U !UP0, `(.L_x_1) ;
	//## File ".nv_debug_ptx_txt", line 7
        /*00a0*/               @P2 BRA `(.L_x_0) ;
        /*00b0*/                   STG.E.64 desc[UR6][R2.64], R4 ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR17+0xc000], R4 ;
        /*00e0*/              @!P0 BRA `(.L_x_3) ;
        /*00f0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
"""
PTX = """.entry kernel()
	.loc	1 10 0                          // kernel.py:10:0
	add.s32
	.loc	2 43 17                         // standard.py:43:17 @[ kernel.py:5:9 @[ kernel.py:12:36 ] ]
	ld.global.v4.b32
	.loc	1 0 0                           // kernel.py:0:0
	st.global.v2.b32
"""
KERNEL = Path("kernel.py")


@pytest.fixture
def instructions():
    return read_sass(SASS, PTX)


def test_nested_loops_are_found_outer_first_and_a_jump_back_from_behind_the_end_is_none(instructions):
    outer, inner, retry = find_loops(instructions)
    assert (outer.body, outer.depth) == ((*range(1, 11), 13, 14, 15), 1)
    assert (inner.body, inner.depth) == ((*range(2, 10), 13, 14, 15), 2)
    assert (retry.body, retry.depth) == ((13, 14), 3)
    assert [works(loop, instructions) for loop in (outer, inner, retry)] == [True, True, False]


def test_the_hottest_loop_is_the_innermost_that_does_not_only_wait(instructions):
    loops = find_loops(instructions)
    assert hottest(loops, instructions) is loops[1]
    assert hottest([], instructions) is None


def test_instructions_are_counted_by_kind_with_the_width_of_accesses_to_global_memory(instructions):
    inner = [instructions[at] for at in find_loops(instructions)[1].body]
    assert counts(inner) == {
        "global load": "1×16 B",
        "barrier": "2",
        "conversion": "1",
        "special": "1",
        "float": "1",
        "control": "5",  # the branches, and the load from shared memory that is never carried out
    }
    assert counts(instructions)["global store"] == "1×8 B"


def test_an_instruction_belongs_to_the_innermost_line_of_the_kernels_own_file(instructions):
    assert instructions[0].stack == ()
    assert instructions[4].stack == (("standard.py", 43), ("kernel.py", 5), ("kernel.py", 12))
    assert [source_line(instructions[at], KERNEL) for at in (0, 1, 4, 9, 10)] == [0, 10, 5, 5, 0]
    assert source_line(instructions[4], Path("standard.py")) == 43


def test_the_opcodes_of_a_line_are_told_by_kind_and_number(instructions):
    assert opcodes(instructions[1:10]) == (
        "1 LDG.E.128.CONSTANT, 1 SYNCS, 1 HADD2, 1 MUFU.EX2, 1 FADD, 3 control, 1 integer"
    )


def test_the_whole_listing_has_loops_places_of_branches_and_lines_where_they_change(instructions):
    lines = listing(instructions, find_loops(instructions)[:2], KERNEL)
    assert len(lines) == len(instructions)
    assert lines[0] == "          0  LDC R1, c[0x0][0x28]"
    assert lines[1].split() == ["1", "1", "IADD3", "R2,", "R2,", "0x1,", "RZ", "10"]
    assert lines[9].split() == ["1.2", "9", "BRA.U", "!UP0,", "`(.L_x_1)", "->", "2"]


def test_amds_assembly_is_read_with_its_branches_lines_and_widths():
    found = read_amdgcn(
        "kernel:\n"
        "\t.loc\t1 7 0 is_stmt 1               ; kernel.py:7:0\n"
        "\ts_load_dwordx2 s[2:3], s[0:1], 0x0\n"
        ".LBB0_1:                               ; =>This Inner Loop Header: Depth=1\n"
        "\t.loc\t2 43 17                         ; standard.py:43:17 @[ kernel.py:8:36 ]\n"
        "\tbuffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen\n"
        "\tglobal_store_short v0, v1, s[0:1]\n"
        "\ts_waitcnt vmcnt(0)                   ; wait\n"
        "\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]\n"
        "\tv_exp_f32_e32 v0, v0\n"
        "\tv_cvt_f32_u32_e32 v1, s6\n"
        "\ts_cbranch_scc1 .LBB0_1\n"
        "; %bb.2:\n"
        "\ts_endpgm\n"
    )
    (loop,) = find_loops(found)
    assert loop.body == tuple(range(1, 8))
    assert [found[at].kind for at in loop.body] == [
        "global load", "global store", "barrier", "matrix", "special", "conversion", "control"
    ]  # fmt: skip
    assert [x.width for x in found[1:3]] == [16, 2]
    assert [source_line(x, KERNEL) for x in found[:2]] == [7, 8]
    assert found[3].text == "s_waitcnt vmcnt(0)"


# ------------------------------------------------------------------------------------------------------------- options


def rows_named(*names):
    return [SimpleNamespace(name=name) for name in names]


def test_a_kernel_is_chosen_by_its_name_or_by_a_part_that_no_other_has():
    rows = rows_named("attention forward", "packed_attention forward", "head scale", "head scale")
    assert choose("attention forward", rows) is rows[0]
    assert choose("packed", rows) is rows[1]
    assert choose("head scale:2", rows) is rows[3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attention", "in more than one; say which: attention forward, packed_attention forward"),
        ("scale", "in more than one; say which: head scale:1, head scale:2"),
        ("flux", "'flux', which is in none of: attention forward, packed_attention forward, head scale:1"),
    ],
)
def test_a_name_of_none_or_of_several_is_refused_with_the_candidates(name, message):
    with pytest.raises(UserError, match=message):
        choose(name, rows_named("attention forward", "packed_attention forward", "head scale", "head scale"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"show": "x", "diff": "HEAD"}, "--diff is given with --show"),
        ({"show": "x", "arch": ["sm_80", "sm_90"]}, "--arch names 2; --show takes one"),
        ({"loop": 1}, "--loop is given without --show"),
        ({"whole": True}, "--whole is given without --show"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        run(MachineCodeOptions(**options), Console())


# ------------------------------------------------------------------------------------------------------------- planted


@triton.jit
def planted_kernel(x_ptr, y_ptr, n_outer, n_inner, N: tl.constexpr):
    cols = tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for i in range(n_outer):
        for j in range(n_inner):
            x = tl.load(x_ptr + (i * n_inner + j) * N + cols)  # loads here
            total += tl.exp2(x)  # exponentials here
        total = tl.sqrt(total)
    tl.store(y_ptr + cols, total)


def plant():
    """What is found in the planted kernel on each architecture; a thread has 4 elements of float32, 16 bytes."""
    said = {}
    for arch, target in TARGETS.items():
        n = 16 * target.warp_size
        x, y = (torch.empty(n, device="meta") for _ in range(2))
        launched = LaunchRecord(
            planted_kernel, (1,), {"x_ptr": x, "y_ptr": y, "n_outer": 9, "n_inner": 9, "N": n}, 4, 1
        )
        row = Row(arch, "planted", "forward", launched, specialize(launched, target), ["none"])
        instructions = disassemble(compile_specialized(row.specialized))
        loops = find_loops(instructions)
        hot = [instructions[at] for at in hottest(loops, instructions).body]
        lines = {}
        for x in hot:
            lines.setdefault(source_line(x, HERE), []).append(x)
        console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
        show(row, console)
        said[arch] = {
            "depths": [loop.depth for loop in loops],
            "hot": counts(hot),
            "lines": {line: counts(these) for line, these in lines.items()},
            "shown": console.export_text(),
        }
    print(json.dumps(said))


@pytest.fixture(scope="module")
def planted():
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def line_of(text):
    return next(str(n) for n, line in enumerate(HERE.read_text().splitlines(), 1) if line.endswith(f"# {text} here"))


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton has no build for this machine")
@pytest.mark.parametrize("arch", TARGETS)
def test_the_inner_loop_of_a_planted_kernel_is_found_and_its_instructions_are_counted_by_line(planted, arch):
    said = planted[arch]
    assert said["depths"][:2] == [1, 2]
    passes, width = said["hot"]["global load"].split(
        "×"
    )  # ptxas carries out some passes in one, and the rest in a loop behind
    assert width == "16 B"
    assert int(said["hot"]["special"]) == 4 * int(passes)
    assert "global store" not in said["hot"]
    assert said["lines"][line_of("loads")]["global load"] == said["hot"]["global load"]
    assert said["lines"][line_of("exponentials")]["special"] == said["hot"]["special"]
    shown = (
        rf"total \+= tl\.exp2\(x\)  # exponentials here +│ +\d+ │ .*{said['hot']['special']} (MUFU.EX2|v_exp_f32_e32), "
    )
    assert re.search(shown, said["shown"])


if __name__ == "__main__":
    plant()
