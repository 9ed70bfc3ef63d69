"""`python -m bench.compiled`: what `torch.compile` makes of a training step for a GPU that is not there."""
