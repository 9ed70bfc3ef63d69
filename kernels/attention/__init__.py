"""Grouped-query flash attention: the op, the tile tables, the kernels forward and backward."""
