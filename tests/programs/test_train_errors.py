"""train.py and bad input: one line that names the option or the file, exit status 2, and nothing lost."""

import json
import re
import subprocess
import sys

import pytest
import torch

from tests.support import run_testing
from tests.support.run_testing import ROOT, Result
from training import machine
from training.step.trainer import Trainer

LONG = "x" * 300  # what any system refuses to look for
BEFORE_TORCH = [
    ("--help", 0, ""),
    ("--bogus", 2, "unknown option '--bogus'"),
    ("--preset huge", 2, "--preset is 'huge'; allowed: reference"),
    ("--dim x", 2, "--dim is 'x'; wanted a whole number"),
    (f"--out-dir {LONG}", 2, f"--out-dir {LONG} cannot be written: File name too long"),
    (f"--init-from {LONG}", 2, f"--init-from {LONG} cannot be read: File name too long"),
    (f"--init-from resume --out-dir {LONG}", 2, f"{LONG}: File name too long"),
    ("--dim 100", 2, "--dim 100 is not divisible by --n-heads 8"),
    ("--n-kv-heads 3", 2, "--n-heads 8 is not divisible by --n-kv-heads 3"),
    ("--dim 120", 2, "odd head dim, 15"),
    ("--vocab-size 255", 2, "--vocab-size is 255; it must be from 256"),
    ("--kernels foo", 2, "unknown switch 'foo'; allowed: all, none"),
    ("--kernels all --device cpu", 2, "Say --kernels none for plain PyTorch, or set TRITON_INTERPRET=1"),
    ("--optimizer fused-adamw", 2, "--optimizer fused-adamw is now --kernels adamw"),
    ("--config nowhere.toml", 2, "nowhere.toml could not be read: No such file"),
    ("--init-from resume --out-dir nowhere", 2, "there is no checkpoint 'last' in nowhere, which is no folder"),
    ("--compile=maybe", 2, "--compile is 'maybe'; it is a switch: --compile or --no-compile"),
    ("--sample-prompt caf\udce9", 2, "--sample-prompt is 'caf\\udce9', which is not UTF-8 text"),
    (f"--out-dir {__file__}/out", 2, "cannot be written: Not a directory"),
]


@pytest.fixture(scope="session")
def before_torch(tmp_path_factory) -> list[dict]:
    """How train.py ends for each of these command lines, in one process, and which heavy modules it imported for them."""
    code = """
import contextlib, io, json, sys
import train
for words in json.load(sys.stdin):
    sys.argv, out, err = ["train.py", *words], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = train.main()
        except SystemExit as exit:
            status = exit.code
    heavy = sorted({"torch", "triton", "numpy", "sentencepiece", "matplotlib"} & set(sys.modules))
    print(json.dumps({"status": status, "out": out.getvalue(), "err": err.getvalue(), "heavy": heavy}))
"""
    environment = {name: value for name, value in run_testing.os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([words.split() for words, *_ in BEFORE_TORCH]),
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("index", range(len(BEFORE_TORCH)), ids=[words for words, *_ in BEFORE_TORCH])
def test_help_and_mistakes_in_the_options_are_answered_before_anything_heavy_is_imported(before_torch, index):
    (_, status, message), found = BEFORE_TORCH[index], before_torch[index]
    assert found["status"] == status
    assert found["heavy"] == []
    assert message in found["err"]
    if status == 0:
        assert "--max-iters" in found["out"]
    else:
        assert re.fullmatch(r"train\.py: error: [^\n]*\n", found["err"])


def refused(result: Result, message: str) -> None:
    assert result.status == 2
    assert re.fullmatch(r"train\.py: error: [^\n]*\n", result.err), result.err
    assert re.search(message, result.err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--data .*text\.txt: no such file or folder"),
        (b"", r"--data .*text\.txt: empty"),
        (b" \n\n ", r"--data .*text\.txt: empty"),
        (b"one\0two\n\nthree", r"text\.txt is binary: it holds a NUL at byte 3"),
        (b"one\n\n\xff\xfe\xfd", r"text\.txt is binary or of another encoding: 0xff"),
        (b"one document", "it holds one document, and training and validation need two"),
        (b"one two three\n\nfour five six", "--vocab-size is 300, allowed for this text: up to"),
    ],
)
def test_bad_text_is_refused(run, tmp_path, content, message):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    refused(run(data=tmp_path / "text.txt", data_dir=tmp_path / "data"), message)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1000}, r"the train split of text\.txt is too short: .* a step takes 1000 \(--batch-size"),
        (
            {"batch_size": 100},
            r"the val split of text\.txt is too short: .*, or hold more of it out: --val-fraction is 0\.05\n$",
        ),
        ({"vocab_size": 10**5}, "--vocab-size is 100000, allowed for this text: up to"),
        ({"tokenizer": "nowhere.model"}, r"--tokenizer nowhere\.model: No such file"),
        ({"tokenizer": __file__}, r"--tokenizer .*test_train_errors\.py is not a sentencepiece model"),
        ({"data": LONG}, rf"{LONG} can't be read: File name too long"),
        ({"data_dir": LONG}, rf"--data .* can't be prepared in {LONG}: File name too long"),
        ({"data_dir": f"{__file__}/data"}, r"--data .* can't be prepared in .*: .*Not a directory"),
    ],
)
def test_data_that_does_not_fit_the_options_is_refused(run, options, message):
    refused(run(**options), message)


def test_a_run_does_not_write_among_its_text(run, tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "d" / name).write_text(f"the cat {name} " * 500)
    words = {
        "data": tmp_path / "d",
        "data_dir": tmp_path / "d" / "data",
        "vocab_size": 265,
        "max_iters": 1,
        "batch_size": 1,
    }
    refused(run(**words, out_dir=f"{tmp_path}/d/."), "--out-dir .* is --data too: .*; name another folder")
    for resumed in ({}, {}, {"init_from": "resume", "max_iters": 2}):  # what lies in it is not read
        result = run(**words | resumed, out_dir=tmp_path / "d" / "out")
        assert (result.status, "d, a file a document: 1 documents" in result.out) == (0, True), result


@pytest.mark.parametrize("size", [400, 299])
def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(run, finished, size):
    tokenizer = finished[0] / "step-00000012" / "tokenizer.model"
    refused(run(tokenizer=tokenizer, vocab_size=size), rf"--vocab-size is {size}.*300")


@pytest.fixture
def shard(run, tmp_path, text):
    """A shard of a prepared text of its own, which the test may damage, and the run that reads it."""
    options = {"data_dir": tmp_path / "data"}
    assert run(**options, max_iters=1, eval_iters=1).status == 0
    return next((tmp_path / "data").glob("*/train-00000.bin")), lambda: run(**options)


@pytest.mark.fault(
    "a token shard is cut short or of another tokenizer",
    "it is named, and which folder to delete so that it is made anew",
)
def test_a_truncated_shard_is_refused(shard):
    path, run = shard
    path.write_bytes(path.read_bytes()[:-2])
    refused(run(), r"train-00000\.bin is truncated or damaged: .*delete .* and they are made anew")


@pytest.mark.fault(
    "a token shard is cut short or of another tokenizer",
    "it is named, and which folder to delete so that it is made anew",
)
def test_a_shard_of_another_tokenizer_is_refused(shard):
    path, run = shard
    raw = bytearray(path.read_bytes())
    raw[8 + 4 + 4 + 5 * 8] ^= 1  # the first byte of the tokenizer's hash
    path.write_bytes(raw)
    refused(run(), r"train-00000\.bin is of another tokenizer")


def test_a_token_id_past_the_vocabulary_is_refused(shard):
    path, run = shard
    raw = bytearray(path.read_bytes())
    manifest = json.loads((path.parent / "manifest.json").read_text())
    del manifest["digests"]  # which would notice first
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    raw[88:] = b"\x2c\x01" * ((len(raw) - 88) // 2)  # 300, the first one that is none
    path.write_bytes(raw)
    refused(run(), "token id 300, allowed: below the vocabulary size 300")


def test_a_dtype_that_the_device_does_not_have_is_refused(run, monkeypatch):
    attend = torch.nn.functional.scaled_dot_product_attention

    def without_float16(q, *rest, **options):
        if q.dtype == torch.float16:
            raise RuntimeError('"attention" not implemented for Half\nand a second line')
        return attend(q, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", without_float16)
    refused(
        run(dtype="float16"),
        "--dtype is float16, which cpu does not have .*not implemented.*try one of float32, bfloat16",
    )
    assert run(dtype="float32", max_iters=1).status == 0


@pytest.mark.fault("`--compile` without a C++ compiler", "one line, before the first step, with the ways on")
def test_a_compiler_that_is_not_there_is_asked_for(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    refused(run(compile=True), r"--compile needs a C\+\+ compiler, and g\+\+ was not found; .* or say --no-compile")
    assert run(max_iters=1).status == 0


@pytest.mark.fault("a model larger than the machine's memory", "one line with both sizes, before anything is made")
def test_a_model_larger_than_memory_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 2**17)
    refused(
        run(),
        r"the model \(2 layers of width 16\) has 12,560 parameters, which with .* moments take 0\.0 GiB, and cpu has 0\.0; choose",
    )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.fault("memory runs out during a step", "one line with what to lower, and status 2")
def test_memory_that_runs_out_in_a_step_is_told(run, monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda self, *_: torch.empty(2**60, dtype=torch.uint8))
    refused(run(), r"error: out of memory: .*; lower --batch-size, and raise --gradient-accumulation-steps by as much")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(run, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(run(device=device), f"--device is {device}, and PyTorch .* finds no GPU; allowed here: auto, cpu")
