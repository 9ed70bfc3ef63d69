"""Train a Llama: `python train.py --help`. The loop of a run, read from top to bottom; its parts are in training/."""

import contextlib
import math
import signal
import sys
import time
from dataclasses import asdict

from training import checkpoint_folder
from training.config import TrainConfig, fail, parse
from training.errors import UserError


def main() -> None:
    """Parse the command line and train. A user's mistake is one line on stderr and exit status 2."""
    try:
        config = parse(
            sys.argv[1:]
        )  # --help and every mistake in the options are answered here, before torch is imported
        aside = checkpoint_folder.claim(config.out_dir, resume=config.init_from == "resume")
        train(config, aside)
    except UserError as error:
        fail(error)


def train(config: TrainConfig, note: str = "") -> None:
    """Run the training that `config` describes, to its end or to the first SIGTERM or Ctrl-C, which saves and returns."""
    import torch

    import kernels
    from model import Llama, flops, generation
    from training import distributed, hardware, state
    from training.batches import Batches, prefetch
    from training.device import memory_name, resolve_device, resolve_dtype, seed_step, set_determinism
    from training.metrics import Metrics, StepRecord
    from training.plot import draw_loss_curve
    from training.schedule import learning_rate
    from training.shards import prepare
    from training.step import Trainer

    # ---- where: processes, device, dtype
    set_determinism(config.deterministic)
    world = distributed.join(config)
    device = resolve_device(config, world.local_rank)
    dtype = resolve_dtype(config, device)
    dtype_name = str(dtype).removeprefix("torch.")
    say = print if world.is_main else (lambda *_: None)
    if note:
        say(note)

    # ---- the data: text to tokens, once; then the batch of a step is a function of (seed, step)
    options = {"vocab_size": config.vocab_size, "data_dir": config.data_dir, "tokenizer_file": config.tokenizer or None}
    options |= {
        "split_text": config.split_text,
        "text_field": config.text_field or None,
        "val_fraction": config.val_fraction,
    }
    if world.is_main:  # the others find it made
        prepare(config.data, **options, progress=True)
    world.wait()
    dataset = prepare(config.data, **options)
    shape = {"sequence_length": config.max_seq_len, "seed": config.seed}
    micro_steps = config.gradient_accumulation_steps // world.size
    batches = Batches(dataset.train, sequences_per_step=config.batch_size * config.gradient_accumulation_steps, **shape)
    eval_batches = {
        split: Batches(shards, sequences_per_step=config.batch_size, **shape)
        for split, shards in (("train", dataset.train), ("val", dataset.val))
    }
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * config.max_seq_len

    def load(step: int):
        """The micro-batches that fall to this process in a step, and how many of their targets count."""
        first = world.rank * micro_steps
        parts = [
            batches.sequences(step, (first + i) * config.batch_size, config.batch_size) for i in range(micro_steps)
        ]
        return parts, sum(int((part.targets != -100).sum()) for part in parts)

    # ---- the model, from scratch or from the last checkpoint
    torch.manual_seed(config.seed)
    with device:
        model = Llama(config.shape(), kernels.select(config.kernel_spec, config.n_layers), dtype)
    trainer = Trainer(model, config, world)
    progress = state.Progress()
    if config.init_from == "resume":
        progress = state.resume(config, trainer, dataset)
    say(
        f"{config.preset}: {flops.parameters(model.config):,} parameters on {memory_name(device)}, {dtype_name}, "
        f"kernels {config.kernel_spec}; {dataset.train.n_tokens:,} tokens to train on, {tokens_per_step:,} a step, "
        f"{batches.steps_per_epoch:.1f} steps an epoch"
    )
    metrics = None
    if world.is_main:
        metrics = Metrics(
            config.out_dir,
            total_steps=config.max_iters,
            start_step=progress.step,
            log_interval=config.log_interval,
            run_name=config.wandb_run_name,
            config=asdict(config),
            tensorboard=config.tensorboard,
            wandb_project=config.wandb_project if config.wandb_log else "",
        )
    saved_step = progress.step if config.init_from == "resume" else None

    def save(best: bool) -> None:
        nonlocal saved_step
        if world.is_main:
            metrics.note(f"saved {state.save(config, trainer, dataset, progress, best=best)}")
        saved_step = progress.step
        world.wait()

    def evaluate() -> None:
        """Report the loss of both splits and a sample; save where validation is better than ever."""
        losses = {}
        for split, source in eval_batches.items():
            count = min(config.eval_iters, int(source.steps_per_epoch))
            mine = range(world.rank, count, world.size)
            losses[split] = trainer.evaluate(
                prefetch(
                    lambda i, s=source, m=mine: s.sequences(m[i], 0, config.batch_size), 0, len(mine), device=device
                )
            )
        bits = losses["val"] / math.log(2) * dataset.val.n_tokens / dataset.val.n_bytes
        if world.is_main:
            metrics.evaluation(progress.step, losses["train"], losses["val"], bits, sample_text())
        better = losses["val"] < progress.best_val_loss
        if better:
            progress.best_val_loss = losses["val"]
        if progress.step > 0 and progress.step != saved_step and (better or config.always_save_checkpoint):
            save(best=better)

    def sample_text() -> str | None:
        if not config.sample_tokens:
            return None
        prompt = [dataset.tokenizer.bos_id, *dataset.tokenizer.encode(config.sample_prompt)]
        prompt = prompt[: config.max_seq_len - 1]
        new = generation.generate(model, prompt, config.sample_tokens, temperature=0.8, seed=config.seed)
        return dataset.tokenizer.decode(prompt[1:] + new)

    # ---- the loop
    stop = StopSignal()
    flops_per_token = flops.flops_per_token(model.config)
    steps = prefetch(load, progress.step, config.max_iters, device=device)
    profiler = profile_trace(config) if config.profile and world.is_main else None
    try:
        with stop, contextlib.closing(steps):
            while True:
                if config.eval_only or progress.step % config.eval_interval == 0 or progress.step == config.max_iters:
                    evaluate()
                if config.eval_only or progress.step >= config.max_iters:
                    break
                start = time.perf_counter()
                parts, valid = next(steps)
                lr = learning_rate(config, progress.step)
                if config.dropout:
                    seed_step(config.seed, progress.step, world.rank)
                result = trainer.step(parts, world.total(valid, device), lr)
                loss, grad_norm, skipped = torch.stack([result.loss, result.grad_norm, result.skipped]).tolist()
                seconds = time.perf_counter() - start
                if profiler:
                    profiler.step()
                progress.skipped += int(skipped)
                progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
                if world.is_main:
                    rate = tokens_per_step / seconds
                    metrics.step(
                        StepRecord(
                            step=progress.step,
                            loss=loss,
                            lr=lr,
                            ms=1000 * seconds,
                            mfu=hardware.mfu(flops_per_token, rate / world.size, memory_name(device), dtype_name),
                            tflops=flops_per_token * rate / world.size / 1e12,
                            tokens_per_second=rate,
                            grad_norm=grad_norm,
                            peak_memory=hardware.peak_memory_bytes(device),
                            skipped=bool(skipped),
                        )
                    )
                progress.step += 1
                if progress.skipped_in_a_row >= config.max_skipped_steps:
                    raise UserError(
                        f"step {progress.step - 1}: the loss or the gradient was not finite {progress.skipped_in_a_row} steps in "
                        f"a row (--max-skipped-steps), last loss {loss}, gradient norm {grad_norm}; the parameters are those "
                        "before them. Try a lower --learning-rate, or bisect with --kernels"
                    )
                if world.any(stop.asked, device):
                    say(f"stopping after step {progress.step - 1}, as asked")
                    break
        if not config.eval_only and progress.step != saved_step:
            save(best=False)
    finally:
        if profiler:
            profiler.stop()
        if metrics:
            metrics.close()
        distributed.leave(world)
    if world.is_main and not config.eval_only:
        draw_loss_curve(f"{config.out_dir}/metrics.jsonl", f"{config.out_dir}/loss.png")
        print(
            f"done: {progress.step} steps, best val loss {progress.best_val_loss:.4f}, everything is in {config.out_dir}"
        )


class StopSignal:
    """While entered, the first SIGTERM or Ctrl-C only sets `asked`; a second one acts as it always does."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self._former = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(number, self._former[number])


def profile_trace(config: TrainConfig):
    """A running profiler that writes steps 3 to 5 of this process to out_dir/profile.json, for chrome://tracing or Perfetto."""
    from torch import profiler

    trace = profiler.profile(
        schedule=profiler.schedule(wait=2, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(f"{config.out_dir}/profile.json"),
    )
    trace.start()
    return trace


if __name__ == "__main__":
    main()
