"""train.py --fused: the whole fast path where kernels run, and plain PyTorch, said in one line, where none can."""

import contextlib
import re
import shutil

import pytest

import train
from kernels.launch import INTERPRETED
from tests.support.run_testing import TINY, arguments, call, edit_config, finish, records, start
from training import distributed
from training.distributed import World
from training.step import trainer
from training.step.optimizer import AdamW, FusedAdamW

NOTE = (
    r"train\.py: --fused: --device is cpu, so plain PyTorch trains in place of the Triton kernels; "
    r"set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter \(slow, for checking\)\n"
)
WIDE = {"dim": 32, "batch_size": 2, "eval_iters": 1, "max_iters": 4, "eval_interval": 2}
"""Heads of 16, which the attention kernel takes; little else."""


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="where there is a GPU, this process has compiled kernels, and none for a CPU"
)


def resume(folder, **options):
    return call(train, arguments(init_from="resume", out_dir=folder, **options))


def losses(folder):
    return [line["loss"] for line in records(folder, "step")]


def test_a_laptop_trains_the_plain_twins_and_says_so(run, tmp_path, no_interpreter):
    plain = run(**WIDE, out_dir=tmp_path / "plain")
    fused = run(**WIDE, fused=True)
    assert (plain.status, plain.err) == (0, "")
    assert fused.status == 0
    assert re.fullmatch(NOTE, fused.err)
    assert "float32, kernels none; " in fused.out
    assert losses(tmp_path / "out") == losses(tmp_path / "plain")


def test_a_program_of_its_own_does_too(tmp_path, text):
    words = arguments(**TINY | WIDE | text | {"out_dir": tmp_path / "out", "fused": True, "kernels": "-rope"})
    result = finish(start("train.py", words))
    assert result.status == 0
    assert re.fullmatch(NOTE, result.err)
    assert len(losses(tmp_path / "out")) == WIDE["max_iters"]


@interpreted
def test_the_wish_is_kept_with_the_run(run, tmp_path, no_interpreter, monkeypatch):
    """Resumed where kernels run, it uses them, AdamW's too; resumed on the laptop, it says again that it does not."""
    made = []
    make = trainer.make_optimizer
    monkeypatch.setattr(trainer, "make_optimizer", lambda *given: made.append(make(*given)) or made[-1])
    out_dir = tmp_path / "out"
    run(**WIDE | {"max_iters": 2}, fused=True)
    assert 'fused = true\nkernels = ""\n' in (out_dir / "config.toml").read_text()
    again = resume(out_dir, max_iters=3)
    assert (again.status, bool(re.fullmatch(NOTE, again.err))) == (0, True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    there = resume(out_dir, max_iters=4)
    assert (there.status, there.err) == (0, "")
    assert "float32, kernels all; " in there.out
    assert [type(optimizer) for optimizer in made] == [AdamW, AdamW, FusedAdamW]


@interpreted
def test_kernels_that_a_saved_run_insists_on_are_not_left_out(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run(max_iters=1, kernels="swiglu@0").status == 0
    monkeypatch.delenv("TRITON_INTERPRET")
    result = resume(tmp_path / "out", max_iters=2)
    assert result.status == 2
    assert re.fullmatch(r"train\.py: error: --kernels swiglu@0 asks for Triton kernels, and [^\n]*\n", result.err)
    assert resume(tmp_path / "out", max_iters=2, kernels="none").status == 0


@interpreted
def test_a_run_saved_when_the_update_was_an_optimizer_goes_on_with_the_same_kernels(run, tmp_path, monkeypatch):
    """As `fused-adamw` alone, then beside --fused: to the bit what the run does under the names of today."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name, today, then in (
        ("update", {"kernels": "adamw"}, {"kernels": '""'}),
        ("both", {"fused": True}, {"fused": "true"}),
    ):
        folders = [tmp_path / name / day for day in ("today", "then")]
        assert run(**WIDE | {"max_iters": 2}, **today, out_dir=folders[0]).status == 0
        shutil.copytree(*folders)
        edit_config(folders[1] / "step-00000002", optimizer='"fused-adamw"', **then)
        for folder in folders:
            result = resume(folder, max_iters=4)
            assert (result.status, result.err) == (0, ""), result
            assert "with other options: --max-iters is 4, was 2\n" in result.out
        assert losses(folders[0]) == losses(folders[1])
        assert 'optimizer = "adamw"' in (folders[1] / "config.toml").read_text()


@interpreted
def test_many_processes_are_told_that_their_step_is_not_captured(run, tmp_path, monkeypatch):
    class Two(World):
        """One of two processes, of which the other does nothing."""

        def sum(self, tensor):
            pass

        def totals(self, *counts, at="", patiently=False):
            return [int(count) for count in counts]

        def gather(self, value, *, patiently=False):
            return [value]

        def wait(self, at="", *, patiently=False):
            pass

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(distributed, "joined", lambda config: contextlib.nullcontext(Two(size=2)))
    options = WIDE | {"max_iters": 1, "gradient_accumulation_steps": 2}
    note = "--fused: with 2 processes a step is not captured as a CUDA graph"
    assert note in run(**options, fused=True).out
    assert note not in run(**options, fused=True, capture=False, kernels="none,swiglu").out
