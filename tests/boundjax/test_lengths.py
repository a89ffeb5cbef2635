"""Lengths of rows, unit vectors and angles: images, planes, the unit ball."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import on_host
from networks import points

import boundjax as bj
from boundjax.ir.families import Joint
from boundjax.ops.domain import DomainWarning
from boundjax.tracing.trace import trace

EPS = 0.05


def norm(x, axis=-1):
    return jnp.linalg.norm(x, axis=axis, keepdims=True)


# Spellings of x over its length, of arrays [2, 3].
UNITS = {
    "sum": lambda x: x / (norm(x) + EPS),
    "max": lambda x: x / jnp.maximum(norm(x, 0), EPS),
    "rsqrt": lambda x: 2.0 * x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + EPS),
    "sqrt": lambda x: x / jnp.sqrt(jnp.sum(jnp.square(x), 1) + EPS)[:, None],
    "clipped": lambda x: x / jnp.sqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), EPS**2)),
    "power": lambda x: x / (jnp.sum(x**2, -1, keepdims=True) ** 0.5 + EPS),
    "reciprocal": lambda x: x * (1.0 / (norm(x) + EPS)),
    "everything": lambda x: x / (jnp.linalg.norm(x) + EPS),
    "safe": lambda x: (lambda n: x / jnp.where(n == 0.0, 1.0, n))(norm(x)),
}
LENGTHS = {
    "norm": lambda x: jnp.linalg.norm(x, axis=-1),
    "of all": lambda x: jnp.linalg.norm(x),
    "hypot": lambda x: jnp.hypot(x[0], x[1]),
    "hypot with a constant": lambda x: jnp.hypot(x, 0.7),
    "three squares": lambda x: jnp.sqrt(x[0] ** 2 + jnp.square(x[1]) + x[0][::-1] ** 2 + 0.1),
    "charbonnier": lambda x: jnp.sqrt(x**2 + 1e-3),
    "safe": lambda x: optax.safe_norm(x, 1e-3, axis=-1),
}
ANGLES = {
    "atan2": lambda x: jnp.arctan2(x[0], x[1]),
    "of a constant x": lambda x: jnp.arctan2(x, 0.7),
    "of a constant y": lambda x: jnp.arctan2(-0.7, x),
}


def joint_node(function, dtype):
    nodes = trace(function, jnp.zeros((2, 3), dtype)).nodes
    return [n for n in nodes if isinstance(n.op, Joint) and n.op.planes is not None][-1]


def random_boxes(rng, dtype):
    yield np.zeros((2, 3), dtype), np.zeros((2, 3), dtype)
    for scale in (0.0, 1e-5, 0.1, 1.0, 10.0):
        for shift in (0.0, 2.0, -2.0):
            center = rng.normal(size=(2, 3)) + shift
            radius = scale * rng.uniform(size=(2, 3))
            yield (center - radius).astype(dtype), (center + radius).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", [*LENGTHS, *ANGLES])
@pytest.mark.sampled(14)
def test_images_and_planes_contain_samples(name, dtype):
    function, rng = {**LENGTHS, **ANGLES}[name], np.random.default_rng(0)
    with jax.enable_x64(dtype == np.float64):

        @on_host
        def run(lower, upper, x):
            box = bj.Box(lower, upper)
            shifted = bj.linear(lambda x: function(x) - 0.3 * x.sum())
            return bj.interval(function)(box), shifted(box), jax.vmap(function)(x)

        for lower, upper in random_boxes(rng, dtype):
            x = points(rng, lower, upper, 400)
            interval, shifted, values = run(lower, upper, x)
            slack = (1e-13 if dtype == np.float64 else 1e-5) * (1.0 + np.abs(x).max())
            moved = values - 0.3 * x.sum((1, 2)).reshape(-1, *[1] * (values.ndim - 1))
            for ends, of in ((interval, values), (shifted, moved)):
                assert (of >= ends.lower - slack).all()
                assert (of <= ends.upper + slack).all()
            if (lower == upper).all() and name != "safe" and lower.any():
                assert (interval.width <= 40 * slack).all()


@pytest.mark.parametrize(
    ("function", "low", "high", "expected"),
    [
        (lambda x: jnp.hypot(x[0], x[1]), (-1.0, -1.0), (2.0, 2.0), (0.0, 8.0**0.5)),
        (lambda x: jnp.linalg.norm(x), (3.0, -1.0), (4.0, 3.0), (3.0, 5.0)),
        (lambda x: jnp.arctan2(x[0], x[1]), (-1.0, 1.0), (1.0, 2.0), (-np.pi / 4, np.pi / 4)),
        (lambda x: jnp.arctan2(x[0], x[1]), (1.0, -1.0), (2.0, 1.0), (np.pi / 4, 0.75 * np.pi)),
        (lambda x: jnp.arctan2(x[0], x[1]), (-2.0, -1.0), (-1.0, -0.5), (-2.356194, -1.815775)),
        # The cut, the origin, and a half plane that is touched.
        (lambda x: jnp.arctan2(x[0], x[1]), (-1.0, -2.0), (1.0, -1.0), (-np.pi, np.pi)),
        (lambda x: jnp.arctan2(x[0], x[1]), (-1.0, -1.0), (1.0, 1.0), (-np.pi, np.pi)),
        (lambda x: jnp.arctan2(x[0], x[1]), (0.0, -2.0), (1.0, -1.0), (-np.pi, np.pi)),
    ],
)
@pytest.mark.sampled(6)
def test_known_ranges(function, low, high, expected):
    bounds = bj.interval(function)(bj.Box(jnp.asarray(low), jnp.asarray(high)))
    np.testing.assert_allclose(np.ravel(bounds), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.sampled(14)
def test_unit_vectors_have_the_range_of_every_coordinate(name, dtype):
    function, rng = UNITS[name], np.random.default_rng(1)
    with jax.enable_x64(dtype == np.float64):
        node = joint_node(function, dtype)
        assert node.primitive == "normalize"
        assert node.params["kind"] != "rms"

        @on_host
        def run(lower, upper, x):
            return bj.interval(function)(bj.Box(lower, upper)), jax.vmap(function)(x)

        for lower, upper in random_boxes(rng, dtype):
            if name == "safe" and (lower <= 0.0).any():
                continue  # where a row may be 0, its reciprocal is unbounded, with a warning
            x = points(rng, lower, upper, 400)
            bounds, values = run(lower, upper, x)
            slack = 1e-12 if dtype == np.float64 else 2e-5
            assert (values >= bounds.lower - slack).all()
            assert (values <= bounds.upper + slack).all()
            most = 2.0 if name == "rsqrt" else 1.0
            assert (np.abs(bounds) <= most + slack).all()
            if (lower > 0.0).all() and name != "everything":
                # Corners decide, and of three coordinates all are among the samples.
                np.testing.assert_allclose(bounds.lower, values.min(0), atol=0.02)
                np.testing.assert_allclose(bounds.upper, values.max(0), atol=0.02)


@pytest.mark.slow
def test_rows_on_a_unit_vector_are_bounded_by_their_length():
    rng = np.random.default_rng(0)
    head = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    specification = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)

    def function(x):
        return (x / (jnp.linalg.norm(x) + 1e-3)) @ head

    box = bj.Box(jnp.full(5, -0.5), jnp.full(5, 0.9))
    lengths = np.linalg.norm(head, axis=0)
    for bounds in (bj.linear(function)(box), bj.linear(function, rounding="float32")(box)):
        np.testing.assert_allclose(bounds.upper, lengths, rtol=1e-3)
        np.testing.assert_allclose(bounds.lower, -lengths, rtol=1e-3)
    for transform in (bj.linear, bj.interval):
        bounds = transform(function)(box, specification)
        rows = np.linalg.norm(specification @ head.T, axis=1)
        np.testing.assert_allclose(bounds.upper, rows, rtol=1e-3)
        np.testing.assert_allclose(bounds.lower, -rows, rtol=1e-3)


def test_layer_norm_lies_in_a_ball_as_well():
    rng = np.random.default_rng(0)
    head = jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)

    def function(x):
        d = x - x.mean()
        return (d * jax.lax.rsqrt(jnp.mean(d * d) + 1e-3)) @ head

    bounds = bj.linear(function)(bj.Box(-jnp.ones(4), jnp.ones(4)))
    np.testing.assert_allclose(bounds.upper, 2.0 * np.linalg.norm(head, axis=0), rtol=1e-3)


def test_narrow_boxes_use_planes_and_not_the_ball():
    head = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)

    def function(x):
        return (x / (jnp.linalg.norm(x) + 1e-3)) @ head

    x = jnp.asarray([1.0, -0.5, 0.3, 2.0, -1.0])
    bounds = bj.linear(function)(bj.Box(x - 1e-3, x + 1e-3))
    jacobian = jax.jacobian(function)(x)
    np.testing.assert_allclose(bounds.width, 2e-3 * np.abs(jacobian).sum(1), rtol=0.05)


def test_without_an_eps_a_row_that_may_be_zero_has_no_bounds():
    def function(x):
        return x / jnp.linalg.norm(x)

    with pytest.warns(DomainWarning):
        bounds = bj.linear(function)(bj.Box(-jnp.ones(3), jnp.ones(3)))
    assert np.isinf(np.asarray(bounds)).all()
    inside = bj.linear(function)(bj.Box(jnp.ones(3), 2.0 * jnp.ones(3)))
    assert np.isfinite(np.asarray(inside)).all()
    # Squares of such rows underflow, and programs divide by 0.
    box = bj.Box(1e-25 * jnp.ones(3), 2e-25 * jnp.ones(3))
    with pytest.warns(DomainWarning):
        tiny = bj.interval(function, rounding="float32")(box)
    assert np.isinf(np.asarray(tiny)).all()


def bounds_in_jit(function, lower, upper):
    """Sets whose ends are not finite are refused, except where nobody can see them."""
    return jax.jit(lambda *ends: bj.linear(function)(bj.Box(*ends)))(lower, upper)


def test_nan_and_infinity_certify_nothing():
    for function in (UNITS["sum"], LENGTHS["norm"], ANGLES["atan2"]):
        lower = jnp.ones((2, 3)).at[0, 1].set(jnp.nan)
        bounds = bounds_in_jit(function, lower, 2.0 * jnp.ones((2, 3)))
        assert np.isnan(bounds.lower).any()
        assert np.isnan(bounds.upper).any()
    bounds = bounds_in_jit(UNITS["sum"], jnp.ones((2, 3)), jnp.full((2, 3), jnp.inf))
    assert not np.isfinite(np.asarray(bounds)).any()


@pytest.mark.parametrize("name", ["unit", "angle"])
def test_gradients_are_finite(name):
    head = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)

    def function(weights, x):
        if name == "unit":
            return UNITS["sum"](x @ weights) @ head
        return jnp.arctan2(*(x @ weights)) + jnp.hypot(*(x @ weights))

    @jax.jit
    @jax.grad
    def gradient(weights, center, eps):
        bounds = bj.linear(lambda x: function(weights, x))(bj.LpBall(center, eps))
        return sum(end.sum() for end in bounds)

    for center in (jnp.zeros((2, 3)), jnp.ones((2, 3)), 1e-9 * jnp.ones((2, 3))):
        for eps in (0.0, 1e-6, 0.1, 3.0):
            assert np.isfinite(gradient(head, center, eps)).all(), (center[0, 0], eps)


@pytest.mark.parametrize("rounding", ["float32", "real"])
@pytest.mark.sampled(6)
def test_rounded_bounds_contain_values_in_float64(rounding):
    rng = np.random.default_rng(3)

    def function(x):
        return jnp.concatenate(
            [
                jnp.ravel(x / (norm(x) + EPS)),
                jnp.ravel(x / jnp.maximum(norm(x), EPS)),
                jnp.linalg.norm(x, axis=-1),
                jnp.hypot(x[0], x[1]),
                jnp.arctan2(x[0], x[1]),
            ]
        )

    bounds_of = jax.jit(bj.linear(function, rounding=rounding))
    for radius in (0.0, 1e-7, 1e-3, 1.0):
        for scale in (1e-3, 1.0, 1e3):
            center = (scale * rng.normal(size=(2, 3))).astype(np.float32)
            lower, upper = center - np.float32(radius * scale), center + np.float32(radius * scale)
            bounds = bounds_of(bj.Box(jnp.asarray(lower), jnp.asarray(upper)))
            x = points(rng, lower, upper, 200)
            programs = np.asarray(jax.jit(jax.vmap(function))(x))
            with jax.enable_x64(True):
                exact = np.asarray(jax.vmap(function)(jnp.asarray(x, jnp.float64)))
            for values in (exact, programs if rounding == "float32" else exact):
                assert (np.asarray(bounds.lower, np.float64) <= values).all()
                assert (np.asarray(bounds.upper, np.float64) >= values).all()
            assert np.isfinite(np.asarray(bounds)).all()
