"""`bench.machine_code.counted`: cycles by hand, passes against a count of pairs, and the kernels of the feed-forward as built."""

import io
import json
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


@pytest.mark.parametrize("tile", [(32, 64), (64, 64), (32, 128), (128, 128)])
def test_passes_of_dk_and_dv_are_those_of_the_whole_group(tile):
    config, tile = TrainConfig(batch_size=3, n_heads=8, n_kv_heads=2, max_seq_len=256), Tile(*tile, 4, 2)
    passes = attention_passes("dkdv", config, tile)
    some, whole = blocks(config, tile)
    assert sum(n * (a + b) for n, (a, b) in passes) == some
    assert sum(n * a for n, (a, _) in passes) == whole


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
    # Four products of 64 rows, a key and 48 columns for each of a program's blocks, at the peak.
    least = 3 * 64 * 64 * 48 / 2048 * 128 * 8 * 10 / (132 * 1980)
    assert least <= row["matrix_us"] <= 2 * least


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"us": 1.0}]}, "--measured is no search for attention's tiles: KeyError"),
        ({"rows": [{"kernel": "dq", "us": 1.0, "shape": "wide"}]}, "--measured is no search for attention's tiles"),
        ({"environment": {"gpu": None, "date": ""}}, "--measured does not say its GPU's clock"),
        ({}, "--only is 'flux', which is in no shape and no kernel"),
    ],
)
def test_what_can_not_be_counted_is_refused(tmp_path, change, message, monkeypatch):
    monkeypatch.setattr(counted, "HAVE_TRITON", True)
    monkeypatch.setattr(
        counted, "_case", lambda table, shape, kernel, *_: type("Case", (), {"shape": shape, "kernel": kernel})
    )
    measured = {
        "bench": "tiles",
        "rows": [],
        "environment": {"gpu": None, "date": "", "gpu_state": {"clocks.sm": "1980 MHz"}},
    }
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(measured | change))
    with pytest.raises(UserError, match=message):
        run(Counted(measured=str(path), only="" if change else "flux"), Console(file=io.StringIO()))


def test_cases_that_no_gpu_has_timed_come_last(monkeypatch):
    monkeypatch.setattr(counted, "_case", lambda table, shape, kernel, config, tile, us, passes: (table.op, kernel, us))
    assert list(cases({"rows": []})) == [("mlp", "backward", None), ("mlp", "forward", None)]
