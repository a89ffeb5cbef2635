"""Compiled bounds and values of the networks, shared by all tests of a worker."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from networks import METHODS, NETWORKS, Network, ascend, pairs

import boundjax as bj

SEEDS = st.integers(0, 2**32 - 1)
BY_NAME = {network.name: network for network in NETWORKS}
RELATIVE_SLACK = {np.float32: 1e-5, np.float64: 1e-12}


def each_network(*names: str):
    """`name`s of networks; one worker compiles all of a network's functions and shares them."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in names]
    )


def each_pair(*methods: str, only: tuple[str, ...] = (), but: tuple[str, ...] = ()):
    """Networks (`only` those, if any are named) with the methods each is bounded with.

    One worker compiles all of a network's functions and shares them.
    """
    return pytest.mark.parametrize(
        ("network", "method"),
        [
            pytest.param(n, m, marks=pytest.mark.xdist_group(n.name), id=f"{n.name}-{m}")
            for n, m in pairs(*methods)
            if n.name not in but and (not only or n.name in only)
        ],
    )


# Networks whose relaxations take long to compile: one precision and one walk have to do.
SLOW = ("lstm", "cosine", "quotients", "saturating", "soft", "growing", "powers", "roots", "waves")


def flat_interval(tree) -> bj.Interval:
    """A pytree of intervals as one interval of vectors `[m]`."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, bj.Interval))
    return bj.Interval(
        jnp.concatenate([jnp.ravel(leaf.lower) for leaf in leaves]),
        jnp.concatenate([jnp.ravel(leaf.upper) for leaf in leaves]),
    )


@functools.cache
def bounds_function(network: Network, method: str):
    """`(weights, lower, upper) -> Interval [m]`, compiled once per network, method and dtype."""

    def bounds(weights, lower, upper):
        transform = METHODS[method](functools.partial(network.apply, weights))
        return flat_interval(transform(bj.Box(lower, upper)))

    return on_host(bounds)


# For what depends on the last digits: the code generator that users have, see `conftest`.
AS_USERS_HAVE_IT = (
    {"xla_cpu_use_fusion_emitters": True}
    if "xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")
    else None
)


def on_host(function, compiler_options=None):
    """`function` compiled, its results as numpy arrays: those broadcast, JAX's here must not."""
    compiled = jax.jit(function, compiler_options=compiler_options)
    return lambda *arguments: jax.device_get(compiled(*arguments))


@functools.cache
def values_function(network: Network):
    return on_host(jax.vmap(network.flat, in_axes=(None, 0)))


@functools.cache
def attack_function(network: Network):
    return jax.jit(ascend(network))


def radii(rng: np.random.Generator, shape: tuple[int, ...]):
    """Degenerate, tiny, usual, partly fixed, wide and huge boxes."""
    yield np.zeros(shape)
    yield np.full(shape, 1e-6)
    yield rng.uniform(0, 0.1, size=shape)
    yield rng.uniform(0, 0.5, size=shape) * (rng.uniform(size=shape) < 0.5)
    yield rng.uniform(0, 2.0, size=shape)
    yield np.full(shape, 1e3)


def random_box(network: Network, seed: int, scale: float):
    """Random float64 weights and a random box, as numpy arrays."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=network.input_shape)
    radius = scale * rng.uniform(size=network.input_shape)
    return network.weights(seed, np.float64), centre - radius, centre + radius


def gradients_equal_finite_differences(network: Network, transform) -> None:
    """Of the bounds in the weights, the radius and the centre."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        weights = network.weights(1, np.float64)
        x = jnp.asarray(rng.normal(size=network.input_shape))
        direction = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), weights)
        weight = jnp.asarray(rng.normal(size=2 * network.flat(weights, x).size))

        def objective(t, eps, shift):
            moved = jax.tree.map(lambda w, d: w + t * d, weights, direction)
            bounds = transform(functools.partial(network.apply, moved))(
                bj.LpBall(x + shift, eps, clip=(-2.0, 2.0))
            )
            return weight @ jnp.concatenate(flat_interval(bounds))

        at = (0.0, 0.1, 0.0)
        run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2)))
        for k, ours in enumerate(run(*at)[1]):
            h = 1e-6 * np.eye(3)[k]
            ahead, behind = run(*(at + h))[0], run(*(at - h))[0]
            np.testing.assert_allclose(ours, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)


def bad_weights_certify_nothing(network: Network, run, layer: int, bad: float) -> None:
    """Where the network's own output is no finite number no bound may claim that it is one."""
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 0, 0.1)
        weights[layer]["kernel"] = weights[layer]["kernel"].at[0].set(bad)
        bounds = run(weights, lower, upper)
        outputs = network.flat(weights, (lower + upper) / 2)
    assert not np.isfinite(outputs).all()
    assert not np.isfinite(bounds.lower[np.isnan(outputs) | np.isneginf(outputs)]).any()
    assert not np.isfinite(bounds.upper[np.isnan(outputs) | np.isposinf(outputs)]).any()
