"""One optimizer step: flat buffers, the optimizer, the schedule, the captured graph."""
