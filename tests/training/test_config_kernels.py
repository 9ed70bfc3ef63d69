"""The options that choose kernels: what they come to, and what is said where no kernel can run."""

import pytest

from training import config as config_module
from training.config import TrainConfig, parse
from training.errors import UserError


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """A machine without a GPU, and without the interpreter that other tests use."""
    monkeypatch.setattr(config_module, "gpu_visible", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def error(*words):
    with pytest.raises(UserError) as caught:
        parse(list(words))
    return str(caught.value)


def test_fused_and_kernels_make_one_selection():
    assert TrainConfig().kernel_spec == "none"
    assert TrainConfig(fused=True).kernel_spec == "all"
    assert TrainConfig(kernels="rope").kernel_spec == "rope"
    assert TrainConfig(fused=True, kernels="-rope@0").kernel_spec == "all,-rope@0"


@pytest.mark.parametrize("words", ["--fused", "--kernels=rope@0", "--fused --kernels=-rope"])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_kernels_without_a_gpu_name_the_two_ways_on(words, device, monkeypatch):
    found = error(*words.split(), f"--device={device}")
    assert found.startswith("--fused" if "--fused" in words else "--kernels rope@0")
    assert ("no GPU was found" if device == "auto" else "--device is cpu") in found
    assert "Leave it off" in found
    assert "TRITON_INTERPRET=1" in found
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert parse([*words.split(), f"--device={device}"]).uses_triton()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--optimizer fused-adamw runs Triton kernels"),
        ("--fused --kernels=none", "--optimizer fused-adamw runs Triton kernels"),
        ("--fused", "--fused and --optimizer fused-adamw run Triton kernels"),
        ("--kernels=swiglu", "--kernels swiglu and --optimizer fused-adamw run Triton kernels"),
    ],
)
def test_the_fused_optimizer_without_a_gpu_is_refused_by_its_name(words, message, monkeypatch):
    words = [*words.split(), "--optimizer=fused-adamw"]
    assert error(*words).startswith(message)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert parse(words).uses_triton()


@pytest.mark.parametrize("words", [["--kernels=-rope@0,swiglu"], ["--kernels", "-rope@0,swiglu"]], ids=len)
def test_a_selection_may_begin_with_a_dash(words, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert parse(["--fused", *words]).kernel_spec == "all,-rope@0,swiglu"


def test_a_selection_that_comes_to_nothing_needs_no_gpu():
    assert not parse(["--fused", "--kernels=none"]).uses_triton()


@pytest.mark.parametrize(("dim", "heads", "width"), [(8, 1, 8), (72, 4, 18), (520, 2, 260)])
def test_a_head_dim_that_the_attention_kernel_lacks_is_refused_before_the_run(dim, heads, width, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
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
    assert "--fused runs Triton kernels" in error("--fused")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_the_environment_hides_are_not_there(hidden, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("os.path.exists", lambda path: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert config_module.gpu_visible()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not config_module.gpu_visible()
