"""Tangent, inverse functions, sinc and entropies: known ranges, and the ends of their domains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host
from jax.scipy import special

import boundjax as bj
from boundjax.ops.domain import DomainWarning
from boundjax.tracing.trace import trace

pytestmark = pytest.mark.sampled(3)


def ranges(function, low, high, transform=bj.linear):
    low, high = np.broadcast_arrays(np.float32(low), np.float32(high))
    return np.asarray(transform(function)(bj.Box(jnp.asarray(low), jnp.asarray(high))))


@pytest.mark.parametrize(
    ("function", "ends", "expected"),
    [
        (jnp.tan, (-0.5, 0.7), (np.tan(-0.5), np.tan(0.7))),
        (jnp.tan, (-0.5 + 3 * np.pi, 0.7 + 3 * np.pi), (np.tan(-0.5), np.tan(0.7))),
        (jnp.arccos, (-1.0, 1.0), (0.0, np.pi)),
        (jnp.arcsin, (-1.0, 0.5), (-np.pi / 2, np.pi / 6)),
        (jnp.arctanh, (-0.5, 0.9), (np.arctanh(-0.5), np.arctanh(0.9))),
        (jnp.arccosh, (1.0, 3.0), (0.0, np.arccosh(3.0))),
        (jnp.sinc, (-0.5, 9.0), (-0.2172336, 1.0)),
        (jnp.sinc, (0.5, 1.5), (-0.2172336, 0.6366198)),
        (jnp.sinc, (2.0, 3.0), (0.0, 0.1283746)),
        (special.entr, (0.0, 1.0), (0.0, 1 / np.e)),
        (lambda x: special.xlogy(x, x), (0.0, 3.0), (-1 / np.e, 3 * np.log(3.0))),
        (lambda p: special.xlogy(2.0, p), (1.0, 3.0), (0.0, 2 * np.log(3.0))),
        (lambda p: special.xlog1py(1.0 - p, -p), (0.0, 1.0), (-1 / np.e, 0.0)),
        (lambda p: special.xlog1py(3.0, p), (0.0, 1.0), (0.0, 3 * np.log(2.0))),
        (lambda p: special.rel_entr(p, jnp.full(1, 0.5)), (0.6, 0.9), (0.1093929, 0.5290080)),
    ],
)
@pytest.mark.sampled(7)
def test_known_ranges(function, ends, expected):
    np.testing.assert_allclose(ranges(function, [ends[0]], [ends[1]])[:, 0], expected, atol=3e-5)


@pytest.mark.parametrize(
    ("function", "ends", "message"),
    [
        (jnp.tan, (1.5, 1.6), "'tan' at .* may contain a pole"),
        (jnp.tan, (2e3, 2e3), "or reach 1000; the bounds on its value are infinite"),
        (jnp.arccos, (-1.1, 0.5), "'acos' at .* leave its domain, from -1 to 1"),
        (jnp.arcsin, (0.0, 1.5), "'asin' at .* leave its domain"),
        (jnp.arctanh, (0.0, 1.0), "'atanh' at .* leave its domain"),
        (jnp.arccosh, (0.5, 2.0), "'acosh' at .* leave its domain, from 1 upward"),
        (lambda x: special.xlogy(x, x), (-0.1, 1.0), "'x_log_x' at .* leave its domain"),
    ],
)
@pytest.mark.sampled(4)
def test_outside_of_the_domain_bounds_are_infinite(function, ends, message):
    with pytest.warns(DomainWarning, match=message):
        bounds = ranges(function, [ends[0]], [ends[1]], bj.interval)
    assert np.isinf(bounds).any()


def test_beyond_the_domain_nothing_is_known():
    for function in (jnp.arccos, jnp.arctanh):
        with pytest.warns(DomainWarning):
            assert np.isnan(ranges(function, [1.5], [2.0], bj.interval)).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_sinc_lies_in_its_image_everywhere(dtype):
    rng = np.random.default_rng(0)
    center, radius = rng.uniform(-45, 45, 400), 10.0 ** rng.uniform(-4, 1.5, 400)
    lower, upper = (center - radius).astype(dtype), (center + radius).astype(dtype)
    share = np.linspace(0.0, 1.0, 2001)[:, None]
    x = np.clip(lower + share * (upper.astype(np.float64) - lower), lower, upper)
    with jax.enable_x64(dtype == np.float64):
        low, high = on_host(bj.interval(jnp.sinc))(bj.Box(lower, upper))
    values, slack = np.sinc(x), 1e-12 if dtype == np.float64 else 1e-5
    assert (values >= low - slack).all()
    assert (values <= high + slack).all()
    near = np.abs(center) + radius < 30
    excess = (high - low) - (values.max(0) - values.min(0))
    assert (excess[near] < 1e-3).all()


def test_an_entropy_is_recognised_only_where_it_is_one():
    def names(function):
        return [node.primitive for node in trace(function, jnp.ones(3)).nodes]

    assert "x_log_x" in names(special.entr)
    assert "x_log_x" in names(lambda p: special.xlog1py(1.0 - p, -p))
    assert "x_log_x" not in names(lambda p: special.xlog1py(1.0 - p, p))
    assert "x_log_x" not in names(lambda p: special.xlogy(p, p[::-1]))
    # This function is NaN at 0.
    assert "x_log_x" not in names(lambda p: p * jnp.log(p))


@pytest.mark.parametrize("rounding", ["float32", "real"])
@pytest.mark.sampled(3)
def test_rounded_bounds_contain_values_in_float64(rounding):
    functions = (jnp.tan, jnp.arcsin, jnp.arccos, jnp.arctanh, jnp.sinc)

    def function(x):
        return jnp.concatenate([f(x) for f in functions] + [special.entr(x * x)])

    x = np.float32([-0.9, -0.5, 0.25, 0.8])
    for radius in (0.0, 1e-7, 0.05):
        lower, upper = x - np.float32(radius), x + np.float32(radius)
        box = bj.Box(jnp.asarray(lower), jnp.asarray(upper))
        bounds = np.asarray(bj.linear(function, rounding=rounding)(box), np.float64)
        assert np.isfinite(bounds).all()
        for share in (0.0, 0.3, 1.0):
            point = np.clip(lower + np.float32(share) * (upper - lower), lower, upper)
            programs = np.asarray(jax.jit(function)(point))
            with jax.enable_x64(True):
                exact = np.asarray(function(jnp.asarray(point, jnp.float64)))
            for values in (exact, programs if rounding == "float32" else exact):
                assert (bounds[0] <= values).all()
                assert (bounds[1] >= values).all()


def test_gradients_at_the_ends_of_a_domain_are_finite():
    def total(scale):
        box = bj.Box(jnp.asarray([-1.0, 0.0, 1.0]), jnp.asarray([1.0, 1.0, 1.0]))
        functions = (jnp.arcsin, jnp.arccos, lambda x: special.entr(jnp.abs(x)))
        bounds = bj.linear(lambda x: jnp.concatenate([f(scale * x) for f in functions]))(box)
        return sum(end.sum() for end in bounds)

    assert np.isfinite(jax.jit(jax.grad(total))(jnp.asarray(1.0)))
