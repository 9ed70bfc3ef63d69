"""README.md of a run's folder: what it says is what the run did, its commands run, and no file of another's is touched."""

import json
import re
import shlex
from pathlib import Path

import pytest

import export
import generate
import train
from tests.support.run_testing import TINY, Result, arguments, call, records, write_text
from training import run_folder


def started(folder: Path, **options) -> Result:
    text = {"data": write_text(folder / "text.txt"), "data_dir": folder / "data", "out_dir": folder / "out"}
    return call(train, arguments(**TINY | text | options))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    result = started(folder)
    assert (result.status, result.err) == (0, "")
    return folder / "out"


def test_the_figures_are_those_of_the_run(run):
    card = (run / "README.md").read_text()
    last = records(run, "eval")[-1]
    figures = " | ".join(f"{last[name]:.4f}" for name in ("train_loss", "val_loss", "bits_per_byte"))
    assert f"| last | 12 | {figures} |" in card
    assert "for 12 of 12 steps: 768 tokens" in card
    assert "![Loss by step](loss.png)" in card
    assert (run / "loss.png").exists()
    assert "| layers | 2, width 16, feed-forward 64 |" in card
    assert "| heads | 2 of 8, for keys and values 1 |" in card
    state = json.loads((run / "step-00000012" / "state.json").read_text())["state"]
    assert f"SHA-256 {state['tokenizer_hash'][:16]}" in card
    assert f"fingerprint {state['data_fingerprint'][:16]}" in card
    sample = last["sample"].split("\n")[0]
    assert not sample.isprintable() or f"    {sample}" in card
    for target in re.findall(r"\]\(([^)]+)\)", card):
        assert (run / target).exists(), target


def test_its_commands_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stories = (run.parent / "text.txt").read_text().split("\n\n")
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    block = re.search(r"## Going on\n\n```\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)[1]
    commands = [shlex.split(line) for line in block.splitlines()]
    programs = {"train.py": train, "generate.py": generate, "export.py": export}
    # What fits a test: few tokens, few steps.
    extra = {"generate.py": ["--device=cpu", "--max-new-tokens=3", "--prompt=the"], "export.py": []}
    tuning = arguments(
        batch_size=2, max_iters=2, warmup_iters=0, eval_interval=2, eval_iters=1, sample_tokens=0, device="cpu"
    )
    ran = []
    for python, program, *words in commands:
        assert python == "python"
        if program == "train.py":
            fresh = "resume" not in words
            more = [*tuning, "--preset=smoke", "--gradient-accumulation-steps=1", "--no-tensorboard"] if fresh else []
        else:
            more = extra[program]
        result = call(programs[program], [word for word in words if word not in ("--prompt", "...")] + more)
        assert result.status == 0, (program, words, result.err)
        ran.append(program)
    assert ran == ["generate.py", "train.py", "train.py", "export.py"]
    assert "for 24 of 24 steps" in (run / "README.md").read_text()  # what went on wrote it anew
    assert f"begun with the weights of `{run}`" in (tmp_path / "tuned" / "README.md").read_text()
    assert (tmp_path / "exported" / "config.json").exists()


def test_a_readme_that_no_run_wrote_stays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    for _ in range(2):  # the second run moves the first one's files
        result = started(tmp_path, max_iters=6)
        assert result.status == 0
        assert re.search(
            r"README\.md is there, and no run wrote it: it stays, and no model card is written", result.err
        )
        assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"
    assert not (tmp_path / "out" / "earlier-1" / "README.md").exists()


def test_an_earlier_runs_card_goes_with_it(tmp_path):
    started(tmp_path, max_iters=6)
    former = (tmp_path / "out" / "README.md").read_text()
    started(tmp_path, max_iters=6, seed=7)
    assert (tmp_path / "out" / "earlier-1" / "README.md").read_text() == former
    assert "| seed | 7 |" in (tmp_path / "out" / "README.md").read_text()


def test_a_card_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    write_text_of_path = Path.write_text

    def full(path, *rest, **named):
        if path.name.endswith("README.md"):
            raise OSError(28, "No space left on device")
        return write_text_of_path(path, *rest, **named)

    monkeypatch.setattr(Path, "write_text", full)
    result = started(tmp_path)
    assert result.status == 0
    assert re.search(r"README\.md cannot be written: No space left on device", result.err)
    assert "done: 12 steps" in result.out
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".tmp")]


def test_a_run_that_is_stopped_has_one_too(tmp_path, monkeypatch):
    import os
    import signal

    from training.step.trainer import Trainer

    step, done = Trainer.step, []

    def interrupted(*words):
        done.append(1)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*words)

    monkeypatch.setattr(Trainer, "step", interrupted)
    result = started(tmp_path)
    assert result.status in (0, 143), result
    steps = int(re.search(r"for (\d+) of 12 steps", (tmp_path / "out" / "README.md").read_text())[1])
    assert 3 <= steps < 12
    assert run_folder.is_card(tmp_path / "out" / "README.md")
