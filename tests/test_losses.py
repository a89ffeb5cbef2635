import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from boundjax.training import cross_entropy, mixed_objective, robust_cross_entropy


def _logits(batch=7, classes=5):
    return 3.0 * jax.random.normal(jax.random.key(1), (batch, classes))


def _margins(logits, labels):
    """`z_y - z_m` over the other classes, in plain numpy."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    return np.array(
        [
            [z[y] - z[m] for m in range(len(z)) if m != y]
            for z, y in zip(logits, labels, strict=True)
        ]
    )


def test_cross_entropy_is_its_definition():
    logits, labels = _logits(), jnp.arange(7, dtype=jnp.int32) % 5
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(probabilities[np.arange(7), labels])
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-5)


def test_robust_cross_entropy_is_its_definition():
    margins = _logits()
    expected = np.log1p(np.exp(-np.asarray(margins)).sum(-1))
    np.testing.assert_allclose(robust_cross_entropy(margins), expected, rtol=1e-5)


def test_exact_margins_give_the_natural_loss():
    logits, labels = _logits(), jnp.arange(7, dtype=jnp.int32) % 5
    margins = jnp.asarray(_margins(logits, labels))
    np.testing.assert_allclose(
        robust_cross_entropy(margins), cross_entropy(logits, labels), rtol=1e-5
    )


def test_lower_margins_never_lower_the_loss():
    margins = _logits()
    for shift in (0.0, 0.1, 10.0):
        assert np.all(robust_cross_entropy(margins - shift) >= robust_cross_entropy(margins))


def test_extreme_margins():
    margins = jnp.array([[1e30, jnp.inf], [-1e30, 0.0], [-jnp.inf, 0.0], [jnp.nan, 1.0]])
    loss = np.asarray(robust_cross_entropy(margins))
    assert loss[0] == 0.0
    assert loss[1] == np.float32(1e30)
    assert loss[2] == np.inf
    assert np.isnan(loss[3])


@pytest.mark.parametrize(
    ("kappa", "beta"), list(itertools.product((0.0, 0.3, 1.0), (0.0, 0.6, 1.0)))
)
def test_mixed_objective_is_its_definition(kappa, beta):
    logits, labels = _logits(), jnp.arange(7, dtype=jnp.int32) % 5
    interval = _logits(7, 4) - 1.0
    linear = _logits(7, 4) + 0.5
    mixed = (1 - beta) * np.asarray(interval) + beta * np.asarray(linear)
    natural = np.mean(cross_entropy(logits, labels))
    expected = kappa * natural + (1 - kappa) * np.mean(np.log1p(np.exp(-mixed).sum(-1)))
    got = mixed_objective(logits, labels, interval, linear, kappa, beta)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    traced = jax.jit(mixed_objective)(
        logits, labels, interval, linear, jnp.float32(kappa), jnp.float32(beta)
    )
    np.testing.assert_allclose(traced, expected, rtol=1e-5)


def test_gradient_of_the_objective_is_finite_at_extremes():
    labels = jnp.zeros(2, jnp.int32)
    margins = jnp.array([[1e4, -1e4], [0.0, 0.0]])

    def loss(scale):
        return mixed_objective(scale * jnp.ones((2, 3)), labels, scale * margins, margins, 0.5, 0.5)

    assert np.isfinite(jax.grad(loss)(jnp.float32(1.0)))


def test_wrong_shapes_are_errors():
    logits, labels = _logits(), jnp.zeros(7, jnp.int32)
    with pytest.raises(ValueError, match=r"logits \[\.\.\., C\] and labels \[\.\.\.\] must agree"):
        cross_entropy(logits, labels[:3])
    with pytest.raises(ValueError, match=r"one shape"):
        mixed_objective(logits, labels, jnp.zeros((7, 4)), jnp.zeros((7, 5)), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"margins \[B, C - 1\] and labels \[B\] must agree"):
        mixed_objective(logits, labels, jnp.zeros((6, 4)), jnp.zeros((6, 4)), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"scalar"):
        robust_cross_entropy(jnp.float32(1.0))
