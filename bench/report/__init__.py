"""`python -m bench.report`: tables and charts from the committed results."""
