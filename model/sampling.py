"""Which token comes next: what is done to the logits, and the draw.

A draw takes one uniform number and is a function of it and of the logits: whoever holds the numbers can repeat it anywhere, and
what one sequence draws does not depend on its neighbours in a batch. Probabilities are whole numbers on the way, in units of 2^-40
of the largest: their sums do not depend on the order in which a device adds them up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

UNITS = 2**40
"""The mass of the likeliest token. Tokens of less than a 2^-41 part of its probability are never drawn."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is done to the logits, in this order: penalty, temperature, top-k, top-p, min-p. The defaults leave them as they are."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token every time, and then what follows changes nothing."""
    top_k: int = 0
    """Draw from the likeliest k tokens, and those as likely as the last of them; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability, and those as likely as the last of them."""
    min_p: float = 0.0
    """Draw from tokens that are at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the sequence has are divided by this where they are positive, and multiplied where not (Keskar et
    al., 2019, arXiv:1909.05858)."""

    def check(self) -> None:
        """Raise ValueError, naming the field, what was found and what is allowed."""
        for name, allowed, words in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0, and finite"),
            ("top_k", 0 <= self.top_k < 2**63, "at least 0, and finite"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "at least 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0, and finite"),
        ):
            if not allowed:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {words}")


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The next tokens (B,) int64.

    logits: (B, V). uniform: (B,) float64, each in [0, 1). seen: (B, V) bool, the tokens that each sequence has; needed where there
    is a repetition penalty.
    """
    if sampling.repetition_penalty != 1:
        penalized = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    below = masses(logits, sampling).cumsum(-1)
    chosen = (uniform[:, None] * below[:, -1:]).long()
    # Counted: how many tokens lie wholly below the chosen unit. Logits that are no numbers leave nothing, and count one too many.
    return (below <= chosen).sum(-1).clamp(max=logits.shape[-1] - 1)


def masses(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (B, V) in units, int64, zero for what the sampling leaves out. Its penalty is not applied here."""
    # float64, and the largest is subtracted first: then no temperature above zero makes an infinity.
    exponents = logits.double()
    exponents = (exponents - exponents.amax(-1, keepdim=True)) / sampling.temperature
    mass = (exponents.exp() * UNITS).round().nan_to_num(0).long()
    if 0 < sampling.top_k < mass.shape[-1]:
        mass = _at_least(mass, mass.topk(sampling.top_k).values[:, -1:])
    if sampling.top_p < 1:
        ordered = mass.sort(descending=True).values
        up_to = ordered.cumsum(-1)
        # A token stays while the mass of those before it is less than asked for.
        inside = up_to - ordered < sampling.top_p * up_to[:, -1:]
        mass = _at_least(mass, ordered.masked_fill(~inside, UNITS).amin(-1, keepdim=True))
    if sampling.min_p > 0:
        mass = _at_least(mass, sampling.min_p * UNITS)
    return mass


def _at_least(mass: Tensor, least: Tensor | float) -> Tensor:
    return torch.where(mass >= least, mass, 0)
