"""What an evaluation reports: the loss of both splits, bits per byte, and a sample of text."""

import math

from model import generation
from model.sampling import Sampling
from training.config import TrainConfig
from training.data.batches import Batch, Batches, prefetch
from training.data.shards import Dataset
from training.distributed import World
from training.errors import UserError
from training.log.metrics import Metrics
from training.progress import Progress
from training.step.trainer import Trainer


class Evaluation:
    """Measures a model on the same batches each time: the first `eval_iters` of each split, or all where it has fewer.

    Raises UserError where a split has less than one batch, or --sample-prompt is no text.
    """

    def __init__(self, config: TrainConfig, trainer: Trainer, dataset: Dataset, world: World):
        self._config, self._trainer, self._dataset, self._world = config, trainer, dataset, world
        self._device = trainer.model.cos.device
        self._train = Batches.of_run(config, dataset.train, 1)
        try:
            self._val = Batches.of_run(config, dataset.val, 1)
        except UserError as error:
            own = config.data == "tinystories"  # which has a validation split of its own
            more = "" if own else f", or hold more of it out: --val-fraction is {config.val_fraction}"
            raise UserError(f"{error}{more}") from None
        self._prompt = [dataset.tokenizer.bos_id, *dataset.tokenizer.encode(config.sample_prompt)]

    def report(self, progress: Progress, metrics: Metrics | None) -> bool:
        """Report the losses and, in the process that has the metrics, a sample. Whether validation is better than ever before.

        Every process calls it; the best loss so far is kept in `progress`.
        """
        train_loss, val_loss, bits_per_byte = self.losses()
        if metrics:
            metrics.evaluation(progress.step, train_loss, val_loss, bits_per_byte, self.sample())
        better = val_loss < progress.best_val_loss
        if better:
            progress.best_val_loss = val_loss
        return better

    def losses(self) -> tuple[float, float, float]:
        """Train and validation loss in nats a token, and bits per byte of the validation text.

        Every process calls it; the batches are shared among them.
        """
        val_loss = self._loss(self._val)
        bits_per_token = val_loss / math.log(2)
        return (
            self._loss(self._train),
            val_loss,
            bits_per_token * self._dataset.val.n_tokens / self._dataset.val.n_bytes,
        )

    def _loss(self, batches: Batches) -> float:
        count = min(self._config.eval_iters, int(batches.steps_per_epoch))
        mine = range(self._world.rank, count, self._world.size)

        def load(i: int) -> Batch:
            (batch,) = batches.micro_batches(mine[i], 1, with_first_key=self._config.packed_documents)
            return batch

        return self._trainer.evaluate(prefetch(load, 0, len(mine), device=self._device))

    def sample(self) -> str | None:
        """Text that the model writes after --sample-prompt, the prompt included; None where none is asked for."""
        config, tokenizer = self._config, self._dataset.tokenizer
        if not config.sample_tokens:
            return None
        prompt = self._prompt[: config.max_seq_len - 1]
        model = self._trainer.model
        sampling = Sampling(temperature=0.8)
        (new,) = generation.generate(model, [prompt], config.sample_tokens, sampling, seed=config.seed)
        return tokenizer.decode(prompt[1:] + new)
