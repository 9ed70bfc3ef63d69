"""Checkpoints are written and verified by all processes: the same files from every layout, which every layout reads."""

import json
from types import SimpleNamespace

import pytest
import torch

import training.checkpoint.files as checkpoint
from tests.support.run_testing import finish, start_many
from tests.support.sharded_steps import TINY
from training.checkpoint import parts, state
from training.config import TrainConfig
from training.distributed import World
from training.errors import UserError
from training.progress import Progress
from training.step.start import new_trainer

DATASET = SimpleNamespace(
    fingerprint="text", tokenizer=SimpleNamespace(hash="tokens", file_name="tokenizer.model", content=b"model")
)

# What one of many processes does: resumes a checkpoint, or trains for one, and saves.
CODE = """
import sys
from tests.training.test_shared_checkpoints import move
move(*sys.argv[1:])
"""


def move(parallel: str, source: str, target: str, damage: str = "") -> None:
    """Save the checkpoint of `source` in `target`; without a source, one of two steps of a new model."""
    from training.distributed import joined

    torch.set_num_threads(1)
    options = {"gradient_accumulation_steps": 4, "device": "cpu", "max_iters": 2, "tie_embeddings": False}
    config = TrainConfig(**TINY | options, parallel=parallel, out_dir=source or target)
    with joined(config) as world:
        save_or_resume(config, world, source, target, damage)


def save_or_resume(config: TrainConfig, world: World, source: str, target: str, damage: str = "") -> None:
    from tests.support.sharded_steps import Case, batches_of

    torch.manual_seed(0)
    trainer = new_trainer(config, world, torch.device("cpu"), torch.float32)
    progress = Progress(2)
    if source:
        progress, _ = state.resume(config, trainer, DATASET)
    else:
        for step in range(2):
            trainer.step(*batches_of(Case(""), step, world), 1e-2)
    if damage and int(damage) == world.rank:
        parts.write_file = full_disk
    config.out_dir = target
    state.save(config, trainer, DATASET, progress, best=False)


def full_disk(path, tensors):
    raise OSError(28, "No space left on device")


def hashes(out_dir) -> dict[str, str]:
    """Of all files but config.toml, which says which layout it was."""
    folder = next(out_dir.glob("step-*"))
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "config.toml"}


def by(size: int, parallel: str, source, target, *damage: str, machines: int = 1) -> list:
    processes = start_many(
        [parallel, str(source), str(target), *damage], size, CODE, LOCAL_WORLD_SIZE=str(size // machines)
    )
    return [finish(process) for process in processes]


def test_two_shares_are_read_as_a_whole_and_written_as_the_same_files(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [result.status for result in by(2, "fsdp", "", tmp_path / "two")] == [0, 0]
    move("ddp", str(tmp_path / "two"), str(tmp_path / "one"))
    results = by(2, "fsdp", tmp_path / "one", tmp_path / "again")
    assert [result.status for result in results] == [0, 0], results
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == hashes(tmp_path / "again")


@pytest.mark.slow
def test_every_layout_gives_the_same_files(tmp_path):
    move("ddp", "", str(tmp_path / "one"))
    source = tmp_path / "one"
    for i, (size, parallel, machines) in enumerate(
        [(2, "ddp", 1), (4, "fsdp", 1), (4, "hsdp", 2), (2, "fsdp", 1), (4, "ddp", 1)]
    ):
        target = tmp_path / str(i)
        results = by(size, parallel, source, target, machines=machines)
        assert [result.status for result in results] == [0] * size, results
        assert hashes(target) == hashes(tmp_path / "one"), (size, parallel)
        source = target


def test_what_one_process_cannot_write_is_told_once_and_leaves_the_earlier_checkpoint(tmp_path):
    out = tmp_path / "out"
    move("ddp", "", str(out))
    before = hashes(out)
    results = by(2, "fsdp", out, out, "1")
    assert [result.status for result in results] == [2, 2], results
    said = "".join(result.err for result in results)
    assert said.count("could not be saved, by rank 1 of 2") == 1
    assert "No space left on device; earlier checkpoints there are untouched" in said
    assert hashes(out) == before
    assert not list(out.glob(".tmp-*"))


def test_what_one_process_finds_damaged_is_told_once(tmp_path):
    out = tmp_path / "out"
    move("ddp", "", str(out))
    names = list(json.loads((next(out.glob("step-*")) / "manifest.json").read_text())["files"])
    damaged = next(path for path in out.glob("step-*/*") if path.name == names[1])  # which process 1 verifies
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    results = by(2, "fsdp", out, tmp_path / "new")
    assert [result.status for result in results] == [2, 2], results
    assert "".join(result.err for result in results).count(f"{names[1]} is damaged: its SHA-256") == 1
    assert not (tmp_path / "new").exists()


def test_a_reader_gives_rows_across_tensors(tmp_path):
    q, k = torch.arange(12.0).view(6, 2), -torch.arange(8.0).view(4, 2)
    checkpoint.save(
        tmp_path, 1, tensors={"model": {"q": q, "k": k}}, state={}, config_toml="", tokenizer=b"", best=False, keep=1
    )
    reader, both = checkpoint.load(tmp_path).reader("model"), torch.cat([q, k])
    for start, stop in [(0, 10), (0, 6), (5, 7), (6, 10), (7, 8), (10, 10), (0, 0)]:
        assert torch.equal(reader.rows(("q", "k"), slice(start, stop)), both[start:stop])
    with pytest.raises(UserError, match="has no tensor v"):
        reader.rows(("q", "v"), slice(0, 10))


def test_hsdp_needs_several_machines_and_adamws_kernel_a_whole_model(monkeypatch):
    from training.sharding import make_mesh

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"4 processes, 4 on this machine.*say --parallel fsdp"):
        make_mesh("hsdp", World(0, 4), torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for options, words in (
        ({"kernels": "all"}, r"--kernels all asks for AdamW's kernel, and --parallel fsdp.*end --kernels with -adamw"),
        ({"optimizer": "muon"}, r"--optimizer is muon.*allowed: adamw, or --parallel ddp"),
    ):
        with pytest.raises(UserError, match=words):
            TrainConfig(parallel="fsdp", **options).check()
    TrainConfig(parallel="fsdp", kernels="all,-adamw").check()
    TrainConfig(parallel="fsdp", fused=True).check()
