"""What a layer keeps for the backward pass and what it computes again there, in closed form. Imports nothing heavy.

Elements a token and layer, for width d, kv = Hkv D and ffn width F, with the kernels of this project or compiled, by the modes of
model/recompute.py:

    none        7 d + 3 kv + 3 F    both norms: their sums and outputs, 4 d; qkv, d + 2 kv; rotated q and k, d + kv; attention's
                                    output, d; gate and up, 2 F; SwiGLU's output, F, but where the feed-forward is one kernel
    selective   6 d + 3 kv          all of that up to attention's output, and what wo makes of it
    full        2 d                 the branch and the residual stream that the layer is given (d in the first, which has no branch)

and in float32 an rms for each norm and the log-sum-exp of each head, where these are kept.
"""

from model.config import LlamaConfig
from model.flops import FLOAT32


def kept_bytes(
    config: LlamaConfig, tokens: int, recompute: str, activation_bytes: int = 2, one_kernel: bool = False
) -> int:
    """Bytes that all layers keep from forward to backward, of so many tokens. activation_bytes: 4 in float32, else 2.

    one_kernel: whether the feed-forward is one (kernels/mlp).
    """
    elements, float32 = _kept_by_a_layer(config, recompute)
    if one_kernel and recompute == "none":
        elements -= config.hidden_dim
    first_has_no_branch = config.dim if recompute == "full" else 0
    all_layers = config.n_layers * elements - first_has_no_branch
    return tokens * (all_layers * activation_bytes + config.n_layers * float32 * FLOAT32)


def _kept_by_a_layer(config: LlamaConfig, recompute: str) -> tuple[int, int]:
    """Elements of the compute dtype and of float32, a token."""
    d, kv, ffn = config.dim, config.n_kv_heads * config.head_dim, config.hidden_dim
    return {
        "none": (7 * d + 3 * kv + 3 * ffn, config.n_heads + 2),
        "selective": (6 * d + 3 * kv, config.n_heads + 1),
        "full": (2 * d, 0),
    }[recompute]


def recomputed_flops_per_token(config: LlamaConfig, recompute: str, sequence_length: int | None = None) -> int:
    """FLOPs of one token that the backward pass computes again, beyond `flops.flops_per_token`, which MFU counts.

    w_down is not computed again: nothing keeps what it makes. Eager half precision, where autograd sees its input only once the
    product is there, does it all the same, and so does the feed-forward that is one kernel.
    """
    d, kv, ffn = config.dim, config.n_kv_heads * config.head_dim, config.hidden_dim
    length = sequence_length or config.max_seq_len
    gate_up = 2 * d * 2 * ffn
    attention = 2 * d * (d + 2 * kv) + 2 * d * d + 4 * d * length
    layer = {"none": 0, "selective": gate_up, "full": attention + gate_up}[recompute]
    return config.n_layers * layer
