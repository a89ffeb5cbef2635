"""Reads VNN-LIB 1.0, also as writers of SMT-LIB state it, and VNN-LIB 2.0.

A file asserts the *unsafe* set: some input in a box and the output that it gives satisfy
constraints, nested in any way with `and`, `or`, `not` and `=>`. `load` and `load_query` bring them
to disjunctive normal form.

The reader of 1.0 is our own because the package `vnnlib` on PyPI has no release that fits: 1.x
reads only VNN-LIB 2.0 and refuses every 1.0 file, and 0.0.1 of 2023 has neither size limits nor
line numbers in its errors.
"""

from boundjax.properties import Case as Case
from boundjax.properties import Conjunction as Conjunction
from boundjax.properties import Property as Property
from boundjax.vnnlib.limits import VnnlibError as VnnlibError
from boundjax.vnnlib.query import NetworkUse as NetworkUse
from boundjax.vnnlib.query import Query as Query
from boundjax.vnnlib.query import Tensor as Tensor
from boundjax.vnnlib.query import is_query as is_query
from boundjax.vnnlib.query import load_query as load_query
from boundjax.vnnlib.query import parse_query as parse_query
from boundjax.vnnlib.reader import load as load
from boundjax.vnnlib.reader import parse as parse
