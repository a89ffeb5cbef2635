"""`milp_optimum` beside grids, samples and bounds, and what it refuses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinked import KINKED

import boundjax as bj
from boundjax.search.milp import Encoding

pytestmark = pytest.mark.quick
TOLERANCE = 1e-5  # of the solver, and of float32 values
SQUARE = bj.Box(-jnp.ones(2), jnp.ones(2))

NIGHTLY = ("leaky relu", "hinge", "min", "hard tanh", "clamp")
LINEAR = [
    pytest.param(n, marks=pytest.mark.slow if n in NIGHTLY else [])
    for n in KINKED
    if "tanh" not in n or n == "hard tanh"
]


@pytest.mark.parametrize("name", LINEAR)
def test_every_op_with_kinks_has_its_exact_optimum(name):
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 5)), random.normal(size=(5, 1))
    first, second = (jnp.asarray(array, jnp.float32) for array in (first, second))

    def function(x):
        return KINKED[name](x @ first) @ second

    # The least value is where two kinks, or edges, meet; a grid comes near.
    grid = jnp.linspace(-1.0, 1.0, 201)
    points = jnp.stack(jnp.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    least = float(np.min(jax.jit(jax.vmap(function))(points)))
    optimum = bj.milp_optimum(function, SQUARE, np.ones(1))
    assert optimum.status == "optimal"
    assert least - 0.05 <= optimum.lower <= least + TOLERANCE
    assert abs(optimum.upper - optimum.lower) <= TOLERANCE
    assert (np.abs(optimum.input) <= 1.0).all()
    assert optimum.upper == float(function(jnp.asarray(optimum.input))[0])


@pytest.fixture(scope="module")
def network():
    """A convolution, both pools, a residual connection and a maximum of two values; its box."""
    random = np.random.default_rng(1)
    kernel = jnp.asarray(random.normal(size=(2, 2, 1, 2)) / 2, jnp.float32)
    head = jnp.asarray(random.normal(size=(8, 3)) / 2, jnp.float32)

    def function(x):
        options = {"window_strides": (1, 1), "padding": "SAME"}
        y = jax.lax.conv_general_dilated(
            x[None], kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
        )
        y = jax.nn.relu(y) + 0.2 * x[None]
        window = {"window_dimensions": (1, 2, 2, 1), "window_strides": (1, 2, 2, 1)}
        largest = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, padding="VALID", **window)
        smallest = jax.lax.reduce_window(y, jnp.inf, jax.lax.min, padding="VALID", **window)
        z = jnp.maximum(largest, smallest + 0.5 * largest).reshape(-1) - 0.3
        return jnp.abs(z) @ head

    center = jnp.asarray(random.normal(size=(4, 4, 1)), jnp.float32)
    return function, bj.LpBall(center, 0.2)


@pytest.fixture(scope="module")
def encoding(network):
    return Encoding(*network)


def test_samples_and_bounds_agree_with_the_optimum(network, encoding):
    function, box = network
    row = np.array([-1.0, 0.5, 0.0])
    optimum = encoding.minimum(row, time_limit=60.0)
    assert optimum.status == "optimal"
    assert abs(optimum.upper - optimum.lower) <= TOLERANCE
    lower, upper = map(np.asarray, box.interval())
    shares = np.random.default_rng(2).uniform(size=(5000, *lower.shape))
    points = jnp.asarray(lower + shares.round(1) * (upper - lower), jnp.float32)
    values = np.asarray(jax.jit(jax.vmap(function))(points)) @ row
    assert optimum.lower <= values.min() + TOLERANCE
    # Never better than what the bounds know.
    rows = jnp.asarray(row, jnp.float32)[None]
    bounds = jax.jit(bj.linear(function, intermediate="linear"))(box, rows)
    assert bounds.lower[0] <= optimum.lower + TOLERANCE
    relaxed = Encoding(function, box, integer=False).minimum(row)
    assert relaxed.lower <= optimum.lower + TOLERANCE


def test_tighter_bounds_change_nothing_but_the_work(network, encoding):
    function, box = network
    row = np.array([0.0, 1.0, -1.0])
    loose = bj.relax(function)(box).pre_activations
    other = bj.milp_optimum(function, box, row, pre_activations=loose)
    assert abs(other.lower - encoding.minimum(row).lower) <= TOLERANCE


def test_a_point_and_a_constant():
    point = jnp.float32([0.25, -0.5])
    optimum = bj.milp_optimum(jax.nn.relu, bj.LpBall(point, 0.0), np.array([2.0, 1.0]))
    assert optimum.lower == pytest.approx(0.5)
    assert optimum.upper == 0.5
    np.testing.assert_array_equal(optimum.input, point)
    constant = bj.milp_optimum(lambda x: 0.0 * x + 3.0, SQUARE, np.ones(2))
    assert constant.lower == pytest.approx(6.0)


def test_time_ends_the_solver():
    random = np.random.default_rng(3)
    layers = [
        jnp.asarray(random.normal(size=shape), jnp.float32)
        for shape in itertools.pairwise((20, 40, 40, 1))
    ]

    def function(x):
        for kernel in layers[:-1]:
            x = jax.nn.relu(x @ kernel)
        return x @ layers[-1]

    optimum = bj.milp_optimum(
        function, bj.Box(-jnp.ones(20), jnp.ones(20)), np.ones(1), time_limit=0.2
    )
    assert optimum.status == "time limit"
    assert optimum.lower < optimum.upper
    if optimum.input is not None:
        assert optimum.upper == float(function(jnp.asarray(optimum.input))[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bj.milp_optimum(lambda x: jnp.tanh(x), SQUARE, np.ones(2)),
            r"needs a piecewise linear function, got 'tanh' at .*test_milp\.py",
        ),
        (lambda: bj.milp_optimum(lambda x: x[:1] * x[1:], SQUARE, np.ones(1)), "got 'mul' at"),
        (
            lambda: bj.milp_optimum(jax.nn.relu, bj.LpBall(jnp.ones(2), 0.1, p=2), np.ones(2)),
            "a MILP needs a box, .*got LpBall",
        ),
        (
            lambda: bj.milp_optimum(jax.nn.relu, SQUARE, np.ones(3)),
            r"row must have the output's shape \(2,\), got \(3,\)",
        ),
        (lambda: bj.milp_optimum(lambda x: (x, x), SQUARE, np.ones(2)), "one output array, got 2"),
        (
            lambda: bj.milp_optimum(lambda x: x * jnp.nan, SQUARE, np.ones(2)),
            "needs finite weights and bounds, got NaN or an infinity",
        ),
        (
            lambda: bj.milp_optimum(jax.nn.relu, SQUARE, np.ones(2), pre_activations={}),
            "must bound every nonlinear op, it lacks relu",
        ),
        (lambda: bj.milp_optimum(jnp.floor, SQUARE, np.ones(2)), "got 'floor' at"),
    ],
)
def test_what_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
