"""Whose folder is it: two runs in one out_dir, two preparations in one data_dir, an earlier run's files."""

import contextlib
import os
import re
import signal
import sys
import types
from pathlib import Path

import pytest

import train
from tests.support.run_testing import TINY, arguments, finish, pointers, records, start, wait_until, write_text
from training import config, distributed
from training.checkpoint import files as checkpoint
from training.distributed import World
from training.folder_lock import held


@pytest.mark.fault(
    "two runs in one `--out-dir`", "the second is told who owns it (process, host, since when), and moves nothing"
)
def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(run, tmp_path, text):
    out_dir = tmp_path / "out"
    assert run(max_iters=1).status == 0
    long = {"out_dir": out_dir, "init_from": "resume", "max_iters": 10**6, "eval_interval": 10**6}
    first = start("train.py", arguments(**TINY | text | long))
    wait_until(lambda: len(records(out_dir, "step")) > 3, first)
    before = {path.name for path in out_dir.iterdir()}
    for options in ({}, {"init_from": "resume"}):
        second = run(**options)
        assert second.status == 2
        who = rf"pid {first.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.fullmatch(
            rf"train\.py: error: --out-dir {re.escape(str(out_dir))} is in use by another run: {who}; .*\n", second.err
        )
    assert {path.name for path in out_dir.iterdir()} == before
    first.send_signal(signal.SIGTERM)
    assert finish(first).status == 0
    assert checkpoint.load(out_dir).step == len(records(out_dir, "step"))
    assert not (out_dir / ".lock").exists()
    assert run(max_iters=1).status == 0  # who comes after it is not refused


def test_only_the_main_process_of_many_takes_the_folder(run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(train, "train", lambda *_: None)
    with held(tmp_path / "out" / ".lock"):
        assert run(max_iters=1).status == 2
        monkeypatch.setattr(distributed, "joined", lambda config: contextlib.nullcontext(World(rank=1, size=2)))
        assert run(max_iters=1).status == 0


@pytest.mark.fault(
    "two runs that prepare one text at once", "the second waits, says so, and uses what the first has made"
)
def test_a_second_preparation_waits_and_uses_what_the_first_has_made(run, tmp_path):
    options = {"data": write_text(tmp_path / "text.txt", documents=25_000), "data_dir": tmp_path / "data"}
    first = start("train.py", arguments(**TINY | options | {"out_dir": tmp_path / "first", "max_iters": 1}))
    wait_until(lambda: list(tmp_path.glob("data/.tmp-*")), first)
    second = run(**options, max_iters=1)
    assert finish(first).status == second.status == 0
    assert re.fullmatch(r"waiting for another process, which prepares .*text\.txt-300-\w+: pid \d+ on .*\n", second.err)
    assert len(list((tmp_path / "data").iterdir())) == 1


# ------------------------------------------------------------------------------------------- the files of an earlier run


@pytest.mark.fault("a new run in the folder of an earlier one", "the earlier one is moved to `earlier-1` inside, whole")
def test_a_run_that_starts_in_a_used_folder_sets_the_earlier_one_aside(run, tmp_path):
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    (out_dir / "notes.md").write_text("mine")
    run(max_iters=1)
    first = {path.name: path.read_bytes() for path in (out_dir / "step-00000001").iterdir()}
    metrics = (out_dir / "metrics.jsonl").read_bytes()
    result = run(max_iters=2, tensorboard=True)
    assert f"{out_dir} held an earlier run, which is now in {out_dir / 'earlier-1'}" in result.out
    earlier = out_dir / "earlier-1"
    assert {path.name: path.read_bytes() for path in (earlier / "step-00000001").iterdir()} == first
    assert (earlier / "metrics.jsonl").read_bytes() == metrics
    assert pointers(earlier) == ("step-00000001", "step-00000001")
    assert (out_dir / "notes.md").read_text() == "mine"
    run(max_iters=3)
    assert pointers(out_dir / "earlier-2") == ("step-00000002", "step-00000002")
    assert (out_dir / "earlier-2" / "tensorboard").is_dir()
    assert pointers(out_dir) == ("step-00000003", "step-00000003")
    assert {path.name for path in out_dir.iterdir()} == {
        *("earlier-1", "earlier-2", "notes.md", "step-00000003", "best", "last"),
        *("config.toml", "metrics.jsonl", "loss.png", "README.md"),
    }


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full_disk(*_, **__):
    raise OSError(28, os.strerror(28))


def no_wandb(**_):
    raise RuntimeError("api_key not configured (no-tty)")


@pytest.mark.fault("a new run is refused, for whatever can be known to be wrong", "no file of an earlier run has moved")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere"}, "--data nowhere: no such file"),
        ({"batch_size": 10**6}, "is too short"),
        ({"sample_prompt": "caf\udce9"}, r"--sample-prompt is 'caf\\udce9', which is not UTF-8 text"),
        ({"data": "caf\udce9.txt"}, r"--data is 'caf\\udce9.txt', which is not UTF-8 text"),
        ({"wandb_log": True}, "--wandb-log: wandb does not start: api_key not configured"),
    ],
)
def test_a_run_that_is_refused_leaves_the_earlier_one_where_it_is(run, tmp_path, monkeypatch, options, message):
    run(max_iters=1)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=no_wandb))
    result = run(**options)
    assert result.status == 2
    assert re.fullmatch(r"train\.py: error: [^\n]*\n", result.err)
    assert re.search(message, result.err)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["write_text", "rename"])
def test_a_disk_too_full_to_begin_leaves_the_earlier_run_where_it_is(run, tmp_path, monkeypatch, name):
    run(max_iters=1)
    before, real = contents(tmp_path / "out"), getattr(Path, name)

    def refuse(self, *rest, **options):
        # The configuration is written first; of the files that are moved this is neither the first nor the last.
        return full_disk() if self.name in (".tmp-config.toml", "metrics.jsonl") else real(self, *rest, **options)

    monkeypatch.setattr(Path, name, refuse)
    result = run(max_iters=1)
    assert result.status == 2
    assert re.fullmatch(r"train\.py: error: --out-dir .* cannot be written: No space left on device\n", result.err)
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out" / "earlier-1").exists()


@pytest.mark.parametrize("init_from", ["resume", "scratch"])
def test_an_evaluation_alone_writes_nothing(run, tmp_path, init_from):
    """It runs beside the run that owns the folder, too."""
    run()
    out_dir = tmp_path / "out"
    with held(out_dir / ".lock"):
        before = contents(out_dir)
        result = run(init_from=init_from, eval_only=True, eval_iters=1, tensorboard=True, profile=True)
        assert (result.status, result.err) == (0, "")
        assert contents(out_dir) == before
    assert re.search(rf"step {12 if init_from == 'resume' else 0}: train loss \d", result.out)


def test_an_evaluation_alone_of_a_fresh_model_makes_no_folder(run, tmp_path):
    result = run(eval_only=True)
    assert (result.status, "step 0: train loss" in result.out) == (0, True)
    assert not (tmp_path / "out").exists()
