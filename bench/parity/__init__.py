"""`python -m bench.parity`: errors against float64, and which kernel is wrong."""
