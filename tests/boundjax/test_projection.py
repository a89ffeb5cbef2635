"""CAP's random-projection estimates: their statistics, their exact limit, and their type."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import BY_NAME, on_host
from network import affine, dense

import boundjax as bj
from boundjax.slopes import resolve
from boundjax.tracing.trace import trace
from boundjax.transforms import projection
from boundjax.transforms.walk import Walk


def mlp(rng, *widths):
    layers = [dense(rng, inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]

    def apply(x, layers):
        for layer in layers[:-1]:
            x = jax.nn.relu(affine(layer, x))
        return affine(layers[-1], x)

    return jax.tree.map(jnp.asarray, layers), apply


# --- statistics (Cauchy and Gaussian estimators) --------------------------------------------------


def ratios(p: float, projections: int, size: int = 120, units: int = 8, draws: int = 1000):
    """Ratio of estimated to true radius of linear units over a ball, `[draws, units]`."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(size, units)) * rng.uniform(size=(size, 1)), jnp.float32)
    eps = jnp.asarray(rng.uniform(0.1, 1.0, size=size), jnp.float32)
    ball = bj.LpBall(jnp.zeros(size), eps, p=p)

    def width(key):
        # The ReLU makes its operand a pre-activation.
        (result,) = pre_activations(lambda x: jax.nn.relu(x @ kernel), ball, key, projections)
        return result.radius

    order = 1 if p == np.inf else 2
    true = jnp.linalg.norm(kernel * eps[:, None], ord=order, axis=0)
    drawn = jax.jit(jax.vmap(width))(jax.random.split(jax.random.key(1), draws))
    return np.asarray(drawn / true[None])


def pre_activations(function, input_set, key, projections):
    """The estimated pre-activations, which the public function does not return."""
    traced = trace(function, input_set.interval().lower)
    companion = projection.Projection(key, projections)
    walk = Walk(traced, input_set, resolve("parallel"), companion=companion)
    return [walk.intervals[node.inputs[0]] for node in traced.nodes if "relu" in node.label]


def test_cauchy_estimates_of_fifty_projections():
    result = ratios(np.inf, 50)
    assert 0.99 <= result.mean() <= 1.03
    assert 0.20 <= result.std() <= 0.24
    # The 25th of 50 values is below the true median where at least 25 of them are.
    low = 0.5 + 0.5 * math.comb(50, 25) / 2**50
    assert abs((result < 1).mean() - low) < 0.02


@pytest.mark.parametrize(("projections", "spread"), [(10, 0.54), (200, 0.11)])
def test_more_projections_are_more_precise(projections, spread):
    result = ratios(np.inf, projections, size=220)
    assert abs(result.std() - spread) < 0.15 * spread


def test_gaussian_estimates_of_fifty_projections():
    result = ratios(2, 50)
    # Chi with k degrees of freedom over sqrt(k): mean 1 - 1 / 4k, deviation 1 / sqrt(2k).
    assert abs(result.mean() - (1 - 1 / 200)) < 0.005
    assert abs(result.std() - 0.1) < 0.01


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_median_is_the_lower_of_two(dtype):
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == np.float64):
        for count in (1, 2, 7, 50):
            values = (rng.normal(size=(count, 3, 4)) * 10.0 ** rng.integers(-45, 30)).astype(dtype)
            values[:, 0] = np.round(values[:, 0])  # ties, and zeros of both signs
            values[:, 1, 1] = np.inf
            result = projection.median_magnitude(jnp.asarray(values))
            assert result.dtype == dtype
            np.testing.assert_array_equal(result, np.sort(np.abs(values), axis=0)[(count - 1) // 2])
        values[3, 2, 2] = np.nan
        assert np.isnan(projection.median_magnitude(jnp.asarray(values))).sum() == 1
        gradient = jax.grad(projection.median_magnitude)(jnp.asarray([-4.0, 1.0, -2.0, 3.0], dtype))
        np.testing.assert_array_equal(gradient, [0.0, 0.0, -1.0, 0.0])


# --- exact without projections --------------------------------------------------------------------


@pytest.mark.parametrize("p", [2, np.inf])
@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "transposed", "linen"])
@pytest.mark.sampled(4)
def test_small_networks_have_the_bounds_of_fast_lin(name, p):
    network = BY_NAME[name]
    with jax.enable_x64(True):
        weights = network.weights(3, np.float64)
        centre = np.random.default_rng(3).normal(size=network.input_shape)
        flat = functools.partial(network.flat, weights)

        @on_host
        def run(centre):
            ball = bj.LpBall(centre, 0.2, p=p, clip=(-2.0, 2.0) if p == np.inf else None)
            options = {"slopes": "parallel", "intermediate": "linear", "intersect": False}
            _, aux = bj.linear(flat, has_aux=True, **options)(ball)
            return aux.linear, bj.estimate(flat, jax.random.key(0), projections=1000)(ball)

        bounds, estimate = run(jnp.asarray(centre))
    np.testing.assert_allclose(estimate.lower_estimate, bounds.lower, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(estimate.upper_estimate, bounds.upper, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["leaky", "clipped", "smooth", "thresholds", "pooling", "rare"])
@pytest.mark.sampled(3)
def test_other_ops_have_parallel_lines_too(name):
    """Without projections, estimates are bounds, for any op that has two lines."""
    network = BY_NAME[name]
    with jax.enable_x64(True):
        weights = network.weights(3, np.float64)
        rng = np.random.default_rng(3)
        centre = rng.normal(size=network.input_shape)
        flat = functools.partial(network.flat, weights)

        @on_host
        def run(centre):
            estimates = bj.estimate(flat, jax.random.key(0), projections=1000)
            return estimates(bj.LpBall(centre, 0.3))

        bounds = run(jnp.asarray(centre))
        moves = rng.uniform(-0.3, 0.3, size=(500, *network.input_shape))
        values = jax.jit(jax.vmap(flat))(jnp.asarray(centre[None] + moves))
    assert (np.asarray(values) >= bounds.lower_estimate - 1e-10).all()
    assert (np.asarray(values) <= bounds.upper_estimate + 1e-10).all()
    assert np.isfinite(bounds.lower_estimate).all()
    assert np.isfinite(bounds.upper_estimate).all()


def test_joint_ops_are_estimated():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4)), jnp.float32)

    def attention(x):
        query, key, value = (jnp.matmul(x, w) for w in weights)
        return jax.nn.softmax(query @ key.T) @ value

    centre = np.random.default_rng(1).normal(size=(4, 3))
    box = bj.LpBall(jnp.asarray(centre, jnp.float32), 0.01)
    exact = jax.jit(bj.linear(attention, slopes="parallel", intermediate="linear"))(box)
    for projections in (5, 16):
        transform = bj.estimate(attention, jax.random.key(0), projections=projections)
        bounds = jax.jit(transform)(box)
        assert np.isfinite(bounds.lower_estimate).all()
        assert (bounds.lower_estimate <= bounds.upper_estimate).all()
    width = bounds.upper_estimate - bounds.lower_estimate
    assert (width <= 3 * exact.width).all()
    assert (width >= 0.3 * exact.width).all()


# --- a larger network -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    layers, apply = mlp(np.random.default_rng(0), 60, 70, 55, 5)
    return jax.tree.map(lambda w: w.astype(jnp.float32), layers), apply


def ball_of(p=np.inf):
    centre = jnp.asarray(np.random.default_rng(1).uniform(size=60), jnp.float32)
    return bj.LpBall(centre, 0.05 if p == np.inf else 0.3, p=p, clip=(0.0, 1.0))


@pytest.mark.parametrize("p", [2, np.inf])
def test_estimates_scatter_around_the_bounds(large, p):
    layers, apply = large
    function, ball = functools.partial(apply, layers=layers), ball_of(p)
    rows = bj.margin_specification(jnp.array(2), 5)
    options = {"slopes": "parallel", "intermediate": "linear", "intersect": False}
    _, aux = jax.jit(bj.linear(function, has_aux=True, **options))(ball, rows)

    def lower(key):
        return bj.estimate(function, key)(ball, rows).lower_estimate

    bounds = jax.jit(jax.vmap(lower))(jax.random.split(jax.random.key(0), 60))
    width = aux.linear.upper - aux.linear.lower
    np.testing.assert_allclose(bounds.mean(0), aux.linear.lower, atol=0.1 * float(width.max()))
    # Estimates are no bounds: many are tighter than the relaxation's own bounds.
    assert 0.1 < float((bounds > aux.linear.lower[None]).mean()) < 0.9


def test_a_key_gives_the_same_estimates_and_another_key_others(large):
    layers, apply = large
    function = functools.partial(apply, layers=layers)
    run = jax.jit(lambda key: bj.estimate(function, key)(ball_of()).lower_estimate)
    first, again, other = (run(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_examples_of_a_batch_share_a_key_or_have_their_own(large):
    layers, apply = large
    function = functools.partial(apply, layers=layers)
    centres = jnp.stack([ball_of().center] * 2)

    def lower(key, centre):
        return bj.estimate(function, key)(bj.LpBall(centre, 0.05)).lower_estimate

    shared = jax.jit(jax.vmap(lower, in_axes=(None, 0)))(jax.random.key(0), centres)
    np.testing.assert_allclose(shared[0], shared[1], rtol=1e-5)
    keys = jax.random.split(jax.random.key(0))
    apart = jax.jit(jax.vmap(lower))(keys, centres)
    assert (jnp.abs(apart[0] - apart[1]) > 1e-3).any()


@pytest.mark.parametrize("p", [2, np.inf])
def test_gradients_equal_finite_differences(p):
    with jax.enable_x64(True):
        layers, apply = mlp(np.random.default_rng(0), 30, 20, 15, 3)
        rng = np.random.default_rng(1)
        centre = jnp.asarray(rng.normal(size=30))
        direction = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), layers)

        def objective(t, eps):
            moved = jax.tree.map(lambda w, d: w + t * d, layers, direction)
            transform = bj.estimate(
                functools.partial(apply, layers=moved), jax.random.key(0), projections=7
            )
            bounds = transform(bj.LpBall(centre, eps, p=p))
            return bounds.lower_estimate.sum() - 2.0 * bounds.upper_estimate.sum()

        run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))
        at = np.array([0.0, 0.1])
        for k, ours in enumerate(run(*at)[1]):
            h = 1e-7 * np.eye(2)[k]
            ahead, behind = run(*(at + h))[0], run(*(at - h))[0]
            np.testing.assert_allclose(ours, (ahead - behind) / 2e-7, rtol=1e-4)


@pytest.mark.parametrize("p", [2, np.inf])
def test_gradients_at_radius_zero_are_finite(large, p):
    layers, apply = large
    centre = ball_of().center

    def objective(layers, eps):
        transform = bj.estimate(functools.partial(apply, layers=layers), jax.random.key(0))
        return transform(bj.LpBall(centre, eps, p=p)).lower_estimate.sum()

    gradients = jax.jit(jax.grad(objective, argnums=(0, 1)))(layers, 0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


# --- what it is not -------------------------------------------------------------------------------


def test_an_estimate_does_not_pass_for_bounds(large):
    layers, apply = large
    estimates = bj.estimate(functools.partial(apply, layers=layers), jax.random.key(0))
    bounds = jax.jit(estimates)(ball_of())
    assert isinstance(bounds, bj.Estimate)
    assert not isinstance(bounds, bj.Interval)
    for name in ("lower", "upper", "width", "middle"):
        assert not hasattr(bounds, name)
    assert bounds.lower_estimate.dtype == jnp.float32


def test_nan_stays_nan(large):
    layers, apply = large
    layers = jax.tree.map(lambda w: w, layers)
    layers[0]["kernel"] = layers[0]["kernel"].at[:, 0].set(jnp.nan)
    estimates = bj.estimate(functools.partial(apply, layers=layers), jax.random.key(0))
    bounds = jax.jit(estimates)(ball_of())
    assert np.isnan(bounds.lower_estimate).all()
    assert np.isnan(bounds.upper_estimate).all()


def test_outputs_keep_their_tree():
    box = bj.Box(-jnp.ones(3), jnp.ones(3))
    result = bj.estimate(
        lambda x: {"a": jax.nn.relu(x), "b": (x.sum(), jnp.ones(2), x > 2)}, jax.random.key(0)
    )(box)
    np.testing.assert_allclose(result["a"].upper_estimate, 1.0)
    total, constant, predicate = result["b"]
    np.testing.assert_allclose(total.lower_estimate, -3.0)
    np.testing.assert_allclose(constant.upper_estimate, 1.0)
    assert not predicate.upper_estimate.any()


def test_options_that_make_no_sense_are_errors():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="projections must be at least 1, got 0"):
        bj.estimate(jax.nn.relu, key, projections=0)
    with pytest.raises(ValueError, match=r"need a box, p=inf or p=2, got LpBall\(p=1\)"):
        bj.estimate(jax.nn.relu, key)(bj.LpBall(jnp.zeros(2), 0.1, p=1))
    with pytest.raises(ValueError, match="specification must have shape"):
        bj.estimate(jax.nn.relu, key)(bj.Box(jnp.zeros(2), jnp.ones(2)), jnp.ones((1, 3)))
