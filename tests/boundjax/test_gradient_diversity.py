"""GradDiv: measures of how alike the gradients of a random network are, and what they bound."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boundjax.attacks import expected_gradient
from boundjax.training import (
    cross_entropy,
    gradient_directions,
    gradient_diversity_loss,
    loss_increase_bound,
    mean_resultant_length,
)
from boundjax.training.gradient_diversity import (
    MEASURES,
    largest_cosine,
    mean_cosine,
    smooth_largest_cosine,
)

KEY = jax.random.key(0)
# Three gradients with equal cosines c: rho, R_mean, R_DPP, R_kappa at p = 784, R_smoothmax.
GOLDEN = {
    0.0: (0.577350, 0.0, 0.0, 0.865657, math.log(6)),
    0.5: (0.816497, 0.5, math.log(2), 2.447407, 2.291759),
    0.9: (0.966092, 0.9, 3.575551, 14.474125, 2.691759),
}


def with_cosine(c, count, size, batch=2):
    """Gradients `[n, B, size]` whose directions have the cosine `c`, of different lengths."""
    gram = np.full((count, count), c) + (1 - c) * np.eye(count)
    units = np.zeros((count, size))
    units[:, :count] = np.linalg.cholesky(gram)
    lengths = np.linspace(0.5, 3.0, count * batch).reshape(count, batch, 1)
    return jnp.asarray(units[:, None] * lengths, jnp.float32)


@pytest.mark.parametrize("c", GOLDEN)
def test_measures_have_the_golden_values(c):
    rho, mean, dpp, kappa, smooth = GOLDEN[c]
    gradients = with_cosine(c, 3, 784)
    cosines = gradient_directions(gradients).cosines
    np.testing.assert_allclose(mean_resultant_length(cosines), rho, rtol=1e-5)
    expected = {"kappa": kappa, "mean": mean, "dpp": dpp, "max": c, "smoothmax": smooth}
    for measure, value in expected.items():
        result = gradient_diversity_loss(gradients, measure)
        np.testing.assert_allclose(result, value, rtol=2e-5, atol=1e-5)


def test_measures_of_two_gradients_have_the_golden_values():
    gradients = with_cosine(0.5, 2, 3072)
    np.testing.assert_allclose(gradient_diversity_loss(gradients, "dpp"), 0.287682, atol=1e-5)
    np.testing.assert_allclose(gradient_diversity_loss(gradients, "kappa"), 3.463256, rtol=1e-5)


@given(seed=st.integers(0, 2**31 - 1), count=st.integers(2, 5))
def test_the_resultant_length_is_a_function_of_the_mean_cosine(seed, count):
    gradients = jax.random.normal(jax.random.key(seed), (count, 3, 2, 4))
    cosines = gradient_directions(gradients).cosines
    rho = np.asarray(mean_resultant_length(cosines))
    mean = np.asarray(mean_cosine(cosines))
    np.testing.assert_allclose(rho**2, (1 + (count - 1) * mean) / count, atol=1e-5)
    largest = np.asarray(largest_cosine(cosines))
    smooth = np.asarray(smooth_largest_cosine(cosines))
    assert np.all(mean <= largest + 1e-6)
    assert np.all(largest <= smooth)
    assert np.all(smooth <= largest + math.log(count * (count - 1)) + 1e-5)


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients_that_are_alike_or_zero_have_finite_measures(measure):
    alike = jnp.ones((2, 3, 5))
    opposite = jnp.stack([jnp.ones((3, 5)), -jnp.ones((3, 5))])
    zero = jnp.zeros((2, 3, 5))
    for gradients in (alike, opposite, zero):
        value, slope = jax.value_and_grad(gradient_diversity_loss)(gradients, measure)
        assert np.isfinite(value)
        assert np.all(np.isfinite(slope))
    assert gradient_diversity_loss(zero, measure) == 0.0


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.sampled(4)
def test_examples_without_a_direction_are_left_out(measure):
    gradients = jax.random.normal(KEY, (3, 4, 6))
    with_zero = gradients.at[1, 2].set(1e-14)
    kept = gradients[:, jnp.array([0, 1, 3])]
    np.testing.assert_allclose(
        gradient_diversity_loss(with_zero, measure),
        gradient_diversity_loss(kept, measure),
        rtol=1e-5,
        atol=1e-6,
    )
    slope = np.asarray(jax.grad(gradient_diversity_loss)(with_zero, measure))
    assert np.all(slope[:, 2] == 0.0)
    assert np.all(np.isfinite(slope))


def network(weights, x):
    first, second = weights
    return jax.nn.relu(x @ first) @ second


def draws_of(weights, x, keys):
    return [
        [
            w + 0.3 * jax.random.normal(jax.random.fold_in(k, i), w.shape)
            for i, w in enumerate(weights)
        ]
        for k in keys
    ]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.sampled(4)
def test_second_derivatives_reach_the_weights(measure):
    """Finite differences of the regularizer of a ReLU network, whose second derivative is 0."""
    keys = jax.random.split(jax.random.key(1), 3)
    weights = [jax.random.normal(keys[0], (5, 8)), jax.random.normal(keys[1], (8, 3))]
    x, labels = jax.random.normal(keys[2], (4, 5)), jnp.array([0, 1, 2, 0])

    @jax.jit
    def regularizer(weights):
        def gradient(weights):
            return jax.grad(lambda x: cross_entropy(network(weights, x), labels).sum())(x)

        drawn = draws_of(weights, x, jax.random.split(KEY, 3))
        return gradient_diversity_loss(jnp.stack([gradient(w) for w in drawn]), measure)

    slope = jax.jit(jax.grad(regularizer))(weights)
    direction = jax.tree.map(lambda w: w / 10, slope)
    length = 1e-3 / math.sqrt(sum(float(jnp.sum(d**2)) for d in direction))
    ends = [
        regularizer(jax.tree.map(lambda w, d, s=s: w + s * length * d, weights, direction))
        for s in (1, -1)
    ]
    expected = sum(float(jnp.sum(s * d)) for s, d in zip(slope, direction, strict=True))
    assert expected > 0
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * length), expected, rtol=0.05)


@given(
    seed=st.integers(0, 2**31 - 1),
    spread=st.floats(0.0, 3.0, width=32),
    factor=st.floats(0.0, 3.0, width=32),
)
def test_the_corrected_theorem_holds_for_any_length(seed, spread, factor):
    """`||E g|| <= m rho + E | ||g|| - m |`, whatever the norms."""
    keys = jax.random.split(jax.random.key(seed))
    gradients = jax.random.normal(keys[0], (4, 3, 2))
    gradients = gradients * jnp.exp(spread * jax.random.normal(keys[1], (4, 3, 1)))
    increase = np.linalg.norm(np.mean(gradients, axis=0), axis=-1)
    lengths = np.linalg.norm(gradients, axis=-1).mean(0)
    for length in (None, factor * lengths):
        bound = np.asarray(loss_increase_bound(gradients, 1.0, length))
        assert np.all(increase <= bound * (1 + 1e-5))


def test_the_printed_theorem_does_not_hold():
    gradients = jnp.array([[[1.0, 0.0]], [[-0.01, 0.0]]])
    rho = mean_resultant_length(gradient_directions(gradients).cosines)
    assert rho[0] == 0.0  # so that M rho is 0 for every M
    increase = np.linalg.norm(np.mean(gradients, axis=0))
    np.testing.assert_allclose(increase, 0.495, rtol=1e-6)
    np.testing.assert_allclose(loss_increase_bound(gradients, 0.1), [0.0495], rtol=1e-5)


def test_the_bound_is_attained_by_gradients_of_one_length():
    gradients = jax.random.normal(KEY, (5, 3, 4))
    gradients = 2.0 * gradients / jnp.linalg.norm(gradients, axis=-1, keepdims=True)
    increase = 0.1 * np.linalg.norm(np.mean(gradients, axis=0), axis=-1)
    np.testing.assert_allclose(loss_increase_bound(gradients, 0.1), increase, rtol=1e-5)


def test_the_loss_grows_by_the_mean_gradient_to_first_order():
    """(2.2.12): half the step leaves about a quarter of the remainder."""
    keys = jax.random.split(jax.random.key(4), 3)
    weights = [jax.random.normal(keys[0], (5, 8)), jax.random.normal(keys[1], (8, 3))]
    x, labels, draws = jax.random.normal(keys[2], (1, 5)), jnp.array([1]), 6

    def f(x, key):
        first, second = draws_of(weights, x, [key])[0]
        return jnp.tanh(x @ first) @ second

    g = expected_gradient(f, x, labels, key=KEY, draws=draws)
    unit = g / jnp.linalg.norm(g)

    def remainder(alpha):
        def expected_loss(x):
            split = jax.random.split(KEY, draws)
            return np.mean([float(cross_entropy(f(x, k), labels)[0]) for k in split])

        increase = expected_loss(x + alpha * unit) - expected_loss(x)
        return abs(increase - alpha * float(jnp.sum(g * unit)))

    ratio = remainder(0.1) / remainder(0.05)
    assert 3.0 < ratio < 5.5


@pytest.mark.parametrize(
    ("gradients", "measure", "message"),
    [
        (jnp.ones((1, 3, 4)), "mean", r"at least two draws, got shape \(1, 3, 4\)"),
        (jnp.ones(3), "mean", r"at least two draws, got shape \(3,\)"),
        (jnp.ones((2, 3, 4)), "median", "unknown measure 'median': use one of kappa, mean, dpp"),
    ],
)
def test_bad_arguments_are_one_line_errors(gradients, measure, message):
    with pytest.raises(ValueError, match=message) as caught:
        gradient_diversity_loss(gradients, measure)
    assert "\n" not in str(caught.value)
