"""Tokens a second of generated text against what others would take: `python -m bench.generation --preset reference`.

Every variant continues the same prompt of one token until `--tokens` are there, in one stream and in several at once, and takes the
likeliest token each time:

    cached             ours: `model.generation`, one token a step against a cache
    cached-compiled    the same, the step under torch.compile; on a GPU `cached-captured` is the step as one CUDA graph
    whole-sequence     the sequence again for each token, as the sampler of llama2.c's sample.py does
    transformers       `generate` of transformers with its cache, where it is installed

They run in turn, so that a machine whose speed drifts is as slow to one as to the others. All have the same random weights, and
the result says how many of the tokens agree with those of the whole sequence: that they compute one thing. Compiling is not in the
time.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

import kernels
from bench import command
from bench.measure import Timing, environment, time_in_turn, version, write_json
from kernels.linear import linear
from model import Llama, huggingface
from model.generation import generate, lay_out_for_decoding
from model.sampling import Sampling
from training.config import TrainConfig, defaults
from training.device import resolve_device, resolve_dtype
from training.errors import UserError
from training.step.capture import Captured

VARIANTS = ("cached", "cached-compiled", "cached-captured", "whole-sequence", "transformers")
GREEDY = Sampling(temperature=0)
PROMPT = [1]

Tokens = list[list[int]]


@dataclass(kw_only=True)
class GenerationBench:
    """Time the generation of text."""

    preset: str = "reference"
    """Shape of the model, as in train.py."""
    streams: list[int] = field(default_factory=lambda: [1, 8])
    """Texts at once."""
    tokens: int = 0
    """Tokens of a text, its prompt of one included; 0: as many as the model's max_seq_len."""
    variants: list[str] = field(default_factory=list)
    """What to time; empty: all that run here."""
    repeats: int = 3
    """Counted runs of each, after one that is not."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto: as in train.py."""
    json: str = ""
    """File to write the result to; it grows as numbers of streams are done."""


def measure(options: GenerationBench, console: Console) -> dict:
    """Time what was asked for, print a table and return (and write, where asked) the result."""
    command.check_at_least(options, repeats=1, tokens=0)
    command.check_writable(options.json)
    for variant in options.variants:
        if variant not in VARIANTS:
            raise UserError(f"--variants is {variant!r}; allowed: {', '.join(VARIANTS)}")
    if not options.streams or min(options.streams) < 1:
        raise UserError(f"--streams is {options.streams}; one or more numbers of at least 1 are wanted")
    config = defaults(options.preset)
    length = options.tokens or config.max_seq_len
    if not 2 <= length <= config.max_seq_len:
        raise UserError(f"--tokens is {length}; allowed: 2 to {config.max_seq_len}, the preset's max_seq_len")
    config.device, config.dtype = options.device, options.dtype
    config.check()
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    absent = why_absent(device)
    wanted = [name for name in options.variants or VARIANTS if name not in absent]
    ways = Ways(config, dtype, device, length - len(PROMPT), wanted)
    result = {
        "bench": "generation",
        "preset": options.preset,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": length,
    }
    result |= {"absent": absent, "rows": [], "environment": environment() | {"transformers": version("transformers")}}
    for streams in options.streams:
        calls = {name: functools.partial(ways.run, name, streams) for name in wanted}
        with console.status("") as status:
            timings = time_in_turn(calls, repeats=options.repeats, progress=status.update)
        result["rows"] += rows(streams, length - len(PROMPT), timings, ways.last)
        if options.json:
            write_json(options.json, result)
    console.print(table(result))
    return result


def why_absent(device: torch.device) -> dict[str, str]:
    """Variants that can't run here, and why."""
    absent = {} if version("transformers") else {"transformers": "not installed"}
    return absent if device.type == "cuda" else absent | {"cached-captured": "no GPU"}


class Ways:
    """The variants on one model of random weights. `last` holds the tokens that each gave last."""

    def __init__(self, config: TrainConfig, dtype: torch.dtype, device: torch.device, n_new: int, wanted: list[str]):
        torch.manual_seed(0)
        self._n_new = n_new
        self.last: dict[str, Tokens] = {}
        spec = "all" if device.type == "cuda" else "none"
        with device:
            self._model = Llama(config.shape(), kernels.select(spec, config.n_layers), dtype).eval()
        self._theirs = None
        if "transformers" in wanted:
            from bench.peers.transformers_llama import TransformersLlama

            peer = TransformersLlama(config.shape()).llama.to(device, dtype).eval()
            state = {name: x.detach() for name, x in self._model.state_dict().items()}
            peer.load_state_dict(huggingface.unpack(config.shape(), state), strict=False)  # a tied head is in it once
            peer.generation_config.eos_token_id = None  # to the last token
            peer.generation_config.pad_token_id = 0
            self._theirs = peer
        lay_out_for_decoding(self._model)
        ours = {
            "cached": lambda step: step,
            "cached-compiled": lambda step: torch.compile(step, fullgraph=True, dynamic=False),
            "cached-captured": lambda step: Captured(step, torch.cuda.Stream()),
        }
        self._ways: dict[str, Callable[[int], Tokens]] = {
            name: functools.partial(self._cached, wrap) for name, wrap in ours.items()
        }
        self._ways |= {"whole-sequence": self._whole_sequence, "transformers": self._transformers}

    def run(self, name: str, streams: int) -> None:
        """Generate by one variant."""
        self.last[name] = self._ways[name](streams)

    def _cached(self, wrap: Callable, streams: int) -> Tokens:
        return generate(self._model, [PROMPT] * streams, self._n_new, GREEDY, ops=self._model.ops, wrap=wrap)

    @torch.no_grad()
    def _whole_sequence(self, streams: int) -> Tokens:
        model = self._model
        tokens = torch.tensor([PROMPT] * streams, device=model.cos.device)
        for _ in range(self._n_new):
            hidden = model.hidden(tokens)[:, -1]  # as there, only the last token's logits are computed
            logits = linear(hidden, model.output.weight, model.output.compute_weight)
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
        return tokens[:, len(PROMPT) :].tolist()

    def _transformers(self, streams: int) -> Tokens:
        tokens = torch.tensor([PROMPT] * streams, device=self._model.cos.device)
        options = {"do_sample": False, "use_cache": True, "max_new_tokens": self._n_new}
        continued = self._theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return continued[:, len(PROMPT) :].tolist()


def rows(streams: int, n_new: int, timings: dict[str, Timing], tokens: dict[str, Tokens]) -> list[dict]:
    """A row a variant: tokens a second of all streams together, against the medians of two others, equal tokens as a share."""
    found = []
    for name, timing in timings.items():
        row = {"streams": streams, "variant": name, "ms_per_token": 1000 * timing.median / n_new}
        row |= {
            f"tokens_per_s{end}": streams * n_new / seconds
            for end, seconds in (("", timing.median), ("_min", timing.maximum), ("_max", timing.minimum))
        }
        for other in ("whole-sequence", "transformers"):
            if other in timings and other != name:
                row[f"vs_{other}"] = timings[other].median / timing.median
        if "whole-sequence" in tokens:
            pairs = zip(itertools.chain(*tokens[name]), itertools.chain(*tokens["whole-sequence"]), strict=True)
            row["agrees"] = sum(a == b for a, b in pairs) / (streams * n_new)
        found.append(row)
    return found


def table(result: dict) -> Table:
    """The rows as people read them."""
    env = result["environment"]
    title = f"{result['preset']}, {result['tokens']} tokens: {result['dtype']}, {env['device']}, torch {env['torch']}"
    shown = Table(title=title, caption="\n".join(f"{name}: {why}" for name, why in result["absent"].items()))
    for heading in ("streams", "variant", "tokens/s", "least, most", "vs whole", "vs transformers", "equal tokens"):
        shown.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in result["rows"]:
        ratios = [f"{row[key]:.2f}x" if key in row else "" for key in ("vs_whole-sequence", "vs_transformers")]
        spread = f"{row['tokens_per_s_min']:.1f}, {row['tokens_per_s_max']:.1f}"
        agrees = f"{row['agrees']:.1%}" if "agrees" in row else ""
        shown.add_row(str(row["streams"]), row["variant"], f"{row['tokens_per_s']:.1f}", spread, *ratios, agrees)
    return shown


if __name__ == "__main__":
    command.run(GenerationBench, __doc__, measure)
