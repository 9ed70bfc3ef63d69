"""Two ladders from a naive kernel to ours, each step a kernel that runs. LEARN.md tells them; nothing imports this."""
