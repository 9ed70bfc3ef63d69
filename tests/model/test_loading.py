"""Weights out and in again: equal to the bit, in any file layout; what is missing, misshapen, damaged or too many is named."""

import json
import struct
import weakref

import pytest
import safetensors.torch
import torch

import kernels
from model import Llama, huggingface
from model.huggingface.folder import INDEX, SINGLE, FolderTensors, split
from model.loading import load
from tests.support.weights_testing import LLAMA3, canonical, llama, write_folder


def empty_like(model: Llama) -> Llama:
    fresh = Llama(model.config, kernels.select("none", model.config.n_layers), model.compute_dtype)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(torch.nan)
    return fresh


def edited(folder, **tensors) -> FolderTensors:
    """The folder's tensors with some replaced, added, or (None) left out."""
    table = safetensors.torch.load_file(folder / SINGLE) | {name.replace("__", "."): t for name, t in tensors.items()}
    safetensors.torch.save_file({name: t for name, t in table.items() if t is not None}, folder / SINGLE)
    return FolderTensors(folder)


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False}, {"n_kv_heads": 4} | LLAMA3])
@pytest.mark.parametrize("max_file_bytes", [10**9, 20_000])
def test_a_round_trip_is_equal_to_the_bit(tmp_path, options, max_file_bytes):
    model = llama(**options)
    write_folder(tmp_path, model, max_file_bytes=max_file_bytes)
    again = empty_like(model)
    load(again, FolderTensors(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    tokens = torch.arange(8)[None]
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_are_read_as_they_are(tmp_path, dtype):
    model = llama(dtype=getattr(torch, dtype))
    write_folder(tmp_path, model, dtype=dtype)
    again = empty_like(model)
    load(again, FolderTensors(tmp_path))
    for name, parameter in model.named_parameters():
        rounded = parameter.to(getattr(torch, dtype))
        assert torch.equal(again.get_parameter(name), rounded.float()), name
        if parameter.ndim == 2:
            assert torch.equal(again.weights()[name].compute_weight, rounded)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_with_values_that_are_not_finite_is_named(tmp_path, value):
    model = llama()
    write_folder(tmp_path, model)
    damaged = torch.ones(model.config.dim)
    damaged[3:5] = value
    tensors = edited(tmp_path, model__layers__1__post_attention_layernorm__weight=damaged)
    message = (
        rf"^model\.layers\.1\.post_attention_layernorm\.weight has 2 values of {model.config.dim} that are not finite$"
    )
    with pytest.raises(ValueError, match=message):
        load(empty_like(model), tensors)


def test_large_weights_are_split_and_indexed_as_transformers_does_it(tmp_path):
    model = llama()
    write_folder(tmp_path, model, max_file_bytes=20_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    for file in files:
        held = safetensors.torch.load_file(tmp_path / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == held.keys()
        assert sum(t.nbytes for t in held.values()) <= 20_000 or len(held) == 1
        with safetensors.safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert set(index["weight_map"]) == set(canonical(model))


def test_files_are_cut_where_the_next_tensor_would_not_fit():
    assert split({"a": 3, "b": 3, "c": 9, "d": 1}, 6) == [["a", "b"], ["c"], ["d"]]
    assert split({"a": 9}, 6) == [["a"]]


def test_what_is_written_may_be_read_by_whom_other_files_may(tmp_path):
    write_folder(tmp_path, llama())
    assert (tmp_path / SINGLE).stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_one_tensor_is_held_at_a_time(tmp_path):
    """What makes the peak one copy of the model and not two."""
    model = llama()
    tensors, held = FolderTensors(write_folder(tmp_path, model)), []

    class Watched:
        shape = tensors.shape

        def __iter__(self):
            return iter(tensors)

        def __contains__(self, name):
            return name in tensors

        def __getitem__(self, name):
            assert not [ref for ref in held if ref() is not None]
            tensor = tensors[name]
            held.append(weakref.ref(tensor))
            return tensor

    load(empty_like(model), Watched())
    assert len(held) == len(tensors)


def test_a_tied_head_may_be_there_twice_and_must_be_the_same(tmp_path):
    model = llama()
    folder = write_folder(tmp_path, model)
    embedding = safetensors.torch.load_file(folder / SINGLE)["model.embed_tokens.weight"]
    load(empty_like(model), edited(folder, lm_head__weight=embedding.clone()))
    with pytest.raises(ValueError, match=r"lm_head\.weight is another matrix than model\.embed_tokens\.weight"):
        load(empty_like(model), edited(folder, lm_head__weight=embedding + 1))


def test_a_buffer_that_old_files_hold_is_passed_over(tmp_path):
    model = llama()
    tensors = edited(write_folder(tmp_path, model), model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    load(empty_like(model), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__norm__weight": None}, r"missing model\.norm\.weight; not part of it none"),
        (
            {"model__layers__1__self_attn__q_proj__bias": torch.ones(32)},
            r"missing none; not part of it model\.layers\.1\.self_attn\.q_proj\.bias",
        ),
        (
            {"model__layers__0__mlp__up_proj__weight": torch.ones(95, 32)},
            r"model\.layers\.0\.mlp\.up_proj\.weight has shape \(95, 32\), and the configuration makes it \(96, 32\)",
        ),
        (
            {"model__norm__weight": torch.ones(32, dtype=torch.int8)},
            r"model\.norm\.weight is of type I8; read are F32, F16",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_copied(tmp_path, change, message):
    fresh = empty_like(llama())
    with pytest.raises(ValueError, match=message):
        load(fresh, edited(write_folder(tmp_path, llama()), **change))
    assert all(parameter.isnan().all() for parameter in fresh.parameters())


def damage(folder, how: str) -> None:
    path = folder / SINGLE
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "header":
        path.write_bytes(content[:8] + b"x" * 50 + content[58:])
    elif how == "length":
        path.write_bytes(struct.pack("<Q", 2**60) + content[8:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no weights":
        path.unlink()
    elif how == "pickle":
        path.rename(folder / "pytorch_model.bin")
    elif how == "index":
        (folder / INDEX).write_text("{")
    elif how == "index without a map":
        (folder / INDEX).write_text("[]")
    elif how == "index that leads outside":
        (folder / INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}')
    elif how == "index of a missing file":
        (folder / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", r"model\.safetensors is damaged: "),
        ("header", r"model\.safetensors is damaged: "),
        ("length", r"model\.safetensors is damaged: "),
        ("empty", r"model\.safetensors is damaged: "),
        ("no weights", r"has no model\.safetensors and no model\.safetensors\.index\.json$"),
        (
            "pickle",
            r"has no model\.safetensors .*; pytorch_model\.bin is no safetensors file, and a pickle is not read",
        ),
        ("index", r"model\.safetensors\.index\.json is damaged: "),
        ("index without a map", r"model\.safetensors\.index\.json is damaged: "),
        ("index that leads outside", "it names files outside its folder"),
        ("index of a missing file", r"model-00001-of-00002\.safetensors is missing"),
    ],
)
def test_damaged_files_are_named(tmp_path, how, message):
    write_folder(tmp_path, llama())
    damage(tmp_path, how)
    with pytest.raises(ValueError, match=message):
        FolderTensors(tmp_path)


def test_the_shapes_are_those_of_the_parameters():
    model = llama(tie_embeddings=False, n_kv_heads=1)
    assert huggingface.shapes(model.config) == {name: tuple(t.shape) for name, t in canonical(model).items()}
