"""Constants that a model computes from weights, and rewrites that hide what a program rounds."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.ir.node import NoProofError
from boundjax.tracing.jaxprs import unroll_limit
from boundjax.tracing.trace import trace
from boundjax.transforms.errors import ErrorAnalysis

DECAY = np.float32(1e-4)


def tiny(xp):
    """`1 - sqrt(1 - decay)`: after cancelling, its computed value is off in the fourth digit."""
    one = xp.ones(3, DECAY.dtype if xp is jnp else np.float64)
    return one - xp.sqrt(one - xp.asarray(DECAY, one.dtype))


def padded(xp, x):
    inner = tiny(xp)[:1]
    return xp.concatenate([x, inner, inner]) * 1e4


def convolved(xp, x):
    kernel = tiny(xp) * xp.asarray([1, 2, 3], x.dtype)
    if xp is np:
        return np.correlate(x, kernel, "valid")
    return jax.lax.conv_general_dilated(x[None, None], kernel[None, None], (1,), "VALID")[0, 0]


def clipped(xp, x):
    return xp.maximum(x - 4.0, tiny(xp)) * 1e4


MODELS = {
    "factor": lambda xp, x: x * tiny(xp),
    "divisor": lambda xp, x: x / (1e4 * tiny(xp)),
    "shift": lambda xp, x: 0.0 * x + tiny(xp),
    "subtracted": lambda xp, x: tiny(xp) - 0.0 * x,
    "dense": lambda xp, x: x @ (xp.eye(3, dtype=x.dtype) * tiny(xp)[:1, None]),
    "transposed": lambda xp, x: (xp.eye(3, dtype=x.dtype) * tiny(xp)[:1, None]).T @ x,
    "convolution": convolved,
    "concatenation": padded,
    "maximum": clipped,
    "step": lambda xp, x: xp.where(x > 0.5, tiny(xp), 0.0) * 1e4,
    "slope": lambda xp, x: xp.where(x > 0.5, x * tiny(xp), 0.0) * 1e4,
    "slope and offset": lambda xp, x: xp.where(x > 0.5, x * tiny(xp) + tiny(xp), 0.0) * 1e4,
    "before a relu": lambda xp, x: xp.maximum(x * tiny(xp), 0.0) * 1e4,
    "behind a relu": lambda xp, x: (
        xp.maximum(x, 0.0) @ (xp.eye(3, dtype=x.dtype) * tiny(xp)[:1, None])
    ),
}
METHODS = {
    "interval": bj.interval,
    "crown-ibp": bj.linear,
    "crown": functools.partial(bj.linear, intermediate="linear"),
    "forward": bj.forward_linear,
}
ROUNDINGS = ["real", "float32"]
X = np.float32([1.0, 2.0, 3.0])


def compiled(method, model, rounding):
    """Bounds at a point, where nothing but rounding has a width."""
    bounds = jax.jit(lambda x: METHODS[method](model, rounding=rounding)(bj.Box(x, x)))
    return lambda x: jax.tree.map(lambda end: np.asarray(end, np.float64), bounds(x))


def bounds_of(method, model, x, rounding):
    return compiled(method, model, rounding)(x)


def all_models(x):
    return {name: model(jnp, x) for name, model in MODELS.items()}


def holds(bounds, value):
    """Whether bounds contain a float64 value; its own error is far below a float32's spacing."""
    lower, upper = bounds
    least = 1e-13 * np.abs(value)
    return bool((lower <= value + least).all() and (value - least <= upper).all())


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sampled(4)
def test_exact_and_computed_constants_lie_within_bounds(method, rounding, monkeypatch):
    exact = {name: model(np, X.astype(np.float64)) for name, model in MODELS.items()}
    programs = [
        jax.tree.map(np.asarray, program(X)) for program in (all_models, jax.jit(all_models))
    ]
    bounds = bounds_of(method, all_models, X, rounding)
    for name, value in exact.items():
        assert holds(bounds[name], value), name
        # About fifty units of rounding, before 1 cancels.
        width = bounds[name].upper - bounds[name].lower
        assert np.max(width) < 0.25 * np.max(np.abs(value)), name
        for computed in programs:
            assert not np.allclose(computed[name], value, rtol=1e-5, atol=0.0), name
            assert rounding == "real" or holds(bounds[name], computed[name]), name
    nothing = lambda self, node, position: jnp.zeros_like(node.constant(position))  # noqa: E731
    monkeypatch.setattr(ErrorAnalysis, "_of_constant", nothing)
    without = bounds_of(method, all_models, X, rounding)
    assert not any(holds(without[name], value) for name, value in exact.items())


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("method", METHODS)
def test_an_output_that_is_a_constant(method, rounding, monkeypatch):
    """A weight is exact, also one that is moved; a result is charged for its rounding."""
    weight = jnp.float32([[0.1, 3.0], [-jnp.inf, 2.0**-149]])

    def model(x):
        return {"x": x, "weight": weight, "moved": weight.T[0], "tiny": tiny(jnp)}

    bounds = METHODS[method](model, rounding=rounding)
    of_box = jax.jit(bounds)(bj.Box(-jnp.asarray(X), jnp.asarray(X)))
    for end in range(2):
        np.testing.assert_array_equal(of_box["weight"][end], weight)
        np.testing.assert_array_equal(of_box["moved"][end], weight[:, 0])
        np.testing.assert_allclose(np.abs(of_box["x"][end]), X, rtol=1e-5)
    exact = tiny(np)
    assert holds(of_box["tiny"], exact)
    assert holds(of_box["tiny"], np.float64(jax.jit(lambda: tiny(jnp))())) or rounding == "real"
    assert (of_box["tiny"].upper - of_box["tiny"].lower < 0.25 * exact).all()
    nothing = lambda self, node, position: jnp.zeros_like(node.constant(position))  # noqa: E731
    monkeypatch.setattr(ErrorAnalysis, "_of_constant", nothing)
    assert not holds(bounds(bj.Box(X, X))["tiny"], exact)


def test_a_constant_output_of_another_type_has_no_rounded_bounds():
    with pytest.raises(NoProofError, match="an output of another type than the input"):
        bj.interval(lambda x: (x, jnp.arange(3)), rounding="real")(bj.Box(X, X))


def test_properties_of_constants():
    box, value = bj.Box(-jnp.asarray(X), jnp.asarray(X)), 5.0001248799e-5
    within = bj.properties.within
    prove = lambda lower, upper: bj.prove(  # noqa: E731
        lambda x: tiny(jnp), box, within(lower, upper, (3,)), timeout=20.0, max_split_inputs=0
    )
    assert prove(0.8 * value, 1.2 * value).verdict == "unsat"
    assert prove(1.2 * value, None).verdict == "sat"
    # The computed number is 1.4e-5 above the exact one, which no proof may forget.
    assert prove(1.00001 * value, None).verdict == "unknown"
    exact = bj.prove(lambda x: jnp.float32([3.0]), box, within(2.9999, 3.0001, (1,)))
    assert exact.proved


def test_the_ball_of_lipschitz_counts_rounded_factors():
    def model(xp, x):
        return x @ (xp.eye(3, dtype=x.dtype) * tiny(xp)[:1, None])

    ball = bj.lipschitz(functools.partial(model, jnp), rounding="real")(bj.Box(X, X))
    exact = model(np, X.astype(np.float64))
    assert np.linalg.norm(exact - np.asarray(ball.center, np.float64)) <= ball.radius
    assert holds(ball.interval(), exact)


# --- which constants count ------------------------------------------------------------------------


def formulas_of(function, rounding="real"):
    graph = trace(function, jnp.asarray(X), rounding)
    return [name for node in graph.constants.nodes if (name := node.primitive) != "input"]


WEIGHTS = jnp.asarray(np.arange(9, dtype=np.float32).reshape(3, 3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x @ WEIGHTS.T.reshape(9)[::-1].reshape(3, 3),
        lambda x: x * jnp.where(WEIGHTS[0] > 1, WEIGHTS[1], -WEIGHTS[2]),
        lambda x: x * jnp.arange(3, dtype=jnp.float32),
        lambda x: x * (WEIGHTS[0] > 1).astype(jnp.float32),
        lambda x: x * jnp.asarray([3, 4, 5], jnp.int8).astype(jnp.float32),
        lambda x: jnp.maximum(x, jnp.maximum(WEIGHTS[0], WEIGHTS.max())),
        lambda x: x @ jnp.eye(3) @ jnp.zeros((3, 2)),
    ],
)
def test_moved_selected_and_converted_weights_are_exact(function):
    assert formulas_of(function) == []


def test_formulas_are_kept_through_calls_loops_and_weights_that_are_traced():
    @jax.jit
    def scaled(w):
        return w * jnp.sqrt(2.0)

    assert "sqrt" in formulas_of(lambda x: x * scaled(WEIGHTS[0]))
    looped = lambda w: jax.lax.fori_loop(0, 3, lambda _, v: v + w, w)  # noqa: E731
    assert formulas_of(lambda x: x * looped(WEIGHTS[0])).count("add") == 3

    def traced(weights):
        assert formulas_of(lambda x: x @ (weights * weights)) == ["square"]
        return weights

    jax.jit(traced)(WEIGHTS)


CARRIERS = {
    "jit": lambda x: x * jax.jit(tiny, static_argnums=0)(jnp),
    "checkpoint": lambda x: jax.checkpoint(lambda v: v * tiny(jnp))(x),
    "vmap": lambda x: jax.vmap(lambda a, w: a * jnp.sqrt(w))(x, WEIGHTS[1]),
    "scan": lambda x: jax.lax.scan(lambda c, w: (c * jnp.sqrt(w), None), x, WEIGHTS[1])[0],
    "branch": lambda x: jax.lax.cond(True, lambda v: v * tiny(jnp), lambda v: v, x),
    "update": lambda x: x * jnp.zeros(3).at[1:].set(tiny(jnp)[:2]),
    "no gradient": lambda x: x * jax.lax.stop_gradient(tiny(jnp)),
    "barrier": lambda x: x * jax.lax.optimization_barrier(tiny(jnp)),
}


@pytest.mark.parametrize("name", CARRIERS)
def test_no_way_of_passing_a_constant_on_loses_its_formula(name):
    assert "sqrt" in formulas_of(CARRIERS[name])


def test_a_formula_in_the_factor_of_a_layer_norm_is_kept():
    """A rewrite that takes over constants must not lose their formulas."""

    def function(x):
        centred = x - jnp.mean(x)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred)) + 1e-3) * jnp.exp(WEIGHTS[0])
        return centred * scale

    graph = trace(function, jnp.asarray(X), "real")
    assert "normalize" in [node.primitive for node in graph.nodes]
    assert "exp" in [node.primitive for node in graph.constants.nodes]


# --- refusals -------------------------------------------------------------------------------------


def drawn(x):
    return x * jax.random.normal(jax.random.key(0), x.shape)


def iterated(x):
    return x * jnp.linalg.norm(WEIGHTS, 2)


@pytest.mark.parametrize("function", [drawn, iterated])
def test_a_constant_of_unknown_rounding_has_no_rounded_bounds(function):
    for rounding in ROUNDINGS:
        with pytest.raises(NoProofError, match="computes a constant; compute it beforehand"):
            bj.linear(function, rounding=rounding)(bj.Box(X, X))
    assert bj.linear(function)(bj.Box(X, X)).lower.shape == (3,)


def test_certify_says_that_a_constant_of_unknown_rounding_proves_nothing():
    with pytest.warns(UserWarning, match="computes a constant"):
        certificate = bj.certify(jax.vmap(drawn), X[None], 0.01)
    assert certificate.arithmetic == "nearest"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.nn.leaky_relu(x, tiny(jnp)[0]),
        lambda x: jnp.where(x > tiny(jnp), 1.0, x),
        lambda x: jnp.where(tiny(jnp) > 1e-5, x, 2 * x),
        lambda x: x.at[:].multiply(tiny(jnp)),
    ],
)
def test_ops_that_state_nothing_about_rounded_constants_are_refused(function):
    with pytest.raises(NoProofError, match="what a rounded constant changes in"):
        bj.interval(function, rounding="real")(bj.Box(X, X))


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (
            lambda x: jax.lax.cond(tiny(jnp)[0] > 5e-5, lambda v: v, lambda v: 2.0 * v, x),
            "the branch of a cond",
        ),
        (
            lambda x: jax.lax.while_loop(
                lambda c: c[1] < 1e-4, lambda c: (2.0 * c[0], c[1] + tiny(jnp)[0]), (x, 0.0)
            )[0],
            "the trip count of a loop",
        ),
    ],
)
def test_control_flow_must_not_depend_on_rounded_constants(function, what):
    with pytest.raises(NoProofError, match=f"{what} at .* depends on a rounded constant"):
        bj.interval(function, rounding="real")(bj.Box(X, X))
    assert bj.interval(function)(bj.Box(X, X)).lower.shape == (3,)


def test_a_loop_rounds_the_numbers_that_it_counts():
    def function(x):
        def step(carry, _):
            y, t = carry
            return (y, t + 0.1), y * t

        return jax.lax.scan(step, (x, 0.0), length=200)[1][-1]

    with unroll_limit(10):
        lower, upper = bj.interval(function, rounding="float32")(bj.Box(X, X))
    exact = X.astype(np.float64) * 199 * float(np.float32(0.1))
    assert holds((lower, upper), exact)
    assert holds((lower, upper), np.asarray(function(X), np.float64))
    assert not np.allclose(np.asarray(function(X)), exact, rtol=1e-6, atol=0.0)


# --- the form that a program computes -------------------------------------------------------------


def programs(function):
    """Float32 programs of a function: as it stands, compiled, and for a batch."""
    batched = jax.jit(jax.vmap(function))
    return [function, jax.jit(function), lambda x: batched(jnp.stack([x] * 5))[2]]


def count_wrong(method, function, inputs):
    """Checks bounds for programs, and counts in how many they lie outside of nearest ones."""
    rounded, nearest = (compiled(method, function, r) for r in ("float32", "nearest"))
    wrong = 0
    for x in inputs:
        within, plain = rounded(x), nearest(x)
        for program in programs(function):
            computed = np.asarray(program(x), np.float64)
            assert holds(within, computed)
            wrong += not holds(plain, computed)
    return wrong


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sampled(4)
def test_layer_norm_with_fast_variance_of_a_large_mean(method):
    """`E[x^2] - E[x]^2` cancels, which the variance around the mean does not show."""
    module = nn.LayerNorm()
    variables = module.init(jax.random.key(0), jnp.zeros(16))
    random = np.random.default_rng(0)
    inputs = [jnp.asarray(100.0 + random.normal(size=16), jnp.float32) for _ in range(10)]
    assert count_wrong(method, functools.partial(module.apply, variables), inputs) >= 10


def normalized(x):
    kernel = jnp.full((3, 3, 1, 4), 0.1)
    y = jax.lax.conv_general_dilated(
        x[None], kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return ((y + 4096.3) - 4096.1) * jnp.asarray([[[[1.0, 2.0, -3.0, 0.5]]]])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sampled(4)
def test_batch_norm_with_a_large_mean_behind_a_large_bias(method):
    plain, kept = (
        [node.primitive for node in trace(normalized, jnp.ones((5, 5, 1)), rounding).nodes]
        for rounding in ("nearest", "float32")
    )
    assert ("mul" in plain, "mul" in kept) == (False, True)
    random = np.random.default_rng(0)
    inputs = [jnp.asarray(random.uniform(size=(5, 5, 1)), jnp.float32) for _ in range(10)]
    assert count_wrong(method, normalized, inputs) >= 10


def test_softmax_shifted_by_a_large_number():
    """Its logarithm is exact in real arithmetic, but the shifted numbers lose digits."""

    def function(x):
        shift = 1e6 * x[:1]
        terms = jnp.exp((x - shift) + shift)
        return terms / jnp.sum(terms)

    assert count_wrong("interval", function, [jnp.asarray([0.5, 0.1, 0.3], jnp.float32)]) >= 1


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=True, epsilon=1e-6)(x)
        return nn.Dense(3)(nn.relu(x).reshape(len(x), -1))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("method", ["interval", "crown-ibp", "crown"])
@pytest.mark.sampled(6)
def test_certify_proves_batch_norm_of_tiny_variance(method, rounding):
    x = np.random.default_rng(0).uniform(size=(4, 6, 6, 1)).astype(np.float32)
    variables = Normalized().init(jax.random.key(0), x)
    statistics = {"mean": jnp.full(4, 0.3), "var": jnp.full(4, 1e-6)}
    params = dict(variables["params"])
    params["BatchNorm_0"] = {"scale": jnp.full(4, 100.0), "bias": jnp.zeros(4)}
    variables = {"params": params, "batch_stats": {"BatchNorm_0": statistics}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        certificate = bj.certify(
            (Normalized(), variables), x, 1e-6, method=method, rounding=rounding
        )
    assert certificate.arithmetic == rounding
    assert np.isfinite(certificate.margins).all()
