"""export.py from the outside: each format read back gives the same weights and text; nothing is left half written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import export
import generate
import train
from model import LlamaConfig, sentencepiece_model
from model.huggingface.folder import FolderTensors
from model.rope import rope_tables
from tests.model.test_llama2c import Reader, encode_as_run_c, read_tokenizer_bin
from tests.support.run_testing import ROOT, TINY, Result, arguments, call, write_text
from tests.support.weights_testing import LLAMA3, llama, write_folder
from training.data.tokenizer import load_tokenizer
from training.log.console import printable


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a short run that began with random weights, large enough that its greedy text is varied."""
    folder = tmp_path_factory.mktemp("export")
    source = write_folder(folder / "hf", llama())
    text = {"data": write_text(folder / "text.txt"), "data_dir": folder / "data", "out_dir": folder / "out"}
    options = {"preset": "smoke", "max_iters": 4, "warmup_iters": 1, "eval_interval": 2, "always_save_checkpoint": True}
    shape = {"vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len"}
    rest = {name: value for name, value in TINY.items() if name not in shape}
    assert call(train, arguments(**rest | text | options, init_from=source)).status == 0
    (folder / "out" / "best").write_text("step-00000002\n")
    return folder / "out"


def exported(*words: str | Path) -> Result:
    result = call(export, [str(word) for word in words])
    assert (result.status, result.err) == (0, "")
    return result


def refused(result: Result, message: str) -> None:
    assert result.status == 2, result
    assert re.fullmatch(r"(export|generate)\.py: error: [^\n]*\n", result.err), result.err
    assert re.search(message, result.err), result.err


def greedy(weights: Path, prompt: str = "the cat") -> str:
    words = [str(weights), f"--prompt={prompt}", "--temperature=0", "--max-new-tokens=40", "--device=cpu"]
    result = call(generate, words)
    assert result.status == 0, result.err
    return result.out


def test_a_hugging_face_folder_has_all_that_a_program_asks_for(run, tmp_path):
    result = exported(run, tmp_path / "hf")
    assert str(tmp_path / "hf") in result.out
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    theirs = FolderTensors(tmp_path / "hf")
    ours = FolderTensors(run / "step-00000004")
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize("words", [["--format=huggingface"], ["--format=llama2c"], ["--format=llama2c", "--version=1"]])
def test_the_text_is_the_same_from_each_format_and_back(run, tmp_path, words):
    exported(run, tmp_path / "one", *words)
    text = greedy(run)
    assert len(set(text)) > 10
    assert greedy(tmp_path / "one") == text
    exported(tmp_path / "one", tmp_path / "two" / "again")
    assert greedy(tmp_path / "two" / "again") == text
    first, again = FolderTensors(run / "step-00000004"), FolderTensors(tmp_path / "two" / "again")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_independent_reader_of_llama2c_writes_the_same_text(run, tmp_path):
    exported(run, tmp_path / "model.bin", "--format=llama2c")
    pieces = read_tokenizer_bin((tmp_path / "tokenizer.bin").read_bytes())[1]
    prompt = encode_as_run_c(pieces, "the cat")
    new = Reader((tmp_path / "model.bin").read_bytes()).greedy(prompt, 40)
    new = new[: new.index(1)] if 1 in new else new
    raw = b"".join(bytes([token - 3]) if 3 <= token < 259 else pieces[token][0] for token in prompt[1:] + new)
    assert printable(raw.decode(errors="replace").removeprefix(" "), "utf-8") + "\n" == greedy(run)


def test_the_tokens_that_end_a_text_of_a_folder_are_kept(run, tmp_path):
    """As Llama's own end their documents with another token than BOS."""
    source = write_folder(tmp_path / "source", llama())
    text = greedy(source)
    tokenizer = load_tokenizer(source / "tokenizer.model")
    token = tokenizer.encode(text)[len(tokenizer.encode("the cat")) + 5]
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, token]}))
    ended = greedy(source)
    assert text.startswith(ended.removesuffix("\n"))
    assert len(ended) < len(text)
    exported(source, tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text())["eos_token_id"] == [299, token, 1]
    assert greedy(tmp_path / "again") == ended
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    refused(
        call(export, [str(source), str(tmp_path / "out")]), r"eos_token_id is \['x'\], wanted an integer or several"
    )
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))  # as SmolLM's
    exported(source, tmp_path / "zero")
    assert json.loads((tmp_path / "zero" / "config.json").read_text())["eos_token_id"] == [0, 1]


@pytest.mark.parametrize(("asked", "got"), [("auto", "float64"), ("float32", "float32"), ("float64", "float64")])
def test_a_folder_is_read_with_the_rope_that_is_asked_for(tmp_path, asked, got):
    source = write_folder(tmp_path, llama(max_seq_len=4096))
    model, _ = generate.load(generate.GenerateConfig(checkpoint=str(source), rope_precision=asked, device="cpu"))
    tables = {
        p: rope_tables(LlamaConfig(**vars(model.config) | {"rope_precision": p}))[0] for p in ("float64", "float32")
    }
    assert torch.equal(model.cos, tables[got])
    assert not torch.equal(tables["float64"], tables["float32"])


def test_options_of_the_folder(run, tmp_path):
    words = ["--dtype=bfloat16", "--max-file-bytes=5000", "--max-position-embeddings=1000", "--which=best"]
    exported(run, tmp_path / "hf", *words)
    theirs, ours = FolderTensors(tmp_path / "hf"), FolderTensors(run / "step-00000002")
    assert all(torch.equal(theirs[name], ours[name].bfloat16()) for name in ours)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"], config["max_position_embeddings"]) == ("bfloat16", "bfloat16", 1000)


def test_a_checkpoint_says_that_it_is_of_pytorch(run):
    for file in ("model.safetensors", "optimizer.safetensors"):
        with safetensors.safe_open(run / "step-00000004" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_what_is_there_is_not_written_over(run, tmp_path):
    (tmp_path / "hf").mkdir()
    exported(run, tmp_path / "hf")  # a folder with nothing in it will do
    before = {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    refused(call(export, [str(run), str(tmp_path / "hf")]), r"hf is there already; name what is not")
    assert {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    (tmp_path / "model.bin").write_text("mine")
    refused(call(export, [str(run), str(tmp_path / "model.bin"), "--format=llama2c"]), "is there already")
    (tmp_path / "model.bin").unlink()
    (tmp_path / "tokenizer.bin").write_text("mine")
    refused(call(export, [str(run), str(tmp_path / "model.bin"), "--format=llama2c"]), "and of another tokenizer")
    assert (tmp_path / "tokenizer.bin").read_text() == "mine"


@pytest.mark.parametrize("words", [["--format=huggingface"], ["--format=llama2c"]])
def test_a_failure_leaves_nothing_half_written(run, tmp_path, monkeypatch, words):
    from model.huggingface import folder
    from model.llama2c import weights

    def full(path, *_):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_file", full)
    monkeypatch.setattr(weights, "_write", lambda file, tensor: full(Path(file.name)))
    refused(
        call(export, [str(run), str(tmp_path / "x" / "out"), *words]), "out cannot be written: No space left on device"
    )
    assert not list((tmp_path / "x").iterdir())
    monkeypatch.undo()
    exported(run, tmp_path / "x" / "out", *words)


def test_what_a_killed_export_left_is_no_hindrance(run, tmp_path):
    (tmp_path / ".tmp-hf").mkdir()
    (tmp_path / ".tmp-hf" / "model.safetensors").write_text("half")
    exported(run, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_run_c_cannot_express_is_said(tmp_path):
    source = write_folder(tmp_path / "scaled", llama(**LLAMA3))
    message = r"scaled: the model's rope_theta is 500000\.0; .* run\.c computes with 10000\.0"
    refused(call(export, [str(source), str(tmp_path / "m.bin"), "--format=llama2c"]), message)
    assert not list(tmp_path.glob("*.bin"))


def test_bad_input_is_named(run, tmp_path):
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "notes.txt").write_text("x")
    out = str(tmp_path / "out")
    refused(
        call(export, [str(nothing), out]), "nothing holds no weights that are known: it has notes.txt; wanted a run's"
    )
    refused(
        call(export, [str(tmp_path / "missing"), out]), "there is no checkpoint 'last' in .*missing, which is no folder"
    )
    refused(
        call(export, [str(nothing / "notes.txt"), out]),
        "notes.txt is no llama2.c file: it has 1 bytes; wanted a run's folder, ",
    )
    bare = write_folder(tmp_path / "bare", llama(), tokenizer=False)
    refused(
        call(export, [str(bare), out]),
        r"bare has no tokenizer beside it \(tokenizer.model, .*\); name one with --tokenizer",
    )
    refused(call(generate, [str(bare)]), r"bare has no tokenizer beside it")
    exported(bare, tmp_path / "named", f"--tokenizer={run / 'step-00000004' / 'tokenizer.model'}")
    (bare / "tokenizer.model").write_text("no model")
    refused(call(export, [str(bare), out]), "tokenizer.model is not a sentencepiece model")
    (bare / "config.json").write_text("{")
    refused(call(export, [str(bare), out]), "config.json is not JSON")
    (bare / "config.json").write_text("[]")
    refused(call(export, [str(bare), out]), "config.json holds a list, wanted an object")
    (bare / "config.json").write_text("[" * 100_000)
    refused(call(export, [str(bare), out]), "config.json is not JSON")
    refused(call(export, ["x" * 300, out]), "x/manifest.json cannot be read: File name too long")
    odd = write_folder(tmp_path / "odd", llama())
    tensors = safetensors.torch.load_file(odd / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    safetensors.torch.save_file(tensors, odd / "model.safetensors")
    for words in ([], ["--format=llama2c"]):
        refused(
            call(export, [str(odd), out, *words]), "odd: model.safetensors: model.norm.weight is of type I8; read are"
        )
    refused(call(export, [str(run), out, "--max-file-bytes=0"]), "--max-file-bytes is 0; it must be at least 1")
    refused(call(export, [str(run), out, "--which", "--dtype=float16"]), "--which needs a value")
    refused(
        call(export, [str(run), out, "--format=llama2c", "--dtype=float16"]), "--dtype float16 is for --format hugg"
    )
    refused(call(export, [str(run), out, "--version=1"]), "--version 1 is for --format llama2c")
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "OUT is ''; it must end in the name of what is to be made"),
        (["."], "OUT is '.'; it must end in the name"),
        (["new/.."], "OUT is 'new/..'; it must end in the name"),
        (["x" * 300], "x cannot be written: File name too long"),
        (["tokenizer.bin", "--format=llama2c"], "OUT is 'tokenizer.bin', as the tokenizer beside the weights"),
    ],
)
def test_a_place_that_cannot_be_is_named(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    refused(call(export, [str(run), *words]), message)
    assert not list(tmp_path.iterdir())


def test_a_model_is_not_made_for_weights_of_another_shape(tmp_path, monkeypatch):
    """As a damaged config.json may ask for more memory than there is."""
    source = write_folder(tmp_path / "hf", llama(), num_hidden_layers=64)
    monkeypatch.setattr("model.Llama", None)
    refused(
        call(generate, [str(source), "--device=cpu"]), r"hf: weights do not fit the model: missing model\.layers\.10\."
    )


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_named(tmp_path):
    source = write_folder(tmp_path / "hf", llama(vocab_size=256))
    refused(
        call(generate, [str(source), "--prompt=the cat", "--device=cpu"]),
        r"--prompt has token 2\d\d \('.+'\) of a tokenizer with 300, and the model has 256",
    )
    content = (source / "tokenizer.model").read_bytes()
    pieces = sentencepiece_model.read(content).pieces
    (tmp_path / "late.model").write_bytes(sentencepiece_model.write([*pieces[:1], *pieces[2:], pieces[1]]))
    for program, words in ((generate, []), (export, [str(tmp_path / "out")])):
        refused(
            call(program, [str(source), *words, f"--tokenizer={tmp_path / 'late.model'}"]),
            r"late.model opens documents with token 299, and the model of .*hf has 256 tokens: it is another model's",
        )


@pytest.mark.skipif(os.geteuid() == 0 or os.name == "nt", reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(run, tmp_path):
    tmp_path.chmod(0o500)
    refused(call(export, [str(run), str(tmp_path / "out")]), "out cannot be written: Permission denied")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that takes nothing")
@pytest.mark.parametrize("program", ["generate", "export"])
def test_a_full_disk_behind_stdout_is_not_taken_for_another(run, tmp_path, program):
    words = [tmp_path / "hf"] if program == "export" else ["--device=cpu", "--max-new-tokens=3"]
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / f"{program}.py", run, *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        f"{program}.py: error: stdout could not be written: No space left on device\n",
    )
    assert (tmp_path / "hf" / "tokenizer.json").exists() == (program == "export")


def test_help_and_mistakes_import_nothing_heavy(tmp_path):
    code = f"""
import contextlib, io, sys, export
for words, wanted in ([["--help"], 0], [["--bogus"], 2], [["nothing", {str(tmp_path / "out")!r}], 2]):
    sys.argv = ["export.py", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            export.main()
        except SystemExit as exit:
            assert exit.code == wanted, (words, exit.code)
    assert not {{"torch", "triton", "numpy", "sentencepiece"}} & set(sys.modules), words
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
