"""Train a Llama: `python train.py --help`. The loop of a run, read from top to bottom; its parts are in training/."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

from training import distributed, launcher, run_folder
from training.command_line import parse, to_toml
from training.config import TrainConfig
from training.distributed import World
from training.errors import UserError
from training.log.console import complain, say
from training.machine import out_of_memory_is_told, require_compiler, require_memory
from training.stopping import Stopped, StopSignal, exit_statuses

LESS_MEMORY = "lower --batch-size, and raise --gradient-accumulation-steps by as much, or --max-seq-len, or take a smaller --preset"


def main() -> None:
    """Parse the command line and train. A user's mistake is one line on stderr and exit status 2."""
    with exit_statuses(speaks=launcher.speaks()) as stop:
        config = parse(sys.argv[1:])
        with distributed.joined(config) as world:
            # One of many processes writes, and of an evaluation alone none.
            writes = world.is_main and not config.eval_only
            with (
                run_folder.owned(config.out_dir) if writes else contextlib.nullcontext(),
                out_of_memory_is_told(LESS_MEMORY),
            ):
                train(config, world, stop)  # imports torch: --help and every mistake in the options have been answered


def train(config: TrainConfig, world: World, stop: StopSignal) -> None:
    """Run the training that `config` describes, to its end or to the first SIGTERM, SIGHUP or Ctrl-C, which saves and returns.

    Raises UserError for what is wrong with the data, the device or the checkpoint, and SystemExit with status 1 where
    training broke down: `max_skipped_steps` steps in a row were not finite. The state before them is saved.
    """
    from model import flops
    from training import void_options
    from training.checkpoint import state
    from training.checkpoint.saves import Saves
    from training.data.batches import Batches, prefetch
    from training.data.description import describe
    from training.data.prepare import prepare_for
    from training.device import (
        name_of,
        resolve_device,
        resolve_dtype,
        resolve_kernels,
        seed_run,
        seed_step,
        set_determinism,
    )
    from training.evaluation import Evaluation
    from training.log import profiling
    from training.log.metrics import Metrics
    from training.log.model_card import write_model_card
    from training.log.plot import draw_loss_curve
    from training.progress import Progress, UnderWay
    from training.step.explain import Skips
    from training.step.recheck import Rechecked, StepDiffersError
    from training.step.schedule import learning_rate
    from training.step.start import new_trainer

    # ---- where it runs: processes, device, dtype, and the kernels that can run there
    set_determinism(config.deterministic)
    device = resolve_device(config, world.local_rank)
    dtype = resolve_dtype(config, device)
    remarks = void_options.remarks(config, device)
    running, kernels_note = resolve_kernels(config, device)
    require_compiler(running, device)
    require_memory(config, device, shares=launcher.shares(config.parallel, world.size))
    if kernels_note and world.is_main:
        print(f"train.py: {kernels_note}", file=sys.stderr)

    # ---- the data: text to tokens, once; then the batch of a step is a function of (seed, step)
    with world.main_first("the preparation of the text"):
        dataset = prepare_for(config, show_progress=world.is_main)
    count, packed = config.gradient_accumulation_steps, config.packed_documents
    batches = Batches.of_run(config, dataset.train, count)

    def load(step: int):
        """The micro-batches that fall to this process in a step, and how many of their targets count."""
        mine = batches.micro_batches(step, count, rank=world.rank, world_size=world.size, with_first_key=packed)
        return mine, sum(int((batch.targets != -100).sum()) for batch in mine)

    # ---- the model: from scratch, from weights, or from the last checkpoint
    seed_run(config.seed)
    trainer = new_trainer(running, world, device, dtype)
    evaluation = Evaluation(config, trainer, dataset, world)
    if world.goes_on and run_folder.step_folders(Path(config.out_dir)):
        config = replace(config, init_from="resume", which="last")
    resumed = config.init_from == "resume"
    progress, resume_note = state.resume(config, trainer, dataset) if resumed else (Progress(), "")
    config = replace(config, which="last")  # said of this call; what is saved is resumed where it ends
    if config.weights:  # which may be of an earlier run in this folder, moved below
        world.wait("reading the weights", patiently=True)

    # ---- the records, kept by the main process. What can be refused has been by the time an earlier run's files are moved
    metrics = profiler = None
    if world.is_main:
        notes = [*describe(dataset), f"weights from {config.weights}" if config.weights else resume_note, *remarks]
        notes.append(evaluation.remark)
        if config.parallel != "ddp" and world.size == 1:
            notes.append(f"--parallel {config.parallel}: the one process has the whole model")
        if running.fused and config.capture and world.size > 1:
            notes.append(f"--fused: with {world.size} processes a step is not captured as a CUDA graph")
        metrics = Metrics.of_run(config, progress.step)
        if not config.eval_only:
            notes.append(run_folder.open_run(config.out_dir, to_toml(config), resume=resumed))
            world.mark_begun()
            metrics.open()
        graph = ", one CUDA graph a step" if trainer.captures else ""
        metrics.note(
            f"{config.model_name}: {flops.parameters(config):,} parameters on {name_of(device)}, "
            f"{str(dtype).removeprefix('torch.')}, kernels {running.kernel_spec}{graph}; "
            f"{dataset.train.n_tokens:,} tokens to train on, {batches.tokens_per_step:,} a step, "
            f"{batches.steps_per_epoch:.1f} steps an epoch"
        )
        if packed:
            metrics.note(
                f"packed documents: a token sees its own document only; {dataset.train.n_documents:,} documents to train "
                f"on, {dataset.train.mean_document_length:.1f} tokens each on average"
            )
        for note in filter(None, notes):
            metrics.note(note)
        if config.profile:
            steps_left = 0 if config.eval_only else config.max_iters - progress.step
            profiler = profiling.trace(Path(config.out_dir) / "profile.json", steps_left, metrics.note)

    # ---- the loop; a GPU's figures are read one step late, so that it never waits for a line to be printed
    saves = Saves(config, trainer, dataset, progress, world, metrics, stop)
    under_way = UnderWay(config, progress, metrics, world, device, dtype)
    take_step = Rechecked(config, trainer, progress, world).step if config.check_steps else trainer.step
    skips = Skips(config, trainer, load, progress, world, metrics)
    steps = prefetch(load, progress.step, config.max_iters, device=device)
    steps = profiling.watched(steps) if profiler else steps
    unreadable = None
    with (
        contextlib.closing(metrics) if metrics else contextlib.nullcontext(),
        contextlib.closing(steps),
        profiler or contextlib.nullcontext(),
    ):
        try:
            while not under_way.broke_down:
                if config.eval_only or progress.step % config.eval_interval == 0 or progress.step == config.max_iters:
                    under_way.finish()
                    if under_way.broke_down:
                        break
                    better = evaluation.report(progress, metrics, stop)
                    if progress.step > 0 and not config.eval_only:
                        saves.after_evaluation(better)
                    under_way.restart_clock()
                if config.eval_only or progress.step == config.max_iters:
                    break
                micro_batches, valid = next(steps)
                valid, asked = world.totals(valid, stop.asked, at=f"step {progress.step}")
                stop.heed(asked)
                lr = learning_rate(config, progress.step)
                if config.dropout:
                    seed_step(config.seed, progress.step, world.rank)
                under_way.add(progress.step, lr, take_step(micro_batches, valid, lr))
                progress.step += 1
                stop.begun = True
                under_way.keep_up()
                skips.explain(under_way)
                if profiler:
                    profiler.step()
        except Stopped:
            under_way.finish()
            if metrics:
                metrics.note(f"stopping after step {progress.step - 1}, as asked")
        except StepDiffersError as error:
            under_way.broke_down = str(error)
        except UserError as error:  # a shard that was damaged meanwhile: what has been learned is saved
            if world.size > 1:
                raise
            unreadable = error
        under_way.finish()
        if under_way.broke_down:
            progress.skipped_in_a_row = 0  # a resumed run may skip as many again
        saves.at_the_end()

    # ---- what is left to say
    if unreadable:
        raise unreadable
    if world.is_main and not config.eval_only:
        try:
            draw_loss_curve(Path(config.out_dir) / "metrics.jsonl", Path(config.out_dir) / "loss.png")
            write_model_card(config, dataset, name_of(device), progress.step)
        except UserError as error:
            complain(str(error))
        say(
            f"done: {progress.step} steps, best val loss {progress.best_val_loss:.4f}, everything is in {config.out_dir}"
        )
    if under_way.broke_down:
        raise SystemExit(f"train.py: error: {under_way.broke_down}")


if __name__ == "__main__":
    main()
