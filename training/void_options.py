"""Options that make each other void: a run says so at its start. None of it is an error: the run is what the options say."""

from kernels import grammar
from training.config import TrainConfig, interpreting


def remarks(config: TrainConfig, device=None) -> list[str]:
    """Which of these options have no effect, or another than their names promise; a line each.

    device: the `torch.device` of the run; None: whatever can run it.
    """
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
    return [*found, *_of_the_feed_forward(config, device)]


def _of_the_feed_forward(config: TrainConfig, device) -> list[str]:
    """Whether its kernel is asked for by name, and not as one of all, where nothing in the run is what it is meant for."""
    named = any("".join(item.split()).partition("@")[0] == "mlp" for item in config.kernels.split(","))
    if not named or "mlp" not in config.switches():
        return []
    dim, hidden_dim, rows = config.dim, config.hidden_dim, config.batch_size * config.max_seq_len
    wanted, is_ = f"--dim up to {grammar.MLP_WIDEST}", f"--dim {dim}"
    if interpreting():
        serves = dim <= grammar.MLP_WIDEST
    else:
        serves = grammar.mlp_serves(dim, hidden_dim, rows, 4 if config.dtype == "float32" else 2)
        wanted += f", multiples of 16, half precision and micro-steps of {grammar.MLP_FEWEST_ROWS:,} tokens or more"
        is_ += f", hidden width {hidden_dim}, --dtype {config.dtype} and {rows:,} tokens"
        if serves and device is not None:
            from kernels.mlp.op import MACHINES, machine_of_device
            from training.device import name_of

            serves = machine_of_device(device) in MACHINES
            wanted, is_ = "GPUs such as H100 and B200 (sm_90, sm_100)", name_of(device)
    told = f"--kernels {config.kernels}: mlp has no effect but swiglu's; it is for {wanted}, and this run has {is_}"
    return [] if serves else [told]


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
