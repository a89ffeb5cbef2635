"""Forward linear bounds: the definition, soundness on every network, and other methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import (
    BY_NAME,
    RELATIVE_SLACK,
    SEEDS,
    SLOW,
    attack_function,
    bad_weights_certify_nothing,
    bounds_function,
    each_network,
    flat_interval,
    gradients_equal_finite_differences,
    on_host,
    radii,
    random_box,
    values_function,
)
from hypothesis import given
from network import affine, dense
from networks import NETWORKS, Network, ball_points, points

import boundjax as bj

TRANSFORMS = {
    "forward": bj.forward_linear,
    "forward-parallel": lambda f: bj.forward_linear(f, slopes="parallel"),
    "forward-constant": lambda f: bj.forward_linear(f, slopes="constant"),
    "forward-backward": lambda f: bj.linear(f, intermediate="forward"),
}


VARIANTS = ("forward-parallel", "forward-constant", "forward-backward")


def grouped(network, *others):
    """Parameters of a test; one worker runs all tests of a network."""
    marks = pytest.mark.xdist_group(network)
    return pytest.param(network, *others, marks=marks, id="-".join([network, *others]))


@functools.cache
def transformed(network: Network, name: str):
    @on_host
    def run(weights, lower, upper):
        transform = TRANSFORMS[name](functools.partial(network.apply, weights))
        return flat_interval(transform(bj.Box(lower, upper)))

    return run


def check_network(network: Network, name: str, seed: int, dtype) -> None:
    rng = np.random.default_rng(seed)
    weights = network.weights(seed, dtype)
    centre = rng.normal(size=network.input_shape)
    for radius in radii(rng, network.input_shape):
        lower, upper = (centre - radius).astype(dtype), (centre + radius).astype(dtype)
        box = jnp.asarray(lower), jnp.asarray(upper)
        bounds = transformed(network, name)(weights, *box)
        interval = bounds_function(network, "interval")(weights, *box)
        inputs = jnp.concatenate(
            [jnp.asarray(points(rng, lower, upper)), attack_function(network)(weights, *box)]
        )
        outputs = values_function(network)(weights, inputs)

        magnitude = max(1.0, np.abs(box).max(), *(np.abs(end).max() for end in interval))
        slack = RELATIVE_SLACK[dtype] * magnitude
        assert bounds.lower.dtype == dtype
        assert np.isfinite(bounds.lower).all()
        assert np.isfinite(bounds.upper).all()
        assert (outputs >= bounds.lower - slack).all(), f"radius {radius.max()}"
        assert (outputs <= bounds.upper + slack).all(), f"radius {radius.max()}"
        assert (bounds.lower >= interval.lower - slack).all()
        assert (bounds.upper <= interval.upper + slack).all()
        if not radius.any():
            assert (bounds.width <= 4 * slack).all()  # smooth lines are moved outward


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(n, marks=pytest.mark.xdist_group(n.name), id=n.name)
        for n in NETWORKS
        if n.name not in SLOW
    ],
)
@given(seed=SEEDS)
@pytest.mark.sampled(7)
def test_bounds_contain_samples_and_attacks(network, seed):
    with jax.enable_x64(True):
        check_network(network, "forward", seed, np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", [grouped(n) for n in ("mlp", "residual", "smooth", "gated")])
@given(seed=SEEDS)
def test_bounds_contain_samples_and_attacks_in_float32(name, seed):
    check_network(BY_NAME[name], "forward", seed, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "name"),
    [
        *[grouped(n, v) for n in ("mlp", "residual", "smooth") for v in VARIANTS],
        grouped("pooling", "forward-backward"),  # windows have no slopes
    ],
)
@given(seed=SEEDS)
def test_variants_contain_samples_and_attacks(network, name, seed):
    with jax.enable_x64(True):
        check_network(BY_NAME[network], name, seed, np.float64)


# --- against the definition -----------------------------------------------------------------------


def dense_forward(layers, lower, upper, slope_of):
    """Forward linear bounds of a ReLU network in plain NumPy: pre-activations, output functions."""
    middle, radius = (lower + upper) / 2, (upper - lower) / 2
    below = above = (np.eye(lower.size), np.zeros(lower.size))  # rows [unit, input], bias
    interval, bounds = (lower, upper), []
    for k, layer in enumerate(layers):
        weights, bias = np.asarray(layer["kernel"]).T, np.asarray(layer["bias"])
        positive, negative = np.maximum(weights, 0), np.minimum(weights, 0)
        below, above = (
            tuple(positive @ a + negative @ b for a, b in zip(own, other, strict=True))
            for own, other in ((below, above), (above, below))
        )
        below, above = (below[0], below[1] + bias), (above[0], above[1] + bias)
        low = below[0] @ middle + below[1] - np.abs(below[0]) @ radius
        high = above[0] @ middle + above[1] + np.abs(above[0]) @ radius
        by_interval = [
            positive @ a + negative @ b + bias for a, b in (interval, (interval[1], interval[0]))
        ]
        low, high = np.maximum(low, by_interval[0]), np.minimum(high, by_interval[1])
        bounds.append((low, high))
        if k < len(layers) - 1:
            chord = np.where(low >= 0, 1.0, np.where(high <= 0, 0.0, high / (high - low)))
            free = np.where(low >= 0, 1.0, np.where(high <= 0, 0.0, slope_of(low, high)))
            unstable = (low < 0) & (high > 0)
            below = free[:, None] * below[0], free * below[1]
            above = chord[:, None] * above[0], chord * above[1] - np.where(unstable, chord * low, 0)
            interval = np.maximum(low, 0), np.maximum(high, 0)
    return bounds, below, above


@given(seed=SEEDS)
def test_bounds_of_an_mlp_equal_the_definition(seed):
    with jax.enable_x64(True):
        network = BY_NAME["mlp"]
        weights, lower, upper = random_box(network, seed, 0.7)
        expected, below, above = dense_forward(weights, lower, upper, lambda low, high: high > -low)
        bounds, (functions, pre) = aux_of_mlp()(weights, lower, upper)
        for ours, theirs in zip(bounds, expected[-1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
        for ours, theirs in zip(functions, (*below, *above), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
        # intermediate="forward" uses the same pre-activations.
        for ours, theirs in zip(pre.values(), expected[:-1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@functools.cache
def aux_of_mlp():
    @on_host
    def run(weights, lower, upper):
        apply, box = functools.partial(BY_NAME["mlp"].apply, weights), bj.Box(lower, upper)
        bounds, functions = bj.forward_linear(apply, has_aux=True)(box)
        _, aux = bj.linear(apply, intermediate="forward", has_aux=True)(box)
        return bounds, (functions, aux.pre_activations)

    return run


# The choice of the slopes does not depend on the ball, which matters only after them.
@pytest.mark.parametrize(
    ("slopes", "orders"), [("adaptive", (1, 2, np.inf)), ("parallel", (2,)), ("zero", (np.inf,))]
)
@pytest.mark.sampled(4)
def test_one_hidden_layer_equals_the_backward_walk(slopes, orders):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        layers = jax.tree.map(jnp.asarray, [dense(rng, 4, 9), dense(rng, 9, 3)])
        specification = jnp.asarray(rng.normal(size=(5, 3)))

        def apply(x):
            return affine(layers[1], jax.nn.relu(affine(layers[0], x)))

        # After one affine layer, intermediate linear bounds are the same, too.
        transforms = (
            bj.forward_linear(apply, slopes=slopes, has_aux=True),
            bj.linear(apply, slopes=slopes, intermediate="linear", has_aux=True),
        )

        @on_host
        def run(ball, rows):
            return [[f(ball, chosen) for f in transforms] for chosen in (None, rows)]

        for p in orders:
            ball = bj.LpBall(jnp.asarray(rng.normal(size=4)), 0.7, p=p)
            for (forward, functions), (backward, aux) in run(ball, specification):
                for ours, theirs in zip(forward, backward, strict=True):
                    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
                for ours, theirs in zip(functions, aux.coefficients, strict=True):
                    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_affine_functions_are_exact():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)

    def apply(x):
        y = (x @ kernel)[jnp.array([0, 3, 3])] - 2.0 * x
        return jnp.concatenate([y, jnp.ones(2)]) / -4.0

    centre = jnp.array([1.0, -2.0, 0.5])
    transform = jax.jit(bj.forward_linear(apply, has_aux=True))
    bounds, functions = transform(bj.LpBall(centre, 0.5, p=2))
    matrix = jax.jacobian(apply)(centre)
    np.testing.assert_allclose(functions.lower_coefficients, matrix, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(functions.lower_coefficients, functions.upper_coefficients)
    reach = 0.5 * jnp.linalg.norm(matrix, axis=1)
    np.testing.assert_allclose(bounds.upper, apply(centre) + reach, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bounds.lower, apply(centre) - reach, rtol=1e-5, atol=1e-6)


# --- specifications, other sets -------------------------------------------------------------------


@pytest.mark.parametrize("name", [grouped(n) for n in ("mlp", "residual", "smooth", "clipped")])
@given(seed=SEEDS)
@pytest.mark.sampled(4)
def test_linear_functions_and_specifications_contain_samples(name, seed):
    network = BY_NAME[name]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, seed, 0.5)
        inputs = points(np.random.default_rng(seed), lower, upper)
        values = values_function(network)(weights, jnp.asarray(inputs))
        rows = np.random.default_rng(seed).normal(size=(4, values.shape[1]))
        for specification, outputs in ((None, values), (rows, values @ rows.T)):
            bounds, functions = specified(network)(weights, lower, upper, specification)
            flat = inputs.reshape(len(inputs), -1).T
            below, above = (
                (c.reshape(len(c), -1) @ flat + b[:, None]).T
                for c, b in (functions[:2], functions[2:])
            )
            assert (outputs >= below - 1e-10).all()
            assert (outputs <= above + 1e-10).all()
            assert (outputs >= bounds.lower - 1e-10).all()
            assert (outputs <= bounds.upper + 1e-10).all()


@functools.cache
def specified(network: Network):
    @on_host
    def run(weights, lower, upper, specification):
        transform = bj.forward_linear(functools.partial(network.flat, weights), has_aux=True)
        return transform(bj.Box(lower, upper), specification)

    return run


@given(seed=SEEDS)
def test_a_specification_is_merged_with_the_last_layer(seed):
    with jax.enable_x64(True):
        network = BY_NAME["mlp"]
        weights, lower, upper = random_box(network, seed, 0.5)
        rows = np.random.default_rng(seed).normal(size=(4, 3))
        merged, _ = specified(network)(weights, lower, upper, rows)
        ends, _ = specified(network)(weights, lower, upper, None)
        apart = np.maximum(rows, 0) @ ends.lower + np.minimum(rows, 0) @ ends.upper
        assert (merged.lower >= apart - 1e-10).all()
        last = {k: v @ rows.T for k, v in weights[-1].items()}
        by_hand = transformed(network, "forward")([*weights[:-1], last], lower, upper)
        for ours, theirs in zip(merged, by_hand, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_specification_of_a_constant_output():
    ones = jnp.ones((2, 3))
    bounds = bj.forward_linear(lambda x: jnp.arange(3.0))(bj.Box(-jnp.ones(2), jnp.ones(2)), ones)
    np.testing.assert_allclose(bounds.lower, 3.0)
    np.testing.assert_allclose(bounds.upper, 3.0)


@pytest.mark.parametrize("p", [1, 2])
@given(seed=SEEDS)
def test_bounds_over_other_norms_contain_samples(p, seed):
    network = BY_NAME["mlp"]
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        weights, centre = network.weights(seed, np.float64), rng.normal(size=3)
        eps = rng.uniform(0, 0.8, size=3)
        bounds = over_balls(p)(weights, jnp.asarray(centre), jnp.asarray(eps))
        inputs = ball_points(rng, centre, eps, p, (-1.5, 1.5))
        outputs = values_function(network)(weights, jnp.asarray(inputs))
    assert (outputs >= bounds.lower - 1e-12).all()
    assert (outputs <= bounds.upper + 1e-12).all()


@functools.cache
def over_balls(p: float):
    @on_host
    def run(weights, centre, eps):
        transform = bj.forward_linear(functools.partial(BY_NAME["mlp"].apply, weights))
        return transform(bj.LpBall(centre, eps, p=p, clip=(-1.5, 1.5)))

    return run


def test_fill_values_and_masks_are_no_coefficients():
    """A fill value or a mask is an offset: -1e38 plus a coefficient would lose all its digits."""

    def filled(x):
        return jnp.take(x, jnp.array([0, 7, 1]), mode="fill", fill_value=5.0)

    def masked(x):
        return x + jnp.array([0.0, -1e38, 0.0]), jnp.where(jnp.arange(3) > 1, x, -jnp.inf)

    box = bj.Box(jnp.array([-1.0, 2.0, 3.0]), jnp.array([1.0, 4.0, 7.0]))
    bounds, functions = bj.forward_linear(filled, has_aux=True)(box)
    np.testing.assert_allclose(bounds.lower, [-1.0, 5.0, 2.0])
    np.testing.assert_allclose(bounds.upper, [1.0, 5.0, 4.0])
    np.testing.assert_allclose(functions.lower_coefficients, [[1, 0, 0], [0, 0, 0], [0, 1, 0]])
    shifted, chosen = bj.forward_linear(masked)(box)
    np.testing.assert_allclose(shifted.upper, [1.0, -1e38, 7.0], rtol=1e-6)
    np.testing.assert_allclose(chosen.lower, [-np.inf, -np.inf, 3.0])


def test_infinite_lines_leave_interval_bounds():
    """The logarithm reaches -inf on [0, 4]; later ops fall back to interval bounds."""
    box = bj.Box(jnp.array([0.0, 1.0]), jnp.array([4.0, 2.0]))

    def apply(x):
        return jnp.exp(0.5 * jax.nn.relu(x)), jnp.maximum(jnp.log(x), -1.0)

    with pytest.warns(bj.ops.domain.DomainWarning, match="'log'"):
        powers, logs = bj.forward_linear(apply)(box)
    np.testing.assert_allclose(powers.upper, jnp.exp(0.5 * box.upper), rtol=1e-4)
    assert (logs.lower >= -1.0 - 1e-5).all()
    assert np.isfinite(logs.upper).all()


# --- numbers that are not numbers, gradients, transforms ------------------------------------------


@pytest.mark.parametrize(
    "name",
    [grouped(n) for n in ("mlp", "cnn", "pooling", "clipped", "smooth", "structure", "rare")],
)
def test_nan_inputs_give_no_bound(name):
    network = BY_NAME[name]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 0, 0.1)
        bounds = transformed(network, "forward")(weights, lower * jnp.nan, upper)
    assert not np.isfinite(bounds.lower).any()
    assert not np.isfinite(bounds.upper).any()


@pytest.mark.xdist_group("mlp")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_weights_that_are_not_finite_certify_nothing(layer, bad, name):
    network = BY_NAME["mlp"]
    bad_weights_certify_nothing(network, transformed(network, name), layer, bad)


@pytest.mark.slow
@each_network("mlp", "clipped", "smooth", "cnn")
def test_gradients_equal_finite_differences(name):
    gradients_equal_finite_differences(BY_NAME[name], bj.forward_linear)


def test_bounds_agree_under_jit_and_vmap():
    network = BY_NAME["cnn"]
    weights = network.weights(0)
    centres = jnp.asarray(
        np.random.default_rng(0).normal(size=(3, *network.input_shape)), jnp.float32
    )

    def bounds(x):
        return bj.forward_linear(functools.partial(network.apply, weights))(bj.LpBall(x, 0.1))

    batched = jax.jit(jax.vmap(bounds))(centres)
    single = jax.jit(bounds)
    for k, centre in enumerate(centres):
        for ours, theirs in zip(batched, single(centre), strict=True):
            np.testing.assert_allclose(ours[k], theirs, rtol=1e-5, atol=1e-5)


# --- options --------------------------------------------------------------------------------------


def test_options_that_make_no_sense_are_errors():
    box = bj.Box(-jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="takes no optimized slopes"):
        bj.forward_linear(jnp.sin, slopes=bj.optimized())
    with pytest.raises(ValueError, match="slopes must be one of"):
        bj.forward_linear(jnp.sin, slopes="steep")
    with pytest.raises(KeyError, match="for no op"):
        bj.forward_linear(jax.nn.relu, slopes={"tanh": jnp.zeros(2)})(box)
    with pytest.raises(ValueError, match="one output array"):
        bj.forward_linear(lambda x: (x, x), has_aux=True)(box)
    with pytest.raises(ValueError, match="specification must have shape"):
        bj.forward_linear(jax.nn.relu)(box, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="intermediate must be one of interval, linear, forward"):
        bj.linear(jax.nn.relu, intermediate="backward")
