"""The options of a run: where each value comes from, and what is said of a bad one."""

import dataclasses
import re
import sys
import tomllib

import pytest

from model.config import PRESETS, LlamaConfig
from training import config as config_module
from training.command_line import from_toml, parse, to_toml
from training.config import RUNS, TrainConfig, defaults
from training.errors import UserError

REFERENCE_NAMES = """
batch_size max_seq_len vocab_size dim n_layers n_heads n_kv_heads multiple_of dropout gradient_accumulation_steps learning_rate
min_lr max_iters warmup_iters decay_lr weight_decay beta1 beta2 grad_clip eval_interval eval_iters eval_only log_interval
always_save_checkpoint init_from out_dir device dtype compile seed preset data fused kernels deterministic
"""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """A machine without a GPU, and without the interpreter that other tests use."""
    monkeypatch.setattr(config_module, "gpu_visible", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return f"--config={path}"

    return write


@pytest.fixture
def saved_run(tmp_path):
    """A run's folder with a checkpoint of which only the configuration is there."""

    def write(**options):
        folder = tmp_path / "run"
        (folder / "step-00000005").mkdir(parents=True)
        (folder / "last").write_text("step-00000005\n")
        config = dataclasses.replace(defaults(options.get("preset", "reference")), **options)
        (folder / "step-00000005" / "config.toml").write_text(to_toml(config))
        return ["--init-from=resume", f"--out-dir={folder}"]

    return write


def error(*words):
    with pytest.raises(UserError) as caught:
        parse(list(words))
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- names and presets


def test_every_option_of_the_reference_is_there_under_its_name():
    assert set(REFERENCE_NAMES.split()) <= {field.name for field in dataclasses.fields(TrainConfig)}


def test_without_options_it_is_the_reference_run():
    config = parse([])
    assert config == TrainConfig()
    assert (config.preset, config.batch_size, config.gradient_accumulation_steps) == ("reference", 128, 4)
    assert config.shape() == LlamaConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_the_shape_and_the_run(preset):
    config = parse([f"--preset={preset}"])
    assert config.preset == preset
    for name, value in (PRESETS[preset] | RUNS.get(preset, {})).items():
        assert getattr(config, name) == value


def test_a_model_is_named_by_its_preset_only_where_it_has_its_shape():
    assert defaults("smoke").model_name == "smoke"
    assert dataclasses.replace(defaults("smoke"), vocab_size=300, max_seq_len=32).model_name == "smoke"
    assert dataclasses.replace(defaults("smoke"), ffn_dim=64).model_name == "4 layers of width 128"
    llama = TrainConfig(**vars(LlamaConfig(**PRESETS["llama3.1-8b"])), init_from="weights/llama")
    assert (llama.preset, llama.model_name) == ("reference", "32 layers of width 4096")


def test_the_help_of_presets_lists_them_all(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    out = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert all(re.search(rf"[ ,]{re.escape(preset)}[ ,.]", out) for preset in PRESETS)
    assert all(
        f"--{name.replace('_', '-')} " in out or f"--{name.replace('_', '-')}," in out
        for name in REFERENCE_NAMES.split()
    )


@pytest.mark.parametrize("words", [["-h", "--init-from=resume"], ["--init-from=resume", "--out-dir=nowhere", "--help"]])
def test_help_is_given_even_where_there_is_no_run_to_resume(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 0
    assert "--max-iters" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- precedence


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(toml):
    assert TrainConfig().max_iters != RUNS["smoke"]["max_iters"]
    assert parse(["--preset=smoke"]).max_iters == RUNS["smoke"]["max_iters"]
    file = toml('preset = "smoke"\nmax_iters = 7\nwarmup_iters = 3')
    config = parse([file])
    assert (config.preset, config.max_iters, config.warmup_iters) == ("smoke", 7, 3)
    assert config.batch_size == RUNS["smoke"]["batch_size"]
    config = parse([file, "--max-iters=8"])
    assert (config.max_iters, config.warmup_iters) == (8, 3)


def test_the_preset_of_the_command_line_wins_over_the_file(toml):
    config = parse([toml('preset = "smoke"\nlearning_rate = 0.25'), "--preset=124m"])
    assert (config.preset, config.dim, config.learning_rate) == ("124m", 768, 0.25)


def test_a_resumed_run_keeps_its_options_under_the_file_and_the_command_line(saved_run, toml):
    resume = saved_run(preset="smoke", max_iters=40, learning_rate=0.5, dim=64)
    config = parse(resume)
    assert (config.preset, config.max_iters, config.learning_rate, config.dim) == ("smoke", 40, 0.5, 64)
    assert config.init_from == "resume"
    config = parse([*resume, toml("max_iters = 50\nwarmup_iters = 9"), "--warmup-iters=10"])
    assert (config.max_iters, config.warmup_iters, config.learning_rate) == (50, 10, 0.5)


def test_a_resumed_run_can_be_asked_for_by_the_file(saved_run, toml, tmp_path):
    saved_run(max_iters=40)
    config = parse([toml(f'init-from = "resume"\nout-dir = "{tmp_path / "run"}"')])
    assert (config.max_iters, config.init_from) == (40, "resume")


def test_a_run_whose_folder_was_moved_goes_on_where_it_is_now(saved_run, tmp_path):
    resume = saved_run(out_dir="elsewhere")
    assert parse(resume).out_dir == str(tmp_path / "run")


def test_a_run_is_found_in_the_folder_where_runs_go_by_default(saved_run, tmp_path, monkeypatch):
    saved_run(out_dir="elsewhere", max_iters=40)
    (tmp_path / "run").rename(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    config = parse(["--init-from=resume"])
    assert (config.out_dir, config.max_iters) == ("out", 40)


def test_what_was_said_of_one_call_does_not_come_back(saved_run):
    config = parse(saved_run(eval_only=True, profile=True, config="gone.toml"))
    assert (config.eval_only, config.profile, config.config) == (False, False, "")


def test_another_preset_than_the_resumed_runs_brings_its_own_options(saved_run):
    resume = saved_run(preset="smoke", max_iters=40, seed=5)
    assert parse([*resume, "--preset=smoke"]).max_iters == 40
    config = parse([*resume, "--preset=124m"])
    assert (config.preset, config.dim, config.seed) == ("124m", 768, 5)


def test_a_file_is_found_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine.toml").write_text("max_iters = 7")
    monkeypatch.chdir(tmp_path)
    config = parse(["--config", "runs/mine.toml"])
    assert (config.max_iters, config.config) == (7, "runs/mine.toml")


# ------------------------------------------------------------------------------------------------------------ spellings


@pytest.mark.parametrize(
    "words",
    [["--n-group=2"], ["--n_group", "2"], ["--n-kv-heads", "2"], ["--n_kv_heads=2"], ["--n-group=4", "--n-kv-heads=2"]],
)
def test_n_group_is_another_name_for_n_kv_heads(words):
    assert parse(words).n_kv_heads == 2


@pytest.mark.parametrize("key", ["n_group", "n-group", "n_kv_heads", "n-kv-heads", '"n-kv_heads"'])
def test_a_file_spells_options_with_dashes_or_underscores(toml, key):
    assert parse([toml(f"{key} = 2")]).n_kv_heads == 2


@pytest.mark.parametrize("words", [["--max_iters", "7"], ["--max_iters=7"], ["--max-iters", "7"], ["--max-iters=7"]])
def test_options_are_spelled_with_dashes_or_underscores(words):
    assert parse(words).max_iters == 7


@pytest.mark.parametrize("form", ["--{0}={1}", "--{0} {1}"])
@pytest.mark.parametrize("name", ["out-dir", "out_dir"])
def test_the_folder_to_resume_is_found_however_it_is_spelled(saved_run, form, name, tmp_path):
    saved_run(max_iters=40)
    assert parse(["--init_from=resume", *form.format(name, tmp_path / "run").split()]).max_iters == 40


def test_the_last_of_two_values_counts():
    assert parse(["--preset=124m", "--preset=smoke", "--max-iters=3", "--max-iters=4"]).max_iters == 4
    assert parse(["--preset=124m", "--preset=smoke"]).dim == PRESETS["smoke"]["dim"]


def test_compile_is_on_by_default_where_there_is_a_gpu(monkeypatch):
    assert not parse([]).compile
    monkeypatch.setattr(config_module, "gpu_visible", lambda: True)
    assert parse([]).compile
    assert not parse(["--device=cpu"]).compile
    assert not parse(["--no-compile"]).compile


# ----------------------------------------------------------------------------------------------------------- TOML files


def test_a_written_configuration_is_read_back_equal(tmp_path):
    config = TrainConfig(
        preset="smoke",
        data='a "quoted" \\ path\nof two lines, é and \U0001f600',
        learning_rate=1e-300,
        min_lr=0.0,
        beta1=0.1 + 0.2,
        seed=2**63 - 1,
        compile=True,
        decay_lr=False,
        wandb_run_name="'",
        schedule="wsd",
    )
    assert from_toml(to_toml(config), "config.toml") == config
    path = tmp_path / "config.toml"
    path.write_text(to_toml(dataclasses.replace(config, decay_lr=True)), encoding="utf-8")
    assert parse([f"--config={path}"]) == dataclasses.replace(config, decay_lr=True, config=str(path))


def test_every_option_is_in_the_written_configuration():
    assert set(tomllib.loads(to_toml(TrainConfig()))) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_a_whole_number_may_stand_for_a_float_and_nothing_else_for_another_type(toml):
    config = parse([toml("dropout = 0\nlearning_rate = 1")])
    assert isinstance(config.dropout, float)
    assert isinstance(config.learning_rate, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_iters = 3.0", "max_iters is 3.0, of type float; wanted int"),
        ('max_iters = "3"', "max_iters is '3', of type str; wanted int"),
        ("max_iters = true", "max_iters is True, of type bool; wanted int"),
        ("dropout = false", "dropout is False, of type bool; wanted float"),
        ("dropout = [0.1]", r"dropout is \[0.1\], of type list; wanted float"),
        ("compile = 1", "compile is 1, of type int; wanted bool"),
        ('compile = "no"', "compile is 'no', of type str; wanted bool"),
        ("out_dir = 2020-01-01", "out_dir is datetime.date.*of type date; wanted str"),
        ('dtype = "float8"', "dtype is 'float8'; allowed: auto, float32, bfloat16, float16"),
        ("schedule = []", r"schedule is \[\]; allowed: cosine, wsd"),
        ("warmup-itres = 3", "unknown option 'warmup-itres'; did you mean 'warmup_iters'"),
        ("[model]\ndim = 3", "unknown option 'model'"),
        ("max_iters = 3\nmax-iters = 4", "max-iters is there twice"),
        ("n_group = 3\nn_kv_heads = 4", "n_kv_heads is there twice"),
        ("max_iters = 3\nmax_iters = 4", "not a TOML file: Cannot overwrite"),
        ("max_iters: 3", "not a TOML file.*line 1"),
        ('preset = "huge"', "--preset is 'huge'; allowed: reference, smoke"),
        ("preset = 3", "preset is 3, of type int; wanted str"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_key(toml, text, message):
    found = error(toml(text))
    assert re.search(message, found)
    if not message.startswith("--"):
        assert "run.toml" in found


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not a TOML file.*utf-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, make, message):
    make(tmp_path / "run.toml")
    assert re.search(rf"--config: .*run\.toml.*{message}", error(f"--config={tmp_path / 'run.toml'}"))


def test_a_checkpoint_of_a_stranger_cannot_bring_unknown_options():
    with pytest.raises(UserError, match="there: unknown option 'exec'"):
        from_toml('exec = "rm"', "there")


# ----------------------------------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bogus 1", "unknown option '--bogus'"),
        ("--max-itrs 3", "unknown option '--max-itrs'; did you mean '--max-iters'?"),
        ("--max-itrs=3", "did you mean '--max-iters'?"),
        ("--n-groups 3", "did you mean '--n-group'?"),
        ("stray", "unexpected 'stray'"),
        ("--compile yes", "unexpected 'yes'; .* --no-name"),
        ("--compile=yes", "--compile is 'yes'; it is a switch: --compile or --no-compile"),
        ("--dim", "--dim needs a value"),
        ("--preset huge", "--preset is 'huge'; allowed: reference, smoke, 124m"),
        ("--dim 0", "--dim is 0; it must be at least 1"),
        ("--n-layers 0", "--n-layers is 0"),
        ("--n-heads 0", "--n-heads is 0"),
        ("--n-kv-heads -1", "--n-kv-heads is -1"),
        ("--max-seq-len 0", "--max-seq-len is 0"),
        ("--multiple-of 0", "--multiple-of is 0"),
        ("--ffn-dim -1", "--ffn-dim is -1"),
        ("--vocab-size 255", "--vocab-size is 255; it must be from 256"),
        ("--dim 100", "--dim 100 is not divisible by --n-heads 8"),
        ("--n-kv-heads 3", "--n-heads 8 is not divisible by --n-kv-heads 3"),
        ("--n-group 16", "--n-heads 8 is not divisible by --n-kv-heads 16"),
        ("--dim 120", "odd head dim, 15"),
        ("--dropout 1", "--dropout is 1.0; it must be at least 0 and less than 1"),
        ("--dropout=-0.1", "--dropout is -0.1"),
        ("--norm-eps 0", "--norm-eps is 0"),
        ("--rope-theta 1", "--rope-theta is 1"),
        ("--rope-theta inf", "--rope-theta is inf; it must be a finite number"),
        ("--rope-scaling-factor 0.5", "--rope-scaling-factor is 0.5"),
        (
            "--rope-low-freq-factor 4",
            "--rope-low-freq-factor 4.0 must be positive and less than --rope-high-freq-factor",
        ),
        ("--batch-size 0", "--batch-size is 0; it must be at least 1"),
        ("--gradient-accumulation-steps 0", "--gradient-accumulation-steps is 0"),
        ("--max-iters 0", "--max-iters is 0"),
        ("--eval-interval 0", "--eval-interval is 0"),
        ("--eval-iters 0", "--eval-iters is 0"),
        ("--log-interval 0", "--log-interval is 0"),
        ("--keep-checkpoints 0", "--keep-checkpoints is 0"),
        ("--max-skipped-steps 0", "--max-skipped-steps is 0"),
        ("--warmup-iters -1", "--warmup-iters is -1; it must be at least 0"),
        ("--decay-iters -1", "--decay-iters is -1"),
        ("--decay-iters 11 --max-iters 10", "--decay-iters 11 is greater than --max-iters 10"),
        ("--sample-tokens -1", "--sample-tokens is -1"),
        ("--learning-rate -1", "--learning-rate is -1"),
        ("--learning-rate nan", "--learning-rate is nan; it must be a finite number"),
        ("--learning-rate inf", "--learning-rate is inf"),
        ("--min-lr 1", "--min-lr 1.0 is greater than --learning-rate 0.0005"),
        ("--min-lr=-1", "--min-lr is -1"),
        ("--weight-decay=-1", "--weight-decay is -1"),
        ("--grad-clip=-1", "--grad-clip is -1"),
        ("--beta1 1", "--beta1 is 1.0; it must be at least 0 and less than 1"),
        ("--beta2=-0.5", "--beta2 is -0.5"),
        ("--val-fraction 0", "--val-fraction is 0.0; it must be between 0 and 1"),
        ("--val-fraction 1", "--val-fraction is 1.0"),
        ("--seed -1", "--seed is -1"),
        ("--seed 9223372036854775808", "--seed is 9223372036854775808; it must be less than 2**63"),
        ("--device tpu", "--device is 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
        ("--device 0", "--device is '0'"),
        ("--device cuda:", "--device is 'cuda:'"),
        ("--device cuda:x", "--device is 'cuda:x'"),
        ("--out-dir=", "--out-dir is empty"),
        ("--data=", "--data is empty"),
        ("--data-dir=", "--data-dir is empty"),
        ("--kernels foo", "--kernels: .*unknown switch 'foo'; allowed: all, none, rms_norm"),
        ("--kernels rope@8", "--kernels: .*layer 8 is out of range; allowed: 0 to 7"),
        ("--dim x", "^--dim is 'x'; wanted a whole number$"),
        ("--max_iters=1e3", "^--max_iters is '1e3'; wanted a whole number$"),
        ("--min-lr -x", "^--min-lr is '-x'; wanted a number$"),
        ("--dtype float8", "^--dtype is 'float8'; allowed: auto, float32, bfloat16, float16$"),
        ("--init-from=", "^--init-from is empty; allowed: scratch, resume, or"),
        ("--max-iters 3 -- --out-dir x", "^unexpected '--'; options are --name value"),
        ("--kernels swiglu,,rope", "--kernels: .*empty item"),
        ("--init-from resume --out-dir nowhere", "--init-from resume: there is no checkpoint 'last' in nowhere"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(words, message):
    assert re.search(message.replace("**", r"\*\*"), error(*words.split()))


def test_wandb_is_asked_for_before_anything_is_done(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "--wandb-log: wandb is not installed" in error("--wandb-log")
