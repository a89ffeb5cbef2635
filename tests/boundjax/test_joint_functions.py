"""Joint ops in whole functions: an attention block, positions, gradients, JAX's transforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host
from joint_nodes import linear_alone, log_softmax, logsumexp, normalize, reciprocal
from networks import points

import boundjax as bj
from boundjax.ops import exponentials


def attention(weights, x, softmax):
    """Two heads over four tokens `[4, 3]`."""
    query, key, value = (jnp.einsum("td,dhk->thk", x, w, precision="highest") for w in weights)
    scores = jnp.einsum("qhd,khd->hqk", query, key, precision="highest")
    shares = softmax(scores)
    return jnp.einsum("hqk,khd->qhd", shares, value, precision="highest").sum((0, 1))


def attention_weights(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(3, 2, 2)), dtype) for _ in range(3)]


def shares(scores):
    # A squashed log-softmax; other tests cover exp.
    return jax.nn.sigmoid(log_softmax(scores))


def sampled_shares(scores):
    return jax.nn.sigmoid(exponentials.log_softmax(scores, (-1,)))


# test_soundness.py covers the network "attention" in float32.
@pytest.mark.slow
def test_an_attention_block():
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        weights = attention_weights(np.float64)
        x = rng.normal(size=(4, 3))

        @on_host
        def run(lower, upper):
            function = functools.partial(attention, weights, softmax=shares)
            box = bj.Box(lower, upper)
            return [
                bj.interval(function)(box),
                linear_alone(function)(box),
                linear_alone(function, intermediate="linear")(box),
                bj.linear(function, slopes=bj.slopes.optimized(1, per_spec=True))(box),
            ]

        values = jax.jit(jax.vmap(lambda x: attention(weights, x, sampled_shares)))
        for eps in (0.0, 1e-3, 0.1, 1.0, 30.0):
            lower, upper = x - eps, x + eps
            outputs = np.asarray(values(jnp.asarray(points(rng, lower, upper))))
            result = run(lower, upper)
            for bounds in result:
                slack = 1e-11 * (1 + np.abs(result[0]).max() + eps**2 * 100)
                assert np.isfinite(bounds.lower).all()
                assert (outputs >= np.asarray(bounds.lower) - slack).all(), eps
                assert (outputs <= np.asarray(bounds.upper) + slack).all(), eps
            if eps == 1e-3:
                interval, crown = result[0], result[2]
                assert crown.width.mean() < 0.8 * interval.width.mean()


def test_positions_given_by_label_are_sound_and_move_the_planes():
    with jax.enable_x64(True):
        weights = attention_weights(np.float64)
        rng = np.random.default_rng(6)
        x = rng.normal(size=(4, 3))
        lower, upper = x - 0.2, x + 0.2
        function = functools.partial(attention, weights, softmax=shares)
        _, aux = jax.jit(bj.linear(function, has_aux=True))(bj.Box(lower, upper))
        # Two matrix products and a log-softmax, each with a plane above and one below.
        names = sorted(label.split("/")[-1] for label in aux.slopes if "logistic" not in label)
        products = ["dot_general", "dot_general:below", "dot_general_1", "dot_general_1:below"]
        assert names == [*products, "log_softmax", "log_softmax:below"]
        values = jax.jit(jax.vmap(lambda x: attention(weights, x, sampled_shares)))
        outputs = np.asarray(values(jnp.asarray(points(rng, lower, upper))))

        @on_host
        def run(slopes):
            return linear_alone(function, slopes=slopes)(bj.Box(lower, upper))

        again = run(aux.slopes)
        for ours, theirs in zip(again, aux.linear, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
        for _ in range(5):
            bounds = run(jax.tree.map(lambda a: jnp.asarray(rng.uniform(size=a.shape)), aux.slopes))
            assert (outputs >= bounds.lower - 1e-11).all()
            assert (outputs <= bounds.upper + 1e-11).all()
            assert np.abs(bounds.lower - aux.linear.lower).max() > 1e-6


FUNCTIONS = {
    "mul": lambda x: jnp.tanh(x) * x[::-1] - x,
    "matmul": lambda x: jnp.outer(x, x) @ x,
    "log_softmax": lambda x: log_softmax(2 * x) - x,
    "masked": lambda x: jnp.tanh(logsumexp(jnp.where(jnp.arange(4) < 3, x, -jnp.inf)))[None] * x,
    "logsumexp": lambda x: logsumexp(x)[None] * x,
    "normalize": lambda x: normalize(x, reciprocal(x, (0,), 1e-2), (0,), 1e-2),
    "select": lambda x: jnp.where(x > 0.1, x * x[::-1], jnp.tanh(x)) - x,
    "attention": lambda x: attention(
        attention_weights(x.dtype), jnp.outer(x, x[:3]), softmax=shares
    ),
}


# One worker compiles the gradients of a function for all tests.
each_function = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.xdist_group(f"joint {n}")) for n in FUNCTIONS]
)


@functools.cache
def gradients_function(name):
    """`(x, eps, weights) -> value, gradients in x and eps` of the weighted ends of both bounds."""
    function = FUNCTIONS[name]

    def objective(x, eps, weights):
        box = bj.LpBall(x, eps)
        ends = (*bj.interval(function)(box), *linear_alone(function)(box))
        return sum(jnp.sum(w * end) for w, end in zip(weights, ends, strict=True))

    return on_host(jax.value_and_grad(objective, argnums=(0, 1)))


def output_shape(name):
    return jax.eval_shape(FUNCTIONS[name], jnp.zeros(4)).shape


@pytest.mark.slow
@each_function
def test_gradients_equal_finite_differences(name):
    rng = np.random.default_rng(7)
    with jax.enable_x64(True):
        x, weights = rng.normal(size=4), rng.normal(size=(4, *output_shape(name)))

        def run(scale, eps):
            value, (in_x, in_eps) = gradients_function(name)(scale * x, eps, weights)
            return value, (in_x @ x, in_eps)

        for at in ((1.0, 0.3), (1.0, 0.01)):
            for k, ours in enumerate(run(*at)[1]):
                h = 1e-6 * np.eye(2)[k]
                ahead, behind = run(*(at + h))[0], run(*(at - h))[0]
                np.testing.assert_allclose(ours, (ahead - behind) / 2e-6, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@each_function
def test_gradients_are_finite_at_every_radius(name, dtype):
    with jax.enable_x64(dtype == np.float64):
        x = np.random.default_rng(8).normal(size=4).astype(dtype)
        weights = np.ones((4, *output_shape(name)), dtype)
        for eps in (0.0, 1e-12, 1e-6, 1e-2, 1.0, 30.0):
            _, result = gradients_function(name)(x, dtype(eps), weights)
            size = max(np.abs(g).max() for g in result)
            assert np.isfinite(size)
            # On a narrow box no gradient may be a quotient of rounding errors.
            assert size < 1e3 * (1 + eps) ** 3, (eps, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_joint_ops_under_vmap_and_jit(name):
    function = FUNCTIONS[name]
    rng = np.random.default_rng(9)
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)

    def bounds(x):
        return bj.linear(function, intermediate="linear")(bj.LpBall(x, 0.1))

    batched, single = jax.jit(jax.vmap(bounds))(x), jax.jit(bounds)
    for k in range(3):
        for ours, expected in zip(batched, single(x[k]), strict=True):
            np.testing.assert_allclose(ours[k], expected, rtol=2e-4, atol=2e-4)


def test_a_value_times_itself_is_its_square():
    bounds = bj.interval(lambda x: x * x)(bj.Box(-jnp.ones(2), 2 * jnp.ones(2)))
    np.testing.assert_allclose(bounds.lower, 0.0, atol=1e-6)
    np.testing.assert_allclose(bounds.upper, 4.0, rtol=1e-5)
