"""What transformers itself makes of the folders that are written here, and this project of those that it writes."""

import json
import re
from pathlib import Path

import pytest
import torch

import export
import generate
import train
from model.config import LlamaConfig
from model.rope import rope_tables
from tests.support.run_testing import TINY, arguments, call, write_text
from tests.support.texts import texts
from tests.support.weights_testing import LLAMA3, llama, tokenizer_model, write_folder
from training import pretrained
from training.data.tokenizer import tokenizer_of
from training.log.console import printable

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers.*"),
]

TOKENS = torch.tensor([[1, 7, 299, 260, 270, 280, 290, 261, 262, 263, 264, 100]])
SHAPES = [{}, {"tie_embeddings": False, "n_kv_heads": 1, "norm_eps": 1e-6}, LLAMA3 | {"n_kv_heads": 4}]


def exported(source: Path, out: Path, *words: str) -> Path:
    result = call(export, [str(source), str(out), *words])
    assert (result.status, result.err) == (0, "")
    return out


def theirs(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def ours(folder: Path):
    weights = pretrained.find(folder)
    model = llama(**vars(weights.config))
    weights.load_into(model)
    return model


def their_whole_text(folder: Path, prompt: str, count: int) -> str:
    """The greedy text of their model and their tokenizer, prompt and all decoded at once."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = theirs(folder).generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=count, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def their_text(folder: Path, prompt: str, count: int) -> str:
    """The greedy text of a pipeline, which takes a folder as it is."""
    pipeline = transformers.pipeline("text-generation", model=str(folder))
    return pipeline(prompt, max_new_tokens=count, do_sample=False)[0]["generated_text"]


def our_text(weights: Path, prompt: str, count: int) -> str:
    words = [f"--prompt={prompt}", "--temperature=0", f"--max-new-tokens={count}", "--device=cpu"]
    result = call(generate, [str(weights), *words])
    assert result.status == 0, result.err
    return result.out.removesuffix("\n")


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("words", [[], ["--max-file-bytes=20000"]])
def test_a_folder_of_ours_gives_their_model_our_logits(tmp_path, options, words):
    source = write_folder(tmp_path / "source", llama(**options))
    model = theirs(exported(source, tmp_path / "hf", *words))
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, llama(**options)(TOKENS), rtol=0, atol=5e-5)
    assert model.generation_config.eos_token_id == 1


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_a_folder_of_theirs_gives_our_model_their_logits(tmp_path, options, shard):
    source = write_folder(tmp_path / "source", llama(**options))
    model = theirs(source)
    model.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 1 or shard == "20KB"
    with torch.no_grad():
        torch.testing.assert_close(ours(tmp_path / "hf")(TOKENS), model(TOKENS).logits, rtol=0, atol=5e-5)


def test_half_precision_is_loaded_as_it_was_written(tmp_path):
    source = write_folder(tmp_path / "source", llama())
    folder = exported(source, tmp_path / "hf", "--dtype=bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.embed_tokens.weight, llama().embedding.weight.bfloat16())


def test_the_tokenizer_gives_the_same_tokens(tmp_path):
    folder = exported(write_folder(tmp_path / "source", llama()), tmp_path / "hf")
    tokenizer, mine = (
        transformers.AutoTokenizer.from_pretrained(folder),
        tokenizer_of("tokenizer.model", tokenizer_model()),
    )
    for text in texts():
        ids = mine.encode(text, bos=True)
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 1)
    assert set(tokenizer("x")) == {"input_ids", "attention_mask"}


def test_the_greedy_text_is_the_same(tmp_path):
    folder = exported(write_folder(tmp_path / "source", llama()), tmp_path / "hf")
    for prompt in ("the cat", " old dogs", "naïve\n"):
        text = their_text(folder, prompt, 30)
        assert printable(text, "utf-8") == our_text(folder, prompt, 30)
        assert len(set(text)) > 8


def test_a_pipeline_of_theirs_may_lose_one_space_before_what_is_new(tmp_path):
    """Version 5 decodes the new tokens alone, and the decoder takes the first space for the one in front of a text."""
    folder = exported(write_folder(tmp_path / "source", llama()), tmp_path / "hf")
    text = our_text(folder, "cat sat", 20)
    assert text.startswith("cat sat ")
    assert printable(their_whole_text(folder, "cat sat", 20), "utf-8") == text
    lost = int(transformers.__version__.split(".")[0]) >= 5
    assert printable(their_text(folder, "cat sat", 20), "utf-8") == (
        text.replace("cat sat ", "cat sat", 1) if lost else text
    )


@pytest.mark.parametrize("options", [{}, {"rope_theta": 500000.0}])
def test_rope_in_float32_is_theirs_to_the_bit(tmp_path, options):
    config = LlamaConfig(
        **{"dim": 64, "n_heads": 1, "n_kv_heads": 1, "max_seq_len": 4096, "rope_precision": "float32"} | options
    )
    model = theirs(write_folder(tmp_path, llama(**{"dim": 64, "n_heads": 1, "n_kv_heads": 1} | options)))
    cos, sin = model.model.rotary_emb(torch.zeros(1, 4096, 64), torch.arange(4096)[None])
    ours = rope_tables(config)
    assert torch.equal(ours[0], cos[0, :, :32])
    assert torch.equal(ours[1], sin[0, :, :32])


def test_fine_tuning_from_their_folder_and_back_to_them(tmp_path):
    """Train from it, resume, export: the command of the README, on a model that transformers wrote."""
    source = tmp_path / "theirs"
    theirs(write_folder(tmp_path / "random", llama(tie_embeddings=False))).save_pretrained(source)
    (source / "tokenizer.model").write_bytes(tokenizer_model())
    stories = write_text(tmp_path / "mine.txt").read_text().split("\n\n")
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    shape = {"vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len"}
    options = {name: value for name, value in TINY.items() if name not in shape}
    options |= {"init_from": source, "data": tmp_path / "mine.jsonl", "data_dir": tmp_path / "data"}
    options |= {"out_dir": tmp_path / "out", "learning_rate": 2e-3, "max_iters": 4}
    assert call(train, arguments(**options)).status == 0
    resumed = call(train, ["--init-from=resume", f"--out-dir={tmp_path / 'out'}", "--max-iters=8"])
    assert resumed.status == 0, resumed.err
    assert re.search(r"resuming .*step-00000004", resumed.out)
    folder = exported(tmp_path / "out", tmp_path / "tuned")
    text = their_text(folder, "the cat", 30)
    assert printable(text, "utf-8") == our_text(tmp_path / "out", "the cat", 30)
    assert printable(text, "utf-8") != our_text(source, "the cat", 30)


def byte_level() -> bytes:
    """A tokenizer.json of GPT-2's kind, which puts nothing in front of a text."""
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts(), trainer)
    return library.to_str().encode()


def test_a_tokenizer_json_is_exported_with_the_token_that_opens_documents(tmp_path):
    source = write_folder(tmp_path / "source", llama(), tokenizer=False, eos_token_id=0)
    (source / "tokenizer.json").write_bytes(byte_level())
    folder = exported(source, tmp_path / "hf")
    tokenizer, mine = transformers.AutoTokenizer.from_pretrained(folder), tokenizer_of("tokenizer.json", byte_level())
    for text in texts():
        ids = mine.encode(text, bos=True)
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == mine.bos_id
    assert theirs(folder).generation_config.eos_token_id == mine.bos_id
    # Once more, from what is now a file that puts it in front itself.
    again = exported(folder, tmp_path / "again")
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    result = call(export, [str(source), str(tmp_path / "m.bin"), "--format=llama2c"])
    assert result.status == 2
    assert "run.c reads sentencepiece's tokenizers only" in result.err


def test_a_damaged_tokenizer_json_is_named(tmp_path):
    source = write_folder(tmp_path / "source", llama(), tokenizer=False)
    for content in (b"", b"{", b'{"version": "1.0"}', b"[]", byte_level()[:-100]):
        (source / "tokenizer.json").write_bytes(content)
        result = call(export, [str(source), str(tmp_path / "hf")])
        assert result.status == 2
        assert re.fullmatch(r"export\.py: error: [^\n]*tokenizer\.json[^\n]*\n", result.err), result.err
    assert not (tmp_path / "hf").exists()
