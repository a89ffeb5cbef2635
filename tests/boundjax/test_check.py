"""The certificate checker: its bounds hold for exact rationals and for float32 programs."""

import math
from fractions import Fraction

import checked_networks as networks
import numpy as np
import pytest

from boundjax import check

pytestmark = pytest.mark.quick

WORDS = ("interval", "crown-ibp", "crown", "fast-lin")
FLOAT32 = 2.0**-24
ROWS = np.array([[1.0, -1.0], [-1.0, 1.0]])


def sets(x, eps, norm=math.inf, clip=None):
    arrays = {"eps": np.float32(eps)}
    if clip is not None:
        arrays |= {"clip_low": np.float32(clip[0]), "clip_high": np.float32(clip[1])}
    return *check.sets_of(arrays, np.asarray(x, np.float32)[None]), norm


def lower_bounds(nodes, ball, word, unit=0.0, rows=ROWS):
    """Lower bounds on the rows: the better of the backward walk and of intervals."""
    with np.errstate(all="ignore"):
        walk = check.Bounds(nodes, ball, word, unit, 0.0)
        last = len(nodes) - 1
        return np.fmax(walk.bound(last, rows[None], True), walk.bound(last, rows[None]))[0]


def points(random, x, eps, norm=math.inf):
    """float32 points of the ball: its middle, corners, and others."""
    x = np.asarray(x, np.float32)
    result = [x]
    for _ in range(6):
        step = random.choice([-1.0, 1.0], size=x.shape)
        if norm != math.inf:
            step = random.normal(size=x.shape)
            step = step / np.linalg.norm(step, norm)
        point = (x + np.float32(eps) * step * random.choice([1.0, 1.0, 0.5])).astype(np.float32)
        result.append(point)
    return [point for point in result if inside(point, x, eps, norm)]


def inside(point, x, eps, norm):
    steps = [abs(Fraction(float(a)) - Fraction(float(b))) for a, b in zip(point, x, strict=True)]
    size = {math.inf: max(steps), 1: sum(steps), 2: sum(s * s for s in steps)}[norm]
    return size <= Fraction(float(np.float32(eps))) ** (2 if norm == 2 else 1)


def cases(count, seed=0):
    """Networks with an input and a radius, from a few spacings to wide."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        nodes = networks.random_network(random)
        x = (random.normal(size=3) * random.choice([1.0, 1e-3, 300.0])).astype(np.float32)
        eps = np.float32(random.choice([0.0, 1e-30, 1e-7, 1e-4, 0.1]))
        yield random, nodes, x, eps


@pytest.mark.parametrize("norm", [math.inf, 2, 1])
def test_no_bound_lies_above_an_exact_value(norm):
    attained = 0
    for random, nodes, x, eps in cases(60, seed=int(min(norm, 3))):
        bounds = {word: lower_bounds(nodes, sets(x, eps, norm), word) for word in WORDS}
        for point in points(random, x, eps, norm):
            first, second = networks.exact(nodes, point)
            for word, (below, above) in bounds.items():
                assert Fraction(below) <= first - second <= -Fraction(above), word
                size = abs(below) + 1e-30
                attained += first - second - Fraction(below) < Fraction(1e-9 * size)
    assert attained > 50  # the bounds are not needlessly wide


def test_no_float32_program_leaves_the_bounds():
    for random, nodes, x, eps in cases(60):
        bounds = {word: lower_bounds(nodes, sets(x, eps), word, FLOAT32) for word in WORDS}
        for point in points(random, x, eps):
            for _ in range(4):
                first, second = (float(v) for v in networks.program(nodes, point, random))
                for word, (below, above) in bounds.items():
                    assert below <= first - second <= -above, word


def cancelling():
    """`(x + 2^24) - 2^24` and similar sums whose terms cancel."""
    nodes = networks.start(2)
    large = np.float32(12345.678)
    networks.dense(nodes, 0, np.float32([[large, 0.1], [-large, 0.1]]), np.float32([1e-9, 0]))
    hidden = networks.ramp(nodes, len(nodes) - 1)
    networks.dense(nodes, hidden, np.float32([[1.0, 0.0], [0.0, 1.0]]))
    return nodes


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3])
def test_cancelling_weights_in_degenerate_sets(word, eps):
    nodes, x = cancelling(), np.float32([0.1, 0.1])
    below, above = lower_bounds(nodes, sets(x, eps), word)
    first, second = networks.exact(nodes, x)
    assert Fraction(below) <= first - second <= -Fraction(above)
    # Here the result of a float32 program is nothing but rounding errors.
    wide = lower_bounds(nodes, sets(x, eps), word, FLOAT32)
    assert wide[1] < above - 1e-4


def big_sum(terms=256):
    """A large term followed by many equal ones, which float32 loses one by one."""
    nodes = networks.start(terms)
    weights = np.full((terms, 1), 0.9, np.float32)
    weights[0] = 2.0**24
    networks.dense(nodes, 0, weights, np.float32([0.0]))
    networks.affine(nodes, len(nodes) - 1, factor=np.float32([1.0]))
    networks.dense(nodes, len(nodes) - 1, np.float32([[1.0, 0.0]]))
    return nodes


def test_the_error_of_programs_is_charged_and_the_test_sees_it(monkeypatch):
    nodes, x = big_sum(), np.ones(256, np.float32)
    value = float(
        networks.in_order(nodes[1].kernel[:, :, 0].reshape(-1))
    )  # below the exact sum: nearly every 0.9 is rounded away
    assert lower_bounds(nodes, sets(x, 0.0), "crown")[0] > value
    assert lower_bounds(nodes, sets(x, 0.0), "crown", FLOAT32)[0] <= value
    gamma = check.gamma
    monkeypatch.setattr(check, "gamma", lambda terms, unit=check.UNIT: 0.2 * gamma(terms, unit))
    assert lower_bounds(nodes, sets(x, 0.0), "crown", FLOAT32)[0] > value


@pytest.mark.parametrize("word", WORDS)
def test_the_rounding_of_the_checker_is_charged_and_the_test_sees_it(word, monkeypatch):
    def wrong():
        count = 0
        for random, nodes, x, eps in cases(15, seed=5):
            below, above = lower_bounds(nodes, sets(x, eps), word)
            for point in points(random, x, eps):
                first, second = networks.exact(nodes, point)
                count += not Fraction(below) <= first - second <= -Fraction(above)
        return count

    assert wrong() == 0
    monkeypatch.setattr(check, "gamma", lambda terms, unit=check.UNIT: 0.0)
    monkeypatch.setattr(check, "UNIT", 0.0)
    monkeypatch.setattr(check, "TINY", 0.0)
    monkeypatch.setattr(check.np, "nextafter", lambda x, end: x)
    assert wrong() > 0


def test_a_value_with_two_users_may_be_rounded_anew_for_each(monkeypatch):
    """`relu(y) - relu(y)` is 0, unless `y` is computed twice and added in another order."""
    nodes = networks.start(64)
    weights = networks.cancelling_terms(64)
    place = networks.dense(nodes, 0, weights[:, None], np.float32([1.0]))
    first, second = networks.ramp(nodes, place), networks.ramp(nodes, place)
    place = check.append(nodes, "add", (first, networks.affine(nodes, second, factor=-1.0)))
    networks.dense(nodes, place, np.float32([[1.0, 0.0]]))
    x = np.ones(64, np.float32)
    values = [float(networks.in_order(weights[order]) + np.float32(1.0))
              for order in (np.arange(64), np.arange(64)[::-1])]  # fmt: skip
    difference = abs(max(values[0], 0.0) - max(values[1], 0.0))
    assert difference > 1e-4
    assert -1e-7 < lower_bounds(nodes, sets(x, 0.0), "interval")[0] <= 0.0
    assert lower_bounds(nodes, sets(x, 0.0), "crown", FLOAT32)[0] <= -difference
    monkeypatch.setattr(check.np, "bincount", lambda x, minlength: np.ones(minlength))
    assert lower_bounds(nodes, sets(x, 0.0), "crown", FLOAT32)[0] > -difference


@pytest.mark.parametrize("op", ["tanh", "sigmoid", "exp"])
@pytest.mark.parametrize("middle", [0.0, 1e-6, 0.3, -0.3, -3.0, 4.0, -30.0, 30.0])
@pytest.mark.parametrize("radius", [0.0, 1e-9, 1e-3, 0.5, 4.0, 20.0])
def test_lines_of_smooth_functions(op, middle, radius):
    nodes = networks.start(1)
    node = nodes[check.append(nodes, op, (0,))]
    low, high = np.full((1, 1), middle - radius), np.full((1, 1), middle + radius)
    with np.errstate(all="ignore"):
        below, above = node.slopes(low, high, "adaptive", 0.0)
        bounds = [node.around(low, high, slope)[1] for slope in (below, above)]
        ends = bounds[0][0].min(axis=0), bounds[1][1].max(axis=0)
    x = np.linspace(low[0, 0], high[0, 0], 2001)
    function = {"tanh": math.tanh, "exp": math.exp, "sigmoid": lambda v: 1 / (1 + math.exp(-v))}[op]
    f = np.array([function(v) for v in x])
    assert (below[0, 0] * x + ends[0][0, 0] <= f).all()
    assert (f <= above[0, 0] * x + ends[1][0, 0]).all()
    # At the middle, the gap between the lines is hardly larger than that of constant lines.
    at = (low + high)[0, 0] / 2
    width = (above[0, 0] * at + ends[1][0, 0]) - (below[0, 0] * at + ends[0][0, 0])
    rounding = 1e-13 * (1.0 + np.abs(f).max() * (1.0 + np.abs(x).max()))
    assert width <= (f.max() - f.min()) * (1 + 1e-6) + rounding


def test_values_that_overflow_in_float32_prove_nothing():
    nodes = networks.start(1)
    place = networks.dense(nodes, 0, np.float32([[1e30, -1e30]]))
    place = networks.affine(nodes, place, factor=np.float32([1e20]), divisor=np.float32([1e30]))
    networks.dense(nodes, place, np.float32([[1.0, 0.0], [0.0, 1.0]]))
    x = np.float32([1e5])
    assert lower_bounds(nodes, sets(x, 0.0), "crown-ibp")[0] > 0
    assert lower_bounds(nodes, sets(x * 1e-9, 0.0), "crown-ibp", FLOAT32)[0] > 0
    assert not lower_bounds(nodes, sets(x * 1e4, 0.0), "crown-ibp", FLOAT32)[0] > 0


def test_denormals_that_a_program_flushes():
    """A weight of 1e-39 is 0 for XLA: the product with 1e38 is 0.1 or 0."""
    nodes = networks.start(1)
    networks.dense(nodes, 0, np.float32([[1e-39, 0.0]]))
    x = np.float32([1e38])
    assert lower_bounds(nodes, sets(x, 0.0), "interval")[0] > 0.09
    assert lower_bounds(nodes, sets(x, 0.0), "interval", FLOAT32)[0] <= 0.0


def test_an_infinite_or_unknown_value_proves_nothing():
    nodes = networks.start(1)
    place = check.append(nodes, "exp", (0,))
    networks.dense(nodes, place, np.float32([[1.0, 0.0]]))
    for x in (800.0, 1e30):
        assert not lower_bounds(nodes, sets([x], 0.0), "crown-ibp")[0] > 0


@pytest.mark.parametrize("norm", [1, 2])
def test_the_support_of_clipped_balls(norm):
    """Against the vertices and random points of the set; for p = 2 against the exact optimum."""
    random = np.random.default_rng(0)
    nodes = networks.start(4)
    for _ in range(20):
        x = random.uniform(size=4).astype(np.float32)
        eps = np.float32(random.uniform(0.05, 1.0))
        rows = random.normal(size=(3, 4)) * (random.random((3, 4)) < 0.8)
        walk = check.Bounds(nodes, sets(x, eps, norm, (0.0, 1.0)), "interval", 0.0, 0.0)
        least = walk.least(rows[None])[0]
        steps = random.normal(size=(4000, 4)) * 10.0 ** random.uniform(-2, 0, size=(4000, 1))
        steps = np.clip(x + steps, 0.0, 1.0) - x
        steps *= np.minimum(1.0, eps / np.linalg.norm(steps, norm, axis=1))[:, None] * (1 - 1e-9)
        attained = ((x + steps) @ rows.T).min(axis=0)
        assert (least <= attained + 1e-12).all()
        if norm == 2:
            assert (attained - least < 0.35 * eps * np.abs(rows).sum(axis=1) + 1e-6).all()
