"""What `bench.step` times: one training step of equal models, computed in different ways.

    reference, reference-compiled    the loop this project started from (`bench/reference_loop.py`)
    plain, compiled                  the torch twins, eager and under torch.compile, with torch's AdamW
    compiled-captured                the same as compiled, captured as a CUDA graph: all that PyTorch gives without our kernels
    fused                            every Triton kernel, AdamW's too, compiled and captured as a CUDA graph
    fused-uncaptured                 the same without the graph
    only-OP, without-OP              one kernel alone on, or alone off; OP: a switch of train.py --kernels
    unchunked                        compiled, with a loss head that holds all logits: a product and F.cross_entropy
    liger, liger-compiled            Liger-Kernel's ops in the same model, torch's attention and AdamW
    transformers                     Hugging Face's Llama of equal size under autocast, with SDPA and torch's AdamW, eager

`only-` and `without-` run uncaptured, so that the difference to compiled and to fused-uncaptured is the kernel's. A kernel that
needs another (`kernels.grammar.NEEDS`) is on with it, and off with it.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench.measure import version
from bench.peers import liger, transformers_llama
from bench.peers.reference_loop import AutocastStep, ReferenceLlama
from bench.step.tokens import MicroBatches
from kernels.grammar import SWITCHES
from kernels.linear import linear
from model import Llama
from training.config import TrainConfig
from training.distributed import World
from training.step.trainer import Trainer

WHOLE = (
    "reference",
    "reference-compiled",
    "plain",
    "compiled",
    "compiled-captured",
    "fused",
    "fused-uncaptured",
    "unchunked",
)
PEERS = {"liger": "liger-kernel", "liger-compiled": "liger-kernel", "transformers": "transformers"}
"""Variants that need a package, and its name."""
PER_OP = tuple(f"{way}-{op}" for way in ("only", "without") for op in SWITCHES)
VARIANTS = (*WHOLE, *PEERS, *PER_OP)
BASELINES = ("compiled", "compiled-captured")
"""What a user would take instead of the kernels here: a step is compared with the faster of these."""


def why_absent(variant: str, device: torch.device) -> str | None:
    """Why a variant can't run here, if it can't."""
    if variant in PEERS and version(PEERS[variant]) is None:
        return f"{PEERS[variant]} is not installed"
    needs_gpu = variant.startswith(("fused", "liger", "only-", "without-")) or variant == "compiled-captured"
    return "no GPU" if needs_gpu and device.type != "cuda" else None


def baseline(rows: list[dict]) -> str:
    """What a step is compared with: the faster of compiled and compiled-captured, without them the first that ran, or nothing."""
    ms = {row["variant"]: row["ms"] for row in rows if "ms" in row}
    return min((variant for variant in BASELINES if variant in ms), key=ms.get, default=next(iter(ms), ""))


def selection(variant: str) -> dict[str, object]:
    """The options of train.py that make a variant of `model.Llama`."""
    if variant in ("plain", "liger"):
        return {"compile": False}
    if variant.startswith("fused"):
        options = {"kernels": "all", "capture": variant == "fused"}
    elif variant in PER_OP:
        way, _, op = variant.partition("-")
        options = {"kernels": {"only": op, "without": f"all,-{op}"}[way], "capture": False}
    else:
        options = {}
    return options | {"compile": True}


def all_logits(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    compute_weight: Tensor | None = None,
    gradient_sum: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The loss head without chunks, its softmax in float32 as under autocast."""
    logits = linear(hidden, weight, compute_weight).float()
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


def make_step(
    variant: str, config: TrainConfig, device: torch.device, dtype: torch.dtype, micro_batches: MicroBatches
) -> Callable[[], float]:
    """A step of a fresh model on always the same batch, which returns its loss."""
    if variant.startswith("reference") or variant == "transformers":
        torch.manual_seed(config.seed)
        make_model = ReferenceLlama if variant != "transformers" else transformers_llama.TransformersLlama
        with device:
            model = make_model(config.shape())
        step = AutocastStep(model, device, dtype, compiled=variant.endswith("compiled"))
        return lambda: step(micro_batches)
    trainer = make_trainer(variant, config, device, dtype)
    valid = sum(targets.numel() for _, targets in micro_batches)
    batches = [(tokens, targets, None) for tokens, targets in micro_batches]
    return lambda: trainer.step(batches, valid, config.learning_rate).loss.item()


def make_trainer(variant: str, config: TrainConfig, device: torch.device, dtype: torch.dtype, **options) -> Trainer:
    """A fresh model of the variant with its optimizer; options of train.py come before those of the variant."""
    torch.manual_seed(config.seed)
    config = replace(config, **selection(variant) | options)
    ops = kernels.select(config.kernel_spec, config.n_layers)
    if variant.startswith("liger"):
        ops = [replace(kernels.TORCH, **liger.ops())] * len(ops)
    if variant == "unchunked":
        ops = [replace(kernels.TORCH, linear_cross_entropy=all_logits)] * len(ops)
    with device:
        model = Llama(config.shape(), ops, dtype)
    return Trainer(model, config, World(), capture=True if variant == "compiled-captured" else None)
