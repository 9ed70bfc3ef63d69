"""A run that is killed and resumed is the run that was not: the same losses, parameters and optimizer state, to the bit."""

import json
import random
import re
import shutil
import signal
from pathlib import Path

import numpy
import pytest
import torch

import train
from tests.support import kernel_testing as kt
from tests.support.run_testing import TINY, Result, arguments, call, finish, records, start, state, write_text
from training.checkpoint import files as checkpoint
from training.evaluation import Evaluation
from training.step.optimizer import LossScale
from training.step.trainer import Trainer

HALF = 6  # steps before the kill, and after it
HALVES = {"max_iters": 2 * HALF, "eval_interval": HALF, "always_save_checkpoint": True, "dropout": 0.1}


@pytest.fixture
def whole(tmp_path, text):
    """A run of 2 * HALF steps that saved at each half: its folder."""

    def run(**options) -> Path:
        result = call(train, arguments(**TINY | text | HALVES | {"out_dir": tmp_path / "whole"} | options))
        assert (result.status, result.err) == (0, "")
        return options.get("out_dir", tmp_path / "whole")

    return run


def killed(whole: Path, folder: Path) -> Path:
    """What a kill between the first save and the second leaves of that run, in a folder of its own."""
    folder.mkdir()
    shutil.copytree(whole / f"step-{HALF:08d}", folder / f"step-{HALF:08d}")
    (folder / "last").write_text(f"step-{HALF:08d}\n")
    if (whole / "best").exists():
        (folder / "best").write_text(f"step-{HALF:08d}\n")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    stop = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == HALF + 2)
    (folder / "metrics.jsonl").write_text("".join(lines[:stop]) + lines[stop][:20])
    half_saved = folder / f".tmp-step-{2 * HALF:08d}"
    half_saved.mkdir()
    (half_saved / "model.safetensors").write_bytes(b"half")
    return folder


def resume(folder: Path, **options) -> Result:
    return call(train, arguments(init_from="resume", out_dir=folder, **options))


def assert_equal_to_the_bit(resumed: Path, whole: Path) -> None:
    last = f"step-{2 * HALF:08d}"
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "tokenizer.model"):
        assert (resumed / last / name).read_bytes() == (whole / last / name).read_bytes(), name
    for name in ("best", "last"):
        ours, theirs = (folder / name for folder in (resumed, whole))
        assert ours.exists() == theirs.exists()
        assert not ours.exists() or ours.read_text() == theirs.read_text()
    unequal = ("time", "ms", "tokens_per_second", "tflops", "mfu", "peak_memory", "sample")
    for kind in ("step", "eval"):
        ours, theirs = (
            [
                {key: value for key, value in line.items() if key not in unequal}
                for line in records(folder, kind)
                if line["step"] >= HALF
            ]
            for folder in (resumed, whole)
        )
        assert ours[-len(theirs) :] == theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_killed_run_resumes_to_the_bit(whole, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 4)
    uninterrupted = whole(dtype=dtype)
    folder = killed(uninterrupted, tmp_path / "killed")
    result = resume(folder)
    assert (result.status, result.err) == (0, "")
    assert f"resuming {folder / f'step-{HALF:08d}'}\n" in result.out
    assert_equal_to_the_bit(folder, uninterrupted)
    assert not list(folder.glob(".tmp-*"))
    if dtype == "float16":
        scales = [state(uninterrupted / f"step-{step:08d}")["loss_scale"] for step in (HALF, 2 * HALF)]
        assert scales[0]["scale"] != scales[1]["scale"]
        assert scales[0]["growth_tracker"] > 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_killed_run_of_muon_resumes_to_the_bit(whole, tmp_path, dtype):
    uninterrupted = whole(dtype=dtype, optimizer="muon")
    folder = killed(uninterrupted, tmp_path / "killed")
    result = resume(folder)
    assert (result.status, result.err) == (0, "")
    assert_equal_to_the_bit(folder, uninterrupted)
    refused(
        resume(folder, optimizer="adamw"),
        r"--optimizer is adamw, and .*step-\d+ was trained with muon; their states differ",
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_killed_compiled_run_resumes_to_the_bit(whole, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 4)
    uninterrupted = whole(dtype=dtype, compile=True)
    folder = killed(uninterrupted, tmp_path / "killed")
    torch._dynamo.reset()  # a new process compiles anew
    result = resume(folder)
    assert (result.status, result.err) == (0, "")
    assert_equal_to_the_bit(folder, uninterrupted)


KILLED = f"""
import os, signal, train
from training.step.trainer import Trainer
step, calls = Trainer.step, iter(range(100))
def step_until_killed(self, *batch):
    if next(calls) == {HALF + 2}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *batch)
Trainer.step = step_until_killed
train.main()
"""


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.fault("`kill -9`", "resumed, the run goes on from its last checkpoint, to the bit")
def test_a_process_that_is_really_killed_is_continued_by_another(whole, tmp_path, text, compiled):
    uninterrupted = whole(compile=compiled)
    folder = tmp_path / "killed"
    process = start(
        "train.py", arguments(**TINY | text | HALVES | {"out_dir": folder, "compile": compiled}), code=KILLED
    )
    assert finish(process).status == -signal.SIGKILL
    assert checkpoint.load(folder).step == HALF
    assert len(records(folder, "step")) == HALF + 2
    result = finish(start("train.py", arguments(init_from="resume", out_dir=folder)))
    assert (result.status, result.err) == (0, "")
    assert_equal_to_the_bit(folder, uninterrupted)


def test_every_generator_goes_on_where_it_was(whole, tmp_path, monkeypatch):
    """Nothing in a run draws from them without seeding first, today: here each step does."""
    take_step, drawn = Trainer.step, []

    def step_and_draw(self, *batch):
        drawn.append((torch.rand(()).item(), random.random(), numpy.random.rand()))
        return take_step(self, *batch)

    monkeypatch.setattr(Trainer, "step", step_and_draw)
    uninterrupted = whole(dropout=0.0)
    wanted = drawn[HALF:]
    drawn.clear()
    assert resume(killed(uninterrupted, tmp_path / "killed")).status == 0
    assert drawn == wanted
    assert len(set(wanted)) == HALF


def test_dropout_is_a_function_of_the_seed_and_the_step(whole, tmp_path, monkeypatch):
    """So that what is drawn beside the steps, by an evaluation say, does not change the run."""
    plain = whole(out_dir=tmp_path / "plain", max_iters=4, eval_interval=2)
    sample = Evaluation.sample
    monkeypatch.setattr(Evaluation, "sample", lambda self, model: (torch.rand(1), sample(self, model))[1])
    assert losses(whole(out_dir=tmp_path / "other", max_iters=4, eval_interval=2)) == losses(plain)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in records(folder, "step")]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_kernels_and_their_optimizer_resume_to_the_bit(whole, tmp_path, dtype):
    options = {"kernels": "all", "device": kt.DEVICE, "dtype": dtype}
    uninterrupted = whole(dim=32, batch_size=2, eval_iters=1, **options)
    folder = killed(uninterrupted, tmp_path / "killed")
    assert resume(folder).status == 0
    assert_equal_to_the_bit(folder, uninterrupted)


@pytest.mark.parametrize(("first", "then"), [("none", "adamw"), ("adamw", "none")])
def test_a_run_may_change_its_optimizer_at_a_checkpoint(whole, tmp_path, first, then):
    uninterrupted = whole(kernels=first, dropout=0.0, device=kt.DEVICE)
    folder = killed(uninterrupted, tmp_path / "killed")
    result = resume(folder, kernels=then)
    assert result.status == 0
    assert f"with other options: --kernels is {then}, was {first}" in result.out
    assert losses(folder)[-HALF:] == pytest.approx(losses(uninterrupted)[-HALF:], rel=1e-6)
    assert state(folder / f"step-{2 * HALF:08d}")["updates"] == 2 * HALF


def test_a_run_that_skipped_steps_resumes_to_the_bit(whole, tmp_path, monkeypatch):
    """The scale of float16 starts out so large that the kill comes while steps are still skipped."""
    build = LossScale.__init__

    def start_high(self, enabled, device):
        build(self, enabled, device)
        self.scale.fill_(2.0**28)

    monkeypatch.setattr(LossScale, "__init__", start_high)
    uninterrupted = whole(dtype="float16")
    first, second = (state(uninterrupted / f"step-{step:08d}") for step in (HALF, 2 * HALF))
    assert (first["skipped"], first["skipped_in_a_row"], first["updates"]) == (HALF, HALF, 0)
    assert 2.0**28 > first["loss_scale"]["scale"] > second["loss_scale"]["scale"]
    assert second["updates"] > 0
    monkeypatch.undo()
    folder = killed(uninterrupted, tmp_path / "killed")
    assert resume(folder).status == 0
    assert_equal_to_the_bit(folder, uninterrupted)


def test_a_signal_before_an_evaluation_resumes_to_the_bit(whole, tmp_path, monkeypatch):
    """The step it stops after is one that is evaluated: the resumed run does that, and saves the best."""
    uninterrupted = whole()
    folder = tmp_path / "stopped"
    take_step, calls = Trainer.step, iter(range(100))

    def step_and_ask(self, *batch):
        result = take_step(self, *batch)
        if next(calls) == HALF - 1:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(Trainer, "step", step_and_ask)
    config = (uninterrupted / "config.toml").read_text()
    (tmp_path / "run.toml").write_text(config)
    result = call(train, [f"--config={tmp_path / 'run.toml'}", f"--out-dir={folder}"])
    assert f"stopping after step {HALF - 1}, as asked" in result.out
    assert not (folder / "best").exists()
    monkeypatch.undo()
    assert resume(folder).status == 0
    assert_equal_to_the_bit(folder, uninterrupted)
    note = [line["text"] for line in records(folder, "note") if "saved" in line["text"]]
    assert note == [f"saved {folder / f'step-{step:08d}'}" for step in (HALF, HALF, 2 * HALF)]


# ------------------------------------------------------------------------------------------------------- other options


def test_a_resumed_run_may_be_longer_and_says_what_changed(whole, tmp_path):
    folder = whole(dropout=0.0)
    result = resume(folder, max_iters=14, learning_rate=0.01)
    assert result.status == 0
    assert "with other options: --max-iters is 14, was 12, --learning-rate is 0.01, was 0.003\n" in result.out
    assert [line["step"] for line in records(folder, "step")] == list(range(14))
    assert "learning_rate = 0.01\n" in (folder / "config.toml").read_text()
    assert (folder / "last").read_text() == "step-00000014\n"


def test_a_finished_run_that_is_resumed_has_nothing_left_to_do(whole):
    folder = whole()
    before = (folder / "step-00000012" / "manifest.json").read_bytes()
    result = resume(folder)
    assert (result.status, result.err) == (0, "")
    assert (folder / "step-00000012" / "manifest.json").read_bytes() == before
    assert len(records(folder, "step")) == 12


def refused(result: Result, message: str) -> None:
    assert result.status == 2
    assert re.fullmatch(r"train\.py: error: [^\n]*\n", result.err), result.err
    assert re.search(message, result.err)


@pytest.fixture(scope="session")
def short(tmp_path_factory, text) -> Path:
    """A run of 2 steps that tests try to resume as something else."""
    folder = tmp_path_factory.mktemp("short") / "out"
    assert call(train, arguments(**TINY | text | {"out_dir": folder, "max_iters": 2})).status == 0
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 32}, "step-00000002 holds another model: --dim is 32, was 16\n"),
        ({"n_layers": 3, "n_group": 2}, "another model: --n-layers is 3, was 2, --n-kv-heads is 2, was 1\n"),
        ({"max_seq_len": 8}, "--max-seq-len is 8, was 16"),
        ({"tie_embeddings": False}, "--tie-embeddings is False, was True"),
        ({"rope_theta": 5e5}, "--rope-theta is 500000.0, was 10000.0"),
        ({"preset": "124m"}, "another model: .*--dim is 768, was 16"),
        ({"max_iters": 1}, "--max-iters is 1, and .*step-00000002 has 2 steps behind it"),
    ],
)
def test_another_model_is_refused(short, options, message):
    before = sorted(short.rglob("*"))
    small = {"batch_size": 1, "gradient_accumulation_steps": 1, "vocab_size": 300} if "preset" in options else {}
    if "preset" in options:
        small["max_seq_len"] = 16
    refused(resume(short, **options | small), message)
    assert sorted(short.rglob("*")) == before


def test_another_vocabulary_is_refused(short, tmp_path):
    refused(resume(short, vocab_size=301, data_dir=tmp_path), "another model: --vocab-size is 301, was 300")


def test_another_text_is_refused(short, tmp_path, text):
    tokenizer = short / "step-00000002" / "tokenizer.model"
    other = write_text(tmp_path / "other.txt", documents=190)
    message = (
        r"was trained with another text than --data .*other\.txt gives now: --data is .*other\.txt, was .*text\.txt"
    )
    refused(resume(short, data=other, data_dir=tmp_path, tokenizer=tokenizer), message)
    # Of another text another tokenizer is trained, which is not what has to be mended.
    refused(resume(short, data=other, data_dir=tmp_path), message)
    for options in ({"tokenizer": tokenizer}, {}):
        refused(
            resume(short, val_fraction=0.1, data_dir=tmp_path, **options),
            r"was trained with another text than --data .* gives now: --val-fraction is 0\.1, was 0\.05",
        )


def test_a_text_that_has_changed_under_its_name_is_refused(tmp_path):
    options = {"data": write_text(tmp_path / "text.txt", documents=200), "data_dir": tmp_path / "data"}
    assert call(train, arguments(**TINY | options | {"out_dir": tmp_path / "out", "max_iters": 1})).status == 0
    write_text(tmp_path / "text.txt", documents=190)
    refused(
        resume(tmp_path / "out"),
        r"another text than --data .*text\.txt gives now: data_fingerprint \w{12}, found \w{12}\n$",
    )


def test_another_tokenizer_is_refused(short, text, tmp_path, run):
    other = {
        "data": write_text(tmp_path / "other.txt", documents=190),
        "data_dir": tmp_path,
        "out_dir": tmp_path / "out",
    }
    assert run(**other, max_iters=1).status == 0
    tokenizer = tmp_path / "out" / "step-00000001" / "tokenizer.model"
    message = r"another tokenizer than --data .*text\.txt gives now: --tokenizer is .*tokenizer\.model, was empty\n$"
    refused(resume(short, tokenizer=tokenizer), message)


@pytest.mark.fault(
    "a resumed run evaluates otherwise than before", "it says that the best loss so far was measured otherwise"
)
def test_a_best_loss_that_was_measured_otherwise_is_told(whole):
    result = resume(whole(max_iters=HALF), max_iters=HALF + 1, eval_iters=1)
    assert re.search(
        r"; its best val loss, \d\.\d{4}, was measured otherwise \(--eval-iters is 1, was 2\), and later ones are compared",
        result.out,
    )


def test_no_checkpoint_is_refused(tmp_path):
    refused(resume(tmp_path), "--init-from resume: there is no checkpoint 'last' in .*, which holds no checkpoint")
