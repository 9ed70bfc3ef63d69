"""What others run: Liger-Kernel, transformers, the loop this project started from."""
