"""The checker of trees: its bounds hold on every part, and it refuses trees that do not cover."""

from fractions import Fraction

import checked_networks as networks
import numpy as np
import pytest

from boundjax import check, check_tree

pytestmark = pytest.mark.quick

FLOAT32 = 2.0**-24


def kinks(nodes):
    """The units of all ramps: `[U, 3]`."""
    units = []
    for number, k in enumerate(k for k, node in enumerate(nodes) if node.op == "ramp"):
        for kink, ends in enumerate((nodes[k].low, nodes[k].high)):
            units += [(number, kink, e) for e in np.flatnonzero(np.isfinite(ends))]
    return np.array(units, np.int32).reshape(-1, 3)


def cases(count, seed=0):
    """Networks with an input and a radius."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        nodes = networks.random_network(random)
        x = (random.normal(size=3) * random.choice([1.0, 1e-3, 300.0])).astype(np.float32)
        eps = np.float32(random.choice([0.0, 1e-7, 1e-3, 0.1, 1.0]))
        yield random, nodes, x - eps, x + eps


def walk_on(nodes, low, high, unit):
    sets = *(np.float64(a)[None] for a in (low, low * 0, low, high)), np.inf
    return check.Bounds(nodes, sets, "crown", unit, 0.0)


def parts_with(random, nodes, values, units, count=6):
    """Signs of random units, on the sides where these values of all nodes lie: `[N, U]`."""
    ramps = [k for k, node in enumerate(nodes) if node.op == "ramp"]
    signs = np.zeros((count, len(units)), np.int8)
    for u, (number, kink, element) in enumerate(units):
        node = nodes[ramps[number]]
        point = Fraction(float((node.low, node.high)[kink][element]))
        value = Fraction(float(values[node.inputs[0]][element]))
        signs[:, u] = 1 if value > point else -1 if value < point else random.choice([-1, 1])
    return signs * (random.random((count, 1)) < random.random(signs.shape))


def bounds_of(random, nodes, walk, units, signs):
    splits = check_tree.Splits(nodes, {"units": units, "free": units})
    multipliers = random.exponential(size=signs.shape) * 10.0 ** random.uniform(-6, 3)
    shares = random.uniform(-0.5, 1.5, size=signs.shape)
    leaves = check_tree.Leaves(walk, splits, signs, multipliers, shares)
    rows = np.tile(np.array([[1.0, -1.0]]), (len(signs), 1))
    return leaves.least_of(rows), leaves.empty


@pytest.mark.parametrize("unit", [0.0, FLOAT32])
def test_no_bound_lies_above_a_value_on_its_part(unit):
    tight = 0
    with np.errstate(all="ignore"):
        for random, nodes, low, high in cases(60):
            units, walk = kinks(nodes), walk_on(nodes, low, high, unit)
            for _ in range(4):
                x = random.choice([low, high, random.uniform(low, high)]).astype(np.float32)
                x = np.clip(x, low, high)
                if unit:
                    values = networks.program_values(nodes, x, random)
                    value = Fraction(float(values[-1][0])) - Fraction(float(values[-1][1]))
                else:
                    values = networks.exact_values(nodes, x)
                    value = values[-1][0] - values[-1][1]
                signs = parts_with(random, nodes, values, units)
                bounds, empty = bounds_of(random, nodes, walk, units, signs)
                assert not empty.any()
                for bound in bounds:
                    assert bound == -np.inf or Fraction(bound) <= value
                    tight += bound > -np.inf and value - Fraction(bound) < Fraction(1, 100)
    assert tight > 30
