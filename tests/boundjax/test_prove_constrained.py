"""`prove` on boxes with linear constraints: proofs, counterexamples inside, and what is refused."""

from fractions import Fraction

import numpy as np
import pytest
from jax import nn
from jax import numpy as jnp

import boundjax as bj
from boundjax import properties, search
from boundjax.search.constraints import Constraints

pytestmark = [pytest.mark.xdist_group("prove"), pytest.mark.quick, pytest.mark.sampled(4)]

BOX = bj.Box(-jnp.ones(2), jnp.ones(2))
ORDERED = bj.Constrained(BOX, jnp.array([[1.0, -1.0]]), jnp.zeros(1))  # x_0 <= x_1


def network(x):
    """`|x_0 - x_1| - (x_0 - x_1) / 2`, which is at least 0, and the sum."""
    difference = x[0] - x[1]
    return jnp.stack([nn.relu(difference) + nn.relu(-difference) - 0.5 * difference, x[0] + x[1]])


@pytest.mark.parametrize(
    "max_split_inputs",
    [
        pytest.param(0, id="units are split", marks=pytest.mark.slow),
        pytest.param(20, id="the box is split"),
    ],
)
def test_a_property_that_needs_the_constraint(max_split_inputs):
    # Where x_0 <= x_1 the network is 1.5 (x_1 - x_0) >= 0, and x_0 - x_1 is never positive.
    def function(x):
        return jnp.stack([-(x[0] - x[1]) + 0.1 * nn.relu(x[0] - x[1]), network(x)[0]])

    wanted = properties.all_positive(np.eye(2), 1e-3)
    options = {"max_split_inputs": max_split_inputs, "timeout": 100.0}
    result = bj.prove(function, ORDERED, wanted, **options)
    assert result.verdict == "unsat"
    assert (result.margins > 0).all()
    assert bj.prove(function, BOX, wanted, **options).verdict == "sat"


@pytest.mark.parametrize("max_split_inputs", [0, 20], ids=["units are split", "the box is split"])
def test_a_counterexample_satisfies_the_constraints(max_split_inputs):
    # x_0 + x_1 is least at x_0 = -1, x_1 = 0.1, on an edge that the second constraint makes.
    rows = jnp.array([[1.0, -1.0], [0.3, 1.0]])
    input_set = bj.Constrained(BOX, rows, jnp.array([0.1, 0.7]), jnp.array([-jnp.inf, -0.2]))
    unsafe = properties.all_positive([[0.0, 1.0]], 0.55)
    options = {"max_split_inputs": max_split_inputs, "timeout": 100.0}
    result = bj.prove(network, input_set, unsafe, **options)
    assert result.verdict == "sat"
    x = [Fraction(float(v)) for v in result.counterexample.inputs]
    assert x[0] + x[1] + Fraction(0.55) <= 0
    assert x[0] - x[1] <= Fraction(float(np.float32(0.1)))
    value = Fraction(float(np.float32(0.3))) * x[0] + x[1]
    assert Fraction(float(np.float32(-0.2))) <= value <= Fraction(float(np.float32(0.7)))
    # Over the box the sum falls to -2.
    safe = properties.all_positive([[0.0, 1.0]], 0.91)
    assert bj.prove(network, input_set, safe, **options).verdict == "unsat"


@pytest.mark.parametrize("method", ["interval", "crown", "alpha-crown"])
def test_bounds_of_the_whole_set(method):
    options = {"method": method, "max_split_inputs": 0, "timeout": 100.0}
    wanted = properties.all_positive([[1.0, 0.0]], 1e-3)
    if method == "interval":
        wanted = properties.all_positive([[1.0, 0.0]], 4.0)
    assert bj.prove(lambda x: jnp.stack([x[1] - x[0], x[0]]), ORDERED, wanted, **options).proved


def test_no_box_with_a_point_is_excluded():
    rng = np.random.default_rng(0)
    excluded = 0
    for _ in range(60):
        rows = rng.normal(size=(2, 3)).astype(np.float32)
        x = rng.normal(size=(50, 3)).astype(np.float32)
        values = [
            [
                sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(r, p, strict=True))
                for r in rows
            ]
            for p in x
        ]
        # Limits that the first point attains up to rounding to the outside.
        upper = np.array(
            [np.nextafter(np.float32(float(v)), np.float32(np.inf)) for v in values[0]]
        )
        constraints = Constraints(rows, np.full(2, -np.inf, np.float32), upper)
        lower_end = x - rng.uniform(0, 0.3, size=x.shape).astype(np.float32) * (
            rng.uniform(size=x.shape) > 0.5
        )
        empty = constraints.exclude(np.minimum(lower_end, x).astype(np.float32), x)
        for point, value, gone in zip(x, values, empty, strict=True):
            inside = all(v <= Fraction(float(u)) for v, u in zip(value, upper, strict=True))
            assert constraints.contain(point) == inside
            assert not (inside and gone)
        excluded += int(empty.sum())
    assert excluded > 500


def test_what_is_refused():
    wanted = properties.all_positive(np.eye(2), 9.0)
    ball = bj.Constrained(bj.LpBall(jnp.zeros(2), 1.0, p=2), ORDERED.rows, ORDERED.upper)
    with pytest.raises(ValueError, match=r"needs a box, .* got LpBall with p = 2"):
        bj.prove(network, ball, wanted)
    with pytest.raises(ValueError, match="needs inputs without constraints: no checker reads them"):
        bj.prove(network, ORDERED, wanted, with_proof=True)
    with pytest.raises(ValueError, match=r"a MILP needs a box, .*got Constrained"):
        bj.milp_optimum(network, ORDERED, np.eye(2)[0])
    with pytest.raises(ValueError, match="leave programs out"):
        bj.prove(network, ORDERED, wanted, programs=search.Programs(network, (2,)))
