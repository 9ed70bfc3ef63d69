import functools
import importlib
from types import SimpleNamespace

import pytest
import torch

from bench.ops.tune import search
from bench.ops.tune.report import as_source
from bench.ops.tune.search import QUICK_REPEATS, SPILL_LIMIT, Trial, Unfit, nearest_first
from bench.ops.tune.tables import ATTENTION, MLP, PADDED_WIDTHS, TABLES, row_with
from kernels.attention.tiles import Tile
from kernels.launch import INTERPRETED, TARGETS, Target
from kernels.mlp.tiles import Tile as MlpTile
from kernels.mlp.tiles import launch_of
from training.config import TrainConfig
from training.device import set_determinism

OLD, FAST, SLOW, SPILLS = Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(32, 32, 4, 2), Tile(128, 128, 4, 3)
SMALL = {"attention": Tile(16, 16, 4, 1), "mlp": MlpTile(32, 16, 4, 2)}
IN_USE = {"attention": Tile(64, 64, 4, 1), "mlp": MlpTile(64, 64, 4, 2)}
"""In the interpreter."""
KERNELS = [(op, kernel) for op, table in TABLES.items() for kernel in table.kernels]
CUDA = torch.device("cuda")

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, which stands in for a GPU")


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
    clock = Clock({OLD: 3e-3, FAST: 2e-3, SLOW: 5e-3, SPILLS: "spills 68 bytes a thread"})
    found = search.search(OLD, [SLOW, OLD, SPILLS, FAST], clock)
    assert (found.old, found.new) == (OLD, FAST)
    assert (found.old_us, found.new_us) == pytest.approx((3000, 2000))
    assert found.tried_us == pytest.approx({str(tuple(t)): 1e6 * clock.seconds[t] for t in (OLD, FAST, SLOW)})
    assert found.unfit == {"(128, 128, 4, 3)": "spills 68 bytes a thread"}
    assert clock.asked[-1] == ((OLD, FAST), None)
    assert [asked for asked in clock.asked if asked[0] == (OLD,)] == [((OLD,), QUICK_REPEATS)]


def test_the_old_tile_stays_where_none_is_faster_in_the_end():
    assert search.search(OLD, [SLOW], Clock({OLD: 3e-3, SLOW: 5e-3})).new == OLD
    assert search.search(OLD, [SPILLS], Clock({OLD: 3e-3, SPILLS: "spills"})).new == OLD
    assert search.search(OLD, [], Clock({OLD: 3e-3})).new_us == pytest.approx(3000)

    def late(*tiles, repeats=None):  # faster in a few calls, slower in many
        return {tile: 3e-3 if tile == OLD else 1e-3 if repeats else 4e-3 for tile in tiles}

    assert search.search(OLD, [FAST], late).new == OLD


def test_what_is_nearest_to_the_old_tile_is_tried_first():
    near, far = Tile(64, 32, 4, 2), Tile(32, 128, 8, 1)
    assert nearest_first(OLD, [far, SPILLS, SLOW, OLD, FAST, near]) == [OLD, near, SLOW, FAST, SPILLS, far]
    assert nearest_first(Tile(16, 16, 2, 5), [near]) == [Tile(16, 16, 2, 5), near]  # it need not be in the grid


def test_ahead_of_each_tile_it_is_said_what_was_found_until_then():
    said = []
    clock = Clock({OLD: 3e-3, FAST: 2e-3, SPILLS: "spills"})
    search.search(OLD, [SPILLS, FAST], clock, lambda tile, tried, unfit: said.append((tile, len(tried), len(unfit))))
    assert said == [(OLD, 0, 0), (FAST, 1, 0), (SPILLS, 2, 0)]


@pytest.mark.parametrize("op", TABLES)
def test_the_grid_is_of_tiles_that_kernels_can_have_and_each_is_there_once(op):
    grid = TABLES[op].grid
    assert len(set(grid)) == len(grid) < 100
    for tile in grid:
        assert all(n >= 1 and n & (n - 1) == 0 for n in tile[:3])
        assert min(tile[:2]) >= 16


# ------------------------------------------------------------------------------------------------------------------ table


def test_a_tile_is_put_in_attentions_table_and_the_table_put_back(tables_put_back):
    def tile_of(kernel, head_dim, target):
        config = TrainConfig(dim=4 * head_dim, n_heads=4, n_kv_heads=4)
        return ATTENTION.tile_of(kernel, config, 2, TARGETS[target])

    with ATTENTION.holding("dq", SLOW):
        assert tile_of("dq", 128, "sm_90") == SLOW
        assert tile_of("dq", 36, "gfx942") == SLOW
        assert tile_of("forward", 128, "sm_90") == ATTENTION.tiles["forward"]["sm_90"][128]
    with pytest.raises(KeyError), ATTENTION.holding("dq", SLOW):
        raise KeyError


def test_a_tile_is_put_in_mlps_table_and_the_table_put_back(tables_put_back):
    tile = MlpTile(32, 16, 16, 3)
    with MLP.holding("backward", tile):
        launch = launch_of("backward", 100, 288, 2, TARGETS["sm_90"])
        assert launch.grid == (4,)
        assert (launch.tiles["BLOCK_M"], launch.tiles["BLOCK_F"], launch.num_warps, launch.num_stages) == tile
        assert MLP.tile_of("backward", TrainConfig(), 4, TARGETS["gfx942"]) == tile
        assert MLP.tile_of("forward", TrainConfig(), 2, TARGETS["sm_90"]) == MLP.tiles["forward"]["sm_90"]
    with pytest.raises(KeyError), MLP.holding("backward", tile):
        raise KeyError


@pytest.mark.parametrize("arch", [75, 80, 90, 100])
@pytest.mark.parametrize("op", TABLES)
def test_a_found_row_is_that_of_the_machine_that_is_here(op, arch, tables_put_back):
    table, target = TABLES[op], Target("cuda", arch, multiprocessors=100, shared_memory=1 << 20)
    kernel, tile = next(iter(table.kernels)), SMALL[op]
    machines = table.tiles[kernel] | {table.machine_of(2, target): table.row_of(tile)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table.tiles, kernel, machines)
        assert table.tile_of(kernel, TrainConfig(), 2, target) == tile


def test_a_new_tile_serves_its_width_and_no_other():
    row = {48: OLD, 160: FAST, 256: SLOW}
    new = row_with(row, 128, SPILLS)
    assert new == {48: OLD, 96: FAST, 128: SPILLS, 160: FAST, 256: SLOW}
    assert row_with(row, 64, FAST) == row
    assert row_with(new, 128, FAST) == row
    assert {64, 96, 128, 144, 160} <= set(PADDED_WIDTHS)
    assert ATTENTION.row_with(row, TrainConfig(dim=256, n_heads=2, n_kv_heads=2), SPILLS) == new


@pytest.mark.parametrize("row", [{48: OLD, 256: SLOW}, MlpTile(128, 32, 8, 2)], ids=["attention", "mlp"])
def test_a_row_is_printed_as_it_stands_in_the_source(row):
    source = as_source("sm_90", row)
    assert eval(f"{{{source}}}", {"Tile": lambda *of: of}) == {"sm_90": row}
    assert source in ('"sm_90": {48: Tile(64, 64, 4, 2), 256: Tile(32, 32, 4, 2)},', '"sm_90": Tile(128, 32, 8, 2),')


# ------------------------------------------------------------------------------------------------------------------ trial


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """The interpreter stands in for the GPU: its clock, no cache to flush, and registers without end."""
    seconds = iter(range(10_000))
    monkeypatch.setattr(search, "GpuInstant", lambda: next(seconds))
    monkeypatch.setattr(search, "gpu_flush", lambda device: lambda: None)
    monkeypatch.setattr(search, "forget_compiled", lambda kernel: None)
    monkeypatch.setattr(search, "spilled_bytes", lambda kernel: 0)


def trial_of(op, kernel):
    config = TrainConfig(max_seq_len=40, batch_size=1, dim=32, n_heads=2, n_kv_heads=1, ffn_dim=24)
    return Trial(TABLES[op], kernel, config, torch.float32, torch.device("cpu"), repeats=1)


@needs_interpreter
@pytest.mark.parametrize(("op", "kernel"), KERNELS)
def test_a_trial_runs_a_kernel_under_the_tiles_it_is_given(op, kernel, no_gpu_needed, monkeypatch, tables_put_back):
    trial = trial_of(op, kernel)
    assert (trial.machine, trial.old) == ("interpreter", IN_USE[op])
    tried = []
    original = trial._contender.run
    monkeypatch.setattr(trial._contender, "run", lambda d: tried.append((d, trial._tile())) or original(d))
    other = SMALL[op]
    assert trial.seconds_of(trial.old, other, repeats=2) == {trial.old: 1, other: 1}
    direction = "forward" if kernel == "forward" else "backward"
    assert tried == [(direction, trial.old), (direction, other)] * 4  # two rounds of warm-up
    assert trial._tile() == trial.old


@needs_interpreter
def test_a_tile_that_does_not_fit_or_does_not_run_is_refused_with_the_reason(no_gpu_needed, monkeypatch):
    def fail():
        raise ValueError("arange\nlong story")

    trial = trial_of("attention", "forward")
    with pytest.raises(Unfit, match="wants more shared memory than there is"):
        trial.seconds_of(Tile(128, 128, 4, 300))
    for op in TABLES:
        trial = trial_of(op, "forward")
        monkeypatch.setattr(trial, "_run_anew", fail)
        with pytest.raises(Unfit, match=r"^ValueError: arange$"):
            trial.seconds_of(SMALL[op])


class Planted:
    """A kernel that in small tiles does another thing than in large ones."""

    def __init__(self, kernel, small):
        self.kernel, self.small = kernel, small

    def __getitem__(self, grid):
        def launch(**arguments):
            sound = functools.partial(self.kernel[grid], **arguments)
            return sound() if arguments["BLOCK_M"] > 32 else self.small(sound, arguments)

        return launch


def scaling(argument):
    """Computes what it should, but for one argument."""

    def small(sound, arguments):
        sound()
        arguments[argument].mul_(1.1)

    return small


def writing_nothing(argument):
    """Does nothing, in memory where an earlier call left the right result unless what is fresh was filled."""

    def small(sound, arguments):
        if not arguments[argument].isnan().all():
            sound()

    return small


@needs_interpreter
@pytest.mark.parametrize(
    ("op", "kernel", "small"),
    [
        ("attention", "forward", scaling("o_ptr")),
        ("attention", "forward", scaling("lse_ptr")),  # which shows in the gradients alone
        ("attention", "dq", scaling("dq_ptr")),
        ("attention", "dkdv", scaling("dv_ptr")),
        ("attention", "dkdv", writing_nothing("dk_ptr")),
        ("mlp", "forward", scaling("out_ptr")),
        ("mlp", "forward", scaling("gate_up_ptr")),
        ("mlp", "forward", writing_nothing("out_ptr")),
        ("mlp", "backward", scaling("dgate_up_ptr")),
        ("mlp", "backward", scaling("y_ptr")),
        ("mlp", "backward", scaling("dx_ptr")),
        ("mlp", "backward", writing_nothing("dx_ptr")),
    ],
)
def test_a_tile_that_computes_something_else_is_refused(
    op, kernel, small, no_gpu_needed, monkeypatch, determinism_put_back
):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    set_determinism(True)  # as bench.ops does
    trial = trial_of(op, kernel)
    module = importlib.import_module(f"kernels.{op}.{'forward' if kernel == 'forward' else 'backward'}")
    name = f"_{op}_{kernel}_kernel"
    monkeypatch.setattr(module, name, Planted(getattr(module, name), small))
    with pytest.raises(Unfit, match="computes something else"):
        trial.seconds_of(SMALL[op])
    assert trial.seconds_of(trial.old) == {trial.old: 1}


@needs_interpreter
def test_fresh_memory_is_filled_only_while_a_tile_is_checked(no_gpu_needed, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    trial = trial_of("mlp", "forward")
    during = []
    monkeypatch.setattr(
        trial._contender, "run", lambda _: during.append(torch.utils.deterministic.fill_uninitialized_memory)
    )
    trial.seconds_of(SMALL["mlp"])
    assert during
    assert not any(during)


@needs_interpreter
@pytest.mark.parametrize(("op", "kernel"), [("attention", "forward"), ("mlp", "backward")])
def test_a_tile_may_spill_a_few_bytes_and_no_more(op, kernel, no_gpu_needed, monkeypatch):
    trial, tile = trial_of(op, kernel), SMALL[op]
    monkeypatch.setattr(search, "spilled_bytes", lambda kernel: SPILL_LIMIT + 4)
    with pytest.raises(Unfit, match="spills 68 bytes a thread"):
        trial.seconds_of(tile)
    monkeypatch.setattr(search, "spilled_bytes", lambda kernel: SPILL_LIMIT)
    assert trial.seconds_of(tile) == {tile: 1}
    assert trial.spilled == {trial.old: 0, tile: 64}


def test_spilled_bytes_are_those_of_what_was_launched_since():
    def compiled(n_spills):
        return SimpleNamespace(n_spills=n_spills)

    kernel = SimpleNamespace(device_caches={0: ({"old": compiled(8)}, "target")})
    assert search.spilled_bytes(kernel) == 32  # Triton counts registers
    search.forget_compiled(kernel)
    assert search.spilled_bytes(kernel) == 0
    kernel.device_caches[0] = ({"a": compiled(0)}, "target")
    assert search.spilled_bytes(kernel) == 0
    kernel.device_caches[1] = ({"b": compiled(1), "c": compiled(4)}, "target")
    assert search.spilled_bytes(kernel) == 16
