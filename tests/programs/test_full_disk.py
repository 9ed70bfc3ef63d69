"""A disk that fills up under a run: the run goes on, says so, and loses no checkpoint that it has."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

import training.checkpoint.files as checkpoint
from tests.support.run_testing import ROOT, TINY, arguments, finish, pointers, records, start, state
from training import evaluation
from training.checkpoint import parts

NO_SPACE = "No space left on device"


def full_disk(*_, **__):
    raise OSError(28, NO_SPACE)


def refuse_saves(monkeypatch, *, but: set[int]) -> None:
    """Let only these saves of a run, counted from 1, find room for their tensors."""
    write, saves = parts.write_file, [0]

    def write_if_there_is_room(path, tensors):
        saves[0] += path.name == "rng.safetensors"  # the first
        return write(path, tensors) if saves[0] in but else full_disk()

    monkeypatch.setattr(parts, "write_file", write_if_there_is_room)


def saved(out_dir):
    return sorted(path.name for path in out_dir.glob("step-*"))


@pytest.mark.fault(
    "a checkpoint finds the disk full", "that is said; the earlier ones stay, the run goes on and tries again"
)
def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint_and_the_run_goes_on(run, tmp_path, monkeypatch):
    refuse_saves(monkeypatch, but={1, 4})
    result = run(always_save_checkpoint=True, eval_interval=3)
    assert result.status == 0
    said = rf"train\.py: --out-dir .*the checkpoint of step {{}} could not be saved: {NO_SPACE}; .*the run goes on.*\n"
    assert re.fullmatch(said.format(6) + said.format(9), result.err)
    assert saved(tmp_path / "out") == ["step-00000003", "step-00000012"]
    assert [line["step"] for line in records(tmp_path / "out", "step")] == list(range(12))
    assert not list((tmp_path / "out").glob(".tmp-*"))


@pytest.mark.fault(
    "the last checkpoint of a run finds the disk full", "one line and status 2; resumed, it is done again"
)
def test_a_last_save_that_fails_is_an_error(run, tmp_path, monkeypatch):
    refuse_saves(monkeypatch, but={1})
    result = run(always_save_checkpoint=True)
    assert result.status == 2
    last = result.err.splitlines()[-1]
    assert re.fullmatch(rf"train\.py: error: --out-dir .*step 12 could not be saved: {NO_SPACE}.*", last)
    assert checkpoint.load(tmp_path / "out").step == 6
    monkeypatch.undo()
    assert run(init_from="resume").status == 0
    assert checkpoint.load(tmp_path / "out").step == 12


def test_the_best_of_those_that_could_be_saved_is_best(run, tmp_path, monkeypatch):
    losses = iter([9.0, 5.0, 3.0, 4.0, 8.0])
    monkeypatch.setattr(evaluation.Evaluation, "losses", lambda self, stop: (1.0, next(losses), 1.0))
    refuse_saves(monkeypatch, but={1, 3, 4})
    assert run(eval_interval=3).status == 0
    # 3.0 was not saved, so 4.0 is better than the best there is, and 8.0 is the last.
    assert pointers(tmp_path / "out") == ("step-00000009", "step-00000012")
    assert state(tmp_path / "out" / "step-00000012")["best_val_loss"] == 4.0


def test_a_save_that_failed_is_tried_again_where_only_the_best_are_saved(run, tmp_path, monkeypatch):
    losses = iter([9.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(evaluation.Evaluation, "losses", lambda self, stop: (1.0, next(losses), 1.0))
    refuse_saves(monkeypatch, but={2, 3})
    assert run(eval_interval=3, max_iters=12).status == 0
    assert pointers(tmp_path / "out")[0] == "step-00000006"


def test_a_curve_that_cannot_be_drawn_ends_no_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", full_disk)
    result = run(max_iters=1)
    assert result.status == 0
    assert re.fullmatch(rf"train\.py: .*loss\.png cannot be written: {NO_SPACE}\n", result.err)
    assert "everything is in" in result.out


def test_a_trace_that_cannot_be_written_ends_no_run(run, tmp_path):
    (tmp_path / "out" / "profile.json" / "in the way").mkdir(parents=True)
    result = run(max_iters=7, profile=True)
    assert result.status == 0
    assert re.search(r"^train\.py: .*profile\.json could not be written: ", result.err, re.M)


@pytest.mark.fault("the disk behind `> log.txt` is full", "that is said once on stderr; the run goes on")
def test_a_full_disk_behind_stdout_ends_no_run(tmp_path, text):
    command = [sys.executable, str(ROOT / "train.py"), *arguments(**TINY | text | {"out_dir": tmp_path / "out"})]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert re.fullmatch(rf"train\.py: stdout could not be written: {NO_SPACE}; [^\n]*\n", done.stderr)
    assert done.returncode == 0
    assert checkpoint.load(tmp_path / "out").step == 12


IN_A_SMALL_DISK = """
mount -t tmpfs -o size=520k none "$0" && mkdir "$0/out" || exit 99
"$@"
status=$?
cp -r "$0/out" "$0.copy"
exit $status
"""


@pytest.mark.fault(
    "the disk fills up under everything that a run writes",
    "metrics, events and each checkpoint say so; the checkpoints that are there are whole",
)
def test_a_disk_that_really_fills_up(tmp_path, text):
    disk = tmp_path / "disk"
    disk.mkdir()
    options = {
        "out_dir": disk / "out",
        "max_iters": 400,
        "eval_interval": 40,
        "keep_checkpoints": 10,
        "tensorboard": True,
    }
    command = [sys.executable, str(ROOT / "train.py"), *arguments(**TINY | text | options), "--always-save-checkpoint"]
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", IN_A_SMALL_DISK, str(disk)]
    if shutil.which("unshare") is None or subprocess.run([*inside[:4], "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(
        [*inside, *command], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode == 99:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    *said, last = done.stderr.splitlines()
    assert done.returncode == 2
    assert re.fullmatch(rf"train\.py: error: --out-dir .*step 400 could not be saved: .*{NO_SPACE}.*", last)
    assert all(line.startswith("train.py: ") and NO_SPACE in line for line in said)
    assert sum("could not be saved" in line for line in said) > 5
    out_dir = tmp_path / "disk.copy"
    steps = [checkpoint.load(path).step for path in out_dir.glob("step-*")]
    assert 0 < checkpoint.load(out_dir).step == max(steps) < 400
    assert len(re.findall(r"^\d+ \|", done.stdout, re.M)) == 134  # every third step, to the end
    records(out_dir, "step")


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_all_files_of_a_run_have_the_modes_of_the_umask(run, tmp_path, umask):
    former = os.umask(umask)
    try:
        assert run(max_iters=1, tensorboard=True, data_dir=tmp_path / "data").status == 0
    finally:
        os.umask(former)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 12
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files
    }


@pytest.mark.fault(
    "a token shard is damaged under a run", "the run is saved, and ends with the file's name and status 2"
)
def test_a_shard_that_is_damaged_under_a_run_ends_it_saved(tmp_path, text):
    """The windows of this text are read in an order of their own; half of them hold an id that is none."""
    out_dir = tmp_path / "out"
    code = """
import numpy, train
from training.data import shards
read, calls = shards.TokenShards.read, iter(range(100))
def read_damaged(self, starts, length):
    if next(calls) == 30:
        for array in self._arrays:
            array = numpy.full_like(array, 300)
            self._arrays = [array]
    return read(self, starts, length)
shards.TokenShards.read = read_damaged
train.main()
"""
    options = {"out_dir": out_dir, "max_iters": 1000, "eval_interval": 1000, "eval_iters": 1}
    result = finish(start("train.py", arguments(**TINY | text | options), code=code))
    assert result.status == 2
    assert "token id 300, allowed: below the vocabulary size 300" in result.err
    assert checkpoint.load(out_dir).step == len(records(out_dir, "step")) > 20
