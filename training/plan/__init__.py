"""What a run would take on GPUs that are not here: `python -m training.plan`. Imports neither torch nor triton."""
