"""What an evaluation reports: the loss of both splits, bits per byte, and a sample of text."""

import contextlib
import math
from collections.abc import Iterator

import torch

from model import Llama, generation
from model.sampling import Sampling
from training.config import TrainConfig
from training.data.batches import Batch, Batches, prefetch
from training.data.shards import Dataset
from training.data.tokens_of_others import TokensOfOthers
from training.distributed import World
from training.errors import UserError
from training.log.metrics import Metrics
from training.progress import Progress
from training.step.trainer import Trainer
from training.stopping import Stopped, StopSignal


class Evaluation:
    """Measures a model on the same batches each time: the first `eval_iters` of each split, or all where it has fewer.

    Attributes:
        remark: what there is to say of it before it is made, or nothing.

    Raises UserError where a split has less than one batch, or --sample-prompt is no text.
    """

    def __init__(self, config: TrainConfig, trainer: Trainer, dataset: Dataset, world: World):
        self._config, self._trainer, self._dataset, self._world = config, trainer, dataset, world
        self._device = trainer.model.cos.device
        self._train = Batches.of_run(config, dataset.train, 1)
        try:
            self._val = Batches.of_run(config, dataset.val, 1)
        except UserError as error:
            # These have a validation split of their own.
            own = config.data == "tinystories" or isinstance(dataset.val, TokensOfOthers)
            more = "" if own else f", or hold more of it out: --val-fraction is {config.val_fraction}"
            raise UserError(f"{error}{more}") from None
        prompt = [dataset.tokenizer.bos_id, *dataset.tokenizer.encode(config.sample_prompt)]
        longest = config.max_seq_len - 1
        self._prompt = prompt[:longest]
        self.remark = ""
        if config.sample_tokens and not longest:
            self.remark = "--sample-tokens has no effect: --max-seq-len is 1, which BOS fills"
        elif config.sample_tokens and len(prompt) > longest:
            self.remark = (
                f"--sample-prompt has {len(prompt)} tokens: samples continue the first {longest} (--max-seq-len)"
            )

    def report(self, progress: Progress, metrics: Metrics | None, stop: StopSignal) -> bool:
        """Report the losses and, in the process that has the metrics, a sample. Whether validation is better than ever before.

        Every process calls it; the best loss so far is kept in `progress`. Stopped, in all of them, where one was asked to stop
        before the losses were known; after that only the sample is left out.
        """
        self._world.at = f"the evaluation before step {progress.step}"
        train_loss, val_loss, bits_per_byte = self.losses(stop)
        sample = None
        if self._config.sample_tokens and self._prompt:
            with self._trainer.whole_model() as model:
                if metrics:
                    with contextlib.suppress(Stopped), stop.interrupting():
                        sample = self.sample(model)
        if metrics:
            metrics.evaluation(progress.step, train_loss, val_loss, bits_per_byte, sample)
        better = val_loss < progress.best_val_loss
        if better:
            progress.best_val_loss = val_loss
        return better

    def losses(self, stop: StopSignal) -> tuple[float, float, float]:
        """Train and validation loss in nats a token, and bits per byte of the validation text.

        Every process calls it; the batches are shared among them. Stopped as in `report`.
        """
        with stop.interrupting(wanted=self._world.size == 1):
            val_loss, train_loss = (self._loss(batches, stop) for batches in (self._val, self._train))
        bits_per_token = val_loss / math.log(2)
        return train_loss, val_loss, bits_per_token * self._dataset.val.n_tokens / self._dataset.val.n_bytes

    def _loss(self, batches: Batches, stop: StopSignal) -> float:
        count, world = min(self._config.eval_iters, int(batches.steps_per_epoch)), self._world

        def load(turn: int) -> Batch:
            index = turn * world.size + world.rank
            (batch,) = batches.micro_batches(min(index, count - 1), 1, with_first_key=self._config.packed_documents)
            # All take equally many turns. In the last one some have no batch left: there no target counts.
            return batch if index < count else batch._replace(targets=torch.full_like(batch.targets, -100))

        def heeding() -> Iterator[Batch]:
            for batch in prefetch(load, 0, -(-count // world.size), device=self._device):
                if world.totals(stop.asked)[0]:
                    raise Stopped
                yield batch

        return self._trainer.evaluate(heeding())

    def sample(self, model: Llama) -> str:
        """Text that the model writes after --sample-prompt, the prompt included."""
        config, tokenizer = self._config, self._dataset.tokenizer
        sampling = Sampling(temperature=0.8)
        (new,) = generation.generate(model, [self._prompt], config.sample_tokens, sampling, seed=config.seed)
        return tokenizer.decode(self._prompt[1:] + new)
