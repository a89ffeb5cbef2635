"""Linear constraints between inputs: against linear programs, samples and exact arithmetic."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import boundjax as bj

pytestmark = [pytest.mark.quick, pytest.mark.sampled(4)]

SIZE = 6


def optimum(c, rows, upper, low, high, lower=None):
    """The maximum of `<c, x>` by HiGHS, float64."""
    matrix, limits = rows, upper
    if lower is not None:
        matrix, limits = np.concatenate([rows, -rows]), np.concatenate([upper, -lower])
    answer = optimize.linprog(
        -np.float64(c),
        np.float64(matrix),
        np.float64(limits),
        bounds=np.stack([low, high], axis=1).astype(np.float64),
        method="highs",
    )
    assert answer.status == 0
    return -answer.fun


def problem(seed, count, equal=False):
    """A box, rows and limits with a point inside, and coefficients `[5, SIZE]`, float32."""
    rng = np.random.default_rng(seed)
    low = rng.normal(size=SIZE)
    high = low + rng.uniform(0, 2, size=SIZE) * (rng.uniform(size=SIZE) > 0.1)
    rows = rng.normal(size=(count, SIZE)) * 10 ** rng.uniform(-2, 2, size=(count, 1))
    rows[rng.uniform(size=rows.shape) < 0.2] = 0.0
    upper = rows @ rng.uniform(low, high)
    if not equal:
        upper += rng.uniform(0, 0.3, size=count) * np.abs(rows).sum(1)
    c = rng.normal(size=(5, SIZE)) * 10 ** rng.uniform(-3, 2, size=(5, 1))
    return tuple(np.float32(a) for a in (low, high, rows, upper, c))


def made(low, high, rows, upper, lower=None):
    return bj.Constrained(bj.Box(*map(jnp.asarray, (low, high))), jnp.asarray(rows), upper, lower)


@jax.jit
def supports(input_set, coefficients):
    return jax.vmap(input_set.support)(coefficients), input_set.interval()


@jax.jit
def maximisers(input_set, coefficients):
    return jax.vmap(jax.grad(input_set.support))(coefficients)


@pytest.mark.parametrize(("count", "gap"), [(1, 1e-5), (4, 1e-4)])
def test_the_support_is_the_linear_programs_optimum(count, gap):
    for seed in range(12):
        low, high, rows, upper, c = problem(seed, count)
        input_set = made(low, high, rows, upper)
        best = np.array([optimum(row, rows, upper, low, high) for row in c])
        size = np.abs(c).astype(np.float64) @ np.maximum(abs(low), abs(high))
        nearest, interval = supports(input_set, c)
        rigorous, outward = supports(input_set.outwards(), c)
        assert np.all(np.abs(np.float64(nearest) - best) <= gap * size)
        # HiGHS is exact up to 1e-7 of the constraints.
        assert np.all(np.float64(rigorous) >= best - 1e-6 * size)
        assert np.all(np.float64(rigorous) <= best + 2 * gap * size)
        for ends in (interval, outward):
            assert np.all(ends.lower >= low - 1e-5 * (1 + abs(low)))
            assert np.all(ends.upper <= high + 1e-5 * (1 + abs(high)))
            for index in range(SIZE):
                unit = np.eye(SIZE)[index]
                assert ends.upper[index] >= optimum(unit, rows, upper, low, high) - 1e-4
                assert ends.lower[index] <= -optimum(-unit, rows, upper, low, high) + 1e-4


@pytest.mark.parametrize("two_rows", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_equations(two_rows):
    for seed in range(8):
        low, high, rows, upper, c = problem(seed, 4, equal=True)
        slack = 1e-5 * np.abs(rows).sum(1)  # so that float32 limits have points
        limits = upper - slack, upper + slack
        if two_rows:
            stacked = np.concatenate([rows, -rows]), np.concatenate([limits[1], -limits[0]])
            input_set = made(low, high, *stacked)
        else:
            input_set = made(low, high, rows, limits[1], limits[0])
        best = [optimum(row, rows, limits[1], low, high, limits[0]) for row in c]
        size = np.abs(c).astype(np.float64) @ np.maximum(abs(low), abs(high))
        np.testing.assert_array_less(
            np.abs(np.float64(supports(input_set, c)[0]) - best), 2e-3 * size
        )
        rigorous = np.float64(supports(input_set.outwards(), c)[0])
        assert np.all(rigorous >= best - 1e-6 * size)


def test_chains_of_ordered_inputs():
    size = 40
    chain = jnp.eye(size)[:-1] - jnp.eye(size)[1:]
    input_set = bj.Constrained(bj.Box(jnp.zeros(size), jnp.ones(size)), chain, jnp.zeros(size - 1))
    c = jax.random.normal(jax.random.key(0), (3, size))
    # The vertices of the set are steps from 0 to 1.
    best = np.cumsum(np.asarray(c)[:, ::-1], axis=1).max(axis=1).clip(0)
    support = np.asarray(supports(input_set, c)[0])
    assert (support >= best - 1e-5).all()
    # The rounding of sums of so many terms is charged.
    charged = size * np.finfo(np.float32).eps * np.abs(np.asarray(c)).sum(axis=1)
    assert (support <= best + charged).all()


def exactly_inside(x, low, high, rows, upper):
    if not (np.all(low <= x) and np.all(x <= high)):
        return False
    return all(
        sum(Fraction(float(a)) * Fraction(float(v)) for a, v in zip(row, x, strict=True))
        <= Fraction(float(limit))
        for row, limit in zip(rows, upper, strict=True)
    )


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_no_point_of_the_exact_set_is_excluded(scale):
    kept = 0
    for seed in range(8):
        low, high, rows, upper, c = problem(seed, 4)
        low, high, upper = (np.float32(a * scale) for a in (low, high, upper))
        nearest = made(low, high, rows, upper)
        support, interval = supports(nearest.outwards(), c)
        # Maximisers, which touch the constraints, moved by a few roundings.
        points = np.asarray(maximisers(nearest, c))
        rng = np.random.default_rng(seed)
        for point in points:
            moves = rng.integers(-3, 4, size=(40, SIZE)) * np.spacing(np.abs(point) + 1e-37)
            for x in np.float32(np.clip(point + moves, low, high)):
                if not exactly_inside(x, low, high, rows, upper):
                    continue
                kept += 1
                assert np.all(interval.lower <= x)
                assert np.all(x <= interval.upper)
                for row, bound in zip(c, support, strict=True):
                    terms = zip(row, x, strict=True)
                    value = sum(Fraction(float(a)) * Fraction(float(v)) for a, v in terms)
                    assert value <= Fraction(float(bound))
    assert kept > 100


@pytest.mark.parametrize("p", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_other_bases(p):
    center = jnp.array([0.5, 0.2, -0.3])
    ball = bj.LpBall(center, 0.4, p=p)
    row = jnp.array([[1.0, -1.0, 0.5]])
    input_set = bj.Constrained(ball, row, jnp.array([0.05]))
    c = jax.random.normal(jax.random.key(0), (6, 3))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200_000, 3))
    x *= 0.4 * rng.uniform(size=(len(x), 1)) / np.linalg.norm(x, ord=p, axis=1, keepdims=True)
    x = np.asarray(center) + x
    x = x[x @ np.asarray(row[0]) <= 0.05]
    best = (x @ np.asarray(c).T).max(axis=0)
    alone = jax.vmap(ball.support)(c)
    for kind in (input_set, input_set.outwards()):
        support, interval = supports(kind, c)
        assert np.all(support >= best - 1e-6)
        assert np.all(support <= best + 0.06)
        assert np.all(support <= alone + 1e-5)
        assert np.all((interval.lower <= x.min(0)) & (x.max(0) <= interval.upper))
        middle, radius = kind.ball()
        assert np.all(np.linalg.norm(x - np.asarray(middle), axis=1) <= radius)
    # A half-space through the center: the maximum along the row is the limit itself.
    np.testing.assert_allclose(supports(input_set, jnp.tile(row, (6, 1)))[0], 0.05, atol=1e-6)


def network(x):
    first = jax.nn.relu(x @ jnp.array([[1.0, -2.0, 0.5], [0.5, 1.0, -1.0]]) + 0.1)
    return first @ jnp.array([[1.0, -1.0], [0.5, 0.3], [-1.0, 0.2]])


ORDERED = bj.Constrained(bj.Box(jnp.zeros(2), jnp.ones(2)), jnp.array([[1.0, -1.0]]), jnp.zeros(1))
TRANSFORMS = {
    "interval": bj.interval,
    "linear": bj.linear,
    "rigorous": lambda f: bj.linear(f, rounding="float32"),
    "alpha": lambda f: bj.linear(f, slopes=bj.optimized(3)),
    "forward": bj.forward_linear,
    "lipschitz": bj.lipschitz,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform_takes_constraints(transform):
    x = np.random.default_rng(0).uniform(size=(3000, 2)).astype(np.float32)
    x = np.sort(x, axis=1)  # x_0 <= x_1
    values = np.asarray(jax.vmap(network)(x))
    bounds = jax.jit(TRANSFORMS[transform](network))(ORDERED, jnp.eye(2))
    assert np.all(bounds.lower <= values.min(0) + 1e-6)
    assert np.all(bounds.upper >= values.max(0) - 1e-6)


def test_linear_bounds_gain_what_the_constraint_excludes():
    difference = jax.jit(bj.linear(lambda x: x[0] - x[1]))
    assert abs(difference(ORDERED).upper) < 1e-6
    assert difference(ORDERED.base).upper == 1.0


@pytest.mark.slow
def test_it_is_a_pytree_under_jit_vmap_and_grad():
    rows, uppers = jnp.array([[1.0, -1.0]]), jnp.array([[-0.5], [0.0], [0.5]])
    boxes = jax.vmap(lambda u: bj.Constrained(bj.Box(jnp.zeros(2), jnp.ones(2)), rows, u))(uppers)
    c = jnp.array([1.0, -1.0])
    support = jax.jit(jax.vmap(lambda s: s.support(c)))(boxes)
    np.testing.assert_allclose(support, uppers[:, 0], atol=1e-6)
    axes = bj.Constrained(bj.Box(None, None), None, 0)
    shared = jax.vmap(
        lambda s: s.support(c),
        in_axes=(axes,),
    )(bj.Constrained(ORDERED.base, rows, uppers))
    np.testing.assert_allclose(shared, uppers[:, 0], atol=1e-6)
    # The derivative by the limit is the multiplier, by the coefficients the maximiser.
    by_limit = jax.jit(jax.grad(lambda u: bj.Constrained(ORDERED.base, rows, u).support(3.0 * c)))
    np.testing.assert_allclose(by_limit(jnp.array([0.2])), [3.0], rtol=1e-5)
    (maximiser,) = maximisers(ORDERED, jnp.array([[1.0, -0.25]]))
    np.testing.assert_allclose(maximiser, [1.0, 1.0], atol=1e-4)


@jax.jit
def value_and_derivatives(c, input_set):
    """The support, and its derivatives by `c` and by the arrays of the set."""
    leaves, tree = jax.tree.flatten(input_set)

    def support(c, *leaves):
        return jax.tree.unflatten(tree, leaves).support(c)

    return jax.value_and_grad(support, argnums=range(1 + len(leaves)))(c, *leaves)


@pytest.mark.slow
def test_gradients_are_finite_at_degenerate_inputs():
    point = bj.Constrained(bj.Box(jnp.ones(2), jnp.ones(2)), jnp.array([[1.0, -1.0]]), jnp.zeros(1))
    flat = bj.Constrained(ORDERED.base, jnp.zeros((1, 2)), jnp.zeros(1))
    ball = bj.Constrained(bj.LpBall(jnp.ones(2), jnp.zeros(()), p=2), point.rows, point.upper)
    for input_set in (point, flat, ORDERED, ball, point.outwards()):
        for c in (jnp.zeros(2), jnp.array([0.0, 1.0])):
            value, by = value_and_derivatives(c, input_set)
            assert np.isfinite(value)
            assert all(np.isfinite(leaf).all() for leaf in by)


def test_sets_without_points():
    rows = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    box = ORDERED.base
    # Neither row alone excludes every point.
    with pytest.raises(ValueError, match="no input of the base satisfies all 2 constraints"):
        bj.Constrained(box, rows, jnp.array([-0.5, 0.4]))
    corner = bj.LpBall(jnp.zeros(2), 1.0, p=2)
    with pytest.raises(ValueError, match="no input of the base satisfies all 1 constraints"):
        bj.Constrained(corner, jnp.array([[1.0, 1.0]]), jnp.array([-1.5]))
    for outward in (False, True):

        def bounds(upper, outward=outward):
            made = bj.Constrained(box, rows, upper, outward=outward)
            rounding = "real" if outward else "nearest"
            return bj.linear(lambda x: x[:1] + 2.0, rounding=rounding)(made)

        assert np.isnan(jax.jit(bounds)(jnp.array([-1.5, 1.0])).lower).all()
        assert np.isnan(jax.jit(bounds)(jnp.array([-0.5, 0.4])).lower).all()
        assert np.isfinite(jax.jit(bounds)(jnp.array([-0.5, 0.5])).lower).all()


BOX = ORDERED.base
ONE = jnp.ones((1, 2))
BAD = {
    "base": (
        lambda: bj.Constrained(jnp.zeros(2), ONE, jnp.ones(1)),
        TypeError,
        "input set, got an",
    ),
    "tree": (
        lambda: bj.Constrained(bj.Box({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}), ONE, jnp.ones(1)),
        TypeError,
        "base of one array, got a set of a pytree",
    ),
    "rows": (lambda: bj.Constrained(BOX, jnp.ones((1, 3)), jnp.ones(1)), ValueError, r"\[k, 2\]"),
    "limits": (lambda: bj.Constrained(BOX, ONE, jnp.ones(2)), ValueError, r"got \(1, 2\) and \(2,"),
    "no rows": (lambda: bj.Constrained(BOX, ONE[:0], jnp.ones(0)), ValueError, "for k >= 1"),
    "nan": (lambda: bj.Constrained(BOX, ONE * jnp.nan, jnp.ones(1)), ValueError, "finite, got nan"),
    "limit nan": (lambda: bj.Constrained(BOX, ONE, jnp.full(1, jnp.nan)), ValueError, "at index 0"),
    "order": (
        lambda: bj.Constrained(BOX, ONE, jnp.ones(1), 2.0 * jnp.ones(1)),
        ValueError,
        r"lower <= upper, .*got 2\.0 and 1\.0 at index 0",
    ),
    "inexact rows": (
        lambda: bj.Constrained(BOX, 0.1 * np.ones((1, 2)), np.ones(1)).outwards().interval(),
        ValueError,
        r"rows of float32 numbers, got 0\.1 at index \(0, 0\); .*jnp\.asarray",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_clear_line(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
