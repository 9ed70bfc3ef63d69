"""Options that make each other void: a run says so at its start. None of it is an error: the run is what the options say."""

from training.config import TrainConfig


def remarks(config: TrainConfig) -> list[str]:
    """Which of these options have no effect, or another than their names promise; a line each."""
    found = _of_the_schedule(config)
    if config.sample_prompt and not config.sample_tokens:
        found.append("--sample-prompt has no effect: --sample-tokens is 0")
    if config.which != "last" and config.init_from == "scratch":
        found.append(f"--which {config.which} has no effect: --init-from is scratch")
    if config.check_steps > config.max_iters:
        found.append(
            f"--check-steps {config.check_steps} has no effect: the run has --max-iters {config.max_iters} steps"
        )
    if config.momentum != TrainConfig.momentum and config.optimizer != "muon":
        found.append(f"--momentum {config.momentum} has no effect: --optimizer is {config.optimizer}")
    if config.wandb_run_name and not config.wandb_log:
        found.append("--wandb-run-name has no effect without --wandb-log")
    return found


def _of_the_schedule(config: TrainConfig) -> list[str]:
    """What `step.schedule.learning_rate` makes of them."""
    warmup, steps, peak = config.warmup_iters, config.max_iters, config.learning_rate
    if not config.decay_lr:
        ignored = [
            words
            for given, words in (
                (warmup, f"--warmup-iters {warmup}"),
                (config.min_lr, f"--min-lr {config.min_lr}"),
                (config.schedule != "cosine", f"--schedule {config.schedule}"),
                (config.decay_iters, f"--decay-iters {config.decay_iters}"),
            )
            if given
        ]
        have = "has" if len(ignored) == 1 else "have"
        return [f"--no-decay-lr: the learning rate is {peak} throughout; {', '.join(ignored)} {have} no effect"] * bool(
            ignored
        )
    if warmup >= steps:
        return [
            f"--warmup-iters {warmup} is not less than --max-iters {steps}: the learning rate only rises, "
            f"to {peak * steps / warmup:.3g} of {peak}, and never decays"
        ]
    found = []
    if config.min_lr == peak:
        found.append(f"--min-lr is --learning-rate, {peak}: the learning rate never decays")
    if config.schedule == "wsd":
        decay = config.decay_iters or steps // 5
        if not decay:
            found.append(
                f"--schedule wsd decays over a fifth of --max-iters {steps}, which is no step: give --decay-iters"
            )
        elif warmup > steps - decay:
            found.append(
                f"--warmup-iters {warmup} ends within the last {decay} steps of {steps}, in which --schedule wsd decays: "
                "the learning rate jumps down where its warm-up ends"
            )
    elif config.decay_iters:
        found.append(f"--decay-iters {config.decay_iters} has no effect: --schedule {config.schedule} decays all along")
    return found
