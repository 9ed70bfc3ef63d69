"""Hugging Face's Llama of equal size: an optional peer, `pip install '.[bench]'` (transformers 4.45 or newer)."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LlamaConfig


class TransformersLlama(nn.Module):
    """`transformers.LlamaForCausalLM`, float32 and with random weights, on PyTorch's scaled_dot_product_attention."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        import transformers

        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.rope_scaling_factor > 1:
            rope |= {
                "rope_type": "llama3",
                "factor": config.rope_scaling_factor,
                "low_freq_factor": config.rope_low_freq_factor,
                "high_freq_factor": config.rope_high_freq_factor,
                "original_max_position_embeddings": config.rope_original_max_seq_len,
            }
        if int(transformers.__version__.partition(".")[0]) >= 5:
            rope = {"rope_parameters": rope}
        else:  # theta apart, and no scaling where there is none
            theta = rope.pop("rope_theta")
            rope = {"rope_theta": theta, "rope_scaling": rope if len(rope) > 1 else None}
        theirs = transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            use_cache=False,
            **rope,
        )
        self.llama = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="sdpa").float()

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of (B, T) tokens against (B, T) targets."""
        logits = self.llama(input_ids=tokens).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
