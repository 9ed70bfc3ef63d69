"""Weights to start from: a checkpoint of ours or a run's folder, a Hugging Face folder of a Llama, a llama2.c file.

What a path is, its shape and its tokenizer are told without torch, so that `--init-from` is answered with the other options.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from model import LlamaConfig
from model.config import option
from model.huggingface import config as huggingface_config
from model.llama2c import header as llama2c
from training import run_folder
from training.errors import UserError

if TYPE_CHECKING:
    from model import Llama
    from model.loading import Tensors
    from training.config import TrainConfig
    from training.data.tokenizer import Tokenizer

TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tokenizer.bin")
"""The tokenizer beside weights: the first of these that is there."""
DEFAULT_LONGEST = 4096
"""Tokens in a training sequence where a run begins with a Hugging Face model of longer ones and --max-seq-len is not given."""
KINDS = "a run's folder, a checkpoint in it, a Hugging Face folder of a Llama (config.json) or a llama2.c file"


@dataclass(frozen=True)
class Pretrained:
    """Weights in a file or folder that was recognized by what it holds.

    Attributes:
        kind: "checkpoint", "huggingface" or "llama2c".
        path: the folder of the checkpoint or of the model, or the file.
        shape: what the configuration beside the weights states, as options of `LlamaConfig`.
        assumed: options that the format does not state, with what its programs compute with.
        document_token: the token that opens documents, where a run named one.
    """

    kind: str
    path: Path
    shape: dict
    assumed: dict
    document_token: str = ""

    @property
    def config(self) -> LlamaConfig:
        """The model's shape, what is not stated as its format's programs have it."""
        return LlamaConfig(**self.assumed | self.shape)

    def tokenizer_file(self) -> Path | None:
        """The file of the tokenizer that lies beside the weights; None where there is none."""
        return tokenizer_in(self.path.parent if self.kind == "llama2c" else self.path)

    def tokenizer(self, file: str = "") -> Tokenizer:
        """The tokenizer in `file`, or the one beside the weights. UserError where there is none, or it is no such model's."""
        from training.data.tokenizer import load_tokenizer

        found = Path(file) if file else self.tokenizer_file()
        if found is None:
            raise UserError(
                f"{self.path} has no tokenizer beside it ({', '.join(TOKENIZERS)}); name one with --tokenizer"
            )
        tokenizer = load_tokenizer(found, self.document_token)
        if tokenizer.bos_id >= self.config.vocab_size:
            raise UserError(
                f"{found} opens documents with token {tokenizer.bos_id}, and the model of {self.path} has {self.config.vocab_size} "
                "tokens: it is another model's; name its own with --tokenizer"
            )
        return tokenizer

    def end_ids(self) -> list[int]:
        """The tokens that end a text as a Hugging Face folder states them, of which BOS may be none; empty for other kinds."""
        stated = []
        for name in ("generation_config.json", "config.json") if self.kind == "huggingface" else ():
            file = self.path / name
            if not stated and file.is_file():
                found = _json_object(file).get("eos_token_id")
                stated = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int for token in stated):
            raise UserError(f"{self.path}: eos_token_id is {stated}, wanted an integer or several")
        return stated

    def options(self) -> dict:
        """What they make of a run's options: their shape, sequences as long as theirs, to a limit, their tokenizer."""
        longest = self.shape["max_seq_len"]
        return {
            **self.assumed,
            **self.shape,
            "max_seq_len": min(longest, DEFAULT_LONGEST) if self.kind == "huggingface" else longest,
            "tokenizer": str(self.tokenizer_file() or ""),
            "document_token": self.document_token,
        }

    def check_agrees(self, config: TrainConfig) -> None:
        """UserError where an option is another than the weights have. Sequences may be shorter than theirs."""
        for name, theirs in self.shape.items():
            ours, longest = getattr(config, name), name == "max_seq_len"
            if ours > theirs if longest else ours != theirs:
                has = f"at most {theirs}" if longest else theirs
                raise UserError(f"{option(name)} is {ours}, and {self.path} has {has}: leave the option out")
        if not config.tokenizer:
            raise UserError(
                f"--init-from {self.path} has no tokenizer beside it ({', '.join(TOKENIZERS)}); name the one that the model "
                "was trained with by --tokenizer"
            )

    def tensors(self) -> Tensors:
        """The tensors by the names of Hugging Face, each read when asked for. UserError for files that are damaged."""
        from model.huggingface.folder import FolderTensors
        from model.llama2c.weights import FileTensors
        from training.checkpoint import files as checkpoint

        try:
            if self.kind == "llama2c":
                return FileTensors(self.path)
            if self.kind == "checkpoint":
                checkpoint.load(self.path)  # which verifies every file
            return FolderTensors(self.path)
        except ValueError as error:  # which names the file
            raise UserError(str(error)) from None
        except OSError as error:
            raise UserError(f"{error.filename or self.path} cannot be read: {error.strerror or error}") from None

    def check_fits(self) -> None:
        """UserError where the weights are not of the shape that is stated: before a model of that shape takes its memory.

        Others than Hugging Face's need no look: the shape of a checkpoint is hashed with it, a llama2.c file's size is held to its.
        """
        from model import huggingface, loading

        if self.kind == "huggingface":
            with self._named():
                loading.check(self.tensors(), huggingface.shapes(self.config))

    def load_into(self, model: Llama, *here) -> None:
        """Copy the weights into a model, tensor by tensor; here: as in `loading.load`. UserError for those that do not fit."""
        from model import loading

        with self._named():
            loading.load(model, self.tensors(), *here)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What does not fit as a UserError that says of which weights it is."""
        try:
            yield
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None


def tokenizer_in(folder: Path) -> Path | None:
    """The file of the tokenizer in a folder; None where there is none. Llama 3's tokenizer.model, which is text, is passed over."""
    present = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    known = [file for file in present if file.suffix != ".model" or _is_sentencepiece(file)]
    return next(iter(known or present), None)


def _is_sentencepiece(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(1) == b"\n"  # the tag of the first piece


def of_option(init_from: str, which: str = "last") -> Pretrained:
    """The weights that --init-from names. UserError as `find`."""
    try:
        is_there = Path(init_from).exists()
    except OSError as error:
        raise UserError(f"--init-from {init_from} cannot be read: {error.strerror}") from None
    if not is_there:
        raise UserError(
            f"--init-from is {init_from!r}, and there is no such file or folder; allowed: scratch, resume, or {KINDS}"
        )
    try:
        return find(init_from, which)
    except UserError as error:
        raise UserError(f"--init-from {init_from}: {error}") from None


def find(path: str | Path, which: str = "last") -> Pretrained:
    """What a path holds. which: the checkpoint of a run's folder. UserError for what is none of `KINDS`, or not there."""
    path = Path(path)
    try:
        is_checkpoint = (path / "manifest.json").is_file() or bool(run_folder.STEP_FOLDER.fullmatch(path.name))
        if which != "last" and (path.is_file() or (path / "config.json").is_file() or is_checkpoint):
            raise UserError(f"--which {which} chooses in a run's folder, and {path} is none; leave the option out")
        if path.is_file():
            return Pretrained("llama2c", path, _shape_of_llama2c(path), dict(llama2c.ASSUMED))
        if (path / "config.json").is_file():
            return Pretrained("huggingface", path, _shape_of_huggingface(path), {})
        if not is_checkpoint:
            if path.exists() and not run_folder.step_folders(path):
                held = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
                raise UserError(f"{path} holds no weights that are known: it has {held}; wanted {KINDS}")
            path = run_folder.find(path, which)
        table = _options_of_checkpoint(path)
        shape = {f.name: table[f.name] for f in fields(LlamaConfig) if f.name in table and f.name != "dropout"}
        return Pretrained("checkpoint", path, shape, {}, table.get("document_token", ""))
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def _shape_of_llama2c(path: Path) -> dict:
    try:
        return llama2c.read_header(path).shape
    except ValueError as error:  # which names the path, perhaps that of a file within one of the others
        raise ValueError(f"{error}; wanted {KINDS}") from None


def _shape_of_huggingface(folder: Path) -> dict:
    path = folder / "config.json"
    table = _json_object(path)
    try:
        return huggingface_config.shape_of(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _json_object(path: Path) -> dict:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path} holds a {type(table).__name__}, wanted an object")
    return table


def _options_of_checkpoint(folder: Path) -> dict:
    path = folder / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise ValueError(f"{path} is not a TOML file: {error}") from None
