"""What the methods score on data that anybody can get: `python -m benchmarks.study`."""
