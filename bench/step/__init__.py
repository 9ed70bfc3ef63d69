"""`python -m bench.step`: a whole training step."""
