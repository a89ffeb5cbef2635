"""Bounds are as tight as the method's definition: exact cases and a second implementation."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import (
    BY_NAME,
    SEEDS,
    bounds_function,
    each_network,
    on_host,
    random_box,
    values_function,
)
from hypothesis import given
from networks import METHODS, NETWORKS, Network, points

import boundjax as bj


@each_network(*(n.name for n in NETWORKS if n.sequential))
@given(seed=SEEDS)
def test_constant_lines_equal_interval_bounds(name, seed):
    """Interval bounds are linear bounds with zero slopes and constant lines."""
    network = BY_NAME[name]
    with jax.enable_x64(True):
        constant, interval = constant_and_interval(network)(*random_box(network, seed, 0.3))
        for ours, expected in zip(constant, interval, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


@functools.cache
def constant_and_interval(network: Network):
    @on_host
    def run(weights, lower, upper):
        # The linear bounds before they are intersected with the interval bounds.
        flat = functools.partial(network.flat, weights)
        box = bj.Box(lower, upper)
        _, aux = bj.linear(flat, slopes="constant", has_aux=True)(box)
        return aux.linear, bj.interval(flat)(box)

    return run


@each_network("mlp", "cnn", "residual", "linen", "leaky", "clipped")
@pytest.mark.parametrize("method", ["crown-ibp", "crown", "fast-lin"])
@given(seed=SEEDS)
def test_exact_where_no_unit_is_unstable(name, method, seed):
    network = BY_NAME[name]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, seed, 1e-6)
        centre, radius = (lower + upper) / 2, (upper - lower) / 2
        value, jacobian = affine_function(network)(weights, centre)
        jacobian = jacobian.reshape(value.size, -1)
        spread = np.abs(jacobian) @ radius.ravel()
        inputs = points(np.random.default_rng(seed), lower, upper, 100)
        moved = (inputs - centre).reshape(100, -1) @ jacobian.T
        outputs = values_function(network)(weights, jnp.asarray(inputs))
        hypothesis.assume(np.abs(outputs - value - moved).max() < 1e-13)

        bounds = bounds_function(network, method)(weights, lower, upper)
        np.testing.assert_allclose(bounds.lower, value - spread, rtol=0, atol=1e-13)
        np.testing.assert_allclose(bounds.upper, value + spread, rtol=0, atol=1e-13)


@functools.cache
def affine_function(network: Network):
    """The value and the Jacobian at a point."""

    def run(weights, x):
        flat = functools.partial(network.flat, weights)
        return flat(x), jax.jacobian(flat)(x)

    return on_host(run)


@each_network("mlp", "cnn", "residual", "smooth")
def test_crown_is_tighter_on_average_than_crown_ibp_than_interval(name):
    network = BY_NAME[name]
    with jax.enable_x64(True):
        boxes = [random_box(network, seed, 0.3) for seed in range(20)]
        width = {
            method: np.mean([bounds_function(network, method)(*box).width for box in boxes])
            for method in ("interval", "crown-ibp", "crown")
        }
    assert width["crown"] < width["crown-ibp"] < width["interval"]


def reference_crown(layers, lower, upper, slopes, intermediate):
    """CROWN for a ReLU MLP in numpy, written from Zhang et al. 2018 alone."""

    def image(kernel, bias, low, high):
        centre, radius = (low + high) / 2, (high - low) / 2
        middle, spread = centre @ kernel + bias, radius @ np.abs(kernel)
        return middle - spread, middle + spread

    def upper_bound(rows, bias, before, ends):
        """Upper bounds of `rows @ z + bias`, z the output of the last of the layers `before`."""
        for (kernel, shift), (low, high) in zip(before[::-1], ends[::-1], strict=True):
            negative, positive = np.minimum(low, 0), np.maximum(high, 0)
            slope = positive / np.maximum(positive - negative, 1e-300)
            free = {
                "adaptive": high > -low,
                "parallel": slope,
                "zero": 0 * slope,
                "one": 0 * slope + 1,
            }
            a = np.where(low >= 0, 1.0, np.where(high <= 0, 0.0, free[slopes]))
            plus, minus = np.maximum(rows, 0), np.minimum(rows, 0)
            bias = bias + plus @ (-negative * slope)
            rows = plus * slope + minus * a
            bias, rows = bias + rows @ shift, rows @ kernel.T
        return rows @ (lower + upper) / 2 + np.abs(rows) @ (upper - lower) / 2 + bias

    ends, low, high = [], lower, upper
    for k, (kernel, bias) in enumerate(layers[:-1]):
        interval = image(kernel, bias, low, high)
        if intermediate == "linear":
            highest = upper_bound(kernel.T, bias, layers[:k], ends)
            lowest = -upper_bound(-kernel.T, -bias, layers[:k], ends)
            # Every node's linear bounds are intersected with its interval bounds.
            ends.append((np.maximum(lowest, interval[0]), np.minimum(highest, interval[1])))
        else:
            ends.append(interval)
        low, high = (np.maximum(end, 0) for end in ends[-1])
    kernel, bias = layers[-1]
    return (
        -upper_bound(-kernel.T, -bias, layers[:-1], ends),
        upper_bound(kernel.T, bias, layers[:-1], ends),
    )


@pytest.mark.parametrize("intermediate", ["interval", "linear"])
@pytest.mark.parametrize("slopes", ["adaptive", "parallel", "zero", "one"])
def test_linear_bounds_equal_a_second_implementation(slopes, intermediate):
    network = BY_NAME["mlp"]
    with jax.enable_x64(True):

        @jax.jit
        def run(weights, lower, upper):
            flat = functools.partial(network.flat, weights)
            transform = bj.linear(flat, slopes=slopes, intermediate=intermediate, has_aux=True)
            return transform(bj.Box(lower, upper))[1].linear

        for seed in range(10):
            weights, lower, upper = random_box(network, seed, 0.6)
            layers = [(np.asarray(w["kernel"]), np.asarray(w["bias"])) for w in weights]
            expected = reference_crown(
                layers, np.asarray(lower), np.asarray(upper), slopes, intermediate
            )
            for ours, reference in zip(run(weights, lower, upper), expected, strict=True):
                np.testing.assert_allclose(ours, reference, rtol=1e-10, atol=1e-10)


def exact_range(first, second, lower, upper):
    """The range of a ReLU net with 2 inputs and one hidden layer, by enumeration.

    The net is linear between the lines where a unit switches, so its extrema lie at corners of the
    box, at crossings of a line with an edge, or at crossings of two lines.
    """
    kernel, bias = first
    corners = [(x, y) for x in (lower[0], upper[0]) for y in (lower[1], upper[1])]
    crossings = []
    for (a, b), c in zip(kernel.T, bias, strict=True):
        crossings += [(x, -(c + a * x) / b) for x in (lower[0], upper[0])]
        crossings += [(-(c + b * y) / a, y) for y in (lower[1], upper[1])]
    for i in range(len(bias)):
        for j in range(i):
            crossings.append(np.linalg.solve(kernel[:, [i, j]].T, -bias[[i, j]]))
    inside = [p for p in crossings if np.all((p >= lower) & (p <= upper))]
    candidates = np.array([*corners, *inside])
    outputs = np.maximum(candidates @ kernel + bias, 0) @ second[0] + second[1]
    return outputs.min(0), outputs.max(0)


def _draw_two_layers(rng):
    return [
        {"kernel": rng.normal(size=(a, b)), "bias": 0.5 * rng.normal(size=b)}
        for a, b in [(2, 5), (5, 3)]
    ]


EXACT = Network("exact", (2,), _draw_two_layers, BY_NAME["mlp"].apply)


@given(seed=SEEDS)
def test_bounds_contain_the_exact_range_and_come_close(seed):
    network = EXACT
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, seed, 0.7)
        first, second = ((np.asarray(w["kernel"]), np.asarray(w["bias"])) for w in weights)
        low, high = exact_range(first, second, np.asarray(lower), np.asarray(upper))
        for method in METHODS:
            bounds = bounds_function(network, method)(weights, lower, upper)
            assert (bounds.lower <= low + 1e-12).all(), method
            assert (bounds.upper >= high - 1e-12).all(), method
            if method == "crown":
                assert (bounds.width <= 5 * (high - low) + 1e-9).all()
