"""Benchmarks of the library and of the train step: `python -m experiments.benchmarks.<name>`."""
