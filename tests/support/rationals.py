"""Numbers as exact fractions."""

from fractions import Fraction

import numpy as np


def exact(array):
    """The numbers of an array as fractions."""
    return np.vectorize(lambda number: Fraction(float(number)), otypes=[object])(array)
