"""Speed and memory compared with alternatives: `python -m benchmarks.speed`."""
