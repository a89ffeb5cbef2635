"""Remainders and rounded quotients by a constant: exact without a wrap, else the whole range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scalar_lines import scalar_node

import boundjax as bj
from boundjax.ops import accuracy
from boundjax.transforms.relaxations import _at_zero

pytestmark = pytest.mark.sampled(3)

FUNCTIONS = {"mod": jnp.mod, "fmod": jnp.fmod, "//": jnp.floor_divide}
DIVISORS = np.array([1.0, -0.7, 2.5, 0.1])
INTERVALS = np.array(
    [
        *[(0.05, 0.06), (-0.06, -0.05), (-0.05, 0.05), (0.0, 0.05), (-0.05, 0.0), (0.0, 0.0)],
        *[(0.9, 1.05), (1.0, 1.05), (0.95, 1.0), (-1.0, -0.95), (-3.0, 4.0), (2.5, 2.55)],
        *[(-1e-9, 1e-9), (-1e-42, 0.5), (0.5, 30.0), (999.0, 999.05), (1e6, 1e6), (1e9, 1e9 + 64)],
    ]
)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.sampled(6)
def test_images_and_lines_contain_a_grid(name, dtype):
    lower, upper = np.repeat(INTERVALS, len(DIVISORS), 0).T.astype(dtype)
    divisors = np.tile(DIVISORS, len(INTERVALS)).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        node = scalar_node(lambda x: FUNCTIONS[name](x, jnp.asarray(divisors)), jnp.asarray(lower))
        ends = node.op.image(node, jnp.asarray(lower), jnp.asarray(upper))
        lines = node.op.lines(node, jnp.asarray(lower), jnp.asarray(upper), _at_zero)
    low, high, *lines = (np.asarray(a, np.float64) for a in (*ends, *lines))
    x = np.linspace(0, 1, 2001)[:, None]
    x = np.clip(lower + x * (upper.astype(np.float64) - lower), lower, upper)
    values = {"mod": np.mod, "fmod": np.fmod, "//": np.floor_divide}[name](x, 1.0 * divisors)
    slack = (1e-14 if dtype == np.float64 else 1e-6) * (1.0 + np.abs(x).max(0))
    assert (values >= low - slack).all()
    assert (values <= high + slack).all()
    below_slope, below, above_slope, above = lines
    assert (values >= below_slope * x + below - slack).all()
    assert (values <= above_slope * x + above + slack).all()
    # The image is attained, or what the function approaches at a wrap.
    remainder, c = np.fmod if name == "fmod" else np.mod, 1.0 * divisors
    whole = [np.round((end - remainder(end, c)) / c) for end in (lower, upper)]
    multiples = whole[0] != whole[1]
    tight = ~multiples & (np.abs(upper) < 1e5) & (np.abs(lower) > 1e-30)
    assert tight.any()
    assert (low >= values.min(0) - 20 * slack)[tight].all()
    assert (high <= values.max(0) + 20 * slack)[tight].all()


@pytest.mark.parametrize(
    ("function", "ends", "expected"),
    [
        (lambda x: jnp.mod(3 * x, 1.0), (0.4, 0.6), (0.2, 0.8)),
        (lambda x: x % 1.0, (0.5, 1.5), (0.0, 1.0)),
        (lambda x: x % -1.0, (0.25, 0.75), (-0.75, -0.25)),
        (lambda x: jnp.fmod(x, 1.0), (-0.25, 0.5), (-0.25, 0.5)),
        (lambda x: jnp.fmod(x, -1.0), (-0.25, 1.5), (-0.25, 1.0)),
        (lambda x: jnp.divmod(x, 0.5)[0], (0.6, 1.2), (1.0, 2.0)),
        (lambda x: jnp.divmod(x, 0.5)[1], (0.6, 0.9), (0.1, 0.4)),
        (lambda x: x // -0.5, (0.6, 0.9), (-2.0, -2.0)),
        (
            lambda x: (x + jnp.pi) % (2 * jnp.pi) - jnp.pi,
            (3.5, 4.0),
            (3.5 - 2 * np.pi, 4 - 2 * np.pi),
        ),
    ],
)
@pytest.mark.sampled(6)
def test_known_ranges(function, ends, expected):
    box = bj.Box(*(jnp.full(1, end, jnp.float32) for end in ends))
    np.testing.assert_allclose(np.ravel(bj.interval(function)(box)), expected, atol=3e-5)
    np.testing.assert_allclose(np.ravel(bj.linear(function)(box)), expected, atol=3e-5)


def test_lines_follow_the_function_where_it_does_not_wrap():
    box = bj.Box(jnp.full(1, 0.1), jnp.full(1, 0.9))
    bounds = bj.linear(lambda x: x % 1.0 - x)(box)
    np.testing.assert_allclose(np.ravel(bounds), 0.0, atol=1e-5)


def test_unknown_operands_and_divisors_have_no_bounds():
    box = bj.Box(jnp.full(3, 0.1), jnp.full(3, 0.2))
    divisors = jnp.asarray([0.0, jnp.inf, 1e-40])
    assert np.isnan(np.asarray(bj.interval(lambda x: jnp.mod(x, divisors))(box))).all()
    node = scalar_node(lambda x: jnp.fmod(x, 1.0), jnp.ones(1))
    assert np.isinf(np.asarray(node.op.image(node, jnp.full(1, -jnp.inf), jnp.ones(1)))).all()
    with pytest.raises(bj.UnsupportedOpError, match="only remainders by a constant have bounds"):
        bj.interval(lambda x: x % (x[::-1] + 1.0))(box)


@pytest.mark.slow
def test_gradients_are_finite_and_see_no_wrap():
    def ends(scale):
        box = bj.Box(jnp.asarray([0.1, 0.9]), jnp.asarray([0.3, 1.1]))
        return sum(e.sum() for e in bj.linear(lambda x: jnp.mod(scale * x, 1.0))(box))

    value = jax.grad(ends)(jnp.asarray(1.0))
    assert np.isfinite(value)
    # The last element wraps, and the whole range is moved by no weight.
    np.testing.assert_allclose(value, 0.1 + 0.3, rtol=1e-5)


@pytest.mark.parametrize("rounding", ["float32", "real"])
@pytest.mark.sampled(3)
def test_rounded_bounds_hold_next_to_multiples(rounding):
    x = np.float32([0.6, 0.7, 2.1, 1e-8, -1e-8, 123.4])
    box = bj.Box(jnp.asarray(np.nextafter(x, np.float32(-9e9))), jnp.asarray(x))
    for name, function in FUNCTIONS.items():
        bounds = bj.linear(lambda x, f=function: f(x, jnp.float32(0.7)), rounding=rounding)(box)
        exact = {"mod": np.mod, "fmod": np.fmod, "//": np.floor_divide}[name]
        for point in box.interval():
            value = exact(np.asarray(point, np.float64), np.float64(np.float32(0.7)))
            assert (np.asarray(bounds.lower, np.float64) <= value).all(), name
            assert (np.asarray(bounds.upper, np.float64) >= value).all(), name


@pytest.mark.parametrize("name", ["remainder", "floor_divide"])
def test_stated_errors_hold_where_nothing_jumps(name):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=20000) * 10.0 ** rng.uniform(-6, 6, 20000)).astype(np.float32)
    with np.errstate(all="ignore"):
        exact = {"remainder": np.mod, "floor_divide": np.floor_divide}[name](
            x.astype(np.float64), 0.75
        )
    computed = np.asarray(jax.jit(getattr(jnp, name))(x, np.float32(0.75)), np.float64)
    error = accuracy.STATED[name].error(x.astype(np.float64), exact, accuracy.SINGLE)
    assert (np.abs(computed - exact) <= error).all()
