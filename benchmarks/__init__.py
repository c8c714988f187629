"""Benchmarks of speed (speed/) and accuracy (study/), and publish.py, which writes the results into the docs."""
