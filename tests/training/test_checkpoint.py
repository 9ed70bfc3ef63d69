"""Checkpoints: what is saved is what is loaded, damage is noticed, and no failure harms the earlier ones."""

import contextlib
import errno
import json
import os
import pickle
import random
import re
import resource

import numpy
import pytest
import safetensors.torch
import torch

from training.checkpoint import files as checkpoint
from training.errors import UserError


def save(out_dir, step, *, best=False, keep=3, value=None, **changes):
    value = float(step if value is None else value)
    arguments = {
        "tensors": {"model": {"w": torch.full((4, 3), value)}, "optimizer": {"m": torch.full((2,), value)}},
        "state": {"best_loss": value},
        "config_toml": "dim = 4\n",
        "tokenizer": b"\x00\x01tok",
    }
    return checkpoint.save(out_dir, step, best=best, keep=keep, **(arguments | changes))


def value_of(out_dir, which="last"):
    """The value that `save` put in, after checking that the parts belong together."""
    loaded = checkpoint.load(out_dir, which)
    value = loaded.state["best_loss"]
    assert loaded.tensors("model")["w"].tolist() == [[value] * 3] * 4
    assert loaded.tensors("optimizer")["m"].tolist() == [value] * 2
    return value


def bits(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


def names(out_dir):
    return sorted(path.name for path in out_dir.iterdir())


def test_everything_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = {
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "float16": torch.randn(7).half(),
        "nan_and_inf": torch.tensor([float("nan"), float("inf"), -0.0]),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "int64": torch.tensor([-(2**62)]),
        "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    state = {"best_loss": float("inf"), "lr": 0.1 + 0.2, "skipped": 0, "scaler": {"scale": 65536.0}, "text": "é\n"}
    config, tokenizer = 'data = "é"\r\n', bytes(range(256))
    path = save(tmp_path, 123, tensors={"model": model}, state=state, config_toml=config, tokenizer=tokenizer)

    assert path == tmp_path / "step-00000123"
    for source in (tmp_path, path, str(path)):
        loaded = checkpoint.load(source)
        assert (loaded.path, loaded.step) == (path, 123)
        assert (loaded.state, loaded.config_toml, loaded.tokenizer) == (state, config, tokenizer)
        tensors = loaded.tensors("model")
        assert tensors.keys() == model.keys()
        for name, tensor in model.items():
            assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(bits(tensors[name]), bits(tensor))


def test_a_tokenizer_comes_back_under_the_name_of_its_file(tmp_path):
    loaded = checkpoint.load(save(tmp_path, 1, tokenizer=b"{}", tokenizer_name="tokenizer.json"))
    assert (loaded.tokenizer_name, loaded.tokenizer) == ("tokenizer.json", b"{}")
    assert "tokenizer.json" in loaded.files
    assert checkpoint.load(save(tmp_path, 2)).tokenizer_name == "tokenizer.model"


def test_tensors_that_share_memory_or_are_strided_are_saved_by_value(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    model = {
        "base": base,
        "tied": base,
        "transposed": base.t(),
        "slice": base[:, 1],
        "expanded": torch.ones(1).expand(5),
    }
    save(tmp_path, 1, tensors={"model": model})
    loaded = checkpoint.load(tmp_path).tensors("model")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.items())


def test_a_group_over_the_size_limit_is_split_and_indexed_as_hugging_face_does(tmp_path):
    model = {f"layers.{i}": torch.full((10,), float(i)) for i in range(5)} | {"big": torch.ones(100)}
    path = save(tmp_path, 1, tensors={"model": model, "optimizer": {"m": torch.ones(3)}}, max_file_bytes=80)
    assert [name for name in names(path) if "safetensors" in name] == [
        *(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)),
        "model.safetensors.index.json",
        "optimizer.safetensors",
    ]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 150
    assert index["weight_map"]["layers.1"] == "model-00001-of-00004.safetensors"
    assert index["weight_map"]["big"] == "model-00004-of-00004.safetensors"
    loaded = checkpoint.load(path)
    tensors = loaded.tensors("model")
    assert tensors.keys() == model.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.items())
    assert loaded.tensors("optimizer").keys() == {"m"}


def test_a_group_that_was_not_saved_is_named(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"has no rng\.safetensors; it holds .*model\.safetensors"):
        checkpoint.load(tmp_path).tensors("rng")


def test_no_pickle_is_written_or_read(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for module, name in [(torch, "save"), (torch, "load"), (pickle, "dumps"), (pickle, "loads"), (pickle, "Unpickler")]:
        monkeypatch.setattr(module, name, refuse)
    state, tensors = checkpoint.rng_state()
    save(tmp_path, 1, tensors={"rng": tensors}, state=state)
    checkpoint.load(tmp_path).tensors("rng")


def test_last_best_and_the_newest_are_kept(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, best=step == 2, keep=2)
    assert names(tmp_path) == ["best", "last", "step-00000002", "step-00000005", "step-00000006"]
    assert value_of(tmp_path) == 6
    assert value_of(tmp_path, "best") == 2
    assert value_of(tmp_path, "step-00000005") == 5


def test_newest_means_last_written_when_a_run_starts_again_from_an_earlier_step(tmp_path):
    for step in (10, 20, 30, 11, 12):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["last", "step-00000011", "step-00000012"]
    assert value_of(tmp_path) == 12


def test_the_checkpoint_of_a_step_can_be_replaced(tmp_path):
    save(tmp_path, 5, value=1)
    save(tmp_path, 5, value=2, best=True)
    assert names(tmp_path) == ["best", "last", "step-00000005"]
    assert value_of(tmp_path) == value_of(tmp_path, "best") == 2


def test_leftovers_of_a_dead_run_are_removed_by_the_next_save(tmp_path):
    (tmp_path / ".tmp-step-00000009").mkdir()
    (tmp_path / ".tmp-step-00000009" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-last").write_text("st")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path)
    save(tmp_path, 1)
    assert names(tmp_path) == ["last", "step-00000001"]


def test_every_flipped_byte_is_noticed_and_the_file_named(tmp_path):
    path = save(tmp_path, 1)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        positions = range(len(good)) if file.name != "manifest.json" else ()
        for i in positions:
            file.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
            with pytest.raises(UserError, match=rf"{file.name} is damaged: its SHA-256"):
                checkpoint.load(tmp_path)
        file.write_bytes(good[: len(good) // 2])
        with pytest.raises(UserError, match=rf"{file.name} is damaged"):
            checkpoint.load(tmp_path)
        file.unlink()
        with pytest.raises(UserError, match=f"{file.name} cannot be read: No such file"):
            checkpoint.load(path)
        file.write_bytes(good)
    assert value_of(tmp_path) == 1


def test_a_damaged_manifest_gives_an_error_or_the_same_checkpoint(tmp_path):
    manifest = save(tmp_path, 1) / "manifest.json"
    good = manifest.read_bytes()
    errors = 0
    for i in range(len(good)):
        for bit in (1, 0x80):
            manifest.write_bytes(good[:i] + bytes([good[i] ^ bit]) + good[i + 1 :])
            try:
                assert value_of(tmp_path) == 1  # a changed space or the like
            except UserError:
                errors += 1
    assert errors > len(good)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ('{"format_version": 2, "parts": []}', "format version 2; this program reads 1"),
        ('{"format_version": 1}', "manifest.json is damaged"),
        ('{"format_version": 1, "files": {}}', "manifest.json is damaged at"),
        ('{"format_version": 1, "files": [1]}', "manifest.json is damaged"),
        ("[]", "manifest.json is damaged"),
        ("", "manifest.json is damaged"),
    ],
)
def test_a_manifest_of_another_version_or_shape_is_refused(tmp_path, manifest, message):
    (save(tmp_path, 1) / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", ["../last", "a\0b", "\udcff", "/etc/passwd", ".", ""])
def test_a_manifest_cannot_name_files_outside_its_folder_or_what_is_no_name(tmp_path, name):
    manifest = save(tmp_path, 1) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][name] = {"size": 14, "sha256": ""}
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"damaged at {re.escape(repr(name))}" if name else "cannot be read"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("which", ["last", "best", "step-00000007", "../elsewhere", ""])
def test_a_checkpoint_that_is_not_there_is_asked_for(tmp_path, which):
    for out_dir, found in ((tmp_path, "holds no checkpoint"), (tmp_path / "missing", "is no folder")):
        with pytest.raises(UserError, match=rf"there is no checkpoint .* in .*, which {found}"):
            checkpoint.find(out_dir, which)


@pytest.mark.parametrize("text", ["step-00000099", "../../etc", "", "\udcff"])
def test_a_pointer_to_nothing_is_an_error_that_lists_what_is_there(tmp_path, text):
    save(tmp_path, 3)
    (tmp_path / "last").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="holds step-00000003"):
        checkpoint.load(tmp_path)


def test_a_best_checkpoint_is_not_guessed(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(UserError, match="no checkpoint 'best'"):
        checkpoint.load(tmp_path, "best")


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of the program handles it."""


def fail_at(monkeypatch, call, error):
    """Make the `call`-th of the system calls that write or rename fail. Returns the counter of those made."""
    made = [0]

    def guarded(real):
        def function(*args, **kwargs):
            made[0] += 1
            if made[0] == call:
                raise error
            return real(*args, **kwargs)

        return function

    for module, name in [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir")]:
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    monkeypatch.setattr(safetensors.torch, "save_file", guarded(safetensors.torch.save_file))
    monkeypatch.setattr(checkpoint.Path, "write_bytes", guarded(checkpoint.Path.write_bytes))
    return made


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
def test_a_full_disk_at_any_moment_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, step):
    call, messages = 0, []
    while True:
        call += 1
        out_dir = tmp_path / str(call)
        save(out_dir, 1, best=True)
        with monkeypatch.context() as patch:
            made = fail_at(patch, call, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            try:
                save(out_dir, step, best=True, value=20)
            except UserError as error:
                messages.append(str(error))
        assert not [name for name in names(out_dir) if name.startswith(".")]
        assert {value_of(out_dir), value_of(out_dir, "best")} <= {1, 20}
        if step == 2 and not (out_dir / "step-00000002").exists():
            assert (out_dir / "last").read_text() == (out_dir / "best").read_text() == "step-00000001\n"
        if made[0] < call:
            assert value_of(out_dir) == 20
            break
    assert len(messages) > 15
    assert all("--out-dir" in message and "No space left on device" in message for message in messages)


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step):
    call = 0
    while True:
        call += 1
        out_dir = tmp_path / str(call)
        save(out_dir, 1, best=True)
        with monkeypatch.context() as patch:
            made = fail_at(patch, call, Killed())
            settle, settled = checkpoint._settle, []
            # A killed process cleans up nothing: only the first call, before anything is written, takes place.
            patch.setattr(checkpoint, "_settle", lambda path, s=settle, d=settled: d or (s(path), d.append(True)))
            with contextlib.suppress(Killed):
                save(out_dir, step, best=True, value=20)
        assert {value_of(out_dir), value_of(out_dir, "best")} <= {1, 20}
        save(out_dir, 3)  # the next run goes on in the folder
        assert value_of(out_dir) == 3
        assert value_of(out_dir, "best") in (1, 20)
        assert not [name for name in names(out_dir) if name.startswith(".")]
        if made[0] < call:
            break
    assert call > 15


def test_a_first_save_that_was_cut_off_before_its_pointer_is_still_found(tmp_path):
    save(tmp_path, 7)
    (tmp_path / "last").unlink()
    assert value_of(tmp_path) == 7


def test_a_disk_that_really_takes_no_more_is_reported(tmp_path):
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))  # Python ignores the signal; the write fails
    try:
        with pytest.raises(UserError, match=r"--out-dir .*step 2 could not be saved: .*File too large"):
            save(tmp_path, 2, tensors={"model": {"w": torch.zeros(2**16)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["last", "step-00000001"]
    assert value_of(tmp_path) == 1


def test_an_out_dir_that_is_a_file_is_reported(tmp_path):
    (tmp_path / "out").write_text("")
    for out_dir in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(UserError, match=r"--out-dir .*out.* could not be saved: (File exists|Not a directory)"):
            save(out_dir, 1)
        with pytest.raises(UserError, match="no checkpoint"):
            checkpoint.load(out_dir)


def test_a_bug_in_the_caller_is_not_dressed_up_as_a_user_error(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path, 1, state={"not json": object()})
    assert names(tmp_path) == []


def draw():
    return (
        [random.random(), random.gauss(0, 1)],
        numpy.random.standard_normal(3).tolist(),
        torch.randn(5).tolist(),
        [torch.randn(2, device=f"cuda:{i}").tolist() for i in range(torch.cuda.device_count())],
    )


def test_random_generators_go_on_exactly_where_they_were(tmp_path):
    draw()  # leaves half of a pair of Gaussians in Python's and NumPy's generator
    state, tensors = checkpoint.rng_state()
    save(tmp_path, 1, tensors={"rng": tensors}, state={"rng": state})
    expected = [draw() for _ in range(3)]
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    assert draw() != expected[0]

    loaded = checkpoint.load(tmp_path)
    checkpoint.set_rng_state(loaded.state["rng"], loaded.tensors("rng"))
    assert [draw() for _ in range(3)] == expected


def test_reading_the_state_of_the_generators_does_not_disturb_them():
    torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
    expected = draw()
    torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
    state, tensors = checkpoint.rng_state()
    assert draw() == expected
    checkpoint.set_rng_state(state, tensors)  # a snapshot, not a view of the live state
    assert draw() == expected
