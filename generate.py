"""Text from a checkpoint: `python generate.py out --prompt "def "`."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from unicodedata import normalize

import tyro

from kernels import grammar
from model.config import option
from training import pretrained, spelling
from training.config import TrainConfig, is_text, why_no_kernels
from training.errors import UserError
from training.log import console
from training.log.transcript import GrowingText, Transcript
from training.machine import out_of_memory_is_told, require_compiler
from training.stopping import exit_statuses


@dataclass(kw_only=True)
class GenerateConfig:
    """Continue prompts with a trained model. Texts go to stdout as they grow, the speed to stderr."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")] = "out"
    """A run's folder, one checkpoint in it such as out/step-00000400, a Hugging Face folder of a Llama, or a llama2.c file."""
    which: str = "last"
    """Checkpoint of a run's folder: last, best, or its name."""
    tokenizer: str = ""
    """Tokenizer file; empty: the one beside the weights."""
    rope_precision: Literal["auto", "float64", "float32"] = "auto"
    """Of the RoPE angles; auto: as the run was trained, float64 for others' weights. float32 is what transformers computes with."""
    prompt: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Text to continue; none, or an empty one: from the start of a document. Can be given several times."""
    prompts_file: str = ""
    """A text file with more prompts, one a line; empty lines are left out."""
    batch_size: int = 8
    """Prompts that are continued at once."""
    max_new_tokens: int = 200
    """Tokens to add to each, at most; a sequence ends at the model's max_seq_len."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token every time."""
    top_k: int = 0
    """Draw from the likeliest k tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Draw from tokens at least this many times as likely as the likeliest; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the text has become less likely."""
    seed: int = 1337
    """Seed of the draws. A prompt gets the same text alone and beside others; one given twice gets two texts."""
    stop: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """A text ends before this. Can be given several times."""
    interactive: bool = False
    """Write on together: each line that you type is put behind the text, and the model goes on; Ctrl-D ends."""
    compile: bool = False
    """torch.compile the step of one token: it takes long to start, and is faster from then on."""
    kernels: str = "auto"
    """Triton kernels, as in training; auto: all of them on a GPU."""
    capture: bool = True
    """On a GPU: record the step of one token as a CUDA graph."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype, as in training."""

    def check(self) -> None:
        """Raise UserError, naming the option, what was found and what is allowed."""
        for name, allowed, words in (
            ("max_new_tokens", 0 <= self.max_new_tokens < 2**63, "at least 0"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0, and finite"),
            ("top_k", 0 <= self.top_k < 2**63, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "at least 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0, and finite"),
            ("seed", 0 <= self.seed < 2**63, "at least 0, and less than 2^63"),
        ):
            if not allowed:
                raise UserError(f"{option(name)} is {getattr(self, name)}; it must be {words}")
        for name, texts in (("prompt", self.prompt), ("stop", self.stop)):
            for text in texts:
                if not is_text(text):
                    raise UserError(f"{option(name)} is {text!r}, which is not UTF-8 text")
        if "" in self.stop:
            raise UserError("--stop is empty, which every text begins with; name a text")
        if self.interactive and (self.prompts_file or len(self.prompt) > 1):
            raise UserError("--interactive goes on with one text; give one --prompt at most, and no --prompts-file")


def main() -> None:
    """Parse the command line and print the texts. A user's mistake is one line on stderr and exit status 2."""
    with exit_statuses(), out_of_memory_is_told("lower --batch-size or --max-new-tokens, or take --device cpu"):
        config = spelling.read(GenerateConfig, sys.argv[1:], positional=("checkpoint",))
        config.check()
        prompts = read_prompts(config)
        writer = Writer(config)
        if config.interactive:
            writer.converse(prompts[0][1])
        else:
            writer.write(prompts)


def read_prompts(config: GenerateConfig) -> list[tuple[str, str]]:
    """Each prompt behind the words that name it in a message. UserError for a file that can't be read or holds none."""
    prompts = [("--prompt", text) for text in config.prompt]
    if path := config.prompts_file:
        try:
            # Without the mark that some editors put in front; other characters than \n that end lines are of a prompt.
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise UserError(f"--prompts-file {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts-file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        of_file = [(f"--prompts-file {path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
        if not of_file:
            raise UserError(f"--prompts-file {path} holds no prompt; one a line is wanted")
        prompts += of_file
    return prompts or [("--prompt", "")]


def typed_lines() -> Iterator[str]:
    """The lines of stdin. UserError for what is no text in its encoding."""
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UserError(f"what is typed is not {sys.stdin.encoding} text: {error.reason}") from None


def load(config: GenerateConfig):
    """The model that `config.checkpoint` names, on its device, and its tokenizer. UserError where it can't be had."""
    weights = pretrained.find(config.checkpoint, config.which)
    # What a run was trained with does not bind who reads it.
    run = TrainConfig(**vars(weights.config), device=config.device, dtype=config.dtype, compile=config.compile)
    run.kernels = "none" if config.kernels == "auto" else config.kernels
    run.rope_precision = run.rope_precision if config.rope_precision == "auto" else config.rope_precision
    run.check()
    # torch, now that a mistake in the path or an option has been answered
    import kernels
    from model import Llama
    from model.generation import lay_out_for_decoding
    from training.device import resolve_device, resolve_dtype

    device = resolve_device(run)
    if config.kernels == "auto" and device.type == "cuda" and not why_no_kernels(run, has_gpu=True):
        run.kernels = "all" if grammar.attention_serves(run.head_dim) else "all,-attention"
    require_compiler(run, device)
    weights.check_fits()
    with device:
        model = Llama(run.shape(), kernels.select(run.kernels, run.n_layers), resolve_dtype(run, device))
    weights.load_into(model)
    lay_out_for_decoding(model)
    return model.eval(), weights.tokenizer(config.tokenizer)


class Writer:
    """A model and its tokenizer at work: prompts in, texts out on stdout."""

    def __init__(self, config: GenerateConfig):
        self._config = config
        self._model, self._tokenizer = load(config)
        from model.sampling import Sampling  # imports torch: see load

        self._end_ids = pretrained.find(config.checkpoint, config.which).end_ids()
        self._sampling = Sampling(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
        )

    def write(self, prompts: list[tuple[str, str]]) -> None:
        """Continue the prompts, given with what they are called. UserError, before a text is begun, where one can't be."""
        from model.generation import copies_before

        tokens = [self._encode(text, name) for name, text in prompts]
        transcript = Transcript(len(tokens))
        at_once = self._config.batch_size
        copies = copies_before(tokens)
        start, n_new = time.perf_counter(), 0
        for first in range(0, len(tokens), at_once):
            batch = slice(first, first + at_once)
            texts = [GrowingText(self._tokenizer, prompt[1:], self._config.stop) for prompt in tokens[batch]]
            for i, text in enumerate(texts, first):
                transcript.write(i, text.prompt)
            n_new += self._continue(tokens[batch], texts, transcript, first, copies[batch])
        seconds = time.perf_counter() - start
        print(f"{n_new} tokens in {seconds:.2f} s: {n_new / seconds:.1f} tokens/s", file=sys.stderr)

    def converse(self, text: str) -> None:
        """Put what is typed behind the text, a line at a time, and let the model go on. UserError where its context is full."""
        if text:
            console.write(text)
        for line in typed_lines():
            text += line.removesuffix("\n")
            tokens = self._encode(text, "the text")
            growing = GrowingText(self._tokenizer, tokens[1:], self._config.stop)
            self._continue([tokens], [growing], Transcript(1))
            text += growing.text

    def _encode(self, text: str, name: str) -> list[int]:
        """The tokens of a prompt, behind the one that opens a document."""
        tokenizer, limit = self._tokenizer, self._model.config.max_seq_len
        for character in sorted(set(text)):
            between = f"a{character}a"
            back = tokenizer.decode(tokenizer.encode(between))
            # A tokenizer may write a character in another form of Unicode.
            if character not in back and normalize("NFKC", between) != normalize("NFKC", back):
                raise UserError(f"{name} has {character!r}, for which this model's tokenizer has no token")
        tokens = tokenizer.encode(text, bos=True)
        if (largest := max(tokens)) >= (n_tokens := self._model.config.vocab_size):
            raise UserError(
                f"{name} has token {largest} ({tokenizer.decode([largest])!r}) of a tokenizer with {tokenizer.n_tokens}, and the "
                f"model has {n_tokens}: leave that out, or name the model's own tokenizer with --tokenizer"
            )
        if len(tokens) >= limit:
            raise UserError(
                f"{name} has {len(tokens)} tokens; the model's max_seq_len is {limit}, so {limit - 1} are allowed"
            )
        return tokens

    def _continue(
        self,
        prompts: list[list[int]],
        texts: list[GrowingText],
        transcript: Transcript,
        first: int = 0,
        copies: list[int] | None = None,
    ) -> int:
        """Let a batch of texts grow and print them, the first as the transcript's number `first`. Returns how many tokens came."""
        from model.generation import generate

        config = self._config

        def on_token(i: int, token: int) -> bool:
            transcript.write(first + i, texts[i].write(token))
            return texts[i].ended or token in self._end_ids

        def on_end(i: int) -> None:
            transcript.write(first + i, texts[i].close())
            transcript.end(first + i)

        new = generate(
            self._model,
            prompts,
            config.max_new_tokens,
            self._sampling,
            seed=config.seed,
            copies=copies,
            stop_token=self._tokenizer.bos_id,
            ops=self._model.ops,
            wrap=self._wrap,
            on_token=on_token,
            on_end=on_end,
        )
        return sum(map(len, new))

    def _wrap(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step of one token, compiled and captured as asked for."""
        import torch

        from training.step.capture import Captured

        if self._config.compile:
            step = torch.compile(step, fullgraph=True, dynamic=False)
        on_gpu = self._model.cos.is_cuda
        return Captured(step, torch.cuda.Stream()) if on_gpu and self._config.capture else step


if __name__ == "__main__":
    main()
