"""When a run is saved, and what becomes of it where a save fails."""

from training.checkpoint import state
from training.config import TrainConfig
from training.data.shards import Dataset
from training.distributed import World
from training.errors import UserError
from training.log.metrics import Metrics
from training.progress import Progress
from training.step.trainer import Trainer
from training.stopping import StopSignal


class Saves:
    """The checkpoints of a run. Every process calls it, and goes on when all know whether there is one more.

    A save that fails, on a full disk for one, leaves the earlier ones and does not end the run: it is said, and tried again
    at the next evaluation. One that is begun is finished, whatever signals come. metrics: None in all processes but the main
    one, which reports.
    """

    def __init__(
        self,
        config: TrainConfig,
        trainer: Trainer,
        dataset: Dataset,
        progress: Progress,
        world: World,
        metrics: Metrics | None,
        stop: StopSignal,
    ):
        self._config, self._trainer, self._dataset = config, trainer, dataset
        self._progress, self._world, self._metrics = progress, world, metrics
        self._stop = stop
        self._best_saved = progress.best_val_loss
        self._failed = False

    def after_evaluation(self, better: bool) -> None:
        """Save a loss better than ever, or where --always-save-checkpoint asks for it, or the last save failed."""
        unsaved = self._progress.step != self._progress.saved_step
        if not better and not (unsaved and (self._config.always_save_checkpoint or self._failed)):
            return
        refusal = self._save(best=better)
        if self._failed:
            self._progress.best_val_loss = self._best_saved  # what is not saved is not what a later one has to beat
        if refusal and self._metrics:
            self._metrics.warn(f"{refusal}; the run goes on, and tries again")

    def at_the_end(self) -> None:
        """Save the last step where that is not done. UserError, in every process, where it fails."""
        if self._progress.step != self._progress.saved_step and (refusal := self._save(best=False)):
            raise refusal

    def _save(self, best: bool) -> UserError | None:
        refusal = None
        with self._stop.finishing():
            self._world.at = f"the save of step {self._progress.step}"
            try:
                folder = state.save(self._config, self._trainer, self._dataset, self._progress, best=best)
                if self._metrics:
                    self._metrics.note(f"saved {folder}")
            except UserError as error:
                refusal = error
        self._failed = refusal is not None
        if not self._failed:
            self._progress.saved_step, self._best_saved = self._progress.step, self._progress.best_val_loss
        return refusal
