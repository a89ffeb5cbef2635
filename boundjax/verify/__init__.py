"""Decides VNN-LIB properties: `verify` for a JAX function, `python -m boundjax.verify` for files.

`programs` holds the compiled functions, `search` decides, `__main__` reads files and prints.
"""

from boundjax.verify.programs import LADDER as LADDER
from boundjax.verify.programs import Programs as Programs
from boundjax.verify.search import Counterexample as Counterexample
from boundjax.verify.search import Result as Result
from boundjax.verify.search import verify as verify
