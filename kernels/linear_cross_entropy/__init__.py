"""The loss head: a product with the vocabulary and its cross entropy, in chunks."""
