"""The options that choose kernels: what they come to, what is exact and what a wish, and what is said where no kernel can run."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from training import config as config_module
from training.command_line import from_toml, parse, to_toml
from training.config import TrainConfig
from training.device import resolve_device, resolve_kernels
from training.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
INTERPRETER = "set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter (slow, for checking)"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """A machine without a GPU, and without the interpreter that other tests use."""
    monkeypatch.setattr(config_module, "gpu_visible", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def no_triton(monkeypatch):
    """A machine where Triton is not installed either."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))


def error(*words):
    with pytest.raises(UserError) as caught:
        parse(list(words))
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- what they come to


def test_fused_and_kernels_make_one_selection():
    assert TrainConfig().kernel_spec == "none"
    assert TrainConfig(fused=True).kernel_spec == "all"
    assert TrainConfig(kernels="rope").kernel_spec == "rope"
    assert TrainConfig(fused=True, kernels="-rope@0").kernel_spec == "all,-rope@0"


@pytest.mark.parametrize(
    ("options", "switches"),
    [
        ({}, set()),
        ({"kernels": "swiglu@0,rope@1"}, {"swiglu", "rope"}),
        ({"kernels": "adamw"}, {"adamw"}),
        ({"kernels": "all,none@0-7,none@out"}, {"adamw"}),
        ({"fused": True, "kernels": "none"}, set()),
        ({"fused": True, "kernels": "none,rope"}, {"rope"}),
    ],
)
def test_the_switches_of_a_run_are_those_on_anywhere(options, switches):
    assert TrainConfig(**options).switches() == switches


def test_the_whole_fast_path_has_the_update_and_the_captured_step():
    config = parse(["--fused"])
    assert "adamw" in config.switches()
    assert config.capture
    assert not parse(["--fused", "--no-capture"]).capture
    assert "adamw" not in parse(["--fused", "--kernels=-rope,-adamw"]).switches()


@pytest.mark.parametrize("words", [["--kernels=-rope@0,swiglu"], ["--kernels", "-rope@0,swiglu"]], ids=len)
def test_a_selection_may_begin_with_a_dash(words, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert parse(["--fused", *words]).kernel_spec == "all,-rope@0,swiglu"


def test_the_update_takes_no_place():
    assert "adamw is of the whole run and takes no place; write adamw" in error("--kernels=adamw@2")


# ------------------------------------------------------------------------------------ --kernels is exact, --fused a wish


@pytest.mark.parametrize("words", ["rope@0", "all,-rope", "adamw", "none,swiglu"])
@pytest.mark.parametrize("fused", [[], ["--fused"]], ids=["exact", "with --fused"])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_kernels_that_cannot_run_are_refused_with_the_two_ways_on(words, fused, device, monkeypatch):
    options = [*fused, f"--kernels={words}", f"--device={device}"]
    reason = "no GPU was found" if device == "auto" else "--device is cpu"
    assert error(*options) == (
        f"--kernels {words} asks for Triton kernels, and {reason}. Say --kernels none for plain PyTorch, "
        f"or {INTERPRETER}"
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert parse(options).uses_triton()


def test_kernels_where_torch_finds_no_gpu_are_refused_too():
    """A driver without a GPU that torch can use: seen only after torch is imported."""
    with pytest.raises(
        UserError, match=r"^--kernels all asks .* no GPU was found\. Say --kernels none .*TRITON_INTERPRET=1"
    ):
        resolve_device(TrainConfig(kernels="all"))


@pytest.mark.parametrize("words", ["--fused", "--fused --kernels=-rope,-adamw", "--fused --kernels=none"])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_what_fused_asks_for_gives_way_to_the_twins_and_says_so(words, device):
    config = parse([*words.split(), f"--device={device}"])
    assert resolve_device(config) == CPU
    running, note = resolve_kernels(config, CPU)
    assert not running.uses_triton()
    assert replace(running, fused=True, kernels=config.kernels) == config
    reason = "no GPU was found" if device == "auto" else "--device is cpu"
    wanted = f"--fused: {reason}, so plain PyTorch trains in place of the Triton kernels; {INTERPRETER}"
    assert note == ("" if config.kernels == "none" else wanted)


@pytest.mark.parametrize("kernels", ["", "-rope"])
def test_the_wish_comes_true_on_a_gpu_and_in_the_interpreter(kernels, monkeypatch):
    config = TrainConfig(fused=True, kernels=kernels)
    assert resolve_kernels(config, GPU) == (config, "")
    monkeypatch.setenv("TRITON_INTERPRET", "yes")
    assert resolve_kernels(config, CPU) == (config, "")
    assert resolve_device(config) == CPU


@pytest.mark.parametrize("interpreted", [False, True])
def test_without_triton_nothing_helps_but_to_install_it(no_triton, interpreted, monkeypatch):
    if interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(config_module, "gpu_visible", lambda: True)
    found = error("--kernels=all")
    assert "Triton is not installed. Say --kernels none for plain PyTorch, or install Triton" in found
    assert "TRITON_INTERPRET" not in found
    running, note = resolve_kernels(parse(["--fused"]), GPU)
    assert not running.uses_triton()
    assert note.startswith("--fused: Triton is not installed, so plain PyTorch trains")
    assert note.endswith("; install Triton, which exists for Linux")


@pytest.mark.parametrize(("dim", "heads", "width"), [(8, 1, 8), (72, 4, 18), (520, 2, 260)])
def test_a_head_dim_that_the_attention_kernel_lacks_is_refused_before_the_run(dim, heads, width):
    shape = [f"--dim={dim}", f"--n-heads={heads}", "--n-kv-heads=1"]
    found = error(*shape, "--fused")
    assert f"--dim {dim} over --n-heads {heads} makes heads of {width}" in found
    assert "multiples of 4 from 16 to 256" in found
    assert "-attention" in found
    assert parse([*shape, "--fused", "--kernels=-attention"]).head_dim == width
    assert parse(shape).head_dim == width


@pytest.mark.parametrize("value", ["0", "", "false", "2"])
def test_a_variable_that_triton_takes_for_no_is_no(value, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert "no GPU was found" in error("--kernels=all")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_the_environment_hides_are_not_there(hidden, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("os.path.exists", lambda path: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert config_module.gpu_visible()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not config_module.gpu_visible()


# ------------------------------------------------------------------------------- when AdamW's kernel was an --optimizer


@pytest.mark.parametrize("words", [["--optimizer", "fused-adamw"], ["--optimizer=fused-adamw"]], ids=len)
def test_the_former_name_of_the_update_is_answered_with_the_new_one(words):
    assert error(*words) == "--optimizer fused-adamw is now --kernels adamw, which --fused and --kernels all include"


@pytest.mark.parametrize(
    ("fused", "kernels", "switches", "exact"),
    [
        (False, "", "adamw", True),
        (False, "swiglu", "swiglu,adamw", True),
        (False, "none", "adamw", True),
        (False, "all,-rope", "all,-rope", True),
        (True, "", "all", False),
        (True, "-rope", "all,-rope", False),
        (True, "all, none", "adamw", True),
        (True, "none@0-3", "all,none@0-3", False),
    ],
)
def test_a_run_saved_under_it_has_the_kernels_it_had(fused, kernels, switches, exact):
    saved = to_toml(TrainConfig(fused=fused, kernels=kernels)).replace(
        'optimizer = "adamw"', 'optimizer = "fused-adamw"'
    )
    config = from_toml(saved, "config.toml")
    assert (config.optimizer, config.fused) == ("adamw", fused)
    assert config.switches() == TrainConfig(kernels=switches).switches()
    assert config.insists_on_kernels() == exact
    assert from_toml(to_toml(config), "config.toml") == config
