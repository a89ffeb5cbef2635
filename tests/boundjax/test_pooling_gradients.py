"""Gradients of bounds through every pooling, in every transform: finite, and right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host

import boundjax as bj

X, WEIGHTS, DIRECTION = np.random.default_rng(0).normal(size=(3, 4, 5, 2))


def of_images(pool, *arguments, **options):
    def function(x):
        # Flax divides by an integer here, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return pool(x[None], *arguments, **options)[0]

    return function


def windows(initial, combine, **options):
    return lambda x: jax.lax.reduce_window(
        x, np.asarray(initial, x.dtype), combine, (2, 2, 1), (1, 2, 1), "VALID", **options
    )


POOLINGS = {
    "max": of_images(nn.max_pool, (2, 2), (2, 2)),
    "max, overlapping, padded": of_images(nn.max_pool, (3, 3), (2, 1), "SAME"),
    "max, dilated": windows(-np.inf, jax.lax.max, window_dilation=(2, 1, 1)),
    "max of a dilated image": windows(-np.inf, jax.lax.max, base_dilation=(1, 2, 1)),
    "min": of_images(nn.pooling.min_pool, (2, 2), (2, 1)),
    "min, dilated": windows(np.inf, jax.lax.min, window_dilation=(1, 2, 1)),
    "mean": of_images(nn.avg_pool, (2, 2), (2, 2)),
    "mean, padded": of_images(nn.avg_pool, (3, 2), (1, 2), "SAME"),
    "mean, padding not counted": of_images(
        nn.avg_pool, (3, 2), (1, 2), "SAME", count_include_pad=False
    ),
    "sum, dilated": windows(0.0, jax.lax.add, window_dilation=(2, 1, 1)),
    "global max": lambda x: x.max((0, 1)),
    "global min": lambda x: x.min((0, 1)),
    "global mean": lambda x: x.mean((0, 1)),
    "global log-sum-exp": lambda x: jax.nn.logsumexp(x, axis=(0, 1)),
    "cumulative max": lambda x: jax.lax.cummax(x, axis=1),
}
TRANSFORMS = {
    "interval": bj.interval,
    "crown-ibp": bj.linear,
    "crown": lambda f: bj.linear(f, intermediate="linear"),
    "forward": bj.forward_linear,
    "lipschitz": bj.lipschitz,
    "real": lambda f: bj.linear(f, rounding="real"),
}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.sampled(11)
def test_gradients_in_weights_equal_finite_differences(pooling, transform):
    def function(weights, x):
        return POOLINGS[pooling](jax.nn.relu(x * weights))

    @on_host
    def run(weights, eps):
        def total(weights):
            ball = bj.LpBall(jnp.asarray(X, weights.dtype), eps)
            bounds = TRANSFORMS[transform](lambda x: function(weights, x))(ball)
            bounds = bounds.interval() if isinstance(bounds, bj.BallBox) else bounds
            shares = jnp.cos(jnp.arange(bounds.lower.size)).reshape(bounds.lower.shape)
            return jnp.sum(shares * bounds.lower) + jnp.sum(jnp.square(shares) * bounds.upper)

        return jax.value_and_grad(total)(weights)

    with jax.enable_x64(True):
        for eps in (0.3, 0.01, 0.0):
            _, gradient = run(WEIGHTS, eps)
            assert np.isfinite(gradient).all()
            h = 1e-6 * DIRECTION
            change = (run(WEIGHTS + h, eps)[0] - run(WEIGHTS - h, eps)[0]) / 2e-6
            np.testing.assert_allclose(np.vdot(gradient, DIRECTION), change, rtol=1e-4, atol=1e-4)
