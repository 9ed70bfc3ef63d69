"""Parameters, FLOPs and bytes of a training step in closed form. Imports nothing heavy.

FLOPs a token = 6 * N_matmul + 12 * L * H * D * T: two a multiply-add, and the backward twice the forward. N_matmul counts the
weights of every matrix product, the output head included and the input embedding not (a look-up multiplies nothing);
attention's two products count all T keys, the causal half not taken off. MFU is this over the GPU's dense peak.
"""

from dataclasses import dataclass

from kernels.grammar import mlp_serves
from model.config import LlamaConfig

FLOAT32 = 4


def matmul_parameters(config: LlamaConfig) -> int:
    """N_matmul: weights that take part in a matrix product, the output head included even where it is tied."""
    kv = config.n_kv_heads * config.head_dim
    layer = config.dim * (config.dim + 2 * kv) + config.dim * config.dim + 3 * config.dim * config.hidden_dim
    return config.n_layers * layer + config.vocab_size * config.dim


def parameters(config: LlamaConfig) -> int:
    """All parameters; a tied head is counted once."""
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.dim
    norms = (2 * config.n_layers + 1) * config.dim
    return matmul_parameters(config) + embedding + norms


def flops_per_token(config: LlamaConfig, sequence_length: int | None = None) -> int:
    """Forward and backward FLOPs of one token; sequence_length in tokens, max_seq_len if not given."""
    length = sequence_length or config.max_seq_len
    return 6 * matmul_parameters(config) + 12 * config.n_layers * config.n_heads * config.head_dim * length


@dataclass(frozen=True)
class Cost:
    """What must be moved and computed, at the least."""

    bytes: int
    """Device memory read and written, each tensor once an operation that touches it."""
    flops: int = 0
    """Two a multiply-add; 0 where memory is the limit and they are not counted."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def times(self, n: int) -> "Cost":
        """So many of it."""
        return Cost(n * self.bytes, n * self.flops)


def step_costs(config: LlamaConfig, micro_batch: int, micro_steps: int, activation_bytes: int = 2) -> dict[str, Cost]:
    """The floor of a step, op by op: `kernel_costs` summed; nothing of `mlp` or of `swiglu`, of which a step needs one."""
    by_op: dict[str, Cost] = {}
    for op, _, cost in kernel_costs(config, micro_batch, micro_steps, activation_bytes):
        by_op[op] = by_op.get(op, Cost(0)) + cost
    return by_op


def kernel_costs(
    config: LlamaConfig, micro_batch: int, micro_steps: int, activation_bytes: int = 2
) -> list[tuple[str, str, Cost]]:
    """The floor of a step if each op reads its inputs and writes its outputs once, each matrix product by itself.

    The op, which of its kernels where they are told apart, and what they cost in the whole step.

    micro_batch: sequences; micro_steps: accumulated; activation_bytes: 2 for half precision, 4 for float32.
    Per op and micro-step, with M tokens and a = activation_bytes (forward + backward):
      embedding  gather: read and write M dim; backward: read M dim a, add to the rows of the float32 gradient
      linear     x, W, y forward; dy, W, dx and dy, x, dW (float32, accumulated: read and written) backward
      rms_norm   first: x, y | dy, x, dx;  add + norm: branch, residual, y, sum | dy, dsum, sum, dx (one gradient for both)
      rope       q, k read and written forward; backward it is part of attention's, which writes dqkv
      swiglu     2F read, F written | F and 2F read, 2F written
      mlp        where it is one kernel (`kernels.grammar.mlp_serves`), in place of w_gate_up, swiglu and w_down: x read, 2F and
                 out written | dout and 2F read, 2F, F and dx written; the gradients of its weights stay products
      attention  q, k, v, o | q, k, v, o, do, dq, dk, dv, and the float32 log-sum-exp written and read
      loss head  a linear map, and between its products each chunk's logits are read and rewritten as their gradient
      optimizer  p, g, m, v read, p, m, v written, and in half precision the copies of the matrices and the head, once a step
    """
    a = activation_bytes
    tokens = micro_batch * config.max_seq_len
    dim, ffn, layers, vocab = config.dim, config.hidden_dim, config.n_layers, config.vocab_size
    q, kv = config.dim, config.n_kv_heads * config.head_dim

    def products(op: str, part: str, inputs: int, outputs: int, times: int) -> list[tuple[str, str, Cost]]:
        flops = 2 * tokens * inputs * outputs
        activations, weight = tokens * (inputs + outputs) * a, inputs * outputs
        forward = Cost(activations + weight * a, flops)
        gradient_of_weight = Cost(activations + 2 * weight * FLOAT32, flops)
        # the gradient of the input moves what the forward moves
        return [(op, part, cost.times(times)) for cost in (forward, forward, gradient_of_weight)]

    linears = {"wqkv": (dim, q + 2 * kv), "wo": (q, dim)}
    feed_forward = {"w_gate_up": (dim, 2 * ffn), "w_down": (ffn, dim)}
    if mlp_serves(dim, ffn, tokens, a):
        weights = 3 * dim * ffn
        kernels = [
            Cost(tokens * (2 * dim + n * ffn) * a + weights * a, 2 * tokens * weights).times(layers) for n in (2, 5)
        ]
        gradients = [products("linear", name, *shape, layers)[-1] for name, shape in feed_forward.items()]
        of_feed_forward = [*(("mlp", "", cost) for cost in kernels), *gradients, ("swiglu", "", Cost(0))]
    else:
        linears |= feed_forward
        of_feed_forward = [("swiglu", "", Cost(layers * tokens * ffn * (3 + 5) * a)), ("mlp", "", Cost(0))]
    norms = 2 * layers * tokens * dim * (4 + 4) * a + tokens * dim * (2 + 3) * a
    attention = tokens * ((2 * q + 2 * kv) + (4 * q + 4 * kv)) * a + 2 * tokens * config.n_heads * FLOAT32
    micro_step = [
        ("embedding", "", Cost(tokens * dim * 3 * a + 2 * min(tokens, vocab) * dim * FLOAT32)),
        *(kernel for name, shape in linears.items() for kernel in products("linear", name, *shape, layers)),
        ("rms_norm", "", Cost(norms)),
        ("rope", "", Cost(layers * tokens * 2 * (q + kv) * a)),
        *of_feed_forward,
        ("attention", "", Cost(layers * attention, 12 * layers * tokens * q * config.max_seq_len)),
        *products("linear_cross_entropy", "products", dim, vocab, 1),
        ("linear_cross_entropy", "softmax", Cost(tokens * vocab * 2 * a)),
    ]
    copies = matmul_parameters(config) * a if a < FLOAT32 else 0
    update = ("optimizer", "", Cost(7 * parameters(config) * FLOAT32 + copies))
    return [(op, part, cost.times(micro_steps)) for op, part, cost in micro_step] + [update]
