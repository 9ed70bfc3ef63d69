"""generate.py from the outside: the same text from the same seed, and what is said of bad input."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate
import train
from tests.support.run_testing import ROOT, TINY, Result, arguments, call, edit_config, finish, start, write_text
from training.log import transcript


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """The folder of a run that has learned a little: two checkpoints, of which the first is the best."""
    folder = tmp_path_factory.mktemp("generate")
    text = {"data": write_text(folder / "text.txt"), "data_dir": folder / "data", "out_dir": folder / "out"}
    longer = {"max_iters": 60, "eval_interval": 30, "max_seq_len": 64, "always_save_checkpoint": True}
    assert call(train, arguments(**TINY | text | longer)).status == 0
    (folder / "out" / "best").write_text("step-00000030\n")
    return folder / "out"


SPEED = r"\d+ tokens in \d+\.\d\d s: \d+\.\d tokens/s\n"


def text_of(*words: str | Path, device: str = "cpu") -> str:
    result = call(generate, [str(word) for word in words] + [f"--device={device}"])
    assert result.status == 0, result.err
    assert re.fullmatch(SPEED, result.err), result.err
    return result.out


def refused(result: Result, message: str) -> None:
    assert result.status == 2
    assert re.fullmatch(r"generate\.py: error: [^\n]*\n", result.err), result.err
    assert re.search(message, result.err)


def test_a_seed_gives_the_same_text_and_another_seed_another(run):
    assert text_of(run, "--seed=1") == text_of(run, "--seed=1")
    assert text_of(run, "--seed=1") != text_of(run, "--seed=2")


def test_a_program_of_its_own_writes_the_same_text(run):
    result = finish(start("generate.py", [str(run), "--seed=3", "--prompt=the", "--device=cpu"]))
    assert result.status == 0, result.err
    assert re.fullmatch(SPEED, result.err), result.err
    assert result.out == text_of(run, "--seed=3", "--prompt=the")


def test_greedy_text_does_not_depend_on_the_seed(run):
    greedy = text_of(run, "--temperature=0", "--seed=1")
    assert greedy == text_of(run, "--temperature=0", "--seed=2")
    assert greedy == text_of(run, "--top-k=1", "--seed=3")
    assert greedy == text_of(run, "--top-p=1e-9", "--seed=4")
    assert greedy != text_of(run, "--seed=1")


@pytest.mark.fault(
    "a temperature so near to zero that logits divided by it are infinite", "the likeliest token is taken"
)
@pytest.mark.parametrize("temperature", ["1e-30", "1e-45", "5e-324"])
def test_text_at_a_temperature_near_zero_is_greedy(run, temperature):
    assert text_of(run, f"--temperature={temperature}") == text_of(run, "--temperature=0")


def test_the_text_begins_with_the_prompt_and_goes_on(run):
    text = text_of(run, "--prompt=the cat sat", "--temperature=0")
    assert text.startswith("the cat sat")
    assert len(text) > len("the cat sat\n")
    assert text_of(run, "--prompt=the cat sat", "--max-new-tokens=0") == "the cat sat\n"


def test_the_text_ends_where_the_model_does(run):
    assert text_of(run, "--max-new-tokens=1000", "--seed=1") == text_of(run, "--max-new-tokens=63", "--seed=1")


def test_a_checkpoint_is_named_by_its_place_or_its_folder(run):
    texts = {which: text_of(run, f"--which={which}") for which in ("last", "best", "step-00000030", "step-00000060")}
    assert texts["last"] == texts["step-00000060"] == text_of(run) == text_of(run / "step-00000060")
    assert texts["best"] == texts["step-00000030"] == text_of(run / "step-00000030", "--which=last")
    assert texts["best"] != texts["last"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_writes_text_too(run, dtype):
    assert text_of(run, f"--dtype={dtype}", "--prompt=the cat", "--temperature=0").startswith("the cat")


def test_a_run_with_kernels_needs_no_gpu_to_write(run, tmp_path, monkeypatch):
    """Whatever a run was trained with, its text is written with the torch twins."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from training.checkpoint import files as checkpoint

    saved = checkpoint.load(run)
    config = saved.config_toml.replace("fused = false", "fused = true").replace('device = "cpu"', 'device = "cuda:7"')
    checkpoint.save(
        tmp_path,
        saved.step,
        tensors={"model": saved.tensors("model")},
        state={},
        config_toml=config,
        tokenizer=saved.tokenizer,
        best=False,
        keep=1,
    )
    assert text_of(tmp_path, "--seed=1", device="auto") == text_of(run, "--seed=1")


def test_a_terminal_that_knows_only_ascii_gets_escapes(run):
    result = finish(
        start("generate.py", [str(run), "--prompt=é\x1b[2J", "--max-new-tokens=0"], PYTHONIOENCODING="ascii")
    )
    assert (result.status, result.out) == (0, "\\xe9\\x1b[2J\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--prompt=" + "x" * 100, r"--prompt has \d+ tokens; the model's max_seq_len is 64, so 63 are allowed"),
        (
            "--which=step-00000007",
            "there is no checkpoint 'step-00000007' in .*, which holds step-00000030, step-00000060",
        ),
        ("--which=../best", "there is no checkpoint '../best'"),
        ("--temperature=-1", "--temperature is -1.0; it must be at least 0, and finite"),
        ("--temperature=nan", "--temperature is nan"),
        ("--temperature=inf", "--temperature is inf"),
        ("--top-k=-1", "--top-k is -1"),
        ("--top-p=0", "--top-p is 0.0; it must be more than 0 and at most 1"),
        ("--top-p=1.5", "--top-p is 1.5"),
        ("--top-p=nan", "--top-p is nan"),
        ("--min-p=2", "--min-p is 2.0; it must be at least 0 and at most 1"),
        ("--repetition-penalty=0", "--repetition-penalty is 0.0; it must be more than 0, and finite"),
        ("--batch-size=0", "--batch-size is 0; it must be at least 1"),
        ("--stop=", "--stop is empty"),
        ("--prompts-file=nowhere.txt", "--prompts-file nowhere.txt: No such file"),
        ("--prompt=\udcff", r"--prompt is '\\udcff', which is not UTF-8 text"),
        ("--stop=\udcff", r"--stop is '\\udcff', which is not UTF-8 text"),
        ("--promt=x", "unknown option '--promt'; did you mean '--prompt'?"),
        ("--prompt", "--prompt needs a value"),
        ("more", "unexpected 'more'; options are --name value"),
        ("--seed=-1", "--seed is -1"),
        ("--max-new-tokens=-1", "--max-new-tokens is -1"),
        ("--device=tpu", "--device is 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(run, words, message):
    refused(call(generate, [str(run), "--device=cpu", words]), message)


@pytest.mark.parametrize("words", ["--bogus", "--dtype=float8", "--top-k=x", "one two"])
def test_an_unknown_option_or_a_value_of_another_type_ends_with_status_2(words):
    result = call(generate, words.split())
    assert result.status == 2
    assert "Traceback" not in result.err
    assert result.out == ""


def test_a_gpu_that_is_not_there_is_named(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(call(generate, [str(run), "--device=cuda"]), "--device is cuda, and PyTorch .* finds no GPU")


def test_a_run_of_kernels_and_their_optimizer_generates_without_them(run, tmp_path, monkeypatch):
    shutil.copytree(run / "step-00000060", tmp_path / "step-00000060")
    edit_config(tmp_path / "step-00000060", kernels='"all"', optimizer='"fused-adamw"')
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = call(generate, [str(tmp_path), "--which=step-00000060", "--max-new-tokens=3"])
    assert result.status == 0, result.err


# --------------------------------------------------------------------------------------------------- several prompts


def test_several_prompts_give_the_texts_of_each_alone_in_their_order(run, tmp_path):
    prompts = ["the cat", "old dogs ran far away from", "and"]
    alone = [text_of(run, f"--prompt={prompt}") for prompt in prompts]
    together = text_of(run, *[f"--prompt={prompt}" for prompt in prompts])
    assert together.split(f"{transcript.SEPARATOR}\n") == alone
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[1:]) + "\n\n")
    for size in (1, 2, 3):
        words = ("--prompt=the cat", f"--prompts-file={tmp_path / 'prompts.txt'}", f"--batch-size={size}")
        assert text_of(run, *words) == together


def test_a_prompt_given_twice_gets_two_texts(run):
    both = text_of(run, "--prompt=the", "--prompt=the")
    first, second = both.split(f"{transcript.SEPARATOR}\n")
    assert first == text_of(run, "--prompt=the")
    assert first != second
    assert text_of(run, "--prompt=the", "--prompt=the", "--batch-size=1") == both


def test_nothing_is_written_where_one_prompt_of_a_file_cannot_be(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat\n\n" + "x" * 100 + "\n")
    result = call(generate, [str(run), "--device=cpu", f"--prompts-file={tmp_path / 'prompts.txt'}"])
    refused(result, r"--prompts-file .*prompts\.txt, line 3 has \d+ tokens")
    assert result.out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "holds no prompt"),
        (b"\xef\xbb\xbf\n", "holds no prompt"),
        (b"a\xff", "is not UTF-8 text: .* at byte 1"),
    ],
)
def test_a_file_without_prompts_is_named(tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    refused(call(generate, [f"--prompts-file={tmp_path / 'prompts.txt'}"]), message)


def test_a_file_of_prompts_is_cut_at_its_line_ends_alone(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfthe cat\r\nold\xe2\x80\xa8dogs\x0c \n")
    prompts = generate.read_prompts(generate.GenerateConfig(prompts_file=str(tmp_path / "prompts.txt")))
    assert [text for _, text in prompts] == ["the cat", "old\u2028dogs\x0c "]


def test_options_are_understood_as_people_type_them(run):
    words = [run, "--temperature=0", "--max-new-tokens=5"]
    assert text_of(*words, "--prompt", "- a", "--compile=False") == text_of(*words, "--prompt=- a")
    assert text_of(*words, "--prompt=the", "--stop", "-") == text_of(*words, "--prompt=the", "--stop=-")


def test_a_text_ends_before_a_stop_text(run):
    whole = text_of(run, "--prompt=the", "--temperature=0")
    after = whole.removeprefix("the")
    stop = after[5:9]
    cut = text_of(run, "--prompt=the", "--temperature=0", "--stop=nowhere to be found", f"--stop={stop}")
    assert cut == "the" + after[: after.index(stop)] + "\n"


def test_what_is_typed_is_put_behind_the_text(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n sat on\n"))
    words = [str(run), "--device=cpu", "--interactive", "--temperature=0", "--max-new-tokens=5"]
    result = call(generate, words)
    assert (result.status, result.err) == (0, "")
    first, second, _ = result.out.split("\n")
    assert text_of(*words[:2], *words[3:], "--prompt=the cat") == f"the cat{first}\n"
    text = f"the cat{first} sat on"
    assert text_of(*words[:2], *words[3:], f"--prompt={text}") == f"{text}{second}\n"


def test_writing_on_together_goes_on_from_what_was_shown(run, monkeypatch):
    """Not from what lies behind a stop text."""
    words = [str(run), "--device=cpu", "--temperature=0", "--max-new-tokens=5"]
    shown = text_of(*words, "--prompt=the cat").removeprefix("the cat").rstrip("\n")
    stop = shown[3:]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n sat\n"))
    result = call(generate, [*words, "--interactive", f"--stop={stop}"])
    first, second, _ = result.out.split("\n")
    assert first == shown[: shown.index(stop)]
    assert text_of(*words, f"--prompt=the cat{first} sat", f"--stop={stop}") == f"the cat{first} sat{second}\n"


def test_writing_on_together_ends_where_the_context_does(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n" * 9))
    result = call(generate, [str(run), "--device=cpu", "--interactive", "--max-new-tokens=30"])
    refused(result, r"the text has \d+ tokens; the model's max_seq_len is 64")
    refused(call(generate, ["--interactive", "--prompt=a", "--prompt=b"]), "--interactive goes on with one text")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the \xff cat\n"), "utf-8"))
    result = call(generate, [str(run), "--device=cpu", "--interactive"])
    refused(result, "what is typed is not utf-8 text: invalid start byte")


def test_a_character_without_a_token_is_named(run, tmp_path, monkeypatch):
    from training.data.tokenizer.sentencepiece_file import SentencePieceTokenizer

    encode = SentencePieceTokenizer.encode
    monkeypatch.setattr(
        SentencePieceTokenizer, "encode", lambda self, text, **o: encode(self, text.replace("é", ""), **o)
    )
    result = call(generate, [str(run), "--device=cpu", "--prompt=café"])
    refused(result, "--prompt has 'é', for which this model's tokenizer has no token")


def test_a_compiled_step_is_what_is_asked_for(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda step, **options: compiled.append(options) or step)
    assert text_of(run, "--compile") == text_of(run)
    assert compiled == [{"fullgraph": True, "dynamic": False}]


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    refused(
        call(generate, [str(tmp_path)]), f"{tmp_path} holds no weights that are known: it has nothing; wanted a run's"
    )
    missing = tmp_path / "missing"
    refused(call(generate, [str(missing)]), f"there is no checkpoint 'last' in {missing}, which is no folder")


def test_a_damaged_checkpoint_is_named(run, tmp_path):
    shutil.copytree(run / "step-00000060", tmp_path / "step-00000060")
    path = tmp_path / "step-00000060" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(call(generate, [str(tmp_path)]), r"model\.safetensors is damaged: it has \d+ bytes and had \d+")


def test_help_and_mistakes_in_the_options_import_nothing_heavy():
    code = """
import contextlib, io, sys, generate
mistakes = [["--bogus"], ["--temperature=-1"], ["--dtype=float8"], ["no/folder"], ["README.md"], ["tests", "--which=best"]]
for words, wanted in [(["--help"], 0), *[(words, 2) for words in mistakes]]:
    sys.argv = ["generate.py", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            generate.main()
        except SystemExit as exit:
            assert exit.code == wanted, (words, exit.code)
    assert not {"torch", "triton", "numpy", "sentencepiece"} & set(sys.modules), words
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
