"""train.py with --parallel fsdp: the run of one process, to the rounding of sums, resumed by one process and by two."""

import pytest

import train
from tests.support.run_testing import TINY, Result, arguments, call, finish, records, start_many, write_text

OPTIONS = {"gradient_accumulation_steps": 2, "learning_rate": 0.01, "max_iters": 6, "eval_interval": 2, "eval_iters": 3}
KEYS = {"step": ("loss", "grad_norm", "lr"), "eval": ("train_loss", "val_loss", "bits_per_byte")}


def test_two_processes_train_evaluate_and_sample_as_one_and_either_goes_on(tmp_path):
    options = TINY | OPTIONS | {"data": write_text(tmp_path / "text.txt"), "data_dir": tmp_path / "data"}
    options |= {"activation_checkpointing": "selective", "always_save_checkpoint": True, "sample_tokens": 5}
    options |= {"decay_lr": False, "warmup_iters": 0}
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(train, arguments(**options, out_dir=one)).status == 0
    fsdp = {"out_dir": two, "parallel": "fsdp", "check_steps": 2}
    results = [finish(process) for process in start_many(arguments(**options | fsdp | {"max_iters": 2}))]
    assert [result.status for result in results] == [0, 0], results
    assert results[1] == Result(0, "", "")
    assert records(two, "eval")[0]["sample"] == records(one, "eval")[0]["sample"] != ""
    on = {"init_from": "resume"}
    results = [finish(process) for process in start_many(arguments(**options | fsdp | on | {"max_iters": 4}))]
    assert [result.status for result in results] == [0, 0], results
    result = call(train, arguments(**options | fsdp | on))
    assert result.status == 0
    assert "--parallel fsdp: the one process has the whole model" in result.out
    for kind, keys in KEYS.items():
        ones, twos = ({line["step"]: line for line in records(folder, kind)} for folder in (one, two))
        assert ones.keys() == twos.keys()
        for step, line in ones.items():
            wanted = [line[key] for key in keys]
            assert [twos[step][key] for key in keys] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_dropout_and_recomputation_of_shares_go_on_to_the_bit(tmp_path):
    options = TINY | OPTIONS | {"data": write_text(tmp_path / "text.txt"), "data_dir": tmp_path / "data"}
    options |= {"dropout": 0.2, "parallel": "fsdp", "eval_iters": 1}
    options |= {"decay_lr": False, "warmup_iters": 0}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    again = {"out_dir": halves, "activation_checkpointing": "full"}
    for more in ({"out_dir": whole}, again | {"max_iters": 2}, again | {"init_from": "resume"}):
        results = [finish(process) for process in start_many(arguments(**options | more))]
        assert [result.status for result in results] == [0, 0], results
    losses = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in records(of, "step")] for of in (whole, halves)
    ]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
