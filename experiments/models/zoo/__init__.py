"""Classifiers as the ecosystem's own examples write them, each as its users would hand it over.

A new kind of model is one more function with `@model`; `tests/boundjax/test_zoo.py` certifies every
one of them and attacks what it certifies, and `experiments.benchmarks.zoo` measures them.
"""

from experiments.models.zoo import functions, linen, nnx
from experiments.models.zoo.registry import EXAMPLES, ZOO, ZooModel

__all__ = ["EXAMPLES", "ZOO", "ZooModel", "functions", "linen", "nnx"]
