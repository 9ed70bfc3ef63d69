"""`bench.machine_code.counted`: cycles by hand, passes against a count of pairs, and the kernels of the feed-forward as built."""

import io
import json
import re
from itertools import product

import pytest
from rich.console import Console

from bench.machine_code import counted
from bench.machine_code.counted import Counted, attention_passes, cases, mlp_passes, run, summary
from bench.machine_code.cycles import Cycles, cycles, in_loops
from bench.machine_code.disassembly import Instruction, read_sass
from kernels.attention.tiles import Tile
from kernels.mlp.tiles import Tile as MlpTile
from tests.bench.test_machine_code import needs_triton
from tests.bench.test_machine_code import run as run_python
from training.config import TrainConfig
from training.errors import UserError

# --------------------------------------------------------------------------------------------------------------- cycles


@pytest.mark.parametrize(
    ("text", "warps", "expected"),
    [
        ("IADD3 R2, R2, 0x1, RZ", 4, Cycles(issue=1)),
        ("@P0 IADD3 R2, R2, 0x1, RZ", 8, Cycles(issue=2)),
        ("@!PT LDS RZ, [RZ]", 8, Cycles()),  # never carried out
        ("MUFU.EX2 R4, R4", 8, Cycles(issue=2, special=16)),
        ("HMMA.16816.F32.BF16 R8, R4, R2, R8", 4, Cycles(matrix=4)),
        # Rows of the left operand in registers, then in shared memory, where a narrow product waits for them.
        ("HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR8], R24", 4, Cycles(matrix=128)),
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24", 8, Cycles(matrix=256)),
        ("HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24", 4, Cycles(matrix=8)),
        ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], !UPT", 4, Cycles(matrix=20)),
    ],
)
def test_an_instruction_takes_its_part_of_the_multiprocessor(text, warps, expected):
    opcode = next(word for word in text.split() if not word.startswith("@"))
    assert cycles([Instruction(text, opcode)], warps) == expected


def test_a_product_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="UTCHMMA is no product whose cycles are known"):
        cycles([Instruction("UTCHMMA gdesc[UR4]", "UTCHMMA")], 4)


SASS = """
.text.kernel:
        /*0000*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0080*/               @P0 BRA `(.L_x_3) ;
        /*0090*/                   EXIT ;
"""


def test_outer_loops_with_products_are_told_from_the_rest():
    outside, loops = in_loops(read_sass(SASS))
    assert [x.opcode.split(".")[0] for x in outside] == ["IADD3", "LDG", "BRA", "EXIT"]
    assert [len(body) for body in loops] == [4, 2]


# --------------------------------------------------------------------------------------------------------------- passes


def blocks(config, tile):
    """How many pairs of a block of queries and one of keys have a pair that sees, and how many see all."""
    length, some, whole = config.max_seq_len, 0, 0
    for first, key in product(range(0, length, tile.block_m), range(0, length, tile.block_n)):
        some += key <= min(first + tile.block_m, length) - 1
        whole += key + tile.block_n - 1 <= first
    return config.batch_size * config.n_heads * some, config.batch_size * config.n_heads * whole


@pytest.mark.parametrize("length", [64, 200, 256])
@pytest.mark.parametrize("tile", [(32, 64), (64, 64), (64, 32), (128, 64), (64, 128)])
@pytest.mark.parametrize("kernel", ["forward", "dq"])
def test_passes_are_those_of_the_blocks_that_the_diagonal_leaves(kernel, tile, length):
    config, tile = TrainConfig(batch_size=3, n_heads=8, n_kv_heads=2, max_seq_len=length), Tile(*tile, 4, 2)
    passes = attention_passes(kernel, config, tile)
    some, whole = blocks(config, tile)
    assert sum(n * (a + b) for n, (a, b) in passes) == some
    assert sum(n * a for n, (a, _) in passes) == whole


@pytest.mark.parametrize("length", [200, 256])
@pytest.mark.parametrize("tile", [(32, 64), (64, 64), (32, 128), (128, 128)])
def test_passes_of_dk_and_dv_are_those_of_the_whole_group(tile, length):
    config, tile = TrainConfig(batch_size=3, n_heads=8, n_kv_heads=2, max_seq_len=length), Tile(*tile, 4, 2)
    passes = attention_passes("dkdv", config, tile)
    programs = 3 * 2
    assert [n for n, _ in passes] == [programs] * -(-length // tile.block_n)
    for block, (_, (whole, cut)) in enumerate(passes):
        first, last = block * tile.block_n, min((block + 1) * tile.block_n, length) - 1
        starts = range(first, length, tile.block_m)  # queries are walked from the block's first key on
        seen_whole = sum(start >= last and start + tile.block_m <= length for start in starts)
        assert (whole, whole + cut) == (4 * seen_whole, 4 * len(starts))


def test_passes_of_the_feed_forward_are_those_over_its_hidden_columns():
    config = TrainConfig(batch_size=3, max_seq_len=100, dim=288, ffn_dim=768)
    assert mlp_passes("forward", config, MlpTile(128, 32, 8, 2)) == [(3, (24,))]


# -------------------------------------------------------------------------------------------------------------- command


def row(shape, stages, resident, ratio, stack=0):
    return {
        "shape": shape,
        "kernel": "dq",
        "tile": [64, 64, 4, stages],
        "resident": resident,
        "stack": stack,
        "ratio": ratio,
    }


def test_ratios_are_gathered_by_shape_stages_and_residence_without_what_spills():
    rows = [row("a", 2, 1, 1.5), row("a", 2, 3, 1.2), row("a", 2, 4, 1.1), row("a", 2, 2, 9.0, stack=512)]
    assert summary([*rows, {"shape": "a", "why": "no loop"}]) == [
        (("a", "2", "one"), [1.5]),
        (("a", "2", "several"), [1.2, 1.1]),
    ]


@needs_triton
def test_nothing_of_the_feed_forward_is_computed_twice(tmp_path):
    """Of gate and up in two layouts, the backward took the exponential and the reciprocal twice."""
    path = tmp_path / "counted.json"
    done = run_python("-m", "bench.machine_code.counted", "--only", "mlp", "--json", str(path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    result = json.loads(path.read_text())
    rows = result["rows"]
    assert [row["kernel"] for row in rows] == ["mlp backward", "mlp forward"]
    least = 2 * 32768 * 768 / 16 / (132 * result["gigahertz"] * 1000)
    for row in rows:
        assert row["special_us"] == pytest.approx(least, rel=0.02)
        assert row["counted_us"] == pytest.approx(row["matrix_us"] + row["issue_us"] + row["special_us"])
        assert "ratio" not in row


@needs_triton
def test_a_tile_that_was_measured_is_counted_beside_its_time(tmp_path):
    measured = json.loads(counted.MEASURED.read_text())
    names = ("shape", "kernel", "block_m", "block_n", "num_warps", "num_stages")
    wanted = ("128x256, 8 and 4 heads of 36", "dq", 64, 64, 4, 1)
    (one,) = (x for x in measured["rows"] if tuple(x.get(name) for name in names) == wanted)
    (tmp_path / "one.json").write_text(json.dumps(measured | {"rows": [one]}))
    path = tmp_path / "counted.json"
    options = ("--measured", str(tmp_path / "one.json"), "--only", "dq", "--json", str(path))
    done = run_python("-m", "bench.machine_code.counted", *options, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert row["measured_us"] == one["us"]
    assert 1 < row["ratio"] == pytest.approx(one["us"] / row["counted_us"])
    # Three products of 64 rows, 64 keys and 48 columns in each of a program's blocks, of which the four programs of a head have 10.
    assert row["matrix_us"] == pytest.approx(3 * 64 * 64 * 48 / 2048 * 128 * 8 * 10 / (132 * 1980))
    shown = done.stdout
    assert f"{wanted[0]}: microseconds on an H100" in shown
    assert "measured/counted, of tiles that spill 64 bytes at most" in shown
    assert f"{row['ratio']:.2f}" in shown


def write_search(path, **change):
    environment = {"gpu": "NVIDIA H100 80GB HBM3", "date": "", "gpu_state": {"clocks.sm": "1980 MHz"}}
    found = {
        "bench": "tiles",
        "dtype": "bfloat16",
        "rows": [],
        "environment": environment | change.pop("environment", {}),
    }
    path.write_text(json.dumps(found | change))
    return str(path)


ROW = {
    "shape": "128x256, 8 and 4 heads of 36",
    "kernel": "dq",
    "block_m": 64,
    "block_n": 64,
    "num_warps": 4,
    "num_stages": 1,
    "us": 79.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bench": "tune"}, "has the bench 'tune'; it must be 'tiles'"),
        ({"dtype": "float32"}, "has the dtype 'float32'; it must be 'bfloat16'"),
        ({"environment": {"gpu": None}}, "has the GPU None; it must be 'H100 SXM'"),
        ({"environment": {"gpu": "NVIDIA A100-SXM4-80GB"}}, "has the GPU 'A100"),
        ({"environment": {"gpu_state": None}}, "does not say its GPU's clock: clocks.sm is None"),
        ({"environment": {"gpu_state": {"clocks.sm": "[N/A]"}}}, "clocks.sm is '\\[N/A\\]'"),
        ({"environment": {"gpu_state": {"clocks.sm": "0 MHz"}}}, "clocks.sm is '0 MHz'"),
        ({"rows": [ROW | {"shape": "wide"}]}, "no tile of attention: .*wide.*not enough values to unpack"),
        ({"rows": [ROW | {"shape": 5}]}, "no tile of attention: .*AttributeError"),
        ({"rows": [ROW | {"us": "x"}]}, "no tile of attention: .*could not convert"),
        ({"rows": [ROW | {"us": -3}]}, "no tile of attention: .*us is -3.0"),
        ({"rows": [ROW | {"us": float("nan")}]}, "no tile of attention: .*us is nan"),
        ({"rows": [ROW | {"block_m": 0}]}, "no tile of attention: .*is no tile"),
        ({"rows": [ROW | {"num_warps": 3}]}, "no tile of attention: .*is no tile"),
        ({"rows": [{"kernel": "dq", "us": 1.0}]}, "no tile of attention: .*KeyError"),
        ({"rows": [ROW]}, "--only is 'flux', which is in no shape and no kernel"),
    ],
)
def test_what_can_not_be_counted_is_refused(tmp_path, change, message, monkeypatch):
    monkeypatch.setattr(counted, "HAVE_TRITON", True)
    monkeypatch.setattr(counted, "_case", lambda table, shape, kernel, *_: FakeCase(shape, kernel))
    with pytest.raises(UserError, match=message):
        run(Counted(measured=write_search(tmp_path / "tiles.json", **change), only="flux"), Console(file=io.StringIO()))


class FakeCase:
    """A kernel that is not built."""

    def __init__(self, shape, kernel):
        self.shape, self.kernel = shape, kernel

    def row(self, gigahertz):
        if self.kernel == "forward":
            raise KeyboardInterrupt
        return row(self.shape, 2, 1, 1.5) | {"why": "planted"}


def test_what_was_counted_until_a_stop_is_kept_and_what_is_in_the_way_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(counted, "HAVE_TRITON", True)
    monkeypatch.setattr(counted, "_case", lambda table, shape, kernel, *_: FakeCase(shape, kernel))
    console, path = Console(file=io.StringIO(), width=120), tmp_path / "counted.json"
    with pytest.raises(KeyboardInterrupt):
        run(Counted(measured=write_search(tmp_path / "tiles.json"), json=str(path), jobs=1), console)
    assert [row["why"] for row in json.loads(path.read_text())["rows"]] == ["planted"]
    assert "not counted: 32768x288x768, dq [64, 64, 4, 2]: planted" in console.file.getvalue()


BUILT = """
import json
from dataclasses import replace
from bench.machine_code.counted import _case, _config, attention_passes
from bench.ops.tune.tables import ATTENTION
from kernels.attention.tiles import Tile

def why(tile, **change):
    config = _config("128x256, 8 and 4 heads of 36")
    case = _case(ATTENTION, "shape", "dq", config, tile, 79.0, attention_passes)
    return replace(case, **change).row(1.98).get("why", "")

print(json.dumps([why(Tile(64, 64, 4, 1)), why(Tile(64, 64, 4, 1), passes=[(1, (1,))]), why(Tile(8, 8, 4, 1))]))
"""


@needs_triton
def test_a_tile_that_can_not_be_built_or_counted_says_why():
    done = run_python("-c", BUILT)
    assert done.returncode == 0, done.stderr
    counts, loops, compiler = json.loads(done.stdout.splitlines()[-1])
    assert counts == ""
    assert loops == "2 loops, 1 in the source"
    assert re.fullmatch(r"\w+: .*\w.*", compiler), compiler


def test_cases_that_no_gpu_has_timed_come_last(monkeypatch):
    monkeypatch.setattr(counted, "_case", lambda table, shape, kernel, config, tile, us, passes: (table.op, kernel, us))
    assert list(cases({"rows": []})) == [("mlp", "backward", None), ("mlp", "forward", None)]
