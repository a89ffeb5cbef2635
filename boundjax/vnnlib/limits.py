"""What a property file may hold: files are untrusted.

Each limit is far above what benchmarks need, and together they keep a small file from exhausting
memory.
"""

MAX_BYTES = 2**26
MAX_TOKENS = 4_000_000
MAX_DEPTH = 100
MAX_DISJUNCTS = 20_000
MAX_CONSTRAINTS = 1_000_000  # in disjunctive normal form
MAX_VARIABLES = 1_000_000
MAX_NUMBERS = 2**25  # in all arrays of a property
MAX_PRODUCTS = 10_000  # of two variables each
MAX_DIGITS = 400  # of a number as it is written
MAX_BITS = 8000  # of a product's numerator and denominator


class VnnlibError(ValueError):
    """A property file that cannot be read; the message names the file and the line."""
