"""Scores of the methods on freely available data: `python -m benchmarks.study`."""
