"""What `bench.ops --tune` prints and writes, stopped or not, and refuses."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bench.machine_code.rows import faults
from bench.ops.__main__ import OpsBench, measure
from bench.ops.tune import report
from bench.ops.tune.report import search_and_show, table_of
from bench.ops.tune.search import Unfit
from bench.ops.tune.tables import ATTENTION, MLP
from kernels.attention.tiles import Tile
from kernels.launch import TARGETS, LaunchRecord
from kernels.mlp.tiles import Tile as MlpTile
from training.errors import UserError

CUDA = torch.device("cuda")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


BEST = {"attention": Tile(32, 32, 4, 1), "mlp": MlpTile(64, 32, 4, 2)}


class FakeTrial:
    """An H100 on which one tile of the grid takes half the time of all others, and spills."""

    machine, arch = "sm_90", 90
    stop_at = None

    def __init__(self, table, kernel, config, dtype, device, repeats):
        self.best = BEST[table.op]
        self.kernel = kernel
        self.old = table.tile_of(kernel, config, dtype.itemsize, TARGETS["sm_90"])
        self.direction = "forward" if kernel == "forward" else "backward"
        self.spilled = dict.fromkeys(table.grid, 0) | {self.old: 0, self.best: 24 if kernel == "backward" else 0}

    def seconds_of(self, *tiles, repeats=None):
        if self.stop_at == (self.kernel, tiles[0]):
            raise KeyboardInterrupt
        if tiles == (MlpTile(128, 64, 8, 3),):
            raise Unfit("spills 440 bytes a thread")
        return {tile: 1e-3 if tile == self.best else 2e-3 for tile in tiles}


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(report, "Trial", FakeTrial)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
    monkeypatch.setattr(report, "environment", lambda: {"gpu": "H100"})


def tune(op, console, json="", sizes=()):
    return search_and_show(op, list(sizes), torch.bfloat16, CUDA, 5, json, console)


def test_times_of_old_and_new_and_rows_to_paste_are_shown_for_attention(console, h100, tables_put_back):
    result = tune("attention", console)
    assert [(row["size"], row["kernel"]) for row in result["rows"]] == [
        (size, kernel) for size in ("4x4096x128", "4x4096x64", "reference") for kernel in ("dkdv", "dq", "forward")
    ]
    assert {(row["old_us"], row["new_us"], row["new"]) for row in result["rows"]} == {(2000, 1000, (32, 32, 4, 1))}
    shown = console.file.getvalue()
    assert shown.count("2.00x") == 9
    (line,) = (line for line in shown.splitlines() if line.startswith("dkdv"))
    row = eval(f"{{{line.removeprefix('dkdv')}}}", {"Tile": Tile})["sm_90"]
    served = [width for width, tile in row.items() if tile == BEST["attention"]]
    assert served == [64, 128]  # 64 serves 48 as well, of head dim 36
    assert row[256] == ATTENTION.tiles["dkdv"]["sm_90"][256]
    assert "kernels/attention/tiles.py" in shown
    assert "MEASURED_SPILLS" not in shown


def test_times_of_old_and_new_and_rows_to_paste_are_shown_for_mlp(console, h100, tables_put_back):
    result = tune("mlp", console)
    assert [(row["size"], row["kernel"]) for row in result["rows"]] == [
        ("reference", "backward"),
        ("reference", "forward"),
    ]
    for row in result["rows"]:
        assert row["unfit"] == {"(128, 64, 8, 3)": "spills 440 bytes a thread"}
        assert len(row["tried_us"]) == 23
        assert row["paste"] == '"sm_90": Tile(64, 32, 4, 2),'
    shown = console.file.getvalue()
    assert shown.count("1 of 24") == 2
    assert "For TILES in kernels/mlp/tiles.py:\n" in shown
    assert 'backward "sm_90": Tile(64, 32, 4, 2),\n' in shown
    assert 'forward  "sm_90": Tile(64, 32, 4, 2),\n' in shown


def test_a_tile_that_spills_comes_with_a_line_for_the_gate(console, h100, monkeypatch):
    backward, forward = tune("mlp", console)["rows"]
    assert backward["spilled_bytes"] == 24
    assert "spilled_bytes" not in forward
    shown = console.file.getvalue()
    heading, line = shown.splitlines()[-2:]
    assert "MEASURED_SPILLS in bench/machine_code/rows.py" in heading
    assert line == backward["gate"] == '("_mlp_backward_kernel", None, 90): 24,'

    launched = LaunchRecord(MLP.kernels["backward"], (1,), {}, num_warps=8, num_stages=2)
    code = SimpleNamespace(stack=24, shared=0, registers=255, loads={}, stores={}, widest_store=16)
    assert faults(code, launched, TARGETS["sm_90"]) == ["spills: 24 bytes a thread, at 255 registers"]
    monkeypatch.setattr("bench.machine_code.rows.MEASURED_SPILLS", eval(f"{{{line}}}"))
    assert faults(code, launched, TARGETS["sm_90"]) == []


def test_what_was_found_survives_a_stop(tmp_path, console, h100, monkeypatch, tables_put_back):
    path, tile = tmp_path / "tune.json", MlpTile(64, 32, 8, 3)
    monkeypatch.setattr(FakeTrial, "stop_at", ("forward", tile))
    with pytest.raises(KeyboardInterrupt):
        tune("mlp", console, str(path))
    written = json.loads(path.read_text())
    assert (written["bench"], written["op"], written["environment"]) == ("tune", "mlp", {"gpu": "H100"})
    assert [(row["kernel"], row["new"]) for row in written["rows"]] == [("backward", [64, 32, 4, 2])]
    under_way = written["under_way"]
    assert (under_way["size"], under_way["kernel"], under_way["tile"]) == ("reference", "forward", [64, 32, 8, 3])
    assert under_way["tried_us"]["(128, 32, 8, 2)"] == 2000
    shown = console.file.getvalue()
    assert 'backward "sm_90": Tile(64, 32, 4, 2),\n' in shown
    assert "forward  " not in shown

    monkeypatch.setattr(FakeTrial, "stop_at", None)
    result = tune("mlp", console, str(path))
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert "under_way" not in result


def test_the_first_tile_of_all_is_in_the_file_before_it_is_tried(tmp_path, console, h100, monkeypatch):
    monkeypatch.setattr(FakeTrial, "stop_at", ("backward", MLP.tiles["backward"]["sm_90"]))
    with pytest.raises(KeyboardInterrupt):
        tune("mlp", console, str(tmp_path / "tune.json"))
    assert json.loads((tmp_path / "tune.json").read_text())["under_way"]["kernel"] == "backward"
    assert console.file.getvalue() == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "swiglu"}, "--tune is 'swiglu'; allowed: attention, mlp, the ops with a table of tiles"),
        ({"tune": "attention", "device": "cpu"}, "--tune attention needs a GPU, and the device is cpu"),
        ({"tune": "mlp", "device": "cpu"}, "--tune mlp needs a GPU, and the device is cpu"),
        ({"tune": "mlp", "preset": ["124m"]}, "--preset is '124m', a size that --tune mlp has no kernel for"),
        ({"tune": "mlp", "preset": ["reference", "smoke"]}, "--preset is reference smoke; --tune mlp takes one, as"),
    ],
)
def test_mistakes_are_named(console, determinism_put_back, options, message):
    with pytest.raises(UserError, match=message):
        measure(OpsBench(**options), console)


def test_attention_is_searched_at_any_number_of_sizes():
    assert table_of("attention", ["reference", "124m"], CUDA) is ATTENTION
    assert table_of("mlp", ["smoke"], CUDA) is MLP
