"""Speed and memory beside what others do: `python -m benchmarks.speed`."""
