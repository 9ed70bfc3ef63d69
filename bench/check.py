"""What must be true before a figure is worth anything, in a minute on a GPU: `python -m bench.check`.

    products     of half-precision operands, summed and kept in float32, against float64
    gradients    of a training step, each parameter's by its name: plain and fused, eager, compiled and captured
    bits         that a captured step and the same step uncaptured compute, over six steps

The gradients are compared with those of plain PyTorch in eager mode and float32; what is allowed is three times the error of plain
PyTorch in half precision, and a thousandth. A gradient that is zero has failed. Each check is one line and none stops the next.
Without a GPU the same is done as far as it can be, in float16 and of a smaller model: the kernels in Triton's interpreter, where
TRITON_INTERPRET=1 is set, what is compiled without Inductor (`aot_eager`), and nothing captured.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch._dynamo.config
from rich.console import Console
from torch import Tensor

from bench import command
from bench.measure import environment, write_json
from bench.step import tokens
from bench.step.variants import make_trainer
from kernels.launch import HAVE_TRITON, INTERPRETED
from kernels.linear import add_product, linear
from kernels.mlp.op import on_any_rows
from training.config import TrainConfig
from training.device import resolve_device, set_determinism
from training.step.trainer import MicroBatch

PRODUCT = 1e-5
"""Relative error of a float32 product of 4096 terms; a result that was rounded to half precision is 100 times further off."""
PLAIN = {torch.float16: 0.003, torch.bfloat16: 0.02}
"""Relative error of a gradient of plain PyTorch in half precision, against float32."""
TIMES_PLAIN, BESIDE = 3.0, 1e-3
STEPS = 6
"""Of a captured step two are run as they are, the third is recorded."""
MODEL = TrainConfig(
    vocab_size=4096,
    max_seq_len=256,
    dim=288,
    n_layers=2,
    n_heads=8,
    n_kv_heads=4,
    batch_size=16,
    gradient_accumulation_steps=2,
    grad_clip=0.0,
)
"""The reference's layers, two of them."""
ON_CPU = {
    "vocab_size": 300,
    "max_seq_len": 16,
    "dim": 32,
    "n_heads": 2,
    "n_kv_heads": 1,
    "ffn_dim": 48,
    "batch_size": 2,
}


@dataclass(kw_only=True)
class CheckBench:
    """Check the products, gradients and captured steps of this machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to check."""
    json: str = ""
    """File to write the result to; it grows as checks are done."""


@dataclass(frozen=True)
class Found:
    """A figure that must not exceed its bound, and what it is of. Infinite where something is zero that should not be."""

    value: float
    bound: float
    where: str = ""

    @property
    def passed(self) -> bool:
        """Whether it does not. A NaN has failed."""
        return self.value <= self.bound

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        value = "zero" if math.isinf(self.value) else f"{self.value:.3g}"
        return f"{where}{value}, allowed {self.bound:.3g}"


@dataclass(frozen=True)
class Check:
    """A check by its name."""

    name: str
    run: Callable[[], Found]


@on_any_rows()
def measure(options: CheckBench, console: Console) -> dict:
    """Run the checks, a line each, and return (and write, where asked) the result. Exit status 1 where one failed."""
    command.check_writable(options.json)
    set_determinism(True)
    device = resolve_device(TrainConfig(device=options.device))
    on_gpu = device.type == "cuda"
    with_kernels = HAVE_TRITON and (on_gpu or INTERPRETED)
    dtype = torch.bfloat16 if on_gpu and torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    env = environment()
    console.print(f"{env['device']}, torch {env['torch']}, Triton {env['triton']}, {dtype}", highlight=False)
    if not with_kernels:
        console.print("no GPU for the kernels: PyTorch is checked; TRITON_INTERPRET=1 runs them in the interpreter")
    # The interpreter computes in NumPy, which warns of overflows that are meant, as in the exponential of a masked score.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    rows: list[dict] = []
    result = {"bench": "check", "dtype": str(dtype).removeprefix("torch."), "rows": rows, "environment": env}
    with torch._dynamo.config.patch(recompile_limit=64):  # each trainer is a graph of one and the same function
        for check in checks(device, dtype, with_kernels):
            start = time.monotonic()
            try:
                found = check.run()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                row, said = {"passed": False, "failed": reason}, reason
            else:
                row = {"passed": found.passed, "value": found.value, "bound": found.bound, "where": found.where}
                said = str(found)
            seconds = time.monotonic() - start
            rows.append({"check": check.name} | row | {"seconds": round(seconds, 1)})
            word = "pass" if row["passed"] else "FAIL"
            console.print(f"{word}  {check.name:<46}  {said}  ({seconds:.1f} s)", markup=False, highlight=False)
            if options.json:
                write_json(options.json, result)
    failed = [row["check"] for row in rows if not row["passed"]]
    console.print(f"{len(rows) - len(failed)} of {len(rows)} checks passed", highlight=False)
    if failed:
        raise SystemExit(1)
    return result


def checks(device: torch.device, dtype: torch.dtype, with_kernels: bool) -> Iterator[Check]:
    """What is checked on a device, in order."""
    yield Check("products: added to a sum", partial(added_product, device, dtype))
    yield Check("products: a weight's gradient", partial(weight_gradient, device, dtype))

    on_gpu = device.type == "cuda"
    gradients = Gradients(MODEL if on_gpu else replace(MODEL, **ON_CPU), device, dtype)
    yield Check("gradients: plain", gradients.of_plain)
    ways = [("fused-uncaptured", "fused", {"compile": False}), ("compiled", "plain, compiled", {})]
    ways += [("fused-uncaptured", "fused, compiled", {})]
    if on_gpu:
        ways += [("compiled-captured", "plain, compiled, captured", {}), ("fused", "fused, compiled, captured", {})]
    for variant, name, options in ways:
        if with_kernels or not variant.startswith("fused"):
            yield Check(f"gradients: {name}", partial(gradients.of, variant, **options))

    if on_gpu:
        eager = {"compile": False}
        pairs = {
            "fused": (("fused", eager), ("fused-uncaptured", eager)),
            "fused, compiled": (("fused", {}), ("fused-uncaptured", {})),
            "fused but torch's AdamW, compiled": (("without-adamw", {"capture": True}), ("without-adamw", {})),
            "plain, compiled": (("compiled-captured", {}), ("compiled", {})),
        }
        for name, (captured, uncaptured) in pairs.items():
            if with_kernels or not name.startswith("fused"):
                yield Check(f"bits of a captured step: {name}", partial(same_bits, captured, uncaptured, device, dtype))


# ------------------------------------------------------------------------------------------------------------- products


def relative(x: Tensor, reference: Tensor) -> float:
    """Norm of the difference over that of the reference; infinite where x is zero and should not be."""
    if not x.count_nonzero() and reference.count_nonzero():
        return float("inf")
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def operands(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random dy (4096, 576), a part of wider rows, and x (4096, 288)."""
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(4096, width, generator=generator).to(device, dtype) for width in (592, 288))
    return dy[:, :576], x


def added_product(device: torch.device, dtype: torch.dtype) -> Found:
    """dy^T x added in place to a float32 sum."""
    dy, x = operands(device, dtype)
    total = torch.ones(576, 288, device=device)
    add_product(total, dy.T, x)
    return Found(relative(total, 1 + dy.double().T @ x.double()), PRODUCT)


def weight_gradient(device: torch.device, dtype: torch.dtype) -> Found:
    """The same as the gradient that `linear` gives a float32 weight."""
    dy, x = operands(device, dtype)
    weight = torch.zeros(576, 288, device=device, requires_grad=True)
    linear(x, weight, weight.detach().to(dtype)).backward(dy)
    return Found(relative(weight.grad, dy.double().T @ x.double()), PRODUCT)


# ------------------------------------------------------------------------------------------------------------ gradients


def batch_of(config: TrainConfig, device: torch.device, seed: int = 0) -> list[MicroBatch]:
    """The micro-batches of a step: tokens as frequent as in text."""
    return [(t.to(device), y.to(device), None) for t, y in tokens.drawn(replace(config, seed=seed))]


class Gradients:
    """Gradients of one batch by parameter, and its loss, in several ways."""

    def __init__(self, config: TrainConfig, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.reference: dict[str, Tensor] = {}
        self.errors_of_plain: dict[str, float] = {}

    def compute(self, variant: str, dtype: torch.dtype, **options) -> dict[str, Tensor]:
        """Those of a step at a learning rate of 0: of the third one where it is captured, which is then recorded and replayed."""
        on_cpu, compiled = self.device.type == "cpu", options.get("compile", variant != "plain")
        trainer = make_trainer(
            variant, self.config, self.device, dtype, **options | {"compile": compiled and not on_cpu}
        )
        if compiled and on_cpu:  # Inductor's C++ would take a minute
            options = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
            trainer.loss_sum = torch.compile(trainer.loss_sum, **options)
        batch = batch_of(self.config, self.device)
        valid = sum(targets.numel() for _, targets, _ in batch)
        for _ in range(3 if trainer.captures else 1):
            result = trainer.step(batch, valid, 0.0)
        flat = trainer.flat
        # torch's AdamW divides the gradients by the loss scale in place, the kernel leaves them: the norm that is told has none.
        unscaled = result.grad_norm / torch.linalg.vector_norm(flat.gradients).clamp(min=1e-30)
        gradients = {name: flat.view(flat.gradients, name) * unscaled for name in flat.starts}
        return gradients | {"loss": result.loss}

    def errors(self, variant: str, **options) -> dict[str, float]:
        """Relative errors in half precision, against plain PyTorch in eager mode and float32."""
        self.reference = self.reference or self.compute("plain", torch.float32)
        found = self.compute(variant, self.dtype, **options)
        return {name: relative(x, self.reference[name]) for name, x in found.items()}

    def of_plain(self) -> Found:
        """Plain PyTorch in eager mode: the measure of the others."""
        self.errors_of_plain = self.errors("plain")
        worst = max(self.errors_of_plain, key=self.errors_of_plain.get)
        return Found(self.errors_of_plain[worst], PLAIN[self.dtype], worst)

    def of(self, variant: str, **options) -> Found:
        """The parameter whose error exceeds what is allowed by most, or comes nearest to it."""
        if not self.errors_of_plain:
            raise ValueError("gradients: plain PyTorch gave none to compare with")
        errors = self.errors(variant, **options)
        allowed = {name: TIMES_PLAIN * error + BESIDE for name, error in self.errors_of_plain.items()}
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name] / allowed[name])
        return Found(errors[worst], allowed[worst], worst)


# ----------------------------------------------------------------------------------------------------------------- bits


def same_bits(
    captured: tuple[str, dict], uncaptured: tuple[str, dict], device: torch.device, dtype: torch.dtype
) -> Found:
    """How many losses and parameters differ after STEPS steps of two variants with their options."""
    runs = []
    for variant, options in (captured, uncaptured):
        trainer = make_trainer(variant, MODEL, device, dtype, **options)
        losses = []
        for seed in range(STEPS):
            batch = batch_of(MODEL, device, seed)
            valid = sum(targets.numel() for _, targets, _ in batch)
            losses.append(trainer.step(batch, valid, 1e-3).loss)
        runs.append((trainer.captures, torch.cat([torch.stack(losses), trainer.flat.values])))
    (is_captured, first), (is_not, second) = runs
    if (is_captured, is_not) != (True, False):
        raise RuntimeError(f"captured are {is_captured} and {is_not}, which should be True and False")
    if not first.isfinite().all():
        raise RuntimeError("losses or parameters are not finite")
    return Found((first != second).sum().item(), 0)


if __name__ == "__main__":
    command.run(CheckBench, __doc__, measure)
