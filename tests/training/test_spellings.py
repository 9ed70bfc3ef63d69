"""What users type, or write into a file, that is not how this program spells it: understood, or answered by name."""

from pathlib import Path

import pytest

from tests.training.test_config import error, no_gpu, saved_run, toml  # noqa: F401 - fixtures
from training.command_line import parse


@pytest.mark.parametrize(
    "words", ["--compile=False", "--compile=false", "--no-compile", "--compile=True --compile=False"]
)
def test_a_switch_may_be_given_as_llama2_c_has_it(words):
    assert not parse(["--compile", *words.split()]).compile


@pytest.mark.parametrize(
    "words", ["--eval_only=True", "--eval-only=true", "--eval_only", "--eval_only=False --eval-only"]
)
def test_a_switch_may_be_turned_on_as_llama2_c_has_it(words):
    assert parse(words.split()).eval_only


def test_a_switch_that_is_neither_on_nor_off_is_answered_by_name():
    assert error("--decay_lr=maybe") == "--decay_lr is 'maybe'; it is a switch: --decay_lr or --no-decay_lr"


@pytest.mark.parametrize("value", ["-x", "- a list", "-1", "-"])
@pytest.mark.parametrize("name", ["--sample-prompt", "--sample_prompt"])
def test_a_value_may_begin_with_a_dash(name, value):
    assert parse([name, value, "--max-iters", "3"]).sample_prompt == value
    assert parse([f"{name}={value}"]).sample_prompt == value


def test_kernels_are_left_out_with_a_dash(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for words in (["--fused", "--kernels", "-rope,-adamw"], ["--fused", "--kernels=-rope,-adamw"]):
        assert parse(words).kernels == "-rope,-adamw"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sample-prompt --max-iters 3", "--sample-prompt needs a value"),
        ("--sample-prompt --no-compile", "--sample-prompt needs a value"),
        ("--sample-prompt -h", "--sample-prompt needs a value"),
        ("--max-iters 3 --sample-prompt", "--sample-prompt needs a value"),
        (
            "--out_dir --max-itrs=3",
            "--out_dir needs a value, and --max-itrs=3 is no option; a value that begins with a dash is --out_dir=--max-itrs=3",
        ),
    ],
)
def test_a_value_that_was_left_out_is_named(words, message):
    assert error(*words.split()) == message


@pytest.mark.parametrize("words", [["--config", ""], ["--config="]])
def test_an_empty_name_of_a_file_of_options_is_named(words):
    assert error(*words) == "--config is empty; name a TOML file, or leave it out"


def test_a_file_of_options_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfmax_iters = 7\n")
    assert parse([f"--config={tmp_path / 'run.toml'}"]).max_iters == 7


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_path_may_begin_with_a_tilde_in_a_file_and_on_the_command_line(home):
    (home / "run.toml").write_text(
        'data = "~/text.txt"\nout-dir = "~/out"\ntokenizer = "~/t.model"\nsample_prompt = "~/x"'
    )
    config = parse(["--config=~/run.toml", "--data-dir=~/data"])
    assert (config.data, config.out_dir) == (str(home / "text.txt"), str(home / "out"))
    assert (config.tokenizer, config.data_dir) == (str(home / "t.model"), str(home / "data"))
    assert config.config == str(home / "run.toml")
    assert config.sample_prompt == "~/x"


def test_a_run_in_a_folder_with_a_tilde_is_resumed(home, saved_run):  # noqa: F811
    saved_run(max_iters=40)
    for words in (["--out-dir=~/run"], ["--out_dir", "~/run"]):
        config = parse(["--init-from=resume", *words])
        assert (config.max_iters, Path(config.out_dir)) == (40, home / "run")


def test_another_checkpoint_brings_its_own_options(saved_run, tmp_path):  # noqa: F811
    resume = saved_run(max_iters=40)
    earlier = tmp_path / "run" / "step-00000003"
    earlier.mkdir()
    (earlier / "config.toml").write_text("max_iters = 30")
    (tmp_path / "run" / "best").write_text("step-00000003")
    assert parse(resume).max_iters == 40
    for which in ("best", "step-00000003"):
        config = parse([*resume, "--which", which])
        assert (config.max_iters, config.which) == (30, which)
    assert "there is no checkpoint 'step-00000004' in" in error(*resume, "--which=step-00000004")


def test_the_checkpoint_of_one_call_does_not_come_back(saved_run):  # noqa: F811
    assert parse(saved_run(which="step-00000001")).which == "last"


def test_options_that_cannot_be_read_name_the_other_checkpoints(saved_run, tmp_path):  # noqa: F811
    resume = saved_run()
    (tmp_path / "run" / "step-00000003").mkdir()
    (tmp_path / "run" / "step-00000005" / "config.toml").unlink()
    assert error(*resume).endswith(
        "could not be read: No such file or directory; take another with --which: step-00000003"
    )
