"""Files and words that nobody meant: read as what they are, or refused with a clear error, and never anything else.

Each test is one kind of input, damaged or made up by hypothesis, the same each time. What is read must also be used: a file that
opens and then crashes is no better.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import training.config
from kernels import grammar
from training.checkpoint import files as checkpoint
from training.command_line import from_toml, parse, to_toml
from training.config import TrainConfig
from training.data import shards
from training.data.prepare import prepare
from training.errors import UserError

fuzz = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw, whole: bytes, within: int | None = None) -> bytes:
    """A file with some of its first `within` bytes changed, cut out or put in; its end may be missing."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(content), within or len(content))))
        content[at : at + draw(st.sampled_from([0, 1, 2, 8]))] = draw(st.binary(max_size=8))
    return bytes(content[: draw(st.sampled_from([len(content), len(content), draw(st.integers(0, len(content)))]))])


@st.composite
def changed(draw, value):
    """A value of JSON with one of its parts, at some depth, replaced, left out or renamed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.integers(0, 5))
        rest = {name: part for name, part in value.items() if name != key}
        if kind == 0:
            return rest
        if kind == 1:
            return rest | {draw(st.text(max_size=8)): value[key]}
        return value | {key: draw(changed(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 1)):
        return [draw(changed(value[0])), *value[1:]]
    return draw(JSON)


def refused_or(call, *arguments, errors=UserError):
    """What the call returns, or None where it was refused in words."""
    try:
        return call(*arguments)
    except errors as error:
        if not str(error).strip():
            raise
        return None


# ----------------------------------------------------------------------------------------------------- prepared texts


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    text = folder / "text.txt"
    text.write_text(
        "\n\n".join(f"Once a bear number {i} went to the sea and the wood, {i * 7} times." for i in range(60))
    )
    prepare(str(text), vocab_size=300, data_dir=folder / "data")
    (made,) = (folder / "data").iterdir()
    return made


@contextlib.contextmanager
def replaced(path: Path, content: bytes):
    """A file with another content, for the block."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


def use(dataset: shards.Dataset) -> None:
    for split in (dataset.train, dataset.val):
        split.read(numpy.arange(max(0, split.n_tokens - 9)), 9)
        assert split.mean_document_length > 0
    dataset.tokenizer.encode("a sea")


def open_and_use(folder: Path) -> None:
    use(shards.open_dataset(folder))


@pytest.mark.fault(
    "headers and manifests of shards and checkpoints, TOML files, options and kernel selections that are damaged or made up",
    "each is read as what it is, or refused in words",
)
@fuzz
@given(data=st.data())
def test_shards_with_a_damaged_header(prepared, data):
    path, manifest = prepared / "train-00000.bin", prepared / "manifest.json"
    names = json.loads(manifest.read_text())
    names.pop("digests")  # which would notice first
    content = data.draw(damaged(path.read_bytes(), within=shards._HEADER.size))
    with replaced(path, content), replaced(manifest, json.dumps(names).encode()):
        refused_or(open_and_use, prepared)


def as_json(value) -> bytes:
    return json.dumps(value).encode()


@fuzz
@given(data=st.data())
def test_manifests_of_prepared_texts(prepared, data):
    path = prepared / "manifest.json"
    whole = path.read_bytes()
    with replaced(path, data.draw(damaged(whole) | changed(json.loads(whole)).map(as_json))):
        refused_or(open_and_use, prepared)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    rng, rng_tensors = checkpoint.rng_state()
    return checkpoint.save(
        tmp_path_factory.mktemp("saved"),
        3,
        tensors={"model": {"w": torch.ones(3, 4), "v": torch.zeros(5).bfloat16()}, "rng": rng_tensors},
        state={"rng": rng, "skipped": 0},
        config_toml=to_toml(TrainConfig()),
        tokenizer=b"tokenizer",
        best=False,
        keep=1,
    )


def load_and_use(folder: Path) -> None:
    loaded = checkpoint.load(folder)
    assert isinstance(loaded.step, int)
    assert isinstance(loaded.state, dict)
    for group in ("model", "rng"):
        assert all(isinstance(tensor, torch.Tensor) for tensor in loaded.tensors(group).values())
    from_toml(loaded.config_toml, "config.toml")


@fuzz
@given(data=st.data())
def test_manifests_of_checkpoints(saved, data):
    path = saved / "manifest.json"
    whole = path.read_bytes()
    with replaced(path, data.draw(damaged(whole) | changed(json.loads(whole)).map(as_json))):
        refused_or(load_and_use, saved)


@fuzz
@given(data=st.data())
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "config.toml"])
def test_files_of_checkpoints_that_were_changed_with_their_hashes(saved, name, data):
    whole = (saved / name).read_bytes()
    strategy = damaged(whole)
    if name == "state.json":
        strategy |= changed(json.loads(whole)).map(as_json)
    content = data.draw(strategy)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with replaced(saved / name, content), replaced(saved / "manifest.json", as_json(manifest)):
        refused_or(load_and_use, saved)


# ------------------------------------------------------------------------------------------------------------- options


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(training.config, "gpu_visible", lambda: False)


OPTION_VALUES = st.text(max_size=12) | st.integers() | st.floats() | st.booleans() | st.lists(st.integers(), max_size=2)


@fuzz
@given(
    content=st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | damaged(to_toml(TrainConfig()).encode())
    | st.sampled_from(
        [b"dim = " + b"[" * 5000, b"a = " + b"{b=" * 5000, b"dim = " + b"9" * 5000, b"a" + b".a" * 5000 + b"=1"]
    )
)
def test_files_of_options(tmp_path, content):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    refused_or(parse, [f"--config={path}"])
    if (text := content.decode("utf-8", "replace")) is not None:
        refused_or(from_toml, text, "config.toml")


@fuzz
@given(
    name=st.sampled_from(sorted(TrainConfig.__dataclass_fields__)),
    value=OPTION_VALUES,
    form=st.sampled_from(["--{}={}", "--{} {}", "--no-{}", "--{}", "{} {}"]),
)
def test_words_of_a_command_line(capsys, name, value, form):
    words = form.format(name.replace("_", "-"), value).split(" ", 1)
    config = refused_or(parse, words, errors=(UserError, SystemExit))
    assert config is None or isinstance(config, TrainConfig)


SPEC = st.lists(
    st.sampled_from([*grammar.SWITCHES, "all", "none", "-", "@", ",", "0", "1", "3", "9", "out", " ", "x", "٣", "²"]),
    max_size=8,
)


@fuzz
@given(spec=SPEC.map("".join) | st.text(max_size=12), n_layers=st.integers(1, 4))
def test_kernel_specs(spec, n_layers):
    places = refused_or(grammar.parse, spec, n_layers, errors=ValueError)
    assert places is None or (len(places) == n_layers + 1 and all(place <= set(grammar.SWITCHES) for place in places))
    of_run = refused_or(grammar.of_run, spec, n_layers, errors=ValueError)
    assert (of_run is None) == (places is None)
