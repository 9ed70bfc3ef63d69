"""Weights for other programs: `python export.py out OUT --format huggingface`, or `--format llama2c`."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from training import pretrained, spelling
from training.errors import UserError
from training.log import console
from training.pretrained import Pretrained
from training.stopping import exit_statuses


@dataclass(kw_only=True)
class ExportConfig:
    """Write a trained model as another program reads it."""

    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS")]
    """A run's folder, one checkpoint in it, a Hugging Face folder of a Llama, or a llama2.c file."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Folder to make (huggingface) or file to write (llama2c, with tokenizer.bin beside it); it must not be there yet."""
    format: Literal["huggingface", "llama2c"] = "huggingface"
    """huggingface: config.json, safetensors, tokenizer.json, as transformers reads them. llama2c: a file for run.c."""
    which: str = "last"
    """Checkpoint of a run's folder: last, best, or its name."""
    tokenizer: str = ""
    """Tokenizer file; empty: the one beside the weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """huggingface: of the weights written. float32 is what a run trains; the others round it."""
    max_file_bytes: int = 5 * 10**9
    """huggingface: weights above this are split into files of at most this size, and an index."""
    max_position_embeddings: int = 0
    """huggingface: longest sequence that config.json states; 0: the max_seq_len that the model was trained with."""
    version: Literal[0, 1] = 0
    """llama2c: of the format. run.c reads 0; 1 has a magic number and a header of 256 bytes."""

    def check(self) -> None:
        """Raise UserError, naming the option, what was found and what is allowed."""
        for name, least in (("max_file_bytes", 1), ("max_position_embeddings", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if self.format == "llama2c" and self.dtype != "float32":
            raise UserError(f"--dtype {self.dtype} is for --format huggingface; a llama2c file holds float32")
        if self.format == "huggingface" and self.version:
            raise UserError(f"--version {self.version} is for --format llama2c")
        out = Path(self.out)
        if out.name in ("", ".."):
            raise UserError(f"OUT is {self.out!r}; it must end in the name of what is to be made")
        if self.format == "llama2c" and out.name == "tokenizer.bin":
            raise UserError(
                f"OUT is {self.out!r}, as the tokenizer beside the weights will be called; choose another name"
            )
        try:
            if out.exists() and not (self.format == "huggingface" and out.is_dir() and not any(out.iterdir())):
                raise UserError(f"{out} is there already; name what is not, or remove it first")
        except OSError as error:  # a folder that may not be looked into, a name that is too long
            raise UserError(f"{out} cannot be written: {error.strerror}") from None


def main() -> None:
    """Parse the command line and write. A user's mistake is one line on stderr and exit status 2."""
    with exit_statuses():
        config = spelling.read(ExportConfig, sys.argv[1:], positional=("weights", "out"))
        config.check()
        weights = pretrained.find(config.weights, config.which)
        write = write_huggingface if config.format == "huggingface" else write_llama2c
        try:
            told = write(config, weights)
        except OSError as error:
            raise UserError(f"{config.out} cannot be written: {error.strerror or error}") from None
        console.write(told)


def write_huggingface(config: ExportConfig, weights: Pretrained) -> str:
    """Write a folder that transformers reads. Returns what to say of it. UserError for what cannot be told in one."""
    import torch

    from model import huggingface
    from model.huggingface import config as configs
    from model.huggingface import folder
    from model.huggingface import tokenizer as tokenizers
    from model.loading import check

    shape, tensors, tokenizer = weights.config, weights.tensors(), weights.tokenizer(config.tokenizer)
    bos_id = tokenizer.bos_id
    end_ids = weights.end_ids()
    if bos_id not in end_ids:
        end_ids.append(bos_id)  # it opens each document, and so ends the one before
    with _named(weights.path):
        check(tensors, huggingface.shapes(shape))
    with _named(config.tokenizer or weights.tokenizer_file()):
        if tokenizer.file_name == "tokenizer.json":
            tokenizer_json = tokenizers.opened_by(tokenizer.content, bos_id)
        else:
            tokenizer_json = tokenizers.tokenizer_json(tokenizer.content, bos_id)
    longest = config.max_position_embeddings or shape.max_seq_len
    contents = {
        "config.json": configs.config_json(
            shape, dtype=config.dtype, bos_id=bos_id, end_ids=end_ids, max_position_embeddings=longest
        ),
        "generation_config.json": configs.generation_config_json(bos_id=bos_id, end_ids=end_ids),
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": tokenizers.tokenizer_config(tokenizer_json, bos_id, end_ids[0], longest),
    }
    with _draft(Path(config.out)) as draft:
        draft.mkdir(parents=True)
        folder.save(draft, shape, tensors, getattr(torch, config.dtype), config.max_file_bytes)
        for name, content in contents.items():
            (draft / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if tokenizer.file_name != "tokenizer.json":
            (draft / tokenizer.file_name).write_bytes(tokenizer.content)
    return f"{config.out}: {weights.path} for transformers, in {config.dtype}"


def write_llama2c(config: ExportConfig, weights: Pretrained) -> str:
    """Write a file that run.c reads, and tokenizer.bin beside it. Returns what to say of it. UserError for what run.c cannot."""
    from model import huggingface
    from model.llama2c import tokenizer as tokenizers
    from model.llama2c import weights as llama2c
    from model.llama2c.header import write_header
    from model.loading import check

    shape, tensors, tokenizer = weights.config, weights.tensors(), weights.tokenizer(config.tokenizer)
    with _named(weights.path):
        check(tensors, huggingface.shapes(shape))
        write_header(shape, config.version)  # refuses before anything is written
    with _named(config.tokenizer or weights.tokenizer_file()):
        if tokenizer.file_name != "tokenizer.model":
            raise ValueError("run.c reads sentencepiece's tokenizers only; --format huggingface takes this one")
        tokenizer_bin = tokenizers.tokenizer_bin(tokenizer.content, shape.vocab_size)
    out, beside = Path(config.out), Path(config.out).parent / "tokenizer.bin"
    if beside.exists() and beside.read_bytes() != tokenizer_bin:
        raise UserError(f"{beside} is there already and of another tokenizer; write {out.name} into another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _draft(beside) as draft_beside, _draft(out) as draft:
        draft_beside.write_bytes(tokenizer_bin)
        llama2c.save(draft, shape, tensors, config.version)
    return f"{out}: {weights.path} for run.c, version {config.version}, with {beside}"


@contextmanager
def _named(path: str | Path | None) -> Iterator[None]:
    """What the formats refuse as a UserError that says of which file it is."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


@contextmanager
def _draft(out: Path) -> Iterator[Path]:
    """A name beside `out` to write under; it becomes `out` when all is written, and is removed when something fails."""
    draft = out.with_name(f".tmp-{out.name}")
    _remove(draft)  # what a killed export left
    try:
        yield draft
        draft.replace(out)
    finally:
        _remove(draft)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
