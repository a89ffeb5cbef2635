"""Selections by comparisons of one value: images of the branches, lines, Lipschitz constants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import on_host

import boundjax as bj
from boundjax.tracing.trace import trace

LEARNED = jnp.asarray([0.1, 0.4, -0.2, 0.0])
# Function, whether it is one op, and whether its images are attained.
FUNCTIONS = {
    "jump": (lambda x: jnp.where(x > 0.4, x, 0.1), True),
    "jump_relu": (lambda x: jnp.where(x >= LEARNED.astype(x.dtype), x, 0.0), True),
    "masked": (lambda x: x * (x > LEARNED.astype(x.dtype)).astype(x.dtype), True),
    "hard_threshold": (lambda x: jnp.where(jnp.abs(x) > 0.5, x, 0.0), True),
    "soft_threshold": (lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0.0), True),
    "nested": (lambda x: jnp.where(x > 0.5, x - 0.5, jnp.where(x < -0.5, x + 0.5, 0.0)), True),
    "band": (lambda x: jnp.where((x >= -0.3) & ~(x > 0.4), 2.0 * x + 1.0, -x), True),
    "flipped": (lambda x: jnp.where((-x > 0.2) | (x == 1.0), 0.3 - x, 3.0 * x), True),
    "huber": (lambda x: jnp.where(jnp.abs(x) <= 1.0, 0.5 * x**2, jnp.abs(x) - 0.5), False),
    "optax_huber": (lambda x: optax.losses.huber_loss(x), False),
    "elu_by_hand": (lambda x: jnp.where(x > 0.0, x, jnp.expm1(x)), False),
    "clamped_log": (lambda x: jnp.where(x > 0.1, jnp.log(x), -2.0), False),
    "trunc": (jnp.trunc, False),
}
CENTERS = np.array([-2.0, -0.6, -0.3, 0.0, 0.1, 0.3, 0.45, 0.5, 1.0, 3.0])
BOXES = np.array([(c - r, c + r) for c in CENTERS for r in (0.0, 0.15, 0.6, 4.0)])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.sampled(14)
def test_images_are_the_union_of_the_branches(name, dtype):
    function, _ = FUNCTIONS[name]
    lower, upper = np.repeat(BOXES[:, :, None], 4, 2).transpose(1, 0, 2).astype(dtype)
    share = np.linspace(0.0, 1.0, 601)[:, None, None]
    grid = np.clip(lower + share * (upper - lower), lower, upper).astype(dtype)
    with jax.enable_x64(dtype == np.float64):

        def bounds(lower, upper):
            box = bj.Box(lower, upper)
            return bj.interval(function)(box), bj.linear(lambda x: function(x) - 0.7 * x)(box)

        interval, linear = on_host(jax.vmap(bounds))(lower, upper)
        values = np.asarray(jax.jit(jax.vmap(jax.vmap(function)))(grid), np.float64)
    slack = (1e-13 if dtype == np.float64 else 5e-6) * (1.0 + np.abs(values).max(0))
    shifted = values - 0.7 * grid
    for ends, of in ((interval, values), (linear, shifted)):
        assert (of >= ends.lower - slack).all()
        assert (of <= ends.upper + slack).all()
    # Attained, up to the grid and to thresholds that only one side of reaches.
    width = np.maximum(values.max(0) - values.min(0), 0.0)
    touches = np.min(np.abs(grid - np.round(grid, 1)), axis=0) == 0.0
    inside = ~touches | (upper - lower > 1.0)
    excess = interval.upper - interval.lower - width
    assert np.median(excess[inside]) < 0.02


@pytest.mark.parametrize("name", FUNCTIONS)
def test_linear_branches_are_one_op(name):
    function, is_one = FUNCTIONS[name]
    names = [node.primitive for node in trace(function, jnp.zeros(4)).nodes]
    assert ("pieces" in names and len(names) <= 3) == is_one


@pytest.mark.parametrize(
    ("function", "ends", "expected"),
    [
        (FUNCTIONS["jump"][0], (-2.0, 2.0), (0.1, 2.0)),
        (FUNCTIONS["jump"][0], (-2.0, 0.4), (0.1, 0.1)),
        (FUNCTIONS["jump"][0], (0.41, 2.0), (0.41, 2.0)),
        (FUNCTIONS["hard_threshold"][0], (-0.2, 2.0), (0.0, 2.0)),
        (FUNCTIONS["hard_threshold"][0], (0.6, 2.0), (0.6, 2.0)),
        (FUNCTIONS["soft_threshold"][0], (-0.2, 2.0), (0.0, 1.5)),
        (FUNCTIONS["huber"][0], (-2.0, 0.5), (0.0, 1.5)),
        (lambda x: jnp.where(x < 0, -x, jnp.where(x > 1, 2.0 - x, x)), (0.5, 1.5), (0.5, 1.0)),
        (lambda x: jnp.where(x <= 1e-3, 0.0, jnp.log(x)), (-1.0, 1.0), (np.log(1e-3), 0.0)),
    ],
)
@pytest.mark.sampled(8)
def test_known_ranges(function, ends, expected):
    box = bj.Box(*(jnp.full(2, end, jnp.float32) for end in ends))
    for bounds in (bj.interval(function)(box), bj.linear(function)(box)):
        for end, value in zip(bounds, expected, strict=True):
            np.testing.assert_allclose(end, value, rtol=1e-5, atol=1e-5)


def test_the_hull_of_a_jump_has_the_best_lines():
    """On [-1, 2] the jump relu lies between lines as a relu does, with its kink moved."""
    box = bj.Box(-jnp.ones(1), 2.0 * jnp.ones(1))
    relaxed = bj.linear(lambda x: jnp.where(x > 0.5, x, 0.0), has_aux=True)
    _, aux = relaxed(box)
    (slope,) = np.ravel(aux.coefficients.upper_coefficients)
    np.testing.assert_allclose(slope, 2.0 / 3.0, rtol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.where(x != 0.0, jnp.tanh(x), 2.0),
        lambda x: jnp.where(x == 0.0, 2.0, jnp.tanh(x)),
        lambda x: jnp.where(x != 0.0, 0.5 * x, 2.0),
        lambda x: jnp.where(~(x == 0.0), x, 2.0),
    ],
)
def test_a_single_point_counts(function):
    bounds = bj.interval(function)(bj.Box(-jnp.ones(2), jnp.ones(2)))
    np.testing.assert_allclose(bounds.upper, 2.0)
    beside = bj.interval(function)(bj.Box(0.5 * jnp.ones(2), jnp.ones(2)))
    assert (beside.upper < 1.01).all()
    node = trace(function, jnp.zeros(2)).nodes[-1]
    if node.primitive == "pieces":
        np.testing.assert_array_equal(node.apply(jnp.zeros(2)), 2.0)


def test_selections_by_several_values_are_left_alone():
    def function(x):
        return jnp.where((x > 0.1) & (x[::-1] > 0.2), x, 0.0)

    names = [node.primitive for node in trace(function, jnp.zeros(4)).nodes]
    assert names.count("select_n") == 1
    assert "pieces" not in names


def test_lipschitz_constants_see_jumps():
    for function, expected in (
        (FUNCTIONS["soft_threshold"][0], 1.0),
        (lambda x: jnp.where(x > 1.0, 3.0 * x - 2.0, x), 3.0),
    ):
        np.testing.assert_allclose(bj.global_lipschitz(function, jnp.zeros(3)), expected)
    with pytest.raises(ValueError, match=r"'pieces' at .* has no Lipschitz constant"):
        bj.global_lipschitz(FUNCTIONS["jump"][0], jnp.zeros(3))
    ball = bj.lipschitz(FUNCTIONS["jump"][0])(bj.LpBall(2.0 * jnp.ones(3), 0.1, p=2))
    np.testing.assert_allclose(ball.radius, 0.1, rtol=1e-6)


@pytest.mark.slow
def test_gradients_in_a_learned_threshold_are_finite():
    def ends(threshold):
        box = bj.Box(jnp.asarray([-1.0, 0.5, 0.5, 0.7]), jnp.asarray([1.0, 0.5, 0.9, 0.9]))
        bounds = bj.linear(lambda x: jnp.where(x > threshold, x + threshold, 0.1))(box)
        return sum(end.sum() for end in bounds)

    assert np.isfinite(jax.grad(ends)(0.5 * jnp.ones(4))).all()


@pytest.mark.parametrize("rounding", ["float32", "real"])
@pytest.mark.parametrize("name", ["jump", "nested", "band", "huber"])
@pytest.mark.sampled(6)
def test_rounded_bounds_hold_at_thresholds(name, rounding):
    function, _ = FUNCTIONS[name]
    edge = np.float32([0.4, 0.5, -0.3, 1.0])
    lower, upper = np.nextafter(edge, np.float32(-9)), np.nextafter(edge, np.float32(9))
    bounds = bj.linear(function, rounding=rounding)(bj.Box(jnp.asarray(lower), jnp.asarray(upper)))
    with jax.enable_x64(True):
        for point in (lower, edge, upper):
            value = np.asarray(jax.jit(function)(point)), np.asarray(function(point.astype(float)))
            # In float64 the thresholds are other numbers.
            assert (bounds.lower <= value[0]).all()
            assert (bounds.upper >= value[0]).all()
    assert np.isfinite(bounds.lower).all()
