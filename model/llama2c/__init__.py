"""llama2.c's files: one of weights, read by run.c and its ports, and tokenizer.bin.

A file of weights is a header of little-endian integers and then float32, matrix by matrix, row by row:

```
version 0   int32 dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: a head of its own), max_seq_len
            embedding | attention_norm | wq | wk | wv | wo | ffn_norm | w1 | w2 | w3 | final_norm | cos | sin | head
version 1   uint32 0x616b3432, int32 1, the seven integers (vocab_size positive), uint8 1 where the head is the embedding,
            zeros up to byte 256
            attention_norm | ffn_norm | final_norm | embedding | wq | wk | wv | wo | w1 | w2 | w3 | head
```

Each name but embedding, final_norm, cos, sin and head stands for all layers in turn. w1 is the gate, w3 the up and w2 the down
projection; cos and sin are tables (max_seq_len, head_dim / 2) that run.c passes over. A head stands only where it is not the
embedding. RoPE turns neighbours, (2i, 2i + 1), where this model turns (i, i + D/2): the rows of each head of wq and wk are in that
order.

Nothing tells RoPE's base, its scaling, or the norms' epsilon: run.c has 10000, none and 1e-5. Nor tokens: to it BOS is 1, and the
byte b is 3 + b.
"""
