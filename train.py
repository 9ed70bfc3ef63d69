"""Train a Llama: `python train.py --help`. The loop of a run, read from top to bottom; its parts are in training/."""

import contextlib
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path

from training import run_folder as checkpoint_folder
from training.config import TrainConfig, parse, to_toml
from training.stopping import StopSignal, exit_statuses


def main() -> None:
    """Parse the command line and train. A user's mistake is one line on stderr and exit status 2."""
    with exit_statuses():
        config = parse(sys.argv[1:])
        checkpoint_folder.check_writable(config.out_dir)
        train(config)  # imports torch: --help and every mistake in the options have been answered by now


def train(config: TrainConfig) -> None:
    """Run the training that `config` describes, to its end or to the first SIGTERM or Ctrl-C, which saves and returns.

    Raises UserError for what is wrong with the data, the device or the checkpoint, and SystemExit with status 1 where
    training broke down: `max_skipped_steps` steps in a row were not finite. The state before them is saved.
    """
    import kernels
    from model import Llama, flops
    from training import distributed, hardware
    from training.checkpoint import state
    from training.data.batches import Batches, prefetch
    from training.data.shards import prepare
    from training.device import name_of, resolve_device, resolve_dtype, seed_run, seed_step, set_determinism
    from training.evaluation import Evaluation
    from training.log import profiling
    from training.log.metrics import Metrics, StepRecord
    from training.log.plot import draw_loss_curve
    from training.step.readback import Readback, lag
    from training.step.schedule import learning_rate
    from training.step.trainer import Trainer

    # ---- where: processes, device, dtype
    set_determinism(config.deterministic)
    world = distributed.join(config)
    device = resolve_device(config, world.local_rank)
    device_name = name_of(device)
    dtype = resolve_dtype(config, device)
    dtype_name = str(dtype).removeprefix("torch.")
    out_dir = Path(config.out_dir)

    # ---- the data: text to tokens, once; then the batch of a step is a function of (seed, step)
    with world.main_first():
        dataset = prepare(
            config.data,
            vocab_size=config.vocab_size,
            data_dir=config.data_dir,
            tokenizer_file=config.tokenizer or None,
            split_text=config.split_text,
            text_field=config.text_field or None,
            val_fraction=config.val_fraction,
            progress=world.is_main,
        )
    sequences_per_step = config.batch_size * config.gradient_accumulation_steps
    tokens_per_step = sequences_per_step * config.max_seq_len
    micro_steps = config.gradient_accumulation_steps // world.size
    batches = Batches(
        dataset.train,
        sequence_length=config.max_seq_len,
        sequences_per_step=sequences_per_step,
        seed=config.seed,
    )

    def load(step: int):
        """The micro-batches that fall to this process in a step, and how many of their targets count."""
        first = world.rank * micro_steps
        parts = [
            batches.sequences(
                step, (first + i) * config.batch_size, config.batch_size, with_first_key=config.packed_documents
            )
            for i in range(micro_steps)
        ]
        return parts, sum(int((part.targets != -100).sum()) for part in parts)

    # ---- the model, from scratch or from the last checkpoint
    seed_run(config.seed)
    with device:
        model = Llama(config.shape(), kernels.select(config.kernel_spec, config.n_layers), dtype)
    trainer = Trainer(model, config, world)
    evaluation = Evaluation(config, trainer, dataset, world)
    resumed = config.init_from == "resume"
    progress, resume_note = state.resume(config, trainer, dataset) if resumed else (state.Progress(), "")
    saved_step = progress.step

    # ---- the records, kept by the main process
    metrics = None
    if world.is_main:
        notes = [resume_note]
        if not (resumed and config.eval_only):  # which looks at a run and is none
            notes.append(checkpoint_folder.open_run(out_dir, to_toml(config), resume=resumed))
        metrics = Metrics(
            out_dir,
            total_steps=config.max_iters,
            start_step=progress.step,
            log_interval=config.log_interval,
            run_name=config.wandb_run_name,
            config=asdict(config),
            tensorboard=config.tensorboard,
            wandb_project=config.wandb_project if config.wandb_log else "",
        )
        metrics.note(
            f"{config.preset}: {flops.parameters(config):,} parameters on {device_name}, {dtype_name}, "
            f"kernels {config.kernel_spec}; {dataset.train.n_tokens:,} tokens to train on, {tokens_per_step:,} a step, "
            f"{batches.steps_per_epoch:.1f} steps an epoch"
        )
        if config.packed_documents:
            metrics.note(
                f"packed documents: a token sees its own document only; {dataset.train.n_documents:,} documents to train "
                f"on, {dataset.train.mean_document_length:.1f} tokens each on average"
            )
        for note in filter(None, notes):
            metrics.note(note)
    profiler = contextlib.nullcontext()
    if config.profile and world.is_main:
        profiler = profiling.trace(out_dir / "profile.json")

    def save(best: bool) -> None:
        nonlocal saved_step
        if world.is_main:
            metrics.note(f"saved {state.save(config, trainer, dataset, progress, best=best)}")
        saved_step = progress.step
        world.wait()

    def evaluate() -> None:
        """Report the loss of both splits and a sample; save where validation is better than ever."""
        train_loss, val_loss, bits_per_byte = evaluation.losses()
        if world.is_main:
            metrics.evaluation(progress.step, train_loss, val_loss, bits_per_byte, evaluation.sample())
        best = val_loss < progress.best_val_loss
        if best:
            progress.best_val_loss = val_loss
        if config.eval_only or progress.step == 0:
            return
        if best or (config.always_save_checkpoint and progress.step != saved_step):
            save(best)

    # ---- the loop; a GPU's figures are read one step late, so that it never waits for a line to be printed
    flops_per_token = flops.flops_per_token(config)
    under_way: deque[tuple[int, float, Readback]] = deque()
    broke_down = ""
    clock = time.perf_counter()

    def finish(left: int) -> None:
        """Report the steps under way, oldest first, until so many are left."""
        nonlocal broke_down, clock
        while len(under_way) > left:
            step, lr, readback = under_way.popleft()
            loss, grad_norm, skipped = readback.wait()
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            if world.is_main:
                rate = tokens_per_step / seconds
                metrics.step(
                    StepRecord(
                        step=step,
                        loss=loss,
                        lr=lr,
                        ms=1000 * seconds,
                        mfu=hardware.mfu(flops_per_token, rate / world.size, device_name, dtype_name),
                        tflops=flops_per_token * rate / world.size / 1e12,
                        tokens_per_second=rate,
                        grad_norm=grad_norm,
                        peak_memory=hardware.peak_memory_bytes(device),
                        skipped=skipped,
                    )
                )
            progress.skipped += int(skipped)
            progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
            if progress.skipped_in_a_row >= config.max_skipped_steps and not broke_down:
                broke_down = (
                    f"step {step}: the loss or the gradient was not finite {progress.skipped_in_a_row} steps in a row "
                    f"(--max-skipped-steps); loss {loss}, gradient norm {grad_norm}. Saved with the parameters of the "
                    "last good step; try a lower --learning-rate, or bisect with --kernels"
                )

    steps = prefetch(load, progress.step, config.max_iters, device=device)
    try:
        with StopSignal() as stop, contextlib.closing(steps), profiler:
            while True:
                if config.eval_only or progress.step % config.eval_interval == 0 or progress.step == config.max_iters:
                    finish(0)
                    if broke_down:
                        break
                    evaluate()
                    clock = time.perf_counter()
                if config.eval_only or progress.step == config.max_iters:
                    break
                parts, valid = next(steps)
                lr = learning_rate(config, progress.step)
                if config.dropout:
                    seed_step(config.seed, progress.step, world.rank)
                under_way.append((progress.step, lr, Readback(trainer.step(parts, world.total(valid, device), lr))))
                progress.step += 1
                finish(lag(device))
                if config.profile and world.is_main:
                    profiler.step()
                if broke_down:
                    break
                if world.any(stop.asked, device):
                    finish(0)
                    if world.is_main:
                        metrics.note(f"stopping after step {progress.step - 1}, as asked")
                    break
            finish(0)
            if broke_down:
                progress.skipped_in_a_row = 0  # a resumed run may skip as many again
            if progress.step != saved_step:
                save(best=False)
    finally:
        if metrics:
            metrics.close()
        distributed.leave(world)

    if world.is_main and not config.eval_only:
        draw_loss_curve(out_dir / "metrics.jsonl", out_dir / "loss.png")
        print(f"done: {progress.step} steps, best val loss {progress.best_val_loss:.4f}, everything is in {out_dir}")
    if broke_down:
        raise SystemExit(f"train.py: error: {broke_down}")


if __name__ == "__main__":
    main()
