"""The learning rate of a step."""

import math

from training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of the update that step `step` (from 0) makes.

    Linear warm-up to learning_rate over warmup_iters, then to min_lr at max_iters: by half a cosine
    (https://arxiv.org/abs/1608.03983), or WSD (https://arxiv.org/abs/2404.06395): constant, then linear over the last steps.
    """
    peak, floor = config.learning_rate, config.min_lr
    if not config.decay_lr:
        return peak
    if step < config.warmup_iters:
        return peak * (step + 1) / config.warmup_iters
    if config.schedule == "wsd":
        decay = config.decay_iters or config.max_iters // 5
        done = (step - (config.max_iters - decay)) / max(1, decay)
        return peak + (floor - peak) * min(1.0, max(0.0, done))
    done = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
