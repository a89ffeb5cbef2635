"""`prove` on every network of the tests: no proof against what inputs attain."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from compiled import attack_function, values_function
from networks import NETWORKS, points

import boundjax as bj
from boundjax import properties
from boundjax.search import Programs

DAILY = ("mlp", "cnn", "pooling")
EACH = [
    pytest.param(n, id=n.name, marks=[] if n.name in DAILY else pytest.mark.slow) for n in NETWORKS
]
SEEDS = 2
# Constants of loops, knots and solves are rounded, and nobody states by how much.
WITHOUT_PROOF = ("loops", "ordered", "counted", "kernels")


@pytest.mark.parametrize("network", EACH)
def test_margins_are_at_most_what_inputs_attain(network):
    compiled, rounding = {}, "nearest" if network.name in WITHOUT_PROOF else "float32"
    for seed in range(SEEDS):
        rng, weights = np.random.default_rng(seed), network.weights(seed)
        center = rng.normal(size=network.input_shape)
        radius = rng.uniform(0.0, 0.1, size=network.input_shape)
        lower, upper = (np.float32(center + sign * radius) for sign in (-1, 1))
        inputs = jnp.concatenate(
            [
                jnp.asarray(points(rng, lower, upper)),
                attack_function(network)(weights, jnp.asarray(lower), jnp.asarray(upper)),
            ]
        )
        outputs = values_function(network)(weights, inputs)[:, :3]
        least, most = outputs.min(axis=0), outputs.max(axis=0)
        size = np.abs(outputs).max() + 1.0
        programs = Programs(
            network.flat,
            network.input_shape,
            weights=weights,
            compiled=compiled,
            rounding=rounding,
        )
        rows = np.eye(programs.output_size)[: outputs.shape[1]]
        decide = functools.partial(
            bj.prove,
            lambda x, weights=weights: network.flat(weights, x),
            bj.Box(lower, upper),
            programs=programs,
            rounding=rounding,
            timeout=2.0,
        )
        # Just not true, by what rounding leaves of the values and more.
        false = decide(properties.all_positive(rows, -least - 1e-4 * size))
        assert false.verdict != "unsat"
        true = decide(properties.all_positive(rows, 0.5 * (most - least) + 1e-3 * size - least))
        attained = 0.5 * (most - least) + 1e-3 * size
        assert (true.margins <= attained + 1e-5 * size).all()
        for result in (false, true):
            if result.verdict == "sat":
                x = result.counterexample.inputs
                assert ((lower <= x) & (x <= upper)).all()
