"""Every method against the exact optimum of a MILP and the optimum of the linear relaxation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import on_host

import boundjax as bj
from boundjax.search.milp import Encoding

SIZES = (6, 12, 12, 4)
EPS = 0.2
ADAM = optax.adam(optax.exponential_decay(0.5, 1, 0.9))
METHODS = {
    "interval": bj.interval,
    "random": functools.partial(bj.linear, slopes=bj.slopes.uniform(jax.random.key(0))),
    "parallel": functools.partial(bj.linear, slopes="parallel"),
    "adaptive": bj.linear,
    "one-step": functools.partial(bj.linear, slopes=bj.optimized()),
    "20 steps": functools.partial(bj.linear, slopes=bj.optimized(20, ADAM, per_spec=True)),
    "80 steps": functools.partial(bj.linear, slopes=bj.optimized(80, ADAM, per_spec=True)),
    "crown": functools.partial(bj.linear, intermediate="linear"),
    "fast-lin": functools.partial(bj.linear, slopes="parallel", intermediate="linear"),
    "forward": functools.partial(bj.linear, intermediate="forward"),
    "alpha-crown": functools.partial(
        bj.linear,
        slopes=bj.optimized(20, ADAM, per_spec=True, optimize_intermediate=True),
        intermediate="linear",
    ),
}
NETS = 24
# One worker computes the bounds for all tests.
pytestmark = pytest.mark.xdist_group("exact")


def draw(seed):
    """Layers with PyTorch's initialisation (uniform in 1/sqrt(fan-in)) and an input; float64."""
    rng = np.random.default_rng(seed)
    layers = [
        (
            rng.uniform(-1, 1, size=(m, n)) * np.sqrt(3.0 / m),
            rng.uniform(-1, 1, size=n) / np.sqrt(m),
        )
        for m, n in itertools.pairwise(SIZES)
    ]
    return layers, rng.normal(size=SIZES[0])


def network(layers, x):
    for kernel, bias in layers[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ layers[-1][0] + layers[-1][1]


def margins_of(method):
    @on_host
    def run(layers, x):
        function = functools.partial(network, layers)
        rows = bj.margin_specification(jnp.argmax(function(x)), SIZES[-1], dtype=x.dtype)
        return METHODS[method](function)(bj.LpBall(x, EPS), rows).lower, rows

    return run


@on_host
def interval_bounds(layers, x):
    relaxed = bj.relax(functools.partial(network, layers))
    return relaxed(bj.LpBall(x, EPS)).pre_activations


def optima(seed, rows, integer):
    """Exact minima of the rows, or those of the linear program with interval bounds."""
    layers, x = draw(seed)
    function, box = functools.partial(network, layers), bj.LpBall(jnp.asarray(x), EPS)
    encoding = Encoding(function, box, interval_bounds(layers, x), integer=integer)
    solved = [encoding.minimum(row) for row in rows]
    assert all(optimum.status == "optimal" for optimum in solved)
    return [optimum.lower for optimum in solved]


@pytest.fixture(scope="module")
def bounds():
    """Lower bounds on the margins `[nets, 3]` by method, and the exact minima."""
    with jax.enable_x64(True):
        result = {}
        for method in METHODS:
            run = margins_of(method)
            results = [run(*draw(seed)) for seed in range(NETS)]
            result[method] = np.array([lower for lower, _ in results])
            rows = [r for _, r in results]
        for name, integer in (("exact", True), ("linear program", False)):
            result[name] = np.array([optima(seed, rows[seed], integer) for seed in range(NETS)])
    return result


@pytest.mark.parametrize("method", METHODS)
def test_no_bound_exceeds_the_exact_optimum(method, bounds):
    assert (bounds[method] <= bounds["exact"] + 1e-7).all()


@pytest.mark.parametrize(
    "method", ["interval", "random", "parallel", "adaptive", "one-step", "20 steps", "80 steps"]
)
def test_the_linear_program_is_the_limit_of_single_neuron_relaxations(method, bounds):
    # With the same (interval) pre-activation bounds no choice of slopes can do better.
    assert (bounds[method] <= bounds["linear program"] + 1e-7).all()


def test_many_steps_come_close_to_the_linear_program(bounds):
    gap = (bounds["linear program"] - bounds["80 steps"]).mean()
    start = (bounds["linear program"] - bounds["adaptive"]).mean()
    assert gap < 0.1 * start


def test_mean_margins_are_ordered(bounds):
    names = ("interval", "random", "parallel", "adaptive", "one-step", "20 steps", "80 steps")
    means = [bounds[name].mean() for name in (*names, "linear program", "exact")]
    assert means == sorted(means), dict(zip(names, means, strict=False))
    deeper = [bounds[m].mean() for m in ("adaptive", "fast-lin", "crown", "alpha-crown", "exact")]
    assert deeper == sorted(deeper)
    assert bounds["adaptive"].mean() < bounds["forward"].mean()


def test_forward_intermediates_equal_backward_ones_of_two_hidden_layers():
    # Both use the same lines for the first layer, the only nonlinear one before the second. Compare
    # without the intersection with intervals, with which the backward walk skips stable units.
    @on_host
    def run(layers, x):
        def linear_part(intermediate):
            function = functools.partial(network, layers)
            transform = bj.linear(function, intermediate=intermediate, has_aux=True)
            return transform(bj.LpBall(x, EPS))[1].linear

        return linear_part("forward"), linear_part("linear")

    with jax.enable_x64(True):
        for seed in range(NETS):
            np.testing.assert_allclose(*run(*draw(seed)), rtol=1e-12, atol=1e-12)
