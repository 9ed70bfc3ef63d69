"""`python -m bench.ops`: each op against its peers."""
