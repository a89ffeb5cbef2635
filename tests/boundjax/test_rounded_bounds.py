"""Rounded bounds of every transform against exact arithmetic and float32 programs."""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rationals import exact

import boundjax as bj
from boundjax.certification.presets import METHODS
from boundjax.precision import training_precision
from boundjax.search import programs
from boundjax.sets.rounding import Arithmetic
from boundjax.tracing.jaxprs import unroll_limit
from boundjax.transforms.errors import ErrorAnalysis

UNIT = 2.0**-24


rounded = functools.partial(bj.linear, rounding="float32", sides="lower")


def lower_bounds(function, lower, upper, rows, **options):
    @jax.jit
    @training_precision("highest")
    def bounds(lower, upper, rows):
        return rounded(function, **options)(bj.Box(lower, upper), rows).lower

    return np.asarray(bounds(*map(jnp.float32, (lower, upper, rows))))


# --- every kind of term, at the worst order of summation ----------------------------------------

COUNT = 256
# Added to 1 one after another each of them is rounded up to a spacing, twice its value.
TERMS = np.concatenate([[1.0], np.full(COUNT - 1, UNIT * (1.0 + 2.0**-10))]).astype(np.float32)
STEEP = np.float32(2.0**30)


def in_order(terms):
    total = np.float32(0)
    for term in terms:
        total += term
    return float(total)


def exactly(terms):
    return float(sum(exact(terms)))


def convolved(x):
    image, kernel = x.reshape(1, 16, 4, 4), jnp.asarray(TERMS.reshape(1, 16, 4, 4))
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "VALID").reshape(-1)


SUMS = {
    "dense": (lambda x: x @ TERMS[:, None], 1.0),
    "convolution": (convolved, 1.0),
    "reduction": (lambda x: jnp.sum(x * TERMS, keepdims=True), 1.0),
    "cumulative": (lambda x: jnp.cumsum(x * TERMS)[-1:], 1.0),
    "pooling": (
        lambda x: jax.lax.reduce_window(x * TERMS, 0.0, jax.lax.add, (COUNT,), (1,), "VALID"),
        1.0,
    ),
    "bias first": (lambda x: x[1:] @ TERMS[1:, None] + TERMS[0], 1.0),
    "residual": (lambda x: x[1:] @ TERMS[1:, None] + x[:1], 1.0),
    "product after product": (lambda x: (x @ TERMS[:, None]) @ jnp.full((1, 1), STEEP), STEEP),
    "factor after product": (lambda x: (x @ TERMS[:, None]) * STEEP, STEEP),
    "relu": (lambda x: jax.nn.relu(x @ TERMS[:, None]) @ jnp.full((1, 1), STEEP), STEEP),
    "maximum": (
        lambda x: jnp.maximum(x @ TERMS[:, None], x[:1] - 9.0) @ jnp.full((1, 1), STEEP),
        STEEP,
    ),
    "tanh": (lambda x: jnp.tanh(x @ TERMS[:, None] - 1.0) @ jnp.full((1, 1), STEEP), None),
    "perturbed product": (lambda x: (x[None] @ (x * TERMS)[:, None])[0] * STEEP, STEEP),
}


def ends_of(function, scale):
    """What a program that adds in order gives for ones, and what is exact."""
    if scale is None:
        program, real = (np.tanh(total(TERMS) - 1.0) for total in (in_order, exactly))
        return program * STEEP, real * STEEP
    return in_order(TERMS) * scale, exactly(TERMS) * float(scale)


@pytest.mark.parametrize("method", ["interval", "linear"])
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.sampled(4)
def test_bounds_hold_for_the_worst_order_of_summation(name, method, monkeypatch):
    """At a point, where nothing but rounding has a width."""
    function, scale = SUMS[name]
    program, real = ends_of(function, scale)
    ones = np.ones(COUNT, np.float32)

    def ends():
        bounds = lower_bounds(function, ones, ones, [[1.0], [-1.0]], intermediate=method)
        return bounds[0], -bounds[1]

    def hold(lower, upper):
        return lower <= min(program, real) and max(program, real) <= upper

    lower, upper = ends()
    assert hold(lower, upper)
    # Not needlessly wide: several roundings of every term, for several ops one after another.
    assert upper - lower < 24 * COUNT * UNIT * abs(scale or STEEP)
    # A matrix product of two perturbed values is charged for itself, its planes and its interval.
    share, gamma = 0.05 if name == "perturbed product" else 0.2, Arithmetic.gamma
    monkeypatch.setattr(Arithmetic, "gamma", lambda self, terms: share * gamma(self, terms))
    assert not hold(*ends())


# Compiled as users do: jax 0.9 without optimisations adds the sum of the bound itself in order.
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("method", ["interval", "linear"])
def test_a_relu_is_dead_only_if_it_is_so_for_every_program(method, monkeypatch):
    bias = np.float32(-1.0 - 1.2 * COUNT * UNIT)  # above the exact sum, below the program's

    def function(x):
        return jax.nn.relu(x @ TERMS[:, None] + bias) * STEEP

    value = np.float32(in_order(TERMS)) + bias
    assert value > 0
    ones = np.ones(COUNT, np.float32)
    box = ones, ones + np.float32(2.0**-22)
    unsafe = -value * STEEP
    assert lower_bounds(function, *box, [[-1.0]], intermediate=method) <= unsafe
    enclose = ErrorAnalysis.enclose_product

    def not_rounded(self, node, operand, center):
        enclose(self, node, operand, center)
        radius = node.op.magnitude(node, operand.radius)
        return bj.Interval(center - radius, center + radius)

    monkeypatch.setattr(ErrorAnalysis, "enclose_product", not_rounded)
    monkeypatch.setattr(ErrorAnalysis, "outward", lambda self, interval, *_: interval)
    assert lower_bounds(function, *box, [[-1.0]], intermediate=method) > unsafe


def test_rows_that_cancel(monkeypatch):
    """Outputs are exact here, and only their sum is rounded."""
    random = np.random.default_rng(0)
    x = random.uniform(1.0, 2.0, 64).astype(np.float32)
    rows = (random.normal(size=(100, 64)) * 1e6).astype(np.float32)
    rows[:, -1] = -np.sum(rows[:, :-1] * x[:-1], axis=1) / x[-1]
    values = (exact(rows) @ exact(x)).astype(np.float64)
    assert (lower_bounds(lambda x: x, x, x, rows) <= values).all()
    nothing = lambda self, index, outputs: jnp.zeros(64)  # noqa: E731
    monkeypatch.setattr(ErrorAnalysis, "of_rows", nothing)
    assert (lower_bounds(lambda x: x, x, x, rows) > values).any()


@pytest.mark.parametrize("start", [1.0, 1.0 + 2.0**-23, 3.0, -1.0 - 2.0**-23])
def test_boxes_of_one_spacing(start):
    """The middle of two neighbours is neither, and is rounded to one of them."""
    lower = np.float32([start])
    upper = np.nextafter(lower, np.float32(np.inf))
    bounds = lower_bounds(lambda x: x * STEEP, lower, upper, [[1.0], [-1.0]])
    assert bounds[0] <= lower[0] * STEEP
    assert bounds[1] <= -upper[0] * STEEP


@pytest.mark.parametrize("shape", [(1, 1), (1,)])
def test_subnormal_weights_count_although_xla_takes_them_for_zero(shape, monkeypatch):
    weights, x = np.full(shape, 1e-38, np.float32), np.float32([9e18])

    def bound():
        product = (lambda x: x @ weights) if len(shape) == 2 else (lambda x: x * weights)
        return lower_bounds(product, x, x, [[-1.0]])[0]

    exact_value = -float(x[0]) * float(weights.flat[0])
    assert 100 * exact_value < bound() <= exact_value
    monkeypatch.setattr(ErrorAnalysis, "_flushed", lambda self, terms: 0.0)
    assert bound() > exact_value


def test_values_too_large_to_charge_for_underflow_have_no_bounds():
    x = np.float32([1e20])
    assert not np.isfinite(lower_bounds(lambda x: 1e-3 * x, x, x, [[1.0]]))
    x = np.float32([1e18])
    assert np.isfinite(lower_bounds(lambda x: 1e-3 * x, x, x, [[1.0]]))


# --- networks at random --------------------------------------------------------------------------

INPUTS, UNITS = 12, 6
SHAPES = {
    "dense": {"w": (INPUTS, 2), "b": (2,)},
    "residual": {
        "w": (INPUTS, UNITS), "b": (UNITS,), "v": (UNITS, UNITS), "c": (UNITS,), "u": (UNITS, 2),
    },
    "convolution": {"k": (3, 2, 3), "b": (3, 1), "u": (3 * INPUTS // 2, 2)},
}  # fmt: skip


def network(kind, p, x, dot, relu, convolution):
    """A network in whatever arithmetic the functions compute."""
    if kind == "dense":
        return dot(x, p["w"]) + p["b"]
    if kind == "residual":
        hidden = relu(dot(x, p["w"]) + p["b"])
        return dot(relu(dot(hidden, p["v"]) + p["c"] + hidden), p["u"])
    return dot(relu(convolution(x.reshape(2, -1), p["k"]) + p["b"]).reshape(-1), p["u"])


def in_jax(kind, p, x):
    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(x[None], kernel, (1,), [(1, 1)])[0]

    return network(kind, p, x, jnp.matmul, jax.nn.relu, convolution)


def in_fractions(kind, p, x):
    def convolution(x, kernel):
        padded = np.pad(x, ((0, 0), (1, 1)), constant_values=Fraction(0))
        patches = np.stack([padded[:, k : k + 3].reshape(-1) for k in range(x.shape[1])], axis=1)
        return kernel.reshape(len(kernel), -1) @ patches

    p = {name: exact(value) for name, value in p.items()}
    return network(kind, p, exact(x), np.matmul, lambda z: z * (z > 0), convolution)


def drawn(kind, random):
    """Weights whose terms cancel, a box of a few spacings or more, and rows that may be large."""
    p = {}
    for name, shape in SHAPES[kind].items():
        value = random.normal(size=shape) * 10.0 ** random.uniform(-1, 5)
        if name in "wvu":
            value[-1] -= value.sum(axis=0)
        if name == "k":
            value[:, -1, -1] -= value.sum(axis=(1, 2))
        p[name] = (value * (name != "b" or random.random() < 0.3)).astype(np.float32)
    center = np.full(INPUTS, random.choice([1.0, 1.1, 1e3]), np.float32)
    if random.random() < 0.5:
        center = random.normal(size=INPUTS).astype(np.float32)
    width = np.abs(center) * np.float32(10.0 ** random.uniform(-7, -3))
    rows = np.float32([[1, 0], [1, -1], [-1, 1]]) * np.float32(10.0 ** random.uniform(0, 6))
    return p, center, np.maximum(center + width, np.nextafter(center, np.float32(np.inf))), rows


@pytest.mark.parametrize("intermediate", ["interval", "linear"])
@pytest.mark.parametrize("kind", SHAPES)
def test_no_bound_lies_above_an_exact_value(kind, intermediate):
    @jax.jit
    @training_precision("highest")
    def bounds(p, lower, upper, rows):
        box, function = bj.Box(lower, upper), lambda x: in_jax(kind, p, x)
        plain = bj.linear(function, sides="lower", intermediate=intermediate)(box, rows)
        slopes = jax.jacobian(lambda x: rows @ function(x))(lower)
        return rounded(function, intermediate=intermediate)(box, rows).lower, plain.lower, slopes

    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(25):
        p, lower, upper, rows = drawn(kind, random)
        answers = [np.asarray(a, np.float64) for a in bounds(p, lower, upper, rows)]
        certain, plain, slopes = answers
        assert np.isfinite(certain).all()
        for row, slope, above, below in zip(rows, slopes, plain, certain, strict=True):
            outputs = in_fractions(kind, p, np.where(slope > 0, lower, upper))
            value = exact(row) @ outputs
            assert Fraction(below) <= value
            wrong += Fraction(above) > value
    assert wrong >= 10  # of 75: bounds that are not rounded


@pytest.mark.parametrize("method", ["crown-ibp", "crown", "alpha-crown"])
@pytest.mark.sampled(4)
def test_little_is_lost_on_an_ordinary_network(method):
    random = np.random.default_rng(0)
    sizes = (64, 64, 64, 10)
    layers = [random.normal(size=shape) / shape[0] ** 0.5 for shape in itertools.pairwise(sizes)]
    layers = [layer.astype(np.float32) for layer in layers]

    def function(x):
        for layer in layers[:-1]:
            x = jax.nn.relu(x @ layer)
        return x @ layers[-1]

    center = random.uniform(size=64).astype(np.float32)
    box = bj.Box(center - np.float32(0.01), center + np.float32(0.01))
    rows = np.eye(10, dtype=np.float32)
    plain = METHODS[method](function, 2**30)(box, rows).lower
    options = programs._OPTIONS[method]
    lost = plain - lower_bounds(function, box.lower, box.upper, rows, **options)
    assert (lost > 0).all()
    assert (lost < 1e-3).all()


def test_constants_after_a_product_take_no_other_product(optimized):
    """A shift, a factor and a shift, as of batch normalisation, are charged with the product."""
    random = np.random.default_rng(0)
    weights = random.normal(size=(8, 16)).astype(np.float32)
    factor, shift = random.normal(size=(2, 16)).astype(np.float32)

    def function(x):
        return jax.nn.relu(((x @ weights + 1.0) * factor - shift) * factor + shift)

    def products(rounding):
        bounds = jax.jit(lambda x: bj.interval(function, rounding=rounding)(bj.LpBall(x, 0.1)))
        return bounds.lower(jnp.zeros(8)).compile().as_text().count(" dot(")

    assert products("nearest") == 2  # of the middle, and of the radius
    assert products("float32") == 2


def test_a_loop_is_charged_step_by_step():
    def function(x):
        return jax.lax.scan(lambda y, _: (0.5 * y + 1.0, None), x, length=50)[0]

    with unroll_limit(10):
        bounds = lower_bounds(function, [0.0], [1.0], [[1.0]])
    assert bounds < 2.0 - 1e-7
    assert bounds == pytest.approx(2.0, abs=1e-4)
    assert lower_bounds(function, [0.0], [1.0], [[1.0]]) == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize("subnormal", [1e-40, -1e-40])
@pytest.mark.parametrize("function", [jnp.sign, jnp.floor, jnp.ceil])
@pytest.mark.sampled(7)
def test_steps_count_both_sides_of_zero_for_subnormal_operands(function, subnormal):
    """One runtime may keep the operand and another may read it as 0."""
    x = np.float32([subnormal])
    exact_value = getattr(np, function.__name__)(x.astype(np.float64))
    for method in (bj.interval, bj.linear, bj.forward_linear):
        bounds = method(function, rounding="float32")
        lower, upper = bounds(bj.Box(x, x))
        for value in (exact_value, 0.0):
            assert lower <= value
            assert value <= upper
        plain = np.float32([1.5])
        assert np.allclose(*bounds(bj.Box(plain, plain)), atol=1e-5)


OVERFLOWING = {
    "product": lambda x: jnp.minimum((x * 3e37) * 1e-37, 1e6),
    "sum": lambda x: jnp.minimum((x * 3e36 + x * 3e36) * 1e-37, 1e6),
    "exp": lambda x: jnp.minimum(jnp.exp(x) * 1e-38, 100.0),
}


@pytest.mark.parametrize("rounding", ["real", "float32"])
@pytest.mark.parametrize("name", OVERFLOWING)
def test_what_overflows_is_no_infinite_constant(name, rounding):
    """Only a mask of -inf is exact: in real numbers a value beyond float32's range comes back."""
    function, x = OVERFLOWING[name], np.float32([89.5, 89.0])
    with jax.enable_x64(True):
        real = np.asarray(function(jnp.asarray(x, jnp.float64)))
    for radius in (0.0, 1e-3):
        box = bj.Box(jnp.asarray(x - np.float32(radius)), jnp.asarray(x + np.float32(radius)))
        for transform in (bj.interval, bj.linear):
            bounds = jax.jit(lambda box, of=transform: of(function, rounding=rounding)(box))(box)
            assert not (np.asarray(bounds.lower) > real * (1.0 + 1e-6)).any()  # of the constants
            assert not (np.asarray(bounds.upper) < real * (1.0 - 1e-6)).any()
