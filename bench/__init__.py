"""What it costs, against what people would use instead. Every command prints a table and can write JSON with its environment."""
