"""The two lines of every elementwise op, alone and inside `f(x) - c x`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host
from networks import METHODS

import boundjax as bj

SCALARS = {
    "relu": jax.nn.relu,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.1),
    "leaky_relu_convex_falling": lambda x: jax.nn.leaky_relu(x, -0.5),
    "leaky_relu_concave": lambda x: jax.nn.leaky_relu(x, 1.5),
    "relu6": jax.nn.relu6,
    "clip": lambda x: jnp.clip(x, -0.5, 0.7),
    "clip_to_a_point": lambda x: jnp.clip(x, 0.25, 0.25),
    "abs": jnp.abs,
    "maximum": lambda x: jnp.maximum(x, -0.3),
    "minimum": lambda x: jnp.minimum(0.4, x),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
}


def scalar_intervals() -> tuple[np.ndarray, np.ndarray]:
    """Intervals of all magnitudes, with and without a kink inside, at an end, and without width."""
    shapes = np.array(
        [
            *[(-1, 1), (0, 1), (-1, 0), (1, 1), (-1, -1), (1, 2), (-2, -1)],
            *[(-1, 1e-3), (-1e-3, 1), (-1, 2), (-2, 1), (0.5, 0.5 + 1e-7)],
        ]
    )
    scaled = [10.0**k * shapes for k in (-6, -3, -1, 0, 1, 3)]
    # The kinks of relu6 and clip, and the far tails of sigmoid.
    kinks = [[(5, 7), (6, 7), (6, 6), (-0.5, 0.7), (-0.5, -0.5), (0.2, 0.7), (-9, 0.7), (0.6, 9)]]
    thin = [[(c, c + w) for c in (-90, -30, -3, 0.7, 3, 30) for w in (1e-9, 1e-6, 1e-3)]]
    return np.concatenate([*scaled, *kinks, *thin]).astype(np.float64).T


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *[
            (m, np.float64)
            for m in ("interval", "crown-ibp", "fast-lin", "zero", "one", "constant")
        ],
        *[(m, np.float32) for m in ("interval", "crown-ibp")],
    ],
)
@pytest.mark.parametrize("name", SCALARS)
def test_scalar_relaxations_contain_a_dense_grid(name, method, dtype):
    # f(x) - c x: for c != 0 the interval bounds are loose and the lines themselves are seen.
    lower, upper = (
        np.repeat(end[:, None], 5, 1).ravel().astype(dtype) for end in scalar_intervals()
    )
    slopes = np.tile(np.array([-1.0, -0.3, 0.0, 0.5, 2.0], dtype), lower.size // 5)
    share = np.linspace(0, 1, 401)[:, None]
    grid = np.clip(lower + share * (upper - lower), lower, upper).astype(dtype)

    with jax.enable_x64(dtype == np.float64):
        c = jnp.asarray(slopes)

        def function(x):
            return SCALARS[name](x) - c * x

        transform = METHODS[method](function)

        @on_host
        def run(lower, upper, grid):
            # A gradient must exist, at kinks too.
            gradient = jax.grad(
                lambda ends: sum(end.sum() for end in transform(bj.Box(*ends))),
            )((lower, upper))
            return transform(bj.Box(lower, upper)), gradient, jax.vmap(function)(grid)

        bounds, gradient, values = run(lower, upper, grid)

    relative = 1e-14 if dtype == np.float64 else 5e-6
    slack = relative * (1 + (1 + np.abs(slopes)) * np.maximum(np.abs(lower), np.abs(upper)))
    for gap in (values.min(0) - bounds.lower, bounds.upper - values.max(0)):
        worst = np.argmin(gap / slack)
        case = f"[{lower[worst]}, {upper[worst]}], c = {slopes[worst]}: {gap[worst]}"
        assert (gap >= -slack).all(), case
    degenerate = lower == upper
    assert (bounds.width[degenerate] <= 4 * slack[degenerate]).all()
    assert all(np.isfinite(end).all() for end in gradient)
