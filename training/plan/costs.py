"""Memory, FLOPs and communication of a training step in closed form, per GPU. Imports nothing heavy.

For P parameters, V x d the embedding, N shards, a = 2 bytes an element of the compute dtype (4 in float32), P_l a layer's matrices.

Memory, bytes:
    always      ddp: 16 P + a N_matmul in half precision (values, gradients, two moments; copies)
                fsdp, hsdp: 16 P / N; with several machines and micro-steps 4 P / N more (sums that wait for the last one)
    loss head   kept activations + logits of a chunk; fsdp also 8 V d (head and its gradient, float32) + a V d (the head cast)
    a layer     kept activations + its backward pass; fsdp also 3 a P_l (two layers gathered, one of them twice while it is copied
                out) + 8 P_l (its gradients, and those of the layer before on their way); of a tied matrix 8 V d besides
    embedding   fsdp: 12 V d (gathered, its gradient, and that once more on its way)
The peak is always + the largest of the three. One layer's backward pass holds its own activations as without recomputation, and
gradients of gate, up, SwiGLU's output and the residual stream. A narrow model keeps less on a GPU on which its feed-forward is one
kernel (model/activations.py), which is not counted on.

Bytes that a GPU sends, and receives as many, in a step of m micro-steps:
    ddp         2 (G - 1) / G * 4 P
    fsdp        m (N - 1) / N * (2 a P_layers + 4 P_layers + 8 V d; untied 24 V d)
    hsdp        the same within a machine, and 2 (R - 1) / R * 4 P / N between R machines, once a step
What goes round over several machines of p GPUs goes in p rings, each of which leaves a machine by another GPU's network link: of a
GPU's bytes 1 / p go over the network.
"""

from dataclasses import dataclass, replace

from model.activations import kept_bytes, recomputed_flops_per_token
from model.config import LlamaConfig
from model.flops import FLOAT32, flops_per_token, matmul_parameters, parameters

CHUNK_BYTES = {"ddp": 1152 * 2**20, "fsdp": 448 * 2**20, "hsdp": 448 * 2**20}
"""Logits that the loss head holds at a time: kernels/linear_cross_entropy/chunked.py."""


@dataclass(frozen=True)
class Layout:
    """Who keeps what: so many GPUs, shards of the model, and GPUs on a machine."""

    parallel: str
    gpus: int
    shards: int
    per_machine: int

    @property
    def replicas(self) -> int:
        """How often the shards are there, all of them."""
        return self.gpus // self.shards


def layout(parallel: str, gpus: int, per_machine: int) -> Layout:
    """Of --parallel. A process alone has the whole model, whatever that says.

    ValueError where the GPUs do not fill machines alike, or hsdp has one machine only.
    """
    if gpus > per_machine and gpus % per_machine:
        raise ValueError(f"--gpus {gpus} is not a multiple of --gpus-per-machine {per_machine}")
    here = min(gpus, per_machine)
    if parallel == "hsdp" and gpus == here:
        raise ValueError(f"--parallel hsdp needs several machines, and --gpus {gpus} are on one; say --parallel fsdp")
    if gpus == 1:
        parallel = "ddp"
    return Layout(parallel, gpus, {"ddp": 1, "fsdp": gpus, "hsdp": here}[parallel], here)


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU by part; the peak is their sum."""

    always: int
    """Values, gradients, moments, copies."""
    kept: int
    """Activations of all layers, from forward to backward."""
    at_the_peak: int
    """What else is there at the worst moment."""
    moment: str
    """Which that is: loss head, a layer's backward, embedding."""

    @property
    def peak(self) -> int:
        """All of it."""
        return self.always + self.kept + self.at_the_peak


def memory(
    config: LlamaConfig, where: Layout, tokens: int, recompute: str, micro_steps: int = 1, activation_bytes: int = 2
) -> Memory:
    """Of a micro-step of so many tokens on a GPU, by the formulas above."""
    a, ends = activation_bytes, config.vocab_size * config.dim
    layer, shared_out = layer_matrices(config), where.parallel != "ddp"
    if shared_out:
        waiting = FLOAT32 if where.replicas > 1 and micro_steps > 1 else 0
        always = (16 + waiting) * parameters(config) // where.shards + 16 * (2 * config.n_layers + 1) * config.dim
    else:
        copies = a * matmul_parameters(config) if a < FLOAT32 else 0
        always = 16 * parameters(config) + copies
    hidden = 3 * a * tokens * config.dim  # the final norm's sum and output, and its gradient
    chunk = min(CHUNK_BYTES[where.parallel], a * tokens * config.vocab_size)
    backward = _layer_backward(config, tokens, recompute, a)
    moments = {"loss head": hidden + chunk, "a layer's backward": hidden + backward, "embedding": 0}
    if shared_out:
        cast = a * ends if a < FLOAT32 else 0
        tied = 8 * ends if config.tie_embeddings else 0
        moments["loss head"] += 8 * ends + cast
        moments["a layer's backward"] += 3 * a * layer + 8 * layer + tied
        moments["embedding"] += 12 * ends
    kept = kept_bytes(config, tokens, recompute, a)
    moments["embedding"] -= kept  # which is gone by then
    moment = max(moments, key=lambda name: moments[name])
    return Memory(always, kept, moments[moment], moment)


def layer_matrices(config: LlamaConfig) -> int:
    """Elements of the matrices of one layer."""
    return (matmul_parameters(config) - config.vocab_size * config.dim) // config.n_layers


def _layer_backward(config: LlamaConfig, tokens: int, recompute: str, a: int) -> int:
    one = replace(config, n_layers=1)
    again = 0 if recompute == "none" else kept_bytes(one, tokens, "none", a) - kept_bytes(one, tokens, recompute, a)
    return again + a * tokens * (3 * config.hidden_dim + 2 * config.dim)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU sends in a step, by link."""

    within: float
    """Between the GPUs of a machine."""
    between: float
    """Between machines."""


def traffic(config: LlamaConfig, where: Layout, micro_steps: int, activation_bytes: int = 2) -> Traffic:
    """Of a step of so many micro-steps on each GPU, by the formulas above."""
    a, ends = activation_bytes, config.vocab_size * config.dim
    if where.parallel == "ddp":
        total = 2 * (where.gpus - 1) / where.gpus * FLOAT32 * parameters(config)
        return _in_rings(total, where)
    layers = config.n_layers * layer_matrices(config)
    # Gathered for both passes and scattered once; the tied matrix stays from the one pass to the other.
    of_ends = 8 * ends if config.tie_embeddings else 24 * ends
    total = micro_steps * (where.shards - 1) / where.shards * ((2 * a + FLOAT32) * layers + of_ends)
    if where.parallel == "hsdp":
        replicas = where.replicas
        return Traffic(total, 2 * (replicas - 1) / replicas * FLOAT32 * parameters(config) / where.shards)
    return _in_rings(total, where)


def _in_rings(total: float, where: Layout) -> Traffic:
    between = total / where.per_machine if where.gpus > where.per_machine else 0.0
    return Traffic(total - between, between)


def flops(config: LlamaConfig, tokens: int, recompute: str) -> tuple[int, int]:
    """FLOPs of so many tokens that MFU counts, and those computed again."""
    return tokens * flops_per_token(config), tokens * recomputed_flops_per_token(config, recompute)
