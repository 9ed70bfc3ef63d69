"""`python -m bench.roofline`: the floor of a step, and what a step issues."""
