"""llama2.c's files, held to a reader of the format that is written here from its description, without torch."""

import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor

import kernels
from model import Llama, generation
from model.llama2c.header import read_header
from model.llama2c.tokenizer import sentencepiece_of, tokenizer_bin
from model.llama2c.weights import FileTensors, save
from model.loading import load
from model.sampling import Sampling
from model.sentencepiece_model import Kind, Piece, read, write
from tests.support.texts import texts
from tests.support.weights_testing import canonical, llama, tokenizer_model

SHAPES = [
    {},
    {"tie_embeddings": False, "n_kv_heads": 1},
    {"n_heads": 2, "n_kv_heads": 2, "dim": 24, "ffn_dim": 40, "n_layers": 3},
]


class Reader:
    """What a program like run.c does with a file: one token at a time, float32, RoPE of neighbours, greedy."""

    def __init__(self, content: bytes):
        magic, version = struct.unpack_from("<Ii", content)
        at = 8 if magic == 0x616B3432 else 0
        self.version = version if at else 0
        d, h, n, heads, kv_heads, vocab, length = struct.unpack_from("<7i", content, at)
        shared = vocab > 0 if not at else content[at + 28] == 1
        vocab = abs(vocab)
        floats = np.frombuffer(content, "<f4", offset=256 if at else 28)
        kv = kv_heads * (d // heads)
        shapes = {
            "norm1": (n, d),
            "q": (n, d, d),
            "k": (n, kv, d),
            "v": (n, kv, d),
            "o": (n, d, d),
            "norm2": (n, d),
            "gate": (n, h, d),
            "down": (n, d, h),
            "up": (n, h, d),
            "norm": (d,),
            "embedding": (vocab, d),
            "cos": (length, d // heads // 2),
            "sin": (length, d // heads // 2),
            "head": (vocab, d),
        }
        order = "embedding norm1 q k v o norm2 gate down up norm cos sin head"
        if at:
            order = "norm1 norm2 norm embedding q k v o gate down up head"
        self.w, place = {}, 0
        for name in order.split():
            if name == "head" and shared:
                self.w["head"] = self.w["embedding"]
                continue
            count = int(np.prod(shapes[name]))
            self.w[name] = floats[place : place + count].reshape(shapes[name])
            place += count
        assert place == len(floats)
        self.n_layers, self.heads, self.kv_heads, self.length = n, heads, kv_heads, length
        self.past = [([], []) for _ in range(n)]

    def logits(self, token: int, position: int) -> np.ndarray:
        w, x = self.w, self.w["embedding"][token]
        for i in range(self.n_layers):
            y = self._norm(x, w["norm1"][i])
            q, k = (self._turn(w[name][i] @ y, position) for name in "qk")
            keys, values = self.past[i]
            keys.append(k)
            values.append((w["v"][i] @ y).reshape(self.kv_heads, -1))
            mixed = []
            for head in range(self.heads):
                group = head * self.kv_heads // self.heads
                scores = np.array([key[group] @ q[head] for key in keys]) / np.sqrt(np.float32(q.shape[1]))
                p = np.exp(scores - scores.max())
                mixed.append(sum(a * value[group] for a, value in zip(p / p.sum(), values, strict=True)))
            x = x + w["o"][i] @ np.concatenate(mixed)
            y = self._norm(x, w["norm2"][i])
            gate = w["gate"][i] @ y
            x = x + w["down"][i] @ (gate / (1 + np.exp(-gate)) * (w["up"][i] @ y))
        return w["head"] @ self._norm(x, w["norm"])

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for position in range(len(prompt) + count - 1):
            following = int(self.logits(tokens[position], position).argmax())
            if position + 1 == len(tokens):
                tokens.append(following)
        return tokens[len(prompt) :]

    @staticmethod
    def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * (x / np.sqrt((x * x).mean() + np.float32(1e-5)))

    def _turn(self, vector: np.ndarray, position: int) -> np.ndarray:
        width = self.w["q"].shape[1] // self.heads
        pairs = vector.reshape(-1, width // 2, 2)
        angle = position / 10000.0 ** (np.arange(0, width, 2) / width)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = pairs[..., 0], pairs[..., 1]
        return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(-1, width)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("options", SHAPES)
def test_an_independent_reader_writes_the_same_greedy_text(tmp_path, options, version):
    model = llama(seed=1, **options)
    save(tmp_path / "m.bin", model.config, canonical(model), version)
    reader = Reader((tmp_path / "m.bin").read_bytes())
    assert reader.version == version
    prompt = [1, 270, 280, 290]
    (ours,) = generation.generate(model, [prompt], 40, sampling=Sampling(temperature=0))
    assert reader.greedy(prompt, 40) == ours
    assert len(set(ours)) > 10


def test_the_tables_in_a_file_of_version_0_are_ropes(tmp_path):
    model = llama()
    save(tmp_path / "m.bin", model.config, canonical(model), 0)
    w = Reader((tmp_path / "m.bin").read_bytes()).w
    assert np.array_equal(w["cos"], model.cos.numpy())
    assert np.array_equal(w["sin"], model.sin.numpy())


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("options", SHAPES)
def test_a_round_trip_is_equal_to_the_bit(tmp_path, options, version):
    model = llama(**options)
    save(tmp_path / "m.bin", model.config, canonical(model), version)
    header = read_header(tmp_path / "m.bin")
    assert header.version == version
    for name, value in header.shape.items():
        assert value == getattr(model.config, name), name
    again = Llama(model.config, kernels.select("none", model.config.n_layers))
    load(again, FileTensors(tmp_path / "m.bin"))
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rope_theta": 500000.0},
            "rope_theta is 500000.0; .* has no place for it, and run.c computes with 10000.0",
        ),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06; .* run.c computes with 1e-05"),
        ({"rope_scaling_factor": 8.0}, "rope_scaling_factor is 8.0"),
    ],
)
def test_what_run_c_would_compute_otherwise_is_said(tmp_path, options, message):
    model = llama(**options)
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "m.bin", model.config, canonical(model), 0)
    assert not (tmp_path / "m.bin").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-4], r"has \d+ bytes, and its header tells of \d+"),
        (lambda content: content + b"\0" * 4, r"has \d+ bytes, and its header tells of \d+"),
        (lambda content: content[:100], "is no llama2.c file: it has 100 bytes"),
        (lambda content: b"", "it has 0 bytes"),
        (lambda content: b"PK\x03\x04" * 100, "is no llama2.c file"),
        (lambda content: bytes(400), "is no llama2.c file: as one, its header says: .*is 0"),
        (
            lambda content: struct.pack("<Ii", 0x616B3432, 2) + content,
            r"is of llama2.c's version 2 \(of 8-bit integers\)",
        ),
        (lambda content: struct.pack("<Ii", 0x616B3432, 7) + content, "is of llama2.c's version 7; 0 and 1 are read"),
        (
            lambda content: content[:12] + struct.pack("<i", 3) + content[16:],
            "its header says: --dim 32 is not divisible",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, message):
    model = llama()
    path = tmp_path / "m.bin"
    save(path, model.config, canonical(model), 0)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_header(path)


def read_tokenizer_bin(content: bytes) -> tuple[int, list[tuple[bytes, float]]]:
    """As run.c reads it."""
    pieces, at = [], 4
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        pieces.append((content[at + 8 : at + 8 + length], score))
        at += 8 + length
    return struct.unpack_from("<i", content)[0], pieces


def encode_as_run_c(pieces: list[tuple[bytes, float]], text: str) -> list[int]:
    """BOS, a space in front, characters or their bytes, then the neighbours whose piece scores best, until none is left."""
    ids = {piece: i for i, (piece, _) in reversed(list(enumerate(pieces)))}
    tokens = [1]
    for character in " " + text if text else "":
        raw = character.encode()
        tokens += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        joined = [ids.get(pieces[a][0] + pieces[b][0]) for a, b in pairwise(tokens)]
        scores = [(-pieces[i][1], at) for at, i in enumerate(joined) if i is not None]
        if not scores:
            return tokens
        at = min(scores)[1]
        tokens[at : at + 2] = [joined[at]]


def test_tokenizer_bin_gives_the_tokens_of_the_model():
    model = tokenizer_model()
    ours = SentencePieceProcessor(model_proto=model)
    longest, pieces = read_tokenizer_bin(tokenizer_bin(model))
    assert len(pieces) == ours.vocab_size()
    assert longest == max(len(piece) for piece, _ in pieces)
    assert pieces[1][0] == b"\n<s>\n"
    for text in texts():
        assert encode_as_run_c(pieces, text) == [1, *ours.encode(text)], text


def test_tokenizer_bin_is_read_back():
    model = tokenizer_model()
    again = sentencepiece_of(tokenizer_bin(model))
    assert read(again).pieces == read(model).pieces
    assert tokenizer_bin(again) == tokenizer_bin(model)
    one, other = SentencePieceProcessor(model_proto=model), SentencePieceProcessor(model_proto=again)
    for text in texts():
        assert other.encode(text) == one.encode(text)


def test_a_tokenizer_that_run_c_cannot_be_given_is_refused():
    control = [Piece("<s>", 0.0, Kind.CONTROL), Piece("</s>", 0.0, Kind.CONTROL)]
    of_bytes = [Piece(f"<0x{byte:02X}>", 0.0, Kind.BYTE) for byte in range(256)]
    unknown = Piece("<unk>", 0.0, Kind.UNKNOWN)
    with pytest.raises(ValueError, match="the byte b as token 3"):
        tokenizer_bin(write([unknown, *control, Piece("a"), *of_bytes]))
    with pytest.raises(ValueError, match="tokens 0, 1 and 2 are unknown, BOS and EOS"):
        tokenizer_bin(write([*control, unknown, *of_bytes]))
    tokenizer_bin(write([unknown, *control, *of_bytes]))


@pytest.mark.parametrize("change", [lambda c: c[:-2], lambda c: b"", lambda c: b"text" * 9, lambda c: c[: len(c) // 2]])
def test_a_damaged_tokenizer_bin_is_refused(change):
    with pytest.raises(ValueError, match=r"no tokenizer\.bin of llama2\.c: "):
        sentencepiece_of(change(tokenizer_bin(tokenizer_model())))
