import math
from types import SimpleNamespace

import pytest

from kernels.attention.backward import dkdv_launch
from kernels.attention.tiles import TILES, heads_in_cache, tile_of
from kernels.launch import INTERPRETER, TARGETS
from kernels.rows import row_tiles

SMALL = {"sm_75": SimpleNamespace(backend="cuda", arch=75, shared_memory=65_536)}
SMALL["sm_120"] = SimpleNamespace(backend="cuda", arch=120, shared_memory=101_376)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("target", [*TARGETS.values(), *SMALL.values()], ids=[*TARGETS, *SMALL])
@pytest.mark.parametrize("kernel", TILES)
def test_tiles_fit_into_the_shared_memory_of_any_target(kernel, target, itemsize):
    for head_dim in range(16, 257, 4):
        tile = tile_of(kernel, head_dim, itemsize, target)
        assert min(tile) >= 1
        assert min(tile.block_m, tile.block_n) >= 16
        kept, walked = (tile.block_n, tile.block_m) if kernel == "dkdv" else (tile.block_m, tile.block_n)
        rows = 2 * tile.num_stages * walked
        if itemsize == 4 or (target.backend == "cuda" and 90 <= target.arch < 120):
            rows += (1 if kernel == "forward" else 2) * kept
        assert rows * sum(row_tiles(head_dim)) * itemsize <= target.shared_memory


def test_a_target_that_has_room_gets_the_tables_tile():
    assert tile_of("dkdv", 128, 2, TARGETS["sm_90"]) == TILES["dkdv"]["sm_90"][128]
    assert tile_of("forward", 36, 4, TARGETS["sm_90"]) == TILES["forward"]["float32"][64]
    assert tile_of("forward", 36, 2, INTERPRETER) == TILES["forward"]["interpreter"][256]


def test_rows_that_are_not_multiples_of_16_bytes_come_in_blocks_of_64_at_most():
    assert [tile_of("forward", head_dim, 2, TARGETS["sm_90"]).block_n for head_dim in (136, 140, 144)] == [128, 64, 128]


def test_a_group_is_split_only_where_multiprocessors_would_be_idle():
    def splits(batch, time, q_heads, k_heads):
        launch = dkdv_launch(batch, time, q_heads, k_heads, 160, 2, target)
        blocks = math.ceil(time / launch.tiles["BLOCK_N"])
        assert launch.grid == (blocks * batch * k_heads * launch.tiles["SPLITS"],)
        return launch.tiles["SPLITS"]

    target = TARGETS["sm_90"]
    assert target.multiprocessors == 132
    assert TILES["dkdv"]["sm_90"][160].block_n == 128
    assert splits(4, 4096, 32, 8) == 1
    assert splits(1, 132 * 128, 8, 1) == 1
    assert splits(1, 131 * 128, 8, 1) == 2
    assert splits(1, 30 * 128, 12, 1) == 6  # 5 would do, and does not divide the group
    assert splits(1, 128, 8, 1) == 8
    assert splits(1, 128, 8, 8) == 1  # a group of one


def test_heads_that_share_the_cache_are_at_least_one_and_at_most_all():
    assert heads_in_cache(2**20, 1000) == 19
    assert heads_in_cache(2**20, 3) == 3
    assert heads_in_cache(2**40, 1000) == 1
