import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host

import boundjax as bj
from boundjax.training import (
    cross_entropy,
    fused_robust_cross_entropy,
    margins_of,
    mixed_objective,
    robust_cross_entropy,
)

pytestmark = pytest.mark.quick


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


def test_margins_are_those_of_the_specification():
    logits = _logits()
    for labels in (jnp.arange(7, dtype=jnp.int32) % 5, jnp.full((7,), 4, jnp.int32)):
        rows = np.asarray(bj.margin_specification(labels, 5, rows="others"))
        expected = np.einsum("bmc,bc->bm", rows, np.asarray(logits))
        margins = margins_of(logits, labels)
        np.testing.assert_allclose(margins, expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(np.sort(margins), np.sort(_margins(logits, labels)), rtol=1e-6)
        np.testing.assert_allclose(
            robust_cross_entropy(margins), cross_entropy(logits, labels), rtol=1e-5
        )
    assert margins_of(logits[0], jnp.int32(3)).shape == (4,)


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

    assert np.isfinite(jax.jit(jax.grad(loss))(jnp.float32(1.0)))


def test_wrong_shapes_are_errors():
    logits, labels = _logits(), jnp.zeros(7, jnp.int32)
    with pytest.raises(ValueError, match=r"logits \[\.\.\., C\] and labels \[\.\.\.\] must agree"):
        cross_entropy(logits, labels[:3])
    with pytest.raises(ValueError, match=r"logits \[\.\.\., C\] and labels \[\.\.\.\] must agree"):
        margins_of(logits, labels[:3])
    with pytest.raises(ValueError, match=r"one shape"):
        mixed_objective(logits, labels, jnp.zeros((7, 4)), jnp.zeros((7, 5)), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"margins \[B, C - 1\] and labels \[B\] must agree"):
        mixed_objective(logits, labels, jnp.zeros((6, 4)), jnp.zeros((6, 4)), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"scalar"):
        robust_cross_entropy(jnp.float32(1.0))


# --- loss fusion ----------------------------------------------------------------------------------


def _drawn(seed):
    """A random 6-12-12-4 net, an input and 4096 corners of the unit box."""
    rng = np.random.default_rng(seed)
    layers = [
        (rng.normal(size=(m, n)) / np.sqrt(m), 0.1 * rng.normal(size=n))
        for m, n in itertools.pairwise((6, 12, 12, 4))
    ]
    return layers, rng.normal(size=6), rng.choice([-1.0, 1.0], size=(4096, 6))


@on_host
def _fusion(layers, x, corners, eps):
    """Robust cross-entropy: fused, by rows, by intervals, attacked."""

    def network(x):
        for kernel, bias in layers[:-1]:
            x = jax.nn.relu(x @ kernel + bias)
        return x @ layers[-1][0] + layers[-1][1]

    ball, label = bj.LpBall(x, eps), jnp.argmax(network(x))
    rows = bj.margin_specification(label, 4, dtype=x.dtype)
    intervals = bj.interval(network)(ball, rows)
    linear = bj.linear(network, sides="lower")

    def lower_bound(weights):
        return linear(ball, (weights @ rows)[None]).lower[0]

    logits = jax.vmap(network)(x[None] + eps * corners)
    return (
        fused_robust_cross_entropy(intervals, lower_bound),
        robust_cross_entropy(linear(ball, rows).lower),
        robust_cross_entropy(intervals.lower),
        jnp.max(cross_entropy(logits, jnp.full(4096, label))),
    )


def test_fused_loss_is_sound_and_no_looser_than_intervals():
    with jax.enable_x64(True):
        results = np.array([_fusion(*_drawn(s), eps) for s in range(6) for eps in (0.05, 0.3)])
        fused, rows, intervals, attacked = results.T
        assert (fused >= attacked - 1e-12).all()
        assert (fused <= intervals + 1e-12).all()
        # One row instead of one per class costs tightness on average.
        assert rows.mean() < fused.mean() < intervals.mean()


def test_fused_loss_of_points_is_the_cross_entropy():
    with jax.enable_x64(True):
        fused, rows, _, _ = _fusion(*_drawn(0), 0.0)
        np.testing.assert_allclose(fused, rows, rtol=1e-12)


def test_fused_loss_at_extremes():
    # Margins of +-1e3 neither overflow nor vanish, NaN stays NaN, and gradients are finite.
    def fused(lower, upper):
        margins = bj.Interval(lower, upper)
        return fused_robust_cross_entropy(margins, lambda weights: weights @ lower)

    run = jax.jit(jax.value_and_grad(fused, argnums=(0, 1)))
    for low, high in ((-1e3, 1e3), (-1e3, -1e3), (1e3, 1e3), (-1e-6, 1e-6), (0.0, 0.0)):
        lower, upper = jnp.full((3,), low), jnp.full((3,), high)
        value, gradient = run(lower, upper)
        expected = robust_cross_entropy(lower)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        assert all(np.isfinite(g).all() for g in gradient)
    assert np.isnan(
        fused_robust_cross_entropy(
            bj.Interval(lower.at[0].set(jnp.nan), upper), lambda weights: weights @ lower
        )
    )
