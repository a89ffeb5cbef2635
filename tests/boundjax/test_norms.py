"""Spectral norms and row norms of linear ops against their explicit matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import SEEDS, on_host
from hypothesis import given

from boundjax.ops import norms, spectrum
from boundjax.tracing.trace import trace

NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(params=[0, norms._UNROLLED], ids=["by parts", "written out"])
def unrolled(request, monkeypatch):
    monkeypatch.setattr(norms, "_UNROLLED", request.param)
    return request.param


def matrix_and(function, shape, *others):
    """The matrix of a linear function and the results of thunks, in one compiled program."""

    @on_host
    def run(x):
        return jax.jacobian(function)(x), [other() for other in others]

    jacobian, result = run(jnp.zeros(shape))
    return jacobian.reshape(-1, int(np.prod(shape))), *result


def layers_of(function, shape):
    nodes = trace(function, jnp.zeros(shape)).nodes
    return [node for node in nodes if norms.has_spectrum(node.op)]


def check_layer(function, shape, tight):
    """The bound is never below the norm and at most `tight` times as large."""
    (node,) = layers_of(function, shape)
    matrix, bound, (rows,) = matrix_and(
        function, shape, lambda: norms.spectral_bound(node), lambda: norms.row_norms(node)
    )
    true = np.linalg.norm(matrix.astype(np.float64), 2)
    assert true <= bound <= tight * true
    np.testing.assert_allclose(rows.reshape(-1), np.linalg.norm(matrix, axis=1), rtol=1e-5)


def convolution(rng, size, kernel, channels, groups=1, strides=(1, 1), padding="SAME", **options):
    into, out = channels
    weights = jnp.asarray(rng.normal(size=(*kernel, into // groups, out)), jnp.float32)

    def function(x):
        return jax.lax.conv_general_dilated(
            x[None],
            weights,
            strides,
            padding,
            dimension_numbers=NHWC,
            feature_group_count=groups,
            **options,
        )[0]

    return function, (*size, into)


CONVOLUTIONS = {
    "same": {"size": (8, 8), "kernel": (3, 3), "channels": (3, 5)},
    "valid": {"size": (8, 7), "kernel": (3, 2), "channels": (2, 4), "padding": "VALID"},
    "strided": {"size": (8, 8), "kernel": (4, 4), "channels": (3, 6), "strides": (2, 2)},
    "sparse": {"size": (9, 9), "kernel": (2, 2), "channels": (2, 2), "strides": (3, 2)},
    "groups": {"size": (6, 6), "kernel": (3, 3), "channels": (4, 6), "groups": 2},
    "dilated": {"size": (8, 8), "kernel": (3, 2), "channels": (2, 3), "rhs_dilation": (2, 3)},
    "wide padding": {
        "size": (4, 5),
        "kernel": (3, 3),
        "channels": (2, 3),
        "padding": ((3, 2), (0, 4)),
    },
    "small image": {"size": (1, 2), "kernel": (3, 3), "channels": (2, 3)},
    "transposed": {
        "size": (4, 4),
        "kernel": (4, 4),
        "channels": (3, 2),
        "padding": ((2, 2), (2, 2)),
        "lhs_dilation": (2, 2),
    },
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.sampled(4)
def test_convolutions(name, unrolled):
    function, shape = convolution(np.random.default_rng(0), **CONVOLUTIONS[name])
    # A torus has no border, and the smaller the image, the more its border matters.
    tight = 1.005 if unrolled else {"small image": 1.6, "wide padding": 1.4}.get(name, 1.12)
    check_layer(function, shape, tight)


@given(seed=SEEDS)
def test_any_convolution(seed):
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 3))
    draw = lambda low, high: tuple(int(v) for v in rng.integers(low, high, 2))  # noqa: E731
    function, shape = convolution(
        rng,
        draw(3, 8),
        draw(1, 5),
        tuple(groups * v for v in draw(1, 4)),
        groups,
        draw(1, 4),
        tuple(draw(-1, 4) for _ in range(2)),
        rhs_dilation=draw(1, 3),
        lhs_dilation=draw(1, 4) if seed % 3 == 0 else (1, 1),
    )
    if not np.prod(jax.eval_shape(function, jnp.zeros(shape)).shape):
        return
    (node,) = layers_of(function, shape)
    matrix, bound = matrix_and(function, shape, lambda: jnp.max(spectrum.of_convolution(node)))
    assert bound >= np.linalg.norm(matrix.astype(np.float64), 2)


def test_convolutions_of_other_ranks(unrolled):
    rng = np.random.default_rng(0)
    line = jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.float32)
    space = jnp.asarray(rng.normal(size=(2, 3, 2, 2, 2)), jnp.float32)
    check_layer(
        lambda x: jax.lax.conv_general_dilated(
            x[None], line, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )[0],
        (9, 2),
        1.1,
    )
    check_layer(
        lambda x: jax.lax.conv_general_dilated(
            x[None], space, (1, 2, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )[0],
        (4, 4, 4, 2),
        1.2,
    )


def test_products(unrolled):
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)
    many = jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32)
    check_layer(lambda x: x @ weights, (5,), 1.005)
    check_layer(lambda x: x @ weights, (2, 5), 1.005)
    check_layer(lambda x: weights @ x, (7, 2), 1.005)
    check_layer(lambda x: jnp.einsum("bi,bij->bj", x, many), (3, 4), 1.005)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gram_iteration_is_an_upper_bound(dtype, scale):
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == np.float64):
        cases = [rng.normal(size=(20, 5, 9)) for _ in range(4)]
        cases.append(np.stack([np.outer(rng.normal(size=5), rng.normal(size=9))] * 20))  # rank 1
        cases.append(np.stack([np.linalg.qr(rng.normal(size=(9, 5)))[0].T] * 20))  # all equal
        cases.append(1e-4 * rng.normal(size=(20, 5, 9)) + np.eye(5, 9))
        largest = jax.jit(spectrum.largest_singular_value)
        for case in cases:
            case = (case * scale).astype(dtype)
            true = np.linalg.norm(case.astype(np.float64), 2, axis=(1, 2))
            bound = np.asarray(largest(jnp.asarray(case)))
            assert (bound >= true).all()
            assert (bound <= 1.005 * true).all()
    assert spectrum.largest_singular_value(jnp.zeros((3, 4))) == 0.0
    assert np.isnan(spectrum.largest_singular_value(jnp.full((3, 4), jnp.nan)))
    assert np.isnan(spectrum.largest_singular_value(jnp.full((3, 4), jnp.inf)))


STRUCTURAL = {
    "reshape": (lambda x: x.reshape(-1), 1.0),
    "slice": (lambda x: x[1:, ::2], 1.0),
    "negation": (lambda x: -x, 1.0),
    "shift": (lambda x: 1.0 - x, 1.0),
    "padding": (lambda x: jnp.pad(x, 1, constant_values=3.0), 1.0),
    "masked": (lambda x: jnp.where(jnp.eye(4) > 0, x, -jnp.inf), 1.0),
    "repetition": (lambda x: jnp.broadcast_to(x[None], (3, 4, 4)), 3**0.5),
    "repeated by a constant": (lambda x: x[:, :, None] + jnp.ones((1, 1, 3)), 3**0.5),
    "sum": (lambda x: x.sum(0), 2.0),
    "mean": (lambda x: x.mean(), 0.25),
    "difference": (lambda x: x - x[::-1], 2.0),
    "concatenation": (lambda x: jnp.concatenate([x, -x]), 2**0.5),
    "gather": (lambda x: x[jnp.array([0, 0, 3])], 2**0.5),
    "scale": (lambda x: x * jnp.arange(4.0)[None], 3.0),
    "repeated scale": (lambda x: x[:, :1] * jnp.array([[3.0, 4.0]]), 5.0),
    "division": (lambda x: x / jnp.array([[1.0, 2.0, 4.0, 0.5]]), 2.0),
    "pooling": (
        lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4,
        0.5,
    ),
}


@pytest.mark.parametrize("name", STRUCTURAL)
def test_norms_of_what_has_no_weights(name):
    function, expected = STRUCTURAL[name]
    nodes = trace(function, jnp.zeros((4, 4))).nodes

    def radius():
        radii = [jnp.ones(())]
        for node in nodes[1:]:
            radii.append(norms.radius(node, [radii[i] for i in node.inputs], None))
        return radii[-1]

    matrix, result = matrix_and(function, (4, 4), radius)
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert result >= np.linalg.norm(matrix, 2) - 1e-6


def test_norms_are_differentiable():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        weights = jnp.asarray(rng.normal(size=(5, 7)))
        result = jax.jit(jax.grad(lambda w: spectrum.largest_singular_value(w)))(weights)
        left, values, right = np.linalg.svd(weights)
        del values
        np.testing.assert_allclose(result, np.outer(left[:, 0], right[0]), atol=0.02)
        none = jax.grad(lambda w: spectrum.largest_singular_value(w))(jnp.zeros((2, 3)))
        assert np.isfinite(none).all()


def test_power_iteration_of_a_layer_of_zeros_keeps_its_vector():
    (node,) = layers_of(lambda x: x @ jnp.zeros((3, 2)), (3,))
    vector = jnp.array([0.6, 0.0, 0.8])
    norm, result = norms.power_step(node, vector)
    assert norm == 0.0
    np.testing.assert_array_equal(result, vector)
