"""A run that begins with weights: from each kind of file, its shape theirs, its steps its own; and what is refused."""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

import export
import generate
import train
from model.huggingface.folder import FolderTensors
from tests.support.run_testing import (
    ROOT,
    TINY,
    Result,
    arguments,
    call,
    finish,
    records,
    start_many,
    write_text,
)
from tests.support.weights_testing import LLAMA3, canonical, llama, write_folder

SHAPE_OF_RUN = {"vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "preset"}
SHORT = {name: value for name, value in TINY.items() if name not in SHAPE_OF_RUN} | {
    "preset": "smoke",
    "max_seq_len": 16,
}
SHORT |= {"max_iters": 4, "warmup_iters": 1, "eval_interval": 2, "learning_rate": 1e-3}


def started(out: Path, **options) -> Result:
    text = {"data": write_text(out.parent / "text.txt"), "data_dir": out.parent / "data", "out_dir": out}
    return call(train, arguments(**SHORT | text | options))


def begun(out: Path, **options) -> dict:
    """The configuration that such a run saved."""
    result = started(out, **options)
    assert (result.status, result.err) == (0, ""), result
    return tomllib.loads((out / "config.toml").read_text())


def refused(result: Result, message: str) -> None:
    assert result.status == 2, result
    assert re.fullmatch(r"train\.py: error: [^\n]*\n", result.err), result.err
    assert re.search(message, result.err), result.err


def test_a_run_begins_with_the_weights_and_the_shape_of_a_folder(tmp_path):
    model = llama(tie_embeddings=False, **LLAMA3)
    source = write_folder(tmp_path / "hf", model, max_file_bytes=20_000)
    config = begun(tmp_path / "out", init_from=source)
    assert (config["dim"], config["ffn_dim"], config["vocab_size"], config["tie_embeddings"]) == (32, 96, 300, False)
    assert (config["rope_theta"], config["rope_scaling_factor"], config["rope_original_max_seq_len"]) == (
        500000.0,
        8.0,
        32,
    )
    assert config["tokenizer"] == str(source / "tokenizer.model")
    # The first losses are those of the model with these weights.
    evaluation, *_ = records(tmp_path / "out", "eval")
    another = write_folder(tmp_path / "other", llama(1, tie_embeddings=False, **LLAMA3))
    begun(tmp_path / "out2", init_from=another)
    other, *_ = records(tmp_path / "out2", "eval")
    assert evaluation["step"] == 0
    assert evaluation["val_loss"] != pytest.approx(other["val_loss"], rel=1e-3)


def test_a_learning_rate_of_nothing_leaves_the_weights_to_the_bit(tmp_path):
    """So what the run saves is what it began with: read, trained on for 4 steps, written."""
    model = llama()
    source = write_folder(tmp_path / "hf", model)
    begun(tmp_path / "out", init_from=source, learning_rate=0.0, weight_decay=0.0)
    saved, former = FolderTensors(tmp_path / "out" / "step-00000004"), canonical(model)
    assert set(saved) == set(former)
    assert all(torch.equal(saved[name], former[name]) for name in former)


def test_a_run_resumes_to_the_bit_even_where_its_source_is_gone(tmp_path):
    source = write_folder(tmp_path / "hf", llama())
    begun(tmp_path / "whole", init_from=source)
    begun(tmp_path / "cut", init_from=source, max_iters=2, decay_lr=False)
    shutil.rmtree(tmp_path / "cut")
    begun(tmp_path / "cut", init_from=source, max_iters=4)
    shutil.rmtree(tmp_path / "cut" / "step-00000004")
    (tmp_path / "cut" / "last").write_text("step-00000002\n")
    shutil.rmtree(source)
    result = call(train, ["--init-from=resume", f"--out-dir={tmp_path / 'cut'}"])
    assert (result.status, result.err) == (0, ""), result
    assert "resuming" in result.out
    one, other = (FolderTensors(tmp_path / name / "step-00000004") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "huggingface", "llama2c"])
def test_every_kind_of_source_begins_a_new_run_with_the_same_weights(tmp_path, kind):
    first = tmp_path / "first"
    begun(first, init_from=write_folder(tmp_path / "hf", llama()))
    source = {"run": first, "checkpoint": first / "step-00000004"}.get(kind)
    if source is None:
        source = tmp_path / "exported" / "model"
        result = call(export, [str(first), str(source), f"--format={kind}"])
        assert (result.status, result.err) == (0, "")
    config = begun(tmp_path / "second", init_from=source, learning_rate=0.0, weight_decay=0.0)
    assert config["init_from"] == str(source)
    one, other = (FolderTensors(out / "step-00000004") for out in (first, tmp_path / "second"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    steps = [line["step"] for line in records(tmp_path / "second", "step")]
    assert steps == [0, 1, 2, 3]
    assert any(f"weights from {source}" in note["text"] for note in records(tmp_path / "second", "note"))
    # The same tokens: the text's fingerprint and the tokenizer's hash are those of the first run, or its twin's.
    evaluations = [records(out, "eval")[i]["val_loss"] for out, i in ((first, -1), (tmp_path / "second", 0))]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-6)


def test_a_run_may_begin_with_its_own_former_weights(tmp_path):
    """The folder's earlier run is set aside after its weights are read."""
    begun(tmp_path / "out", init_from=write_folder(tmp_path / "hf", llama()))
    begun(tmp_path / "out", init_from=tmp_path / "out")
    assert (tmp_path / "out" / "earlier-1" / "step-00000004").is_dir()
    result = call(train, ["--init-from=resume", f"--out-dir={tmp_path / 'out'}", "--max-iters=6"])
    assert (result.status, result.err) == (0, ""), result


@pytest.mark.slow
def test_the_earlier_run_is_set_aside_when_every_process_has_read_it(tmp_path):
    begun(tmp_path / "out", init_from=write_folder(tmp_path / "hf", llama()))
    slow = """
import os, sys, time, train
from training.pretrained import Pretrained
sys.argv[0] = "train.py"
load_into = Pretrained.load_into
def late(*words):
    time.sleep(3 * (os.environ["RANK"] == "1"))
    return load_into(*words)
Pretrained.load_into = late
train.main()
"""
    text = {"data": tmp_path / "text.txt", "data_dir": tmp_path / "data", "out_dir": tmp_path / "out"}
    options = SHORT | text | {"init_from": tmp_path / "out", "gradient_accumulation_steps": 2}
    results = [finish(process) for process in start_many(arguments(**options), code=slow)]
    assert [(result.status, result.err) for result in results] == [(0, "")] * 2
    assert (tmp_path / "out" / "earlier-1" / "step-00000004").is_dir()


def test_a_file_of_defaults_may_name_the_weights(tmp_path):
    source = write_folder(tmp_path / "hf", llama())
    (tmp_path / "run.toml").write_text(f"init_from = {str(source)!r}\nlearning_rate = 1e-5\n")
    assert begun(tmp_path / "out", config=tmp_path / "run.toml")["dim"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 64}, r"--dim is 64, and .*hf has 32: leave the option out"),
        ({"n_kv_heads": 4}, r"--n-kv-heads is 4, and .*hf has 2"),
        ({"vocab_size": 400}, r"--vocab-size is 400, and .*hf has 300"),
        ({"rope_theta": 5e5}, r"--rope-theta is 500000\.0, and .*hf has 10000\.0"),
        ({"norm_eps": 1e-6}, r"--norm-eps is 1e-06, and .*hf has 1e-05"),
        ({"tie_embeddings": False}, r"--tie-embeddings is False, and .*hf has True"),
        ({"max_seq_len": 65}, r"--max-seq-len is 65, and .*hf has at most 64"),
    ],
)
def test_an_option_that_contradicts_the_weights_is_refused(tmp_path, options, message):
    source = write_folder(tmp_path / "hf", llama())
    refused(started(tmp_path / "out", init_from=source, **options), message)
    assert not (tmp_path / "out").exists()


def test_sequences_are_as_long_as_the_weights_have_seen(tmp_path):
    from training.command_line import parse

    source = write_folder(tmp_path / "hf", llama())
    assert parse([f"--init-from={source}"]).max_seq_len == 64
    long = write_folder(tmp_path / "long", llama(), max_position_embeddings=131072)
    assert parse([f"--init-from={long}"]).max_seq_len == 4096
    assert parse([f"--init-from={long}", "--max-seq-len=8192"]).max_seq_len == 8192


def test_a_run_does_not_write_into_the_weights_of_another(tmp_path):
    """A checkpoint would lose its options, and a Hugging Face folder's model would be taken for the run's."""
    source = write_folder(tmp_path / "hf", llama())
    begun(tmp_path / "out", init_from=source)
    checkpoint = tmp_path / "out" / "step-00000004"
    for folder, message in (
        (source, r"a model of Hugging Face itself \(config\.json\)"),
        (checkpoint, "a checkpoint itself"),
    ):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        for init_from in (folder, "scratch"):
            refused(
                started(folder, init_from=init_from),
                rf"--out-dir .*{folder.name} holds {message}.*; name another folder",
            )
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        refused(
            started(tmp_path / "new", init_from=folder, which="best"),
            rf"--which best chooses in a run's folder, and .*{folder.name} is none; leave the option out",
        )


def test_bad_weights_are_named(tmp_path):
    out = tmp_path / "out"
    refused(
        started(out, init_from=tmp_path / "missing"), "--init-from is '.*missing', and there is no such file or folder"
    )
    (tmp_path / "nothing").mkdir()
    refused(started(out, init_from=tmp_path / "nothing"), "--init-from .*nothing holds no weights that are known")
    source = write_folder(tmp_path / "hf", llama(), attention_bias=True)
    refused(started(out, init_from=source), r"--init-from .*config\.json: attention_bias is True; only False is read")
    source = write_folder(tmp_path / "hf", llama(), num_hidden_layers=3)
    refused(started(out, init_from=source), r"hf: weights do not fit the model: missing model\.layers\.2\.")
    source = write_folder(tmp_path / "hf", llama(), intermediate_size=64)
    refused(
        started(out, init_from=source),
        r"gate_proj\.weight has shape \(96, 32\), and the configuration makes it \(64, 32\)",
    )
    bare = write_folder(tmp_path / "bare", llama(), tokenizer=False)
    refused(started(out, init_from=bare), r"bare has no tokenizer beside it \(.*\); name the one .* by --tokenizer")
    refused(started(out, init_from="x" * 300), "cannot be read: File name too long")
    (bare / "tokenizer.bin").write_text("no tokenizer")
    refused(started(out, init_from=bare), r"--tokenizer .*tokenizer\.bin: no tokenizer\.bin of llama2\.c: ")


def test_rope_in_float32_is_an_option_that_stays_with_the_run(tmp_path):
    source = write_folder(tmp_path / "hf", llama())
    assert begun(tmp_path / "out", init_from=source, rope_precision="float32")["rope_precision"] == "float32"
    refused(
        call(
            train, ["--init-from=resume", f"--out-dir={tmp_path / 'out'}", "--max-iters=9", "--rope-precision=float64"]
        ),
        "holds another model: --rope-precision is float64, was float32",
    )


def test_the_vocabulary_of_weights_may_be_padded_to_any_size(tmp_path):
    source = write_folder(tmp_path / "hf", llama(vocab_size=333))
    assert begun(tmp_path / "out", init_from=source)["vocab_size"] == 333
    result = call(train, ["--init-from=resume", f"--out-dir={tmp_path / 'out'}", "--max-iters=5"])
    assert (result.status, result.err) == (0, ""), result
    source = write_folder(tmp_path / "small", llama(vocab_size=290))
    refused(
        started(tmp_path / "out2", init_from=source),
        "--tokenizer .* has 300 tokens, and the weights that the run begins with only 290: .* name one of no more",
    )


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    """From a run to a folder for transformers, from such a folder to a run fine-tuned on a .jsonl, and on."""
    monkeypatch.chdir(tmp_path)
    begun(tmp_path / "out", init_from=write_folder(tmp_path / "random", llama()))
    stories = (tmp_path / "text.txt").read_text().split("\n\n")
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    page = (ROOT / "README.md").read_text()
    block = re.search(r"## Weights in and out\n\n```\n(.*?)```", page, re.DOTALL)[1]
    small = {name: SHORT[name] for name in ("preset", "eval_iters", "sample_tokens", "device", "tensorboard")}
    shorter = arguments(**small, max_iters=4, warmup_iters=1, eval_interval=2, gradient_accumulation_steps=1)
    programs = {"export.py": (export, []), "generate.py": (generate, ["--device=cpu"]), "train.py": (train, shorter)}
    for line in block.splitlines():
        _, name, *words = shlex.split(line, comments=True)
        program, more = programs[name]
        result = call(program, words + more)
        assert result.status == 0, (line, result.err)
    result = call(train, ["--init-from=resume", "--out-dir=tuned", "--max-iters=6"])
    assert result.status == 0, result.err
    assert call(export, ["tuned", "tuned-hf"]).status == 0
    greedy = ["--prompt=the cat", "--temperature=0", "--device=cpu", "--max-new-tokens=30"]
    texts = [call(generate, [folder, *greedy]).out for folder in ("tuned", "tuned-hf")]
    assert texts[0] == texts[1]
    tuned, former = FolderTensors("tuned-hf"), FolderTensors("hf")
    assert not any(torch.equal(tuned[name], former[name]) for name in former)
