"""The batch of a step: a pure function of (seed, step), read from token shards, and its prefetching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from training.config import TrainConfig
from training.data.token_stream import TokenStream
from training.errors import UserError

T = TypeVar("T")


class Batch(NamedTuple):
    """Rows of a global batch.

    Attributes:
        tokens: (n, T) int64.
        targets: (n, T) int64, the token after each.
        first_key: (n, T) int32, where in its row the document of each token begins, 0 where it began before the row;
            None unless asked for.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    first_key: torch.Tensor | None = None


class Batches:
    """All batches of a split, for ever: each epoch sees every window once, in an order of its own.

    Window w is the tokens w * T ... w * T + T of the stream, T + 1 of them, so that each token is a target once; what
    is left over at the end (fewer than T tokens) is not used. The windows of an epoch are permuted by (seed, epoch),
    the epochs are laid end to end, and step s takes the next B sequences from s * B on: a batch may span two epochs,
    and none is cut short.

    Args:
        shards: the split.
        sequence_length: T.
        sequences_per_step: B, the sequences of a step over all micro-steps and ranks.
        seed: not negative.

    Raises:
        UserError: the split has fewer windows than one step takes.
    """

    def __init__(self, shards: TokenStream, *, sequence_length: int, sequences_per_step: int, seed: int):
        assert sequence_length > 0
        assert sequences_per_step > 0
        self.shards = shards
        self.sequence_length = sequence_length
        self.sequences_per_step = sequences_per_step
        self.seed = seed
        self.windows = (shards.n_tokens - 1) // sequence_length
        if self.windows < sequences_per_step:
            raise UserError(
                f"{shards.name} is too short: its {shards.n_tokens} tokens give {self.windows} sequences of "
                f"--max-seq-len {sequence_length}, and a step takes {sequences_per_step} (--batch-size times gradient "
                "accumulation and processes); lower one of them or give more text"
            )
        self._orders: dict[int, np.ndarray] = {}

    @classmethod
    def of_run(cls, config: TrainConfig, shards: TokenStream, micro_steps: int) -> Batches:
        """Those of the options of a run, in steps of so many micro-batches over all ranks."""
        return cls(
            shards,
            sequence_length=config.max_seq_len,
            sequences_per_step=config.batch_size * micro_steps,
            seed=config.seed,
        )

    @property
    def tokens_per_step(self) -> int:
        """Targets of a step over all micro-steps and ranks."""
        return self.sequences_per_step * self.sequence_length

    @property
    def steps_per_epoch(self) -> float:
        """Steps that see each window once; a fraction where the epoch ends within a step."""
        return self.windows / self.sequences_per_step

    def sequences(self, step: int, start: int, count: int, *, with_first_key: bool = False) -> Batch:
        """Rows start ... start + count of the global batch of a step, on the CPU.

        Ranks and micro-steps that take disjoint rows together see the global batch, however it is sliced.
        """
        assert step >= 0
        assert 0 <= start <= start + count <= self.sequences_per_step
        positions = step * self.sequences_per_step + np.arange(start, start + count)
        epochs, places = np.divmod(positions, self.windows)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():  # one, or two where it ends within the step
            rows = epochs == epoch
            windows[rows] = self._order(epoch)[places[rows]]
        tokens = self.shards.read(windows * self.sequence_length, self.sequence_length + 1)
        first_key = _first_key(tokens[:, :-1], self.shards.bos_id) if with_first_key else None
        return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy()), first_key)

    def micro_batches(
        self, step: int, count: int, *, rank: int = 0, world_size: int = 1, with_first_key: bool = False
    ) -> list[Batch]:
        """The global batch of a step cut into `count` micro-batches: those that fall to one of so many processes."""
        rows, share = self.sequences_per_step // count, count // world_size
        mine = range(rank * share, (rank + 1) * share)
        return [self.sequences(step, i * rows, rows, with_first_key=with_first_key) for i in mine]

    def _order(self, epoch: int) -> np.ndarray:
        """The windows of an epoch in the order they are seen, drawn from a generator of its own."""
        if epoch not in self._orders:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.windows)
            # Two are kept, the epochs that a step can span.
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) == 1} | {epoch: order}
            return order
        return self._orders[epoch]


def _first_key(tokens: np.ndarray, bos_id: int) -> torch.Tensor:
    """(n, T) int32: the place of the last BOS at or before each token, 0 where the row has none so far."""
    places = np.arange(tokens.shape[1], dtype=np.int32)
    return torch.from_numpy(np.maximum.accumulate(np.where(tokens == bos_id, places, np.int32(0)), axis=1))


def prefetch(load: Callable[[int], T], start: int, stop: int, *, device: torch.device | str = "cpu") -> Iterator[T]:
    """Yield load(start) ... load(stop - 1) on `device`; a thread loads the next one while the caller uses this one.

    Items are tensors or tuples (named ones too) and lists of them. For CUDA the thread also pins them, and the copy is
    queued on the caller's stream without waiting for it. An error in `load` reaches the caller where its item would
    have; closing the iterator waits for the load in progress and ends the thread.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    if on_cuda and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())

    def load_pinned(index: int) -> T:
        item = load(index)
        return _map_tensors(torch.Tensor.pin_memory, item) if on_cuda else item

    # A thread starts out on GPU 0: pinning from it would open a context there for every process.
    initializer = (lambda: torch.cuda.set_device(device)) if on_cuda else None
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=initializer) as thread:
        upcoming = thread.submit(load_pinned, start) if start < stop else None
        for index in range(start, stop):
            item = upcoming.result()
            upcoming = thread.submit(load_pinned, index + 1) if index + 1 < stop else None
            yield (
                _map_tensors(lambda tensor: tensor.to(device, non_blocking=True), item)
                if device.type != "cpu"
                else item
            )


def _map_tensors(function: Callable[[torch.Tensor], torch.Tensor], item: T) -> T:
    if isinstance(item, torch.Tensor):
        return function(item)
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(_map_tensors(function, part) for part in item))
    if isinstance(item, tuple | list):
        return type(item)(_map_tensors(function, part) for part in item)
    return item
