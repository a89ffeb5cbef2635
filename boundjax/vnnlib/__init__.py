"""Reads VNN-LIB 1.0 properties, also as writers of SMT-LIB state them.

A file asserts the *unsafe* set: some input in a box and the output that it gives satisfy linear
constraints, nested in any way with `and`, `or`, `not` and `=>`. `load` brings them to disjunctive
normal form.

The reader is our own because the package `vnnlib` on PyPI has no release that fits: 1.x reads only
VNN-LIB 2.0 and refuses every 1.0 file, and 0.0.1 of 2023 has neither size limits nor line numbers
in its errors.
"""

from boundjax.properties import Case as Case
from boundjax.properties import Conjunction as Conjunction
from boundjax.properties import Property as Property
from boundjax.vnnlib.limits import VnnlibError as VnnlibError
from boundjax.vnnlib.reader import load as load
from boundjax.vnnlib.reader import parse as parse
