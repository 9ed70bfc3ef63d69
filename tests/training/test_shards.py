import contextlib
import json
import struct
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from training.data import build, digests, encode, shards
from training.data import prepare as preparing
from training.data.corpus import open_corpus, parts
from training.data.prepare import prepare
from training.data.shards import TokenShards
from training.data.tokenizer import load_tokenizer, train_tokenizer
from training.errors import UserError

STORIES = [f"Once {name} went to the {place}.\nIt rained — {i} times." for i in range(20) for name, place in
           [("a bear", "sea"), ("an owl", "wood"), ("Tim", "market")]]  # fmt: skip
VOCAB = 320


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(STORIES, VOCAB, path)
    return path


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n\n".join(STORIES))
    return path


@pytest.fixture
def prepare_here(source, tokenizer_file, tmp_path):
    """`prepare` of the source with a given tokenizer, and the folder it is kept in."""

    def call(**options):
        defaults = {"vocab_size": VOCAB, "data_dir": tmp_path / "data", "tokenizer_file": tokenizer_file}
        return prepare(str(source), **(defaults | {"val_fraction": 0.2} | options))

    return call


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "data").iterdir())


def stream(split):
    return split.read(np.array([0]), split.n_tokens)[0].tolist()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(prepare_here, tmp_path):
    prepare_here()
    (folder,) = (tmp_path / "data").iterdir()
    return folder


# What the shards hold


def test_each_split_is_its_documents_in_order_each_behind_a_bos(prepare_here, source):
    dataset = prepare_here()
    opened = open_corpus(str(source), val_fraction=0.2)
    assert dataset.fingerprint == opened.fingerprint
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        texts = list(opened.documents(name))
        assert stream(split) == [token for text in texts for token in dataset.tokenizer.encode(text, bos=True)]
        assert split.n_documents == len(texts)
        assert split.n_bytes == sum(len(text.encode()) for text in texts)
        assert split.mean_document_length == split.n_tokens / len(texts)
        assert (split.vocab_size, split.bos_id) == (VOCAB, dataset.tokenizer.bos_id)


def test_a_tokenizer_is_trained_on_the_training_documents_alone(source, tmp_path, monkeypatch):
    seen = []

    def train(documents, *rest):
        seen.extend(documents)
        return train_tokenizer(seen, *rest)

    monkeypatch.setattr(build, "train_tokenizer", train)
    dataset = prepare(str(source), vocab_size=VOCAB, data_dir=tmp_path / "data", val_fraction=0.2)
    assert dataset.tokenizer.n_tokens == VOCAB
    assert seen == list(open_corpus(str(source), val_fraction=0.2).documents("train"))


def test_neither_workers_nor_parts_nor_shards_change_the_stream(prepare_here, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    alone = prepare_here(workers=1)
    monkeypatch.setattr(encode, "POOL_BYTES", 0)
    together = prepare_here(workers=2, data_dir=tmp_path / "b")
    (first,), (second,) = (tmp_path / "data").iterdir(), (tmp_path / "b").iterdir()
    assert contents(first) == contents(second)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 50)
    many = prepare_here(workers=1, data_dir=tmp_path / "c")
    (third,) = (tmp_path / "c").iterdir()
    assert len(list(third.glob("train-*.bin"))) > 10
    for split in ("train", "val"):
        assert stream(getattr(alone, split)) == stream(getattr(together, split)) == stream(getattr(many, split))


def test_windows_are_read_from_anywhere_also_across_shards(prepare_here, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 50)
    train = prepare_here().train
    whole = np.array(stream(train))
    for length in (1, 7, 200):
        starts = np.arange(train.n_tokens - length + 1)
        windows = train.read(starts, length)
        assert windows.dtype == np.int64
        assert (windows == whole[starts[:, None] + np.arange(length)]).all()


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65536, 2), (65537, 4)])
def test_tokens_take_two_bytes_up_to_a_vocabulary_of_65536(tmp_path, vocab_size, itemsize):
    tokenizer = SimpleNamespace(n_tokens=vocab_size, bos_id=1, hash="ab" * 32)
    ids = np.array([1, 2, vocab_size - 1], shards.token_dtype(vocab_size))
    writer = shards.ShardWriter(tmp_path, "val", tokenizer)
    writer.append(shards.Encoded(ids, 1, 9))
    (name,) = writer.close()
    assert (tmp_path / name).stat().st_size == shards._HEADER.size + 3 * itemsize
    assert stream(TokenShards("val", [tmp_path / name], tokenizer)) == ids.tolist()


# What is kept


def test_what_is_prepared_is_used_again(prepare_here, folder, tmp_path, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(preparing, "build", None)
    dataset = prepare_here()
    assert contents(folder) == before
    assert dataset.train.n_documents + dataset.val.n_documents == len(STORIES)


def test_a_change_of_source_option_tokenizer_vocabulary_or_format_makes_new_shards(
    prepare_here, source, tmp_path, monkeypatch
):
    prepare_here()
    prepare_here(val_fraction=0.5)
    prepare_here(tokenizer_file=None)
    prepare_here(tokenizer_file="", vocab_size=VOCAB - 1)
    other = tmp_path / "other.model"
    train_tokenizer(STORIES[:30], VOCAB, other)
    prepare_here(tokenizer_file=other)
    source.write_text("\n\n".join([*STORIES, "One more."]))
    assert prepare_here().train.n_documents + prepare_here().val.n_documents == len(STORIES) + 1
    monkeypatch.setattr(shards, "FORMAT_VERSION", 2)
    prepare_here()
    assert len(folders(tmp_path)) == 7
    assert all(name.startswith("stories.txt-3") for name in folders(tmp_path))


def test_an_interrupted_preparation_leaves_nothing_that_looks_complete(prepare_here, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "close", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_here()
    assert folders(tmp_path) == []
    with monkeypatch.context() as patch:  # a kill: nothing is tidied up
        patch.setattr(shards.ShardWriter, "close", lambda self: 1 / 0)
        patch.setattr(build.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(ZeroDivisionError):
            prepare_here()
    (left_over,) = folders(tmp_path)
    assert left_over.startswith(".tmp-")
    assert prepare_here().train.n_tokens > 0
    assert len(folders(tmp_path)) == 2


def test_all_files_are_on_the_disk_before_the_folder_gets_its_name(prepare_here, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(build, "_fsync", lambda path: synced.append((path.name, len(folders(tmp_path)), path.is_dir())))
    prepare_here()
    (name,) = folders(tmp_path)
    assert {path for path, _, _ in synced[:4]} == {p.name for p in (tmp_path / "data" / name).iterdir()}
    assert synced[4][0].startswith(".tmp-")
    assert synced[5:] == [("data", 2, True)]  # and the lock of the preparation


def test_of_two_processes_that_prepare_at_once_the_first_is_kept(prepare_here, tmp_path, monkeypatch):
    """Where the file system has no locks, and nothing makes the second one wait."""
    monkeypatch.setattr(preparing.folder_lock, "held", lambda *_, **__: contextlib.nullcontext())
    encode_parts, other = encode.encode_parts, []

    def encode_while_another_finishes(*arguments):
        monkeypatch.setattr(encode, "encode_parts", encode_parts)
        other.append(prepare_here())
        return encode_parts(*arguments)

    monkeypatch.setattr(encode, "encode_parts", encode_while_another_finishes)
    assert stream(prepare_here().train) == stream(other[0].train)
    assert len(folders(tmp_path)) == 1


def test_many_preparations_at_once_agree(prepare_here, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(stream(prepare_here().train))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(result == results[0] for result in results)
    assert len(folders(tmp_path)) == 1


# What is refused


def test_a_shard_cut_at_any_place_is_truncated(prepare_here, folder):
    path = folder / "train-00000.bin"
    whole = path.read_bytes()
    for length in (9, shards._HEADER.size - 1, shards._HEADER.size, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"train-00000.bin is truncated.*delete .*made anew"):
            prepare_here()
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match=r"train-00000.bin is truncated or damaged"):
        prepare_here()


def test_a_file_that_is_no_shard_is_refused(prepare_here, folder):
    for content in (b"", b"NOTSHARD" + bytes(200)):
        (folder / "val-00000.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"val-00000.bin is no token shard: it starts with"):
            prepare_here()


def test_a_shard_of_another_format_is_refused(prepare_here, folder):
    path = folder / "val-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + struct.pack("<I", 99) + whole[12:])
    with pytest.raises(UserError, match="format version 99, wanted 1"):
        prepare_here()


def test_shards_of_another_tokenizer_are_refused(prepare_here, folder, tmp_path):
    train_tokenizer(STORIES[:30], VOCAB, folder / "tokenizer.model")
    with pytest.raises(UserError, match=r"train-00000.bin is of another tokenizer"):
        prepare_here()
    train_tokenizer(STORIES, VOCAB - 1, folder / "tokenizer.model")
    with pytest.raises(UserError, match=r"another tokenizer: vocabulary 320.*wanted 319"):
        prepare_here()


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.model", "val-00000.bin"])
def test_a_missing_file_is_named(prepare_here, folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"damaged token shards: .*{name}.*delete"):
        prepare_here()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"source": "x"}'])
def test_a_damaged_manifest_is_refused(prepare_here, folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="damaged token shards"):
        prepare_here()


def test_a_shard_whose_content_has_changed_is_named(prepare_here, folder):
    path = folder / "train-00000.bin"
    whole = path.read_bytes()
    for at in (shards._HEADER.size, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(
            UserError, match=r"train-00000\.bin is not the file that was prepared: .*delete .*made anew"
        ):
            prepare_here()
    path.write_bytes(whole)
    assert prepare_here().train.n_tokens > 0


def test_of_a_large_shard_evenly_spaced_blocks_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "BLOCK_BYTES", 4)
    monkeypatch.setattr(digests, "BLOCKS", 8)
    path, whole = tmp_path / "shard", bytes(range(100))
    path.write_bytes(whole)
    before, noticed = digests.digest(path), set()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        if digests.digest(path) != before:
            noticed.add(at)
    assert len(noticed) == 32
    assert {0, 3, 96, 99} <= noticed
    assert all(noticed & set(range(at, at + 14)) for at in range(87))
    path.write_bytes(whole + b"x")
    assert digests.digest(path) != before


def test_shards_of_earlier_versions_have_no_digests_and_are_read(prepare_here, folder):
    forget_digests(folder)
    assert prepare_here().train.n_tokens > 0


def forget_digests(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digests"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_token_past_the_vocabulary_is_refused_when_it_is_read(prepare_here, folder):
    forget_digests(folder)
    path = folder / "train-00000.bin"
    whole = bytearray(path.read_bytes())
    whole[shards._HEADER.size + 20 : shards._HEADER.size + 22] = struct.pack("<H", VOCAB)
    path.write_bytes(whole)
    train = prepare_here().train
    assert train.read(np.array([0, 11]), 10).shape == (2, 10)
    with pytest.raises(UserError, match=r"the train split of stories.txt: token id 320, allowed: below .* 320"):
        train.read(np.array([0, 5]), 10)


def test_a_given_tokenizer_of_another_size_says_which_number_to_pass(prepare_here):
    with pytest.raises(UserError, match=r"--vocab-size is 4096, but --tokenizer .*320 tokens: pass --vocab-size 320"):
        prepare_here(vocab_size=4096)


def test_a_folder_that_cannot_be_written_is_named(prepare_here, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"can't be prepared in .*file"):
        prepare_here(data_dir=tmp_path / "file" / "data")


def test_a_mistake_that_a_worker_process_finds_reaches_the_user(tmp_path, tokenizer_file, monkeypatch):
    rows = [json.dumps({"text": story}) for story in STORIES]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, '{"text": 3}']))
    monkeypatch.setattr(parts, "PART_BYTES", 500)
    monkeypatch.setattr(encode, "POOL_BYTES", 0)
    with pytest.raises(UserError, match=r"rows.jsonl, line 61: field 'text' is a int"):
        prepare(
            str(tmp_path / "rows.jsonl"),
            vocab_size=VOCAB,
            data_dir=tmp_path / "data",
            tokenizer_file=tokenizer_file,
            val_fraction=0.2,
            split_text="blank-lines",  # by itself the first records are looked at before there are workers
            workers=2,
        )
    assert folders(tmp_path) == []


def test_the_progress_bar_is_drawn_on_a_terminal_only(prepare_here, tmp_path, monkeypatch, capsys):
    prepare_here(progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    prepare_here(progress=True, data_dir=tmp_path / "b")
    out, err = capsys.readouterr()
    assert out == ""
    assert "encoding stories.txt" in err


def test_the_tokenizer_of_a_prepared_source_is_the_given_one(prepare_here, tokenizer_file):
    assert prepare_here().tokenizer.hash == load_tokenizer(tokenizer_file).hash
