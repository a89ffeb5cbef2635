"""Empty arrays: a maximum, sum or product over no elements is a constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host
from jax import lax

import boundjax as bj

TRANSFORMS = {
    "interval": bj.interval,
    **{
        f"linear-{slopes}": lambda f, slopes=slopes: bj.linear(f, slopes=slopes)
        for slopes in ("adaptive", "parallel", "zero", "one", "constant")
    },
    "crown": lambda f: bj.linear(f, intermediate="linear"),
    "forward-backward": lambda f: bj.linear(f, intermediate="forward"),
    "optimized": lambda f: bj.linear(f, slopes=bj.optimized(steps=2)),
    "forward": bj.forward_linear,
    "forward-constant": lambda f: bj.forward_linear(f, slopes="constant"),
    "lipschitz": bj.lipschitz,
}
# `lipschitz` refuses layers without units, by name.
WITHOUT_L2 = [name for name in TRANSFORMS if name != "lipschitz"]


def pool(x, start, function, padding):
    return lax.reduce_window(x, np.float32(start), function, (2,), (1,), [padding])


# Increasing functions of `[4]`, whose exact bounds are their values at the ends of the box.
NOTHING = {
    "max": lambda x: jnp.max(x[:0], initial=0.3) + x,
    "min": lambda x: jnp.min(x[:0], initial=-0.7) + x,
    "max_over_an_axis": lambda x: jnp.max(x.reshape(2, 2)[:, :0], axis=1, initial=0.5).sum() + x,
    "min_keeps_axes": lambda x: (
        jnp.min(x.reshape(2, 2)[:0], 0, keepdims=True, initial=2.0)[0, 0] + x
    ),
    "max_of_no_rows": lambda x: jnp.concatenate([jnp.max(x[:0].reshape(0, 2), axis=1), x]),
    "max_of_nothing_over_nothing": lambda x: jnp.concatenate(
        [jnp.max(x[:0].reshape(0, 0), axis=1, initial=1.0), x]
    ),
    "sum": lambda x: jnp.sum(x[:0]) + x,
    "cumulative_sum": lambda x: jnp.concatenate([jnp.cumsum(x[:0]), jnp.cumsum(x)]),
    "larger_of_two": lambda x: jnp.sum(jnp.maximum(x[:0], x[4:])) + x,
    "activations": lambda x: jnp.sum(jax.nn.relu(x[:0]) + jnp.exp(x[4:]) + jax.nn.gelu(x[:0])) + x,
    "concatenate": lambda x: jnp.concatenate([x[:0], jax.nn.relu(x), x[4:]]),
    "split": lambda x: jnp.concatenate(jnp.split(x, [0, 2])),
    "update": lambda x: x.at[jnp.zeros(0, jnp.int32)].set(x[:0]),
    "gather": lambda x: jnp.sum(x[jnp.zeros(0, jnp.int32)]) + x,
    "pad": lambda x: jnp.pad(x[:0], 2, constant_values=0.4) + x,
    "pool_of_padding": lambda x: jnp.maximum(pool(x[:0], -jnp.inf, lax.max, (2, 3)), -5.0) + x,
    "least_of_padding": lambda x: jnp.minimum(pool(x[:0], jnp.inf, lax.min, (2, 3)), 5.0) + x,
    "mean_of_padding": lambda x: pool(x[:0], 0.0, lax.add, (2, 3)) + x,
    "dot": lambda x: jnp.dot(x[:0], x[4:]) + x,
    "product": lambda x: (x[:0].reshape(2, 0) @ x[:0].reshape(0, 2)).sum() + x,
    "softmax": lambda x: jnp.sum(jax.nn.softmax(x[:0])) + x,
    "softmax_of_no_rows": lambda x: jnp.sum(jax.nn.log_softmax(x[:0].reshape(0, 3))) + x,
    "logsumexp_of_no_rows": lambda x: jnp.sum(jax.nn.logsumexp(x[:0].reshape(0, 3), axis=1)) + x,
    "logsumexp": lambda x: jnp.maximum(jax.nn.logsumexp(x[:0]), -9.0) + x,
    "selection": lambda x: jnp.sum(jnp.where(x[:0] > 0, x[:0], 1.0)) + x,
    "any": lambda x: jnp.where(jnp.any(x[:0] > 0), -x, x),
    "all": lambda x: jnp.where(jnp.all(x[:0] > 0), x, -x),
    "norm": lambda x: jnp.linalg.norm(x[:0]) + x,
}
LAYERS = {
    "dense_of_nothing": lambda x: x[:0] @ jnp.zeros((0, 4)) + jax.nn.relu(x),
    "dense_without_units": lambda x: jax.nn.relu(x @ jnp.zeros((4, 0))) @ jnp.zeros((0, 4)) + x,
    "dense_of_no_rows": lambda x: jnp.sum(x[:0].reshape(0, 2) @ jnp.ones((2, 3))) + x,
    "no_rows_of_nothing": lambda x: jnp.sum(x[:0].reshape(0, 0) @ jnp.ones((0, 3))) + x,
    "units_beside_none": lambda x: jnp.concatenate([x @ jnp.zeros((4, 0)), x]),
    "convolution_without_channels": lambda x: (
        jnp.sum(lax.conv_general_dilated(x.reshape(1, 1, 4), jnp.ones((0, 1, 2)), (1,), "VALID"))
        + x
    ),
    "convolution_of_no_channels": lambda x: (
        jnp.sum(
            lax.conv_general_dilated(x[:0].reshape(1, 0, 4), jnp.ones((2, 0, 2)), (1,), "VALID")
        )
        + x
    ),
}


@pytest.mark.parametrize(
    ("function", "transforms"),
    [
        *[pytest.param(f, TRANSFORMS, id=name) for name, f in NOTHING.items()],
        *[pytest.param(f, WITHOUT_L2, id=name) for name, f in LAYERS.items()],
    ],
)
@pytest.mark.sampled(4)
def test_bounds_of_functions_of_nothing_are_exact(function, transforms):
    lower, upper = jnp.float32([-1.0, 0.05, 0.3, -0.2]), jnp.float32([1.0, 0.15, 0.9, -0.1])
    exact = on_host(jax.vmap(function))(jnp.stack([lower, upper]))

    @on_host
    def run(lower, upper):
        box = bj.Box(lower, upper)
        return {name: TRANSFORMS[name](function)(box) for name in transforms}

    for transform, bounds in run(lower, upper).items():
        ends = np.stack([bounds.lower, bounds.upper])
        np.testing.assert_allclose(ends, exact, atol=1e-6, err_msg=transform)


def test_the_mean_of_nothing_is_no_number():
    box = bj.Box(-jnp.ones(3), jnp.ones(3))
    for name in WITHOUT_L2:
        bounds = TRANSFORMS[name](lambda x: jnp.mean(x[:0]) + x)(box)
        assert np.isnan(bounds.lower).all(), name
        assert np.isnan(bounds.upper).all(), name


def test_layers_without_units_have_no_l2_bounds():
    box = bj.Box(-jnp.ones(4), jnp.ones(4))
    for name in ("dense_of_nothing", "dense_without_units", "convolution_of_no_channels"):
        with pytest.raises(ValueError, match=r"layer without units.*test_empty\.py"):
            bj.lipschitz(LAYERS[name])(box)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_L2)
def test_windows_of_nothing_but_padding_have_their_own_value(name):
    """The maximum of no numbers is -inf; a later maximum makes it a bound with a gradient."""
    lower, upper = jnp.float32([-1.0, 0.05, 0.3, -0.2]), jnp.float32([1.0, 0.15, 0.9, -0.1])

    def padded(sign, scale=1.0):
        start, function = (-jnp.inf, lax.max) if sign > 0 else (jnp.inf, lax.min)
        return lambda x: pool(scale * x, start, function, (3, 3))

    for sign in (1, -1):
        bounds = TRANSFORMS[name](padded(sign))(bj.Box(lower, upper))
        ends = np.stack([bounds.lower, bounds.upper])
        exact = jax.vmap(padded(sign))(jnp.stack([lower, upper]))
        np.testing.assert_array_equal(ends[:, [0, 1, 7, 8]], np.full((2, 4), -sign * np.inf))
        np.testing.assert_allclose(ends, exact, atol=1e-6)

    if name == "optimized":  # its gradient holds the slopes fixed
        return

    def total(scale):
        bounds = TRANSFORMS[name](lambda x: jnp.maximum(padded(1, scale)(x), -5.0))(
            bj.Box(lower, upper)
        )
        return bounds.lower.sum() + 2.0 * bounds.upper.sum()

    scale = jnp.float32([1.0, 2.0, 3.0, 1.5])
    gradient = jax.grad(total)(scale)
    ahead, behind = (total(scale + sign * 1e-2) for sign in (1.0, -1.0))
    np.testing.assert_allclose(gradient.sum(), (ahead - behind) / 2e-2, rtol=1e-3)
