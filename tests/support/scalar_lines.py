"""Lines of smooth functions for the tests: functions, intervals, what the lines should be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import AS_USERS_HAVE_IT, on_host
from scalar_functions import SCALARS, SMOOTH, scalar_intervals

from boundjax.ir.families import Scalar
from boundjax.tracing.trace import trace

# Steps have no derivative, straight pieces no curvature, far waves constant lines; the others are
# not one op.
COMPOSED = (
    *("sign", "floor", "ceil", "round", "predicate", "hard_sigmoid", "power_of_a_base"),
    *("cast", "interp"),
    *("sinc", "mod", "mod_negative", "fmod", "floor_divide", "jump", "shrink", "huber"),
)
FUNCTIONS = {
    **{name: (SCALARS[name], (-2e3, 2e3)) for name in ("sigmoid", "tanh", "softplus")},
    **{name: entry for name, entry in SMOOTH.items() if name not in COMPOSED},
}
# Around every inflection and kink of the table, on either side of them, narrow and wide.
INTERVALS = np.array(
    [
        *[(-1, 1), (-3, 1), (-1, 4), (-6, 6), (-2.5, -2.3), (-1.5, -1.3), (1.3, 1.5), (-5, 0.5)],
        *[(0.2, 5), (-3, -1), (-0.5, 3), (2, 9), (-9, -2), (-4, 2), (-1.2, 2.9), (-8, 8), (1, 1.1)],
        *[(-3.2, -2.8), (2.8, 3.1), (-0.01, 0.01), (-20, 30), (-3.5, 4.1), (-6.9, 0.1), (0.3, 6)],
        *[(-12, -1.4), (-1.6, 9), (-2.2, 12), (-7, 2.4), (0.05, 0.2), (0.5, 70), (-0.9, -0.2)],
    ]
)
# One worker runs the tests of a function, which share compiled lines and values.
each_function = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.xdist_group(f"smooth {name}")) for name in FUNCTIONS],
)


def scalar_node(function, example):
    nodes = trace(function, example).nodes
    return next(node for node in nodes if isinstance(node.op, Scalar))


def in_domain(intervals, low, high):
    """The intervals' parts inside a domain that are not points."""
    ends = np.clip(intervals, low, high)
    return ends[ends[:, 0] < ends[:, 1]].T


class Given:
    """Positions for the lines in the order in which they ask."""

    def __init__(self, *positions):
        self.positions = list(positions)

    def __call__(self, lower, upper, default):
        assert default.shape == lower.shape
        return self.positions.pop(0) if self.positions else default


def drawn_intervals(name, rng):
    """Lower and upper ends `[2, n]`, as many for every function."""
    centre, radius = 4 * rng.normal(size=300), 10 ** rng.uniform(-5, 1.5, size=300)
    drawn = np.stack([centre - radius, centre + radius], axis=1)
    return np.clip(np.concatenate([drawn, scalar_intervals().T, INTERVALS]), *FUNCTIONS[name][1]).T


@functools.cache
def _compiled_lines(name):
    function, _ = FUNCTIONS[name]

    def run(lower, upper, first, second):
        node = scalar_node(function, lower)
        return node.op.lines(node, lower, upper, Given(first, second))

    return on_host(run, AS_USERS_HAVE_IT)


def compiled_lines(name, lower, upper, first=0.5, second=0.5, dtype=np.float64):
    """The lines over intervals `[n]` with given positions: one program for every `n`."""
    size = 300 + scalar_intervals().shape[1] + len(INTERVALS)
    arguments = (np.broadcast_to(a, lower.shape) for a in (lower, upper, first, second))
    arguments = [jnp.asarray(np.resize(a, size).astype(dtype)) for a in arguments]
    return jax.tree.map(lambda line: line[: lower.size], _compiled_lines(name)(*arguments))


@functools.cache
def compiled_values(name, size):
    """Of points `[count, size]`."""
    node = scalar_node(FUNCTIONS[name][0], jnp.zeros(size))
    return on_host(jax.vmap(node.apply))


def grid_and_values(name, lower, upper, count=2001):
    """Points of the intervals `[count, n]` and the function there, in float64."""
    share = np.linspace(0, 1, count)[:, None]
    grid = np.clip(lower + share * (upper - lower), lower, upper)
    with jax.enable_x64(True):
        return grid, compiled_values(name, lower.size)(grid)


def least_gaps(lines, grid, values):
    """How far the values stay from the lower and the upper line, in float64."""
    lower_slope, lower_intercept, upper_slope, upper_intercept = (
        np.asarray(a, np.float64) for a in lines
    )
    below = values - (lower_slope * grid + lower_intercept)
    above = upper_slope * grid + upper_intercept - values
    return np.minimum(below.min(0), above.min(0))


def concave_envelope(grid, values, at):
    """The least concave function above the points `[count]`, at a point: by its convex hull."""
    hull = []
    for x, y in zip(grid, values, strict=True):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) > (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return np.interp(at, *np.transpose(hull))
