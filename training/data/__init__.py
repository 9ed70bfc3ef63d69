"""From text to batches: corpus, tokenizer, shards, batches."""
