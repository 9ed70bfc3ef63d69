"""`python -m bench.machine_code`: what the compiler makes of each kernel, with no GPU."""
