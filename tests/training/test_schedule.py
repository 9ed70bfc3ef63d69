"""The learning rate of a step."""

import itertools

import pytest

from training.config import TrainConfig
from training.step.schedule import learning_rate


def rates(**options):
    config = TrainConfig(**{"learning_rate": 1.0, "max_iters": 100, "warmup_iters": 10} | options)
    return [learning_rate(config, step) for step in range(config.max_iters + 1)]


def test_warm_up_is_linear_and_never_zero():
    assert rates()[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_floor():
    lr = rates(min_lr=0.2)
    assert lr[10] == 1.0
    assert lr[55] == pytest.approx(0.6)
    assert lr[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(lr[10:]))


def test_the_default_schedule_is_the_reference_run():
    config = TrainConfig()
    assert learning_rate(config, 999) == learning_rate(config, 1000) == 5e-4
    assert learning_rate(config, 50_500) == pytest.approx(2.5e-4)
    assert learning_rate(config, 100_000) == 0


def test_wsd_stays_then_falls_in_a_line():
    lr = rates(schedule="wsd", min_lr=0.5)
    assert set(lr[10:81]) == {1.0}
    assert lr[90] == pytest.approx(0.75)
    assert lr[100] == pytest.approx(0.5)
    assert rates(schedule="wsd", decay_iters=50)[75] == pytest.approx(0.5)


def test_without_decay_the_rate_is_constant():
    assert set(rates(decay_lr=False)) == {1.0}


def test_no_warm_up_and_a_run_that_is_all_warm_up():
    assert rates(warmup_iters=0)[0] == 1.0
    assert rates(warmup_iters=200)[99] == pytest.approx(0.5)
