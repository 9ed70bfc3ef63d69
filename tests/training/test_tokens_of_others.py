"""Tokens that nanoGPT and llama2.c prepared: found, trained on as they are, and refused where they are of another tokenizer."""

import numpy as np
import pytest

import generate
import train
from model.llama2c.tokenizer import tokenizer_bin
from tests.support.run_testing import TINY, arguments, call
from training.data import tokens_of_others
from training.data.description import describe
from training.data.prepare import prepare
from training.data.tokenizer import load_tokenizer, train_tokenizer
from training.errors import UserError

STORIES = [f"Once {name} went to the {place}, {i} times." for i in range(60) for name, place in
           [("a bear", "sea"), ("an owl", "wood"), ("Tim", "market")]]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "their.model"
    train_tokenizer(STORIES, 300, path)
    return path


@pytest.fixture(params=["nanoGPT", "llama2.c"])
def theirs(request, tmp_path, tokenizer_file):
    """A folder as the program writes it, and the text and tokens of each split as they are read."""
    tokenizer = load_tokenizer(tokenizer_file)
    folder = tmp_path / "their data"
    folder.mkdir()
    if request.param == "nanoGPT":
        texts = {"train": STORIES[20:], "val": STORIES[:20]}
        tokens = {}
        for split, documents in texts.items():
            ids = [token for document in documents for token in (*tokenizer.encode(document), tokenizer.bos_id)]
            tokens[split] = np.array(ids, "<u2")
            tokens[split].tofile(folder / f"{split}.bin")
        for name in ("prepare.py", "readme.md", "input.txt", "meta.pkl"):
            (folder / name).write_bytes(b"of no interest\0")
    else:
        shards = [STORIES[:20], STORIES[20:90], STORIES[90:]]
        ids = [[token for document in shard for token in tokenizer.encode(document, bos=True)] for shard in shards]
        for number, shard in enumerate(ids):
            np.array(shard, "<u2").tofile(folder / f"data{number:02}.bin")
        texts = {"train": STORIES[20:], "val": STORIES[:20]}
        tokens = {"val": np.array(ids[0]), "train": np.array(ids[1] + ids[2])}
    return folder, texts, tokens


def test_both_splits_are_the_files_as_they_are(theirs, tokenizer_file, tmp_path):
    folder, texts, tokens = theirs
    dataset = prepare(str(folder), vocab_size=300, data_dir=tmp_path / "data", tokenizer_file=tokenizer_file)
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        assert split.read(np.array([0]), split.n_tokens)[0].tolist() == tokens[name].tolist()
        assert split.read(np.array([5]), 100)[0].tolist() == tokens[name][5:105].tolist()
        assert split.n_documents == len(texts[name])
        n_bytes = sum(len(text.encode()) for text in texts[name])
        assert n_bytes <= split.n_bytes <= n_bytes + len(texts[name])  # and the space that is in front of each
    assert describe(dataset)[0].startswith("data their data, tokens of another program: 160 documents of ")
    assert not (tmp_path / "data").exists()


def test_a_long_stream_is_counted_in_a_sample(theirs, tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_of_others, "_COUNTED", 100)
    monkeypatch.setattr(tokens_of_others, "_LOOKED_AT", 50)
    folder, texts, _ = theirs
    dataset = prepare(str(folder), vocab_size=300, data_dir=tmp_path, tokenizer_file=tokenizer_file)
    assert dataset.train.n_documents == pytest.approx(160, rel=0.1)
    assert dataset.train.n_bytes == pytest.approx(sum(map(len, texts["train"])), rel=0.1)
    assert "about" in describe(dataset)[0]


def test_a_run_trains_on_them_resumes_and_writes(theirs, tokenizer_file, tmp_path):
    folder, *_ = theirs
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())  # found where it lies
    options = TINY | {"data": folder, "out_dir": tmp_path / "out", "data_dir": tmp_path / "data"}
    result = call(train, arguments(**options | {"max_iters": 4, "packed_documents": True}))
    assert (result.status, result.err) == (0, "")
    assert "tokens of another program" in result.out
    result = call(train, arguments(out_dir=tmp_path / "out", init_from="resume", max_iters=6))
    assert (result.status, result.err) == (0, "")
    result = call(generate, [str(tmp_path / "out"), "--prompt=Once", "--max-new-tokens=3", "--device=cpu"])
    assert result.out.startswith("Once")
    file = next(folder.glob("*.bin"))
    file.write_bytes(file.read_bytes()[2:])
    result = call(train, arguments(out_dir=tmp_path / "out", init_from="resume", max_iters=8))
    assert result.status == 2
    assert "was trained with another text" in result.err


def test_gpt_2s_kind_of_tokenizer_goes_with_nanogpts_files(tmp_path):
    pytest.importorskip("tokenizers")
    from tests.training.test_tokenizer_json import content

    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "tokenizer.json").write_bytes(content("gpt2"))
    tokenizer = load_tokenizer(tmp_path / "d" / "tokenizer.json")
    ids = [token for text in STORIES for token in (*tokenizer.encode(text), 0)]
    for split in ("train", "val"):
        np.array(ids, "<u2").tofile(tmp_path / "d" / f"{split}.bin")
    vocab_size = -(-tokenizer.n_tokens // 64) * 64
    dataset = prepare(str(tmp_path / "d"), vocab_size=vocab_size, data_dir=tmp_path)
    assert dataset.train.n_bytes == sum(len(text.encode()) for text in STORIES)
    assert dataset.train.n_documents == len(STORIES)


# What is refused


def test_a_missing_tokenizer_is_asked_for_and_found_beside(theirs, tokenizer_file, tmp_path):
    folder, *_ = theirs
    with pytest.raises(
        UserError, match=r"holds tokens that another program has prepared; name their tokenizer with --tok"
    ):
        prepare(str(folder), vocab_size=300, data_dir=tmp_path)
    folder.with_name("their data.model").write_bytes(tokenizer_file.read_bytes())
    assert prepare(str(folder), vocab_size=300, data_dir=tmp_path).tokenizer.n_tokens == 300


def test_tokens_of_another_tokenizer_are_refused(theirs, tokenizer_file, tmp_path):
    folder, *_ = theirs
    small, other = tmp_path / "small.model", {"data_dir": tmp_path}
    train_tokenizer(STORIES, 290, small)
    with pytest.raises(
        UserError, match=r"\.bin holds token 29\d, which is none of the tokenizer, which has 290 tokens"
    ):
        prepare(str(folder), vocab_size=290, tokenizer_file=small, **other)
    with pytest.raises(UserError, match=r"no document begins in its first [\d,]+ tokens: .*--document-token"):
        prepare(str(folder), vocab_size=300, tokenizer_file=tokenizer_file, document_token="</s>", **other)


def test_a_stream_without_document_tokens_is_known_by_its_text(tmp_path, tokenizer_file):
    """As nanoGPT's shakespeare, which is one document of 300,000 tokens."""
    folder = tmp_path / "shakespeare"
    folder.mkdir()
    for split in ("train", "val"):
        np.array(load_tokenizer(tokenizer_file).encode(" ".join(STORIES)), "<u2").tofile(folder / f"{split}.bin")
    dataset = prepare(str(folder), vocab_size=300, data_dir=tmp_path, tokenizer_file=tokenizer_file)
    assert (dataset.train.n_documents, dataset.val.n_documents) == (1, 1)
    other = tmp_path / "other.model"
    train_tokenizer([story.upper() for story in STORIES], 300, other)
    with pytest.raises(UserError, match=r"no document begins in its first [\d,]+ tokens"):
        prepare(str(folder), vocab_size=300, data_dir=tmp_path, tokenizer_file=other)


def test_a_tokenizer_bin_beside_the_tokens_is_none_of_them(theirs, tokenizer_file, tmp_path):
    folder, texts, _ = theirs
    (folder / "tokenizer.bin").write_bytes(tokenizer_bin(tokenizer_file.read_bytes()))
    dataset = prepare(str(folder), vocab_size=300, data_dir=tmp_path)
    assert dataset.tokenizer.n_tokens == 300
    assert (dataset.train.n_documents, dataset.val.n_documents) == (len(texts["train"]), len(texts["val"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are no tokens of 2 bytes each"),
        (b"\1\0\2", "3 bytes are no tokens of 2 bytes each"),
        (np.arange(1, 99, dtype="<u4").tobytes(), "holds tokens of 32 bits, wanted 16"),
    ],
)
def test_a_file_that_holds_no_such_tokens_is_named(theirs, tokenizer_file, tmp_path, content, message):
    folder, *_ = theirs
    path = sorted(folder.glob("*.bin"))[-1]
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name}:? {message}"):
        prepare(str(folder), vocab_size=300, data_dir=tmp_path, tokenizer_file=tokenizer_file)


@pytest.mark.parametrize("names", [["train.bin"], ["val.bin", "more.bin"], ["data00.bin"]])
def test_files_for_one_split_alone_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"\1\0")
    with pytest.raises(
        UserError, match=r"none to train or none to validate on; wanted train\.bin and val\.bin, or sev"
    ):
        prepare(str(tmp_path), vocab_size=300, data_dir=tmp_path / "data")


def test_tokens_beside_the_records_they_are_of_are_chosen_by_name(tmp_path, tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file)
    folder = tmp_path / "TinyStories_all_data"
    folder.mkdir()
    for number in range(2):
        ids = [token for text in STORIES for token in tokenizer.encode(text, bos=True)]
        np.array(ids, "<u2").tofile(folder / f"data{number:02}.bin")
        (folder / f"data{number:02}.json").write_text(str([{"story": text} for text in STORIES]).replace("'", '"'))
    options = {"vocab_size": 300, "data_dir": tmp_path / "data", "tokenizer_file": tokenizer_file}
    with pytest.raises(
        UserError, match=r"it holds tokens \(data00\.bin\) among other files \(data00\.json\).*--data-files"
    ):
        prepare(str(folder), **options)
    assert prepare(str(folder), data_files="*.bin", **options).train.n_documents == len(STORIES)
    texts = prepare(str(folder), data_files="*.json", **options)
    assert texts.train.n_documents + texts.val.n_documents == 2 * len(STORIES)


def test_a_validation_split_of_theirs_that_is_too_short_is_not_blamed_on_an_option_of_ours(
    theirs, tokenizer_file, tmp_path
):
    folder, _, tokens = theirs
    val = next(path for path in sorted(folder.glob("*.bin")) if path.name in ("val.bin", "data00.bin"))
    bos_id = load_tokenizer(tokenizer_file).bos_id
    np.array([*tokens["val"][:8], bos_id], "<u2").tofile(val)
    words = {"data": folder, "tokenizer": tokenizer_file, "out_dir": tmp_path / "out", "vocab_size": 300}
    result = call(train, arguments(**TINY | words))
    assert result.status == 2
    assert "the val split" in result.err
    assert "--val-fraction" not in result.err
