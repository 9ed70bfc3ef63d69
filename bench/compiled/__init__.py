"""`python -m bench.compiled`: what `torch.compile` makes of a training step for a GPU that is not there."""

KNOWN = {"2.11": "torch==2.11.0"}
"""Versions of PyTorch whose insides `bench.compiled.without_gpu` knows, each with what pip installs (a build with CUDA)."""
