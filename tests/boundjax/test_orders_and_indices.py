"""Orders, spans, products over an axis, counts, indices, interpolation, kernels and solves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host
from jax import lax
from networks import points

import boundjax as bj

pytestmark = pytest.mark.sampled(3)

RNG = np.random.default_rng(0)
TABLE, ROWS = RNG.normal(size=(7, 3)).astype(np.float32), RNG.normal(size=(5, 4)).astype(np.float32)
MATRIX = (RNG.normal(size=(4, 4)) + 4.0 * np.eye(4)).astype(np.float32)
SYSTEM = MATRIX @ MATRIX.T
LOWER = np.linalg.cholesky(SYSTEM)
IMAGE = RNG.normal(size=(1, 5, 6, 2)).astype(np.float32)
COTANGENT = RNG.normal(size=(1, 2, 4, 2)).astype(np.float32)
NHWC = ("NHWC", "HWIO", "NHWC")
KNOTS, HEIGHTS = np.float32([-1.0, -0.5, 0.0, 0.3, 1.2]), np.float32([0.0, 1.0, -0.5, 0.2, 2.0])


def level(x, most=4):
    return jnp.clip((2.0 * x).astype(jnp.int32) + 2, 0, most)


def convolved(kernel_shape, image=IMAGE, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC} | options

    def function(x):
        size = int(np.prod(kernel_shape))
        kernel = x[:size].reshape(kernel_shape)
        return lax.conv_general_dilated(jnp.asarray(image, x.dtype), kernel, **options).ravel()

    return function


def both_perturbed(x):
    image, kernel = x[8:].reshape(1, 3, 3, 2), x[:8].reshape(2, 2, 1, 2)
    return lax.conv_general_dilated(
        image, kernel, (2, 1), "SAME", dimension_numbers=NHWC, feature_group_count=2
    ).ravel()


def kernel_gradient(x):
    """The image is perturbed and takes the kernel's place."""
    image = x.reshape(1, 3, 4, 1)

    def output(kernel):
        return lax.conv_general_dilated(image, kernel, (2, 1), "SAME", dimension_numbers=NHWC)

    _, pull_back = jax.vjp(output, jnp.zeros((2, 2, 1, 2)))
    return pull_back(jnp.asarray(COTANGENT))[0].ravel()


# Functions whose linear bounds are the exact range of every output over a box, up to rounding:
# linear ones, and those of an interval that is exact. The number of inputs, and the function.
EXACT = {
    "kernel": (36, convolved((3, 3, 2, 2))),
    "kernel, strided": (
        36,
        convolved((3, 3, 2, 2), window_strides=(2, 1), padding=((1, 0), (2, -1))),
    ),
    "kernel, dilated": (24, convolved((2, 3, 2, 2), rhs_dilation=(2, 1), padding="VALID")),
    "kernel, transposed": (
        8,
        convolved((2, 2, 2, 1), lhs_dilation=(2, 2), padding=((1, 0), (0, 1))),
    ),
    "kernel, grouped": (18, convolved((3, 3, 1, 2), feature_group_count=2)),
    "kernel, batches": (
        8,
        convolved((2, 2, 1, 2), IMAGE.reshape(2, 5, 6, 1), batch_group_count=2),
    ),
    "kernel, gradient": (12, kernel_gradient),
    "solve": (4, lambda x: jnp.linalg.solve(MATRIX, x)),
    "solve, columns": (8, lambda x: jnp.linalg.solve(MATRIX, x.reshape(4, 2)).ravel()),
    "solve, batched": (
        8,
        lambda x: jax.vmap(jnp.linalg.solve)(jnp.stack([MATRIX, SYSTEM]), x.reshape(2, 4)).ravel(),
    ),
    "inverse": (4, lambda x: jnp.linalg.inv(MATRIX) @ x),
    "cholesky": (4, lambda x: jax.scipy.linalg.cho_solve((jnp.asarray(LOWER), True), x)),
    "triangular, from the right": (
        8,
        lambda x: lax.linalg.triangular_solve(LOWER, x.reshape(2, 4), lower=True).ravel(),
    ),
    "tridiagonal": (
        3,
        lambda x: lax.linalg.tridiagonal_solve(
            jnp.array([0.0, 1.0, 1.0]), jnp.full(3, 4.0), jnp.array([1.0, 2.0, 0.0]), x[:, None]
        ).ravel(),
    ),
    "sort": (5, jnp.sort),
    "sort, rows": (6, lambda x: jnp.sort(x.reshape(2, 3), axis=0, descending=True).ravel()),
    "group sort": (6, lambda x: jnp.sort(x.reshape(-1, 2), axis=1).ravel()),
    "top_k": (5, lambda x: lax.top_k(x, 2)[0]),
    "median": (5, lambda x: jnp.median(x)[None]),
    "prod": (6, lambda x: jnp.prod(x.reshape(2, 3), axis=1)),
    "cumprod": (4, lambda x: lax.cumprod(x, reverse=True)),
    "cummax": (6, lambda x: lax.cummax(x.reshape(2, 3), axis=1).ravel()),
    "cummin": (4, lambda x: lax.cummin(x, reverse=True)),
    "cumlogsumexp": (4, lax.cumlogsumexp),
    "associative scan": (4, lambda x: lax.associative_scan(jnp.maximum, x)),
    "interp": (4, lambda x: jnp.interp(x, KNOTS, HEIGHTS)),
    "interp of weights": (4, lambda x: jnp.interp(x, *jnp.asarray([KNOTS, HEIGHTS], x.dtype))),
    "interp with values outside": (4, lambda x: jnp.interp(x, KNOTS, HEIGHTS, 3.0, -2.0)),
    "interp with a value right": (4, lambda x: jnp.interp(x, KNOTS, HEIGHTS, right=5.0)),
}
# Functions whose intervals are as a rule wider than the range.
SOUND = {
    "take": (
        3,
        lambda x: jnp.take(jnp.asarray(TABLE, x.dtype), level(x, 6), axis=0),
    ),
    "take, filled": (
        3,
        lambda x: jnp.take(TABLE, (9 * x).astype(jnp.int32), axis=0, mode="fill", fill_value=-9),
    ),
    "two indices": (4, lambda x: jnp.asarray(ROWS)[level(x), level(x[::-1], 3)]),
    "a perturbed row": (4, lambda x: x[level(x[:2], 3)]),
    "along an axis": (4, lambda x: jnp.take_along_axis(ROWS.T, level(x)[:, None], 1).ravel()),
    "one-hot": (4, lambda x: (jax.nn.one_hot(level(x), 5) @ ROWS).ravel()),
    "dynamic slice": (4, lambda x: lax.dynamic_slice(ROWS, (level(x[0]), 1), (2, 2)).ravel()),
    "dynamic update": (4, lambda x: lax.dynamic_update_slice(x, 2 * x[:2], (level(x[3]),))),
    "argmax": (4, lambda x: jnp.asarray(TABLE)[jnp.argmax(x)] + jnp.argmin(x).astype(x.dtype)),
    "argsort": (4, lambda x: jnp.argsort(x).astype(x.dtype)),
    "sorted by keys": (4, lambda x: lax.sort_key_val(x, x[::-1])[1]),
    "bytes": (4, lambda x: (jnp.clip(x, 0.0, 1.0) * 255).astype(jnp.uint8).astype(x.dtype) / 255),
    "integers": (4, lambda x: (level(x) ** 2 - 3 * level(x[::-1])).astype(x.dtype)),
    "votes": (5, lambda x: jnp.where(jnp.cumsum(x > 0.1) >= 2, x, -x)),
    "select": (4, lambda x: jnp.select([x < 0.3, x < 0.5], [x, 2 * x], 0.0)),
    "piecewise": (4, lambda x: jnp.piecewise(x, [x < 0, x > 0.5], [jnp.negative, jnp.tanh, 0.3])),
    "choose": (4, lambda x: jnp.choose(level(x, 1), [x, 2 * x], mode="clip")),
    "switch": (4, lambda x: lax.switch(level(x[0], 2), [jnp.abs, jnp.negative, jnp.tanh], x)),
    "digitize": (4, lambda x: jnp.take(jnp.arange(6.0), jnp.digitize(x, KNOTS))),
    "digitize, falling": (4, lambda x: jnp.digitize(x, KNOTS[::-1], right=True).astype(x.dtype)),
    "searchsorted": (4, lambda x: jnp.searchsorted(KNOTS, x, side="right").astype(x.dtype)),
    "both of a convolution": (26, both_perturbed),
}
CASES = EXACT | SOUND


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled(8)
def test_bounds_contain_samples(name):
    size, function = CASES[name]
    rng = np.random.default_rng(1)

    @on_host
    def run(lower, upper, inputs):
        box = bj.Box(lower, upper)
        both = bj.interval(function)(box), bj.linear(function)(box)
        return both, jax.vmap(function)(inputs)

    center = 0.6 * rng.normal(size=size)
    for radius in (0.0, 0.02, 0.4 * rng.uniform(size=size), 2.0):
        lower, upper = (center - radius).astype(np.float32), (center + radius).astype(np.float32)
        bounds, values = run(lower, upper, points(rng, lower, upper, 4000))
        slack = 2e-5 * (1.0 + np.abs(values).max())
        for of_method in bounds:
            assert np.isfinite(of_method.width).all()
            assert (values >= np.asarray(of_method.lower) - slack).all()
            assert (values <= np.asarray(of_method.upper) + slack).all()
        if np.all(radius == 0.0):
            assert (bounds[1].width <= slack).all()
        if name in EXACT and np.ndim(radius):
            # Samples meet few corners of many inputs.
            share = 0.7 if size > 6 else 0.95
            assert np.mean(np.ptp(values, axis=0) / bounds[1].width) > share


@pytest.mark.parametrize("rounding", ["real", "float32"])
@pytest.mark.parametrize(
    "name", ["group sort", "prod", "cumlogsumexp", "kernel, grouped", "take", "votes", "interp"]
)
@pytest.mark.sampled(8)
def test_rounded_bounds_contain_the_values_themselves(name, rounding):
    """Without any slack, on boxes so narrow that rounding is most of their bounds."""
    size, function = CASES[name]
    rng = np.random.default_rng(2)

    @on_host
    def run(lower, upper, inputs):
        box = bj.Box(lower, upper)
        return bj.linear(function, rounding=rounding)(box), jax.vmap(function)(inputs)

    center = 0.6 * rng.normal(size=size)
    for radius in (0.0, 1e-6, 0.1):
        lower, upper = (center - radius).astype(np.float32), (center + radius).astype(np.float32)
        bounds, values = run(lower, upper, points(rng, lower, upper, 500))
        assert (values >= bounds.lower).all()
        assert (values <= bounds.upper).all()


def test_a_factorisation_has_no_stated_rounding():
    with pytest.raises(bj.NoProofError, match="nobody states how much"):
        bj.linear(CASES["solve"][1], rounding="real")(bj.Box(jnp.zeros(4), jnp.ones(4)))


def interval(function, lower, upper):
    bounds = jax.jit(bj.interval(function))(bj.Box(jnp.float32(lower), jnp.float32(upper)))
    return np.asarray(bounds.lower).tolist(), np.asarray(bounds.upper).tolist()


def test_values_of_the_shared_cases():
    """Ranges worked out by hand."""
    votes = interval(
        lambda x: (x > 0.4).sum().astype(jnp.float32), [0.5, 0.1, 0.3, 0.2], [0.6, 0.2, 0.7, 0.9]
    )
    assert votes == (1.0, 3.0)
    rows = interval(lambda x: jnp.take(TABLE, x[0].astype(jnp.int32), axis=0), [2.0], [5.0])
    np.testing.assert_array_equal(rows, (TABLE[2:6].min(0), TABLE[2:6].max(0)))
    pairs = interval(
        lambda x: jnp.sort(x.reshape(2, 2), axis=1).ravel(),
        [-0.5, 0.1, 0.2, -0.3],
        [0.4, 0.3, 0.9, 0.6],
    )
    np.testing.assert_allclose(pairs, ([-0.5, 0.1, -0.3, 0.2], [0.3, 0.4, 0.6, 0.9]))
    product = interval(jnp.prod, [0.2, 0.5, 1.0], [0.7, 0.9, 1.5])
    np.testing.assert_allclose(product, (0.1, 0.945), rtol=1e-6)


def test_an_index_is_decided_where_the_order_is():
    lower, upper = [0.0, 3.0, 1.0, 1.0], [0.9, 4.0, 2.0, 2.0]
    assert interval(lambda x: jnp.argmax(x).astype(x.dtype), lower, upper) == (1.0, 1.0)
    order = interval(lambda x: jnp.argsort(x).astype(x.dtype), lower, upper)
    assert order == ([0.0, 2.0, 2.0, 1.0], [0.0, 3.0, 3.0, 1.0])
    # Of equal numbers the first is meant.
    assert interval(lambda x: jnp.argmax(x).astype(x.dtype), [1.0, 1.0], [1.0, 1.0]) == (0.0, 0.0)
    tie = interval(lambda x: jnp.argmax(x).astype(x.dtype), [1.0, 0.0], [2.0, 1.0])
    assert tie == (0.0, 0.0)
    assert interval(lambda x: jnp.argmax(x[::-1]).astype(x.dtype), [1.0, 0.0], [2.0, 1.0])[0] == 0.0


@pytest.mark.parametrize("rounding", ["nearest", "real", "float32"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_index_is_decided_by_differences(rounding, sign):
    """Intervals of logits overlap where one is always larger than the others."""
    find = jnp.argmax if sign > 0 else jnp.argmin

    def index(x, gap):
        logits = jnp.stack([x[0] - gap, x[0] + x[1], x[0] - gap * x[1]])
        return find(sign * logits).astype(x.dtype)

    box = bj.Box(jnp.float32([-5.0, 0.1]), jnp.float32([5.0, 0.3]))
    options = {"intermediate": "linear", "rounding": rounding}
    decided, open_ = (bj.linear(lambda x, g=g: index(x, g), **options)(box) for g in (0.5, -0.2))
    np.testing.assert_allclose(decided, (1.0, 1.0), atol=1e-6)
    assert open_.lower <= 0.0
    assert open_.upper >= 1.0


@pytest.mark.parametrize("rounding", ["nearest", "real", "float32"])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.where(x > 0.5, 1.0, 0.0),
        lambda x: jnp.where(jnp.argmax(x) == jnp.arange(2), 1.0, 0.0),
        lambda x: jnp.where(x[0] < x[1], 1.0, 0.0),
        lambda x: jnp.where(x > 1.5, 3.0, jnp.where(x > 0.5, 1.0, 0.0)),
    ],
)
def test_decided_selections_are_exact(function, rounding):
    """A one that may be a little less than one would be cast to 0."""
    cast = bj.interval(lambda x: function(x).astype(jnp.int32).astype(x.dtype), rounding=rounding)
    box = bj.Box(jnp.float32([0.6, 2.0]), jnp.float32([0.7, 2.1]))
    expected = function(box.lower).astype(np.float32)
    np.testing.assert_array_equal(cast(box), (expected, expected))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (1e12 * x).astype(jnp.int32),  # no int32
        lambda x: (300.0 * x).astype(jnp.uint8),  # no uint8
        lambda x: -((3.0 * x).astype(jnp.uint8)),  # wraps around
        lambda x: (3.0 * x).astype(jnp.int8) * 60,
        lambda x: (2.0**24 * x).astype(jnp.int32) + 1,  # float32 rounds it
        lambda x: (3.0 * x).astype(jnp.int32) + 2**24,
        lambda x: jnp.broadcast_to((2.0**20 * x).astype(jnp.int32), (2, 64)).sum(1),
    ],
)
def test_integers_outside_their_range_have_no_bounds(function):
    lower, upper = interval(lambda x: function(x).astype(x.dtype), [0.5], [1.0])
    assert np.isnan(lower).all()
    assert np.isnan(upper).all()


def test_indices_outside_the_table():
    filled = interval(lambda x: jnp.take(TABLE, x.astype(jnp.int32), axis=0), [5.5], [7.5])
    assert np.isnan(filled).all()  # JAX fills in NaN
    clipped = interval(
        lambda x: jnp.take(TABLE, x.astype(jnp.int32), axis=0, mode="clip"), [5.5], [7.5]
    )
    np.testing.assert_array_equal(clipped[0], [TABLE[5:].min(0)])


@pytest.mark.filterwarnings("ignore::boundjax.ops.domain.DomainWarning")
def test_nan_decides_nothing():
    for name in ("sort", "prod", "cummax", "interp", "take", "argmax", "votes", "kernel, grouped"):
        size, function = CASES[name]
        bounds = jax.jit(lambda x, f=function: bj.interval(f)(bj.Box(x, x + 1.0)))(
            jnp.full(size, jnp.nan)
        )
        decided = np.isfinite(bounds.lower) & np.isfinite(bounds.upper)
        # A comparison with NaN is false or true: a vote selects x, which is NaN.
        assert not decided.any(), name


def test_unsorted_knots_have_no_bounds():
    @jax.jit
    def bounds(knots):
        return bj.linear(lambda x: jnp.interp(x, knots, HEIGHTS))(bj.Box(-jnp.ones(1), jnp.ones(1)))

    assert np.isfinite(bounds(KNOTS)).all()
    assert np.isnan(bounds(KNOTS[::-1])).all()


DIFFERENTIABLE = (
    "group sort",
    "prod",
    "cummax",
    "interp of weights",
    "kernel, grouped",
    "take",
    "votes",
)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.sampled(6)
def test_gradients_equal_finite_differences(name):
    size, function = CASES[name]
    with jax.enable_x64(True):
        x = 0.5 * np.random.default_rng(3).normal(size=size)

        @on_host
        def run(scale, eps):
            def total(scale, eps):
                box = bj.LpBall(jnp.asarray(x), eps)
                bounds = bj.linear(lambda x: function(scale * x))(box)
                return jnp.sum(jnp.sin(bounds.lower)) + jnp.sum(bounds.upper)

            return jax.value_and_grad(total, argnums=(0, 1))(scale, eps)

        for at in ((1.0, 0.3), (1.0, 0.0)):
            _, gradient = run(*at)
            assert np.isfinite(gradient).all()
            for k in (0, 1) if at[1] else (0,):
                h = 1e-6 * np.eye(2)[k]
                change = (run(*(at + h))[0] - run(*(at - h))[0]) / 2e-6
                np.testing.assert_allclose(gradient[k], change, rtol=1e-4, atol=1e-4)
