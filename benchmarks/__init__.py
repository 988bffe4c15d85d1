"""Speed and memory of JinaBERT beside what a user would pick instead: `python -m benchmarks.speed`."""
