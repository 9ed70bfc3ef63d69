"""What the timed steps read: tokens as frequent as those of text.

Which tokens a batch holds decides what a step costs where equal ones meet: the embedding's gradient adds up the rows of each token.
Uniformly drawn tokens hide that. So the batch is the first one of the prepared corpus where the data folder has one for this
vocabulary, else it is drawn by the Zipf-Mandelbrot law, p ~ 1 / (rank + 2.7) (https://en.wikipedia.org/wiki/Zipf-Mandelbrot_law),
by which 3.8% of the tokens are the most frequent one in a vocabulary of 4096, 2.5% in one of 128256.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from training.config import TrainConfig
from training.data.batches import Batches
from training.data.shards import TokenShards, open_dataset

MicroBatches = list[tuple[Tensor, Tensor]]
"""(tokens, targets), each (B, T) int64."""


def draw(config: TrainConfig, source: str = "auto") -> tuple[MicroBatches, dict]:
    """The micro-batches of a step, on the CPU, and where they are from.

    source: auto, zipf or uniform. The second result has `source`, which is the name of the corpus, zipf or uniform, and
    `most_frequent`, the share of the tokens that are the most frequent one.
    """
    shards = prepared(config) if source == "auto" else None
    micro_batches = first_step(shards, config) if shards else drawn(config, uniform=source == "uniform")
    counts = torch.bincount(torch.cat([tokens.flatten() for tokens, _ in micro_batches]))
    name = _corpus_name(config.data) if shards else "uniform" if source == "uniform" else "zipf"
    return micro_batches, {"source": name, "most_frequent": counts.max().item() / counts.sum().item()}


def prepared(config: TrainConfig) -> TokenShards | None:
    """The training split of the newest corpus of `config.data` and `config.vocab_size` in the data folder.

    None where there is none, or it is too short for a step. Nothing is prepared: that would take longer than the bench.
    """
    name = _corpus_name(config.data)
    manifests = Path(config.data_dir).glob(f"*-{config.vocab_size}-*/manifest.json")
    for manifest in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
        if json.loads(manifest.read_text(encoding="utf-8")).get("source") == name:
            shards = open_dataset(manifest.parent).train
            sequences = config.batch_size * config.gradient_accumulation_steps
            return shards if shards.n_tokens > sequences * config.max_seq_len else None
    return None


def _corpus_name(data: str) -> str:
    """What a prepared corpus of `--data` is called in its manifest: a path by its last part."""
    return data if data in ("stdlib", "tinystories") else Path(data).resolve().name


def first_step(shards: TokenShards, config: TrainConfig) -> MicroBatches:
    """What train.py reads in its first step."""
    rows, micro_steps = config.batch_size, config.gradient_accumulation_steps
    batches = Batches(
        shards, sequence_length=config.max_seq_len, sequences_per_step=rows * micro_steps, seed=config.seed
    )
    return [tuple(batches.sequences(0, i * rows, rows)[:2]) for i in range(micro_steps)]


def drawn(config: TrainConfig, uniform: bool = False) -> MicroBatches:
    """Tokens drawn independently of each other, uniformly or by the Zipf-Mandelbrot law, id 0 the most frequent."""
    generator = torch.Generator().manual_seed(config.seed)
    rank = torch.arange(1, config.vocab_size + 1, dtype=torch.float64)
    weights = torch.ones_like(rank) if uniform else 1 / (rank + 2.7)
    shape = (config.gradient_accumulation_steps, config.batch_size, config.max_seq_len + 1)
    n_tokens = shape[0] * shape[1] * shape[2]
    tokens = torch.multinomial(weights, n_tokens, replacement=True, generator=generator).view(shape)
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
