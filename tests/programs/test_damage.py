"""Files that changed behind a run's back: the one that did is named, and the way on."""

import re
import shutil
from pathlib import Path

import pytest

import train
from tests.support.run_testing import TINY, Result, arguments, call, records, write_text
from training.checkpoint import files as checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory, text) -> Path:
    """A run with checkpoints of steps 4, 8 and 12."""
    out_dir = tmp_path_factory.mktemp("made") / "out"
    options = {"out_dir": out_dir, "eval_interval": 4, "always_save_checkpoint": True}
    assert call(train, arguments(**TINY | text | options)).status == 0
    return out_dir


def resume(folder: Path, **options) -> Result:
    return call(train, arguments(init_from="resume", out_dir=folder, **options))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.fault(
    "a file of the newest checkpoint is cut short, changed or missing",
    "it is named, with the checkpoints that `--which` can take in its place",
)
@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_a_damaged_newest_checkpoint_is_named_and_another_goes_on(made, tmp_path, harm):
    names = sorted(path.name for path in (made / "step-00000012").iterdir())
    assert len(names) == 7
    for name in names:
        folder = tmp_path / name
        shutil.copytree(made, folder)
        harm(folder / "step-00000012" / name)
        result = resume(folder)
        assert result.status == 2
        assert re.fullmatch(
            rf"train\.py: error: [^\n]*{re.escape(name)}[^\n]*; take another with --which: step-00000008, step-00000004\n",
            result.err,
        ), result.err
    result = resume(folder, which="step-00000008")
    assert (result.status, result.err) == (0, "")
    assert f"resuming {folder / 'step-00000008'}\n" in result.out
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (folder / "step-00000012" / name).read_bytes() == (made / "step-00000012" / name).read_bytes()
    assert checkpoint.load(folder).step == 12
    assert [line["loss"] for line in records(folder, "step")][-4:] == [line["loss"] for line in records(made, "step")][
        -4:
    ]
    assert 'which = "last"\n' in (folder / "step-00000012" / "config.toml").read_text()


def test_the_best_can_be_taken(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    (tmp_path / "out" / "best").write_text("step-00000004\n")
    assert f"resuming {tmp_path / 'out' / 'step-00000004'}\n" in resume(tmp_path / "out", which="best").out


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(made):
    result = resume(made, which="step-00000005")
    assert result.status == 2
    assert "no checkpoint 'step-00000005' in" in result.err
    assert "which holds step-00000004, step-00000008, step-00000012" in result.err


@pytest.mark.fault(
    "a token shard is replaced under a resumed run",
    "it is named, and which folder to delete; made anew, the run goes on",
)
def test_a_shard_that_was_replaced_is_named(run, tmp_path):
    text = {"data": write_text(tmp_path / "text.txt"), "data_dir": tmp_path / "data"}
    assert run(**text, max_iters=2).status == 0
    (folder,) = (tmp_path / "data").iterdir()
    # Whole, of the same tokenizer, and of another text.
    write_text(tmp_path / "other.txt", documents=190)
    options = {"data": tmp_path / "other.txt", "data_dir": tmp_path / "other", "tokenizer": folder / "tokenizer.model"}
    assert run(**options, out_dir=tmp_path / "elsewhere", max_iters=1).status == 0
    shutil.copy(next((tmp_path / "other").glob("*/train-00000.bin")), folder)
    result = resume(tmp_path / "out", max_iters=4)
    assert result.status == 2
    assert re.fullmatch(
        rf"train\.py: error: damaged token shards: {re.escape(str(folder))}/train-00000\.bin is not the file that was prepared: "
        rf"its content has changed; delete {re.escape(str(folder))} and they are made anew\n",
        result.err,
    )
    shutil.rmtree(folder)
    assert resume(tmp_path / "out", max_iters=4).status == 0
