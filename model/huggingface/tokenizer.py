"""A sentencepiece model as tokenizer.json: the same tokens for the same text, by the `tokenizers` library.

Both merge neighbours by priority. There a merge is a pair with a rank; here it is any pair that makes a piece, and the piece's
score decides. So the list of merges is every way to cut every piece in two, in the order of the scores.

Two texts differ by nature: one with the name of a control token in it ("<s>"), which becomes that token there and never here,
and one with U+2581, sentencepiece's mark for a space, which here comes back as itself and there as a space.
"""

import json

from model.sentencepiece_model import SPACE, Kind, SentencepieceModel, read


def tokenizer_json(model: bytes, bos_id: int) -> dict:
    """The content of tokenizer.json for the bytes of a `.model` file; every text is opened by `bos_id`.

    ValueError for what is no sentencepiece model, and for a kind of one whose tokens tokenizer.json cannot give.
    """
    parsed = read(model)
    _check(parsed)
    vocabulary = {piece.text: i for i, piece in enumerate(parsed.pieces)}
    special = sorted(parsed.of(Kind.UNKNOWN) | parsed.of(Kind.CONTROL))
    (unknown,) = parsed.of(Kind.UNKNOWN).values()
    bos = parsed.pieces[bos_id].text
    # Before the space becomes a mark, and not by "Metaspace", which leaves it out before a text that begins with a space.
    prepend = [{"type": "Prepend", "prepend": SPACE}] if parsed.space_before_text else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if parsed.space_before_text else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special_token(i, parsed.pieces[i].text) for i in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prepend, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "pre_tokenizer": None,
        "post_processor": _template(bos, bos_id),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown.text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": parsed.byte_fallback,
            "ignore_merges": False,
            "vocab": vocabulary,
            # As "left right", which every version reads; no piece has a space.
            "merges": [f"{left} {right}" for left, right in _merges(parsed)],
        },
    }


def opened_by(content: bytes, bos_id: int) -> dict:
    """The content of a tokenizer.json that puts `bos_id` in front of a text and nothing behind, from one that may do otherwise.

    GPT-2's puts nothing in front, some put an end token behind, and a run may have its documents opened by another token.
    """
    import tokenizers

    spec = json.loads(content)
    tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    if tokenizer.encode("a").ids != [bos_id, *tokenizer.encode("a", add_special_tokens=False).ids]:
        former = spec.get("post_processor") or {}
        steps = former["processors"] if former.get("type") == "Sequence" else [former]
        kept = [step for step in steps if step.get("type") == "ByteLevel"]  # of offsets; every other kind adds tokens
        template = _template(tokenizer.id_to_token(bos_id), bos_id)
        spec["post_processor"] = {"type": "Sequence", "processors": [*kept, template]}
    return spec | {"truncation": None, "padding": None}


def tokenizer_config(tokenizer: dict, bos_id: int, end_id: int, max_seq_len: int) -> dict:
    """The content of tokenizer_config.json beside `tokenizer`, that of a tokenizer.json.

    end_id: the token that ends a text; where training was done here that is BOS, which opens the next one.
    """
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = {i: token for token, i in ids.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[bos_id],
        "eos_token": tokens.get(end_id, tokens[bos_id]),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_seq_len,
    }
    unknown = tokenizer["model"].get("unk_token")
    return config | ({"unk_token": unknown} if unknown else {})


def _check(model: SentencepieceModel) -> None:
    """ValueError for what is not written: it would give other tokens."""
    if model.model_type != "bpe":
        raise ValueError(
            f"the tokenizer's model type is {model.model_type}; bpe is what tokenizer.json is written from"
        )
    if model.normalization != "identity" or model.removes_extra_spaces:
        raise ValueError(
            f"the tokenizer changes texts before it reads them (normalization {model.normalization!r}, removing extra spaces: "
            f"{model.removes_extra_spaces}); tokenizer.json is written from one that does not (identity)"
        )
    if model.space_after_word:
        raise ValueError(
            "the tokenizer writes spaces behind words; tokenizer.json is written from one with them in front"
        )
    if len(model.of(Kind.UNKNOWN)) != 1:
        raise ValueError(f"the tokenizer has {len(model.of(Kind.UNKNOWN))} unknown tokens, wanted 1")
    for kind in (Kind.USER_DEFINED, Kind.UNUSED):
        if pieces := model.of(kind):
            i, piece = next(iter(pieces.items()))
            raise ValueError(
                f"the tokenizer has {len(pieces)} pieces that are {kind.name.lower().replace('_', ' ')} (the first is {i}, "
                f"{piece.text!r}), which tokenizer.json cannot tell"
            )


def _merges(model: SentencepieceModel) -> list[tuple[str, str]]:
    """Every way to make a piece of two, those of higher scores first."""
    pieces = {piece.text for piece in model.of(Kind.NORMAL).values()}
    merges = []
    for piece in sorted(model.of(Kind.NORMAL).values(), key=lambda piece: -piece.score):  # stable: equal scores by id
        cuts = ((piece.text[:at], piece.text[at:]) for at in range(1, len(piece.text)))
        merges += [(left, right) for left, right in cuts if left in pieces and right in pieces]
    return merges


def _special_token(i: int, content: str) -> dict:
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **switches, "special": True}


def _template(bos: str, bos_id: int) -> dict:
    """A post-processor that puts BOS in front of a text, and of each of two."""

    def opened(name: str, type_id: int) -> list[dict]:
        return [
            {"SpecialToken": {"id": bos, "type_id": type_id}},
            {"Sequence": {"id": name, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": opened("A", 0),
        "pair": opened("A", 0) + opened("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
