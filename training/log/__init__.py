"""What a run says: log lines, metrics, the curve, a profile."""
