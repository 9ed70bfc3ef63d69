import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bench.ops import tune
from bench.ops.__main__ import OpsBench, measure
from bench.ops.sizes import HEADS
from bench.ops.tune import GRID, PADDED_WIDTHS, Trial, Unfit, as_source, in_table, machine_of, row_with, search
from kernels.attention.tiles import TILES, Tile, tile_of
from kernels.launch import INTERPRETED, INTERPRETER, TARGETS
from training.config import TrainConfig
from training.errors import UserError

OLD, FAST, SLOW, SPILLS = Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(32, 32, 4, 2), Tile(128, 128, 4, 3)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


class Clock:
    """Seconds of each tile as a test says, and what was asked."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.asked = []

    def __call__(self, *tiles, repeats=None):
        self.asked.append((tiles, repeats))
        for tile in tiles:
            if isinstance(self.seconds[tile], str):
                raise Unfit(self.seconds[tile])
        return {tile: self.seconds[tile] for tile in tiles}


# ----------------------------------------------------------------------------------------------------------------- search


def test_the_fastest_fit_tile_is_found_and_timed_beside_the_old_one():
    clock = Clock({OLD: 3e-3, FAST: 2e-3, SLOW: 5e-3, SPILLS: "spills registers"})
    found = search(OLD, [SLOW, OLD, SPILLS, FAST], clock)
    assert (found.old, found.new) == (OLD, FAST)
    assert (found.old_us, found.new_us) == pytest.approx((3000, 2000))
    assert found.unfit == {"(128, 128, 4, 3)": "spills registers"}
    assert clock.asked[-1] == ((OLD, FAST), None)
    assert ((OLD,), tune.QUICK_REPEATS) not in clock.asked


def test_the_old_tile_stays_where_none_is_faster_in_the_end():
    assert search(OLD, [SLOW], Clock({OLD: 3e-3, SLOW: 5e-3})).new == OLD
    assert search(OLD, [SPILLS], Clock({OLD: 3e-3, SPILLS: "spills registers"})).new == OLD
    assert search(OLD, [], Clock({OLD: 3e-3})).new_us == pytest.approx(3000)


def test_the_grid_is_of_tiles_that_kernels_can_have_and_each_is_there_once():
    assert len(set(GRID)) == len(GRID) < 100
    for tile in GRID:
        assert all(n >= 1 and n & (n - 1) == 0 for n in tile[:3])
        assert min(tile.block_m, tile.block_n) >= 16


# ------------------------------------------------------------------------------------------------------------------ table


def test_a_tile_is_put_in_the_table_and_the_table_put_back():
    before = {kernel: TILES[kernel] for kernel in TILES}
    with in_table("dq", SLOW):
        assert tile_of("dq", 128, 2, TARGETS["sm_90"]) == SLOW
        assert tile_of("dq", 36, 2, TARGETS["gfx942"]) == SLOW
        assert tile_of("forward", 128, 2, TARGETS["sm_90"]) == TILES["forward"]["sm_90"][128]
    with pytest.raises(KeyError), in_table("dq", SLOW):
        raise KeyError
    assert all(TILES[kernel] is table for kernel, table in before.items())


def test_the_machine_is_the_one_whose_rows_are_read():
    found = {name: machine_of(2, target) for name, target in TARGETS.items()}
    assert found == {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "gfx942": "hip"}
    assert machine_of(4, TARGETS["sm_90"]) == "float32"
    assert machine_of(2, INTERPRETER) == "interpreter"


def test_a_new_tile_serves_its_width_and_no_other():
    row = {48: OLD, 160: FAST, 256: SLOW}
    new = row_with(row, 128, SPILLS)
    assert new == {48: OLD, 96: FAST, 128: SPILLS, 160: FAST, 256: SLOW}
    assert row_with(row, 64, FAST) == row
    assert row_with(new, 128, FAST) == row
    assert {64, 96, 128, 144, 160} <= set(PADDED_WIDTHS)


def test_a_row_is_printed_as_it_stands_in_the_source():
    row = {48: OLD, 256: SLOW}
    source = as_source("sm_90", row)
    assert source == '"sm_90": {48: Tile(64, 64, 4, 2), 256: Tile(32, 32, 4, 2)},'
    assert eval(f"{{{source}}}", {"Tile": Tile}) == {"sm_90": row}


# ------------------------------------------------------------------------------------------------------------------ trial


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """The interpreter stands in for the GPU: its clock, no cache to flush, and registers without end."""
    seconds = iter(range(10_000))
    monkeypatch.setattr(tune, "GpuInstant", lambda: next(seconds))
    monkeypatch.setattr(tune, "gpu_flush", lambda device: lambda: None)
    monkeypatch.setattr(tune, "forget_compiled", lambda kernel: None)
    monkeypatch.setattr(tune, "spills", lambda kernel: False)


def trial_of(kernel):
    config = TrainConfig(max_seq_len=40, batch_size=1, dim=32, n_heads=2, n_kv_heads=1)
    return Trial(kernel, config, torch.float32, torch.device("cpu"), repeats=1)


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, which stands in for a GPU")
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_a_trial_runs_a_kernel_under_the_tiles_it_is_given(kernel, no_gpu_needed, monkeypatch):
    trial = trial_of(kernel)
    assert (trial.machine, trial.old) == ("interpreter", Tile(64, 64, 4, 1))
    tried = []
    original = trial._contender.run
    monkeypatch.setattr(trial._contender, "run", lambda d: tried.append((d, trial._tile())) or original(d))
    other = Tile(16, 16, 4, 1)
    assert trial.seconds_of(trial.old, other, repeats=2) == {trial.old: 1, other: 1}
    direction = "forward" if kernel == "forward" else "backward"
    assert tried == [(direction, trial.old), (direction, other)] * 4  # two rounds of warm-up
    assert trial._tile() == trial.old


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, which stands in for a GPU")
def test_a_tile_that_does_not_fit_or_does_not_run_is_refused_with_the_reason(no_gpu_needed, monkeypatch):
    def fail():
        raise ValueError("arange\nlong story")

    trial = trial_of("forward")
    with pytest.raises(Unfit, match="wants more shared memory than there is"):
        trial.seconds_of(Tile(128, 128, 4, 300))
    monkeypatch.setattr(trial, "_results", fail)
    with pytest.raises(Unfit, match=r"^ValueError: arange$"):
        trial.seconds_of(Tile(16, 16, 4, 1))


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, which stands in for a GPU")
def test_a_tile_that_spills_or_computes_something_else_is_refused(no_gpu_needed, monkeypatch):
    trial = trial_of("forward")
    trial._expected = [1.05 * x for x in trial._expected]
    with pytest.raises(Unfit, match="computes something else"):
        trial.seconds_of(Tile(16, 16, 4, 1))
    trial._expected = [torch.full_like(x, torch.nan) for x in trial._expected]
    with pytest.raises(Unfit, match="computes something else"):
        trial.seconds_of(Tile(16, 16, 4, 1))
    monkeypatch.setattr(tune, "spills", lambda kernel: True)
    with pytest.raises(Unfit, match="spills registers"):
        trial.seconds_of(Tile(16, 16, 4, 1))


def test_spills_are_those_of_what_was_launched_since(monkeypatch):
    def compiled(n_spills):
        return SimpleNamespace(n_spills=n_spills)

    kernel = SimpleNamespace(device_caches={0: ({"old": compiled(8)}, "target")})
    monkeypatch.setitem(tune.KERNELS, "dq", kernel)
    assert tune.spills("dq")
    tune.forget_compiled("dq")
    kernel.device_caches[0] = ({"a": compiled(0)}, "target")
    assert not tune.spills("dq")
    kernel.device_caches[1] = ({"b": compiled(0), "c": compiled(4)}, "target")
    assert tune.spills("dq")


# ---------------------------------------------------------------------------------------------------------------- command


class FakeTrial:
    """An H100 on which a kernel of half the table's rows of queries, with four warps, takes half the time."""

    machine = "sm_90"

    def __init__(self, kernel, config, dtype, device, repeats):
        self.old = tile_of(kernel, config.head_dim, dtype.itemsize, TARGETS["sm_90"])
        self.direction = "forward" if kernel == "forward" else "backward"

    def seconds_of(self, *tiles, repeats=None):
        return {tile: 1e-3 if tile == Tile(32, 32, 4, 1) else 2e-3 for tile in tiles}


def test_times_of_old_and_new_and_rows_to_paste_are_shown(console, monkeypatch):
    monkeypatch.setattr(tune, "Trial", FakeTrial)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    before = {kernel: dict(TILES[kernel]["sm_90"]) for kernel in TILES}
    cuda = torch.device("cuda")
    result = tune.search_and_show("attention", {}, torch.bfloat16, cuda, 5, console)
    assert {kernel: TILES[kernel]["sm_90"] for kernel in TILES} == before
    assert [(row["size"], row["kernel"]) for row in result["rows"]] == [
        (size, kernel) for size in (*HEADS, "reference") for kernel in ("forward", "dq", "dkdv")
    ]
    assert {(row["old_us"], row["new_us"], row["new"]) for row in result["rows"]} == {(2000, 1000, (32, 32, 4, 1))}
    shown = console.file.getvalue()
    assert shown.count("2.00x") == 9
    tuned = "Tile(32, 32, 4, 1)"
    assert 'forward  "sm_90": {' in shown
    assert f"64: {tuned}" in shown
    assert f"128: {tuned}" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "swiglu"}, "--tune is 'swiglu'; allowed: attention"),
        ({"tune": "attention", "device": "cpu"}, "--tune attention needs a GPU, and the device is cpu"),
    ],
)
def test_mistakes_are_named(console, determinism_put_back, options, message):
    with pytest.raises(UserError, match=message):
        measure(OpsBench(**options), console)
