"""Every method on every network: bounds contain samples and attacks and are as tight as defined.

float64 reveals wrong rules (slack: 1e-12 of the magnitudes that occur), float32 wrong precision.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import (
    BY_NAME,
    RELATIVE_SLACK,
    SEEDS,
    SLOW,
    attack_function,
    bad_weights_certify_nothing,
    bounds_function,
    each_network,
    each_pair,
    flat_interval,
    gradients_equal_finite_differences,
    on_host,
    radii,
    random_box,
    values_function,
)
from hypothesis import given
from networks import METHODS, NETWORKS, ONLY_ON, Network, ball_points, points

import boundjax as bj
from boundjax.ir.families import Expansion
from boundjax.ir.table import all_ops
from boundjax.tracing.trace import trace


def check_network(network: Network, method: str, seed: int, dtype) -> None:
    rng = np.random.default_rng(seed)
    weights = network.weights(seed, dtype)
    centre = rng.normal(size=network.input_shape)
    for radius in radii(rng, network.input_shape):
        lower, upper = (centre - radius).astype(dtype), (centre + radius).astype(dtype)
        box = jnp.asarray(lower), jnp.asarray(upper)
        bounds = bounds_function(network, method)(weights, *box)
        interval = bounds_function(network, "interval")(weights, *box)
        values = values_function(network)
        inputs = jnp.concatenate(
            [jnp.asarray(points(rng, lower, upper)), attack_function(network)(weights, *box)]
        )
        outputs = values(weights, inputs)

        magnitude = max(1.0, np.abs(box).max(), *(np.abs(end).max() for end in interval))
        slack = RELATIVE_SLACK[dtype] * magnitude
        assert bounds.lower.dtype == dtype
        assert np.isfinite(bounds.lower).all()
        assert np.isfinite(bounds.upper).all()
        assert (outputs >= bounds.lower - slack).all(), f"radius {radius.max()}"
        assert (outputs <= bounds.upper + slack).all(), f"radius {radius.max()}"
        # No method may be looser than interval bounds, with which it is intersected.
        assert (bounds.lower >= interval.lower - slack).all()
        assert (bounds.upper <= interval.upper + slack).all()
        if not radius.any():
            assert (bounds.width <= slack).all()


@each_pair()
@given(seed=SEEDS)
@pytest.mark.sampled(7)
def test_bounds_contain_samples_and_attacks(network, method, seed):
    with jax.enable_x64(True):
        check_network(network, method, seed, np.float64)


# Elementwise and single joint ops have their own float32 tests (`test_relaxations.py`,
# `test_joint.py`). These networks cover windows, indices, loops, branches and whole walks.
IN_FLOAT32 = (
    *("mlp", "cnn", "transposed", "residual", "linen", "pooling", "repeated", "structure", "rare"),
    *("gated", "attention", "decisions", "loops", "branches", "indexing"),
)


@pytest.mark.slow
@each_pair("crown", only=IN_FLOAT32)
@given(seed=SEEDS)
def test_bounds_contain_samples_and_attacks_in_float32(network, method, seed):
    check_network(network, method, seed, np.float32)


def test_every_op_of_the_table_occurs_in_a_network():
    used = set()
    for network in NETWORKS:
        apply = functools.partial(network.apply, network.weights(0))
        nodes = trace(apply, jnp.zeros(network.input_shape)).nodes
        used |= {id(node.op) for node in nodes}
    # Only a weakly typed input is cast to its own dtype; test_ops.py bounds such a cast.
    cast = trace(lambda x: jax.lax.convert_element_type(x, jnp.float32), jnp.asarray(0.5))
    used |= {id(node.op) for node in cast.nodes}
    # Graphs contain no expansions, only the ops that they expand to.
    kept = (op for op in all_ops() if not isinstance(op, Expansion))
    missing = [f"{op.name} ({op.note})" for op in kept if id(op) not in used]
    if jax.__version_info__ < (0, 10):  # makes them of other ops
        missing = [op for op in missing if op.partition(" ")[0] not in ("stack", "unstack")]
    assert not missing, f"add these ops to a network in tests/support/networks.py: {missing}"


def test_every_method_has_networks():
    known = {network.name for network in NETWORKS}
    for method, names in ONLY_ON.items():
        assert method in METHODS
        assert "mlp" in names
        assert set(names) <= known


# --- transforms of transforms -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [("mlp", "interval"), ("mlp", "crown"), ("cnn", "crown-ibp")],
)
@pytest.mark.sampled(4)
def test_bounds_agree_under_jit_vmap_and_pmap(name, method):
    network = BY_NAME[name]
    weights = network.weights(0)
    rng = np.random.default_rng(0)
    centres = jnp.asarray(rng.normal(size=(4, *network.input_shape)), jnp.float32)

    def bounds(x):
        transform = METHODS[method](functools.partial(network.apply, weights))
        return flat_interval(transform(bj.LpBall(x, 0.2, clip=(-1.0, 1.0))))

    batched = jax.device_get(jax.jit(jax.vmap(bounds))(centres))
    devices = jax.device_count()
    assert devices > 1
    mapped = jax.pmap(jax.vmap(bounds))(centres.reshape(devices, -1, *network.input_shape))
    mapped = jax.tree.map(lambda end: end.reshape(len(centres), -1), mapped)
    single = jax.jit(bounds)(centres[0])
    # Eager code compiles every operation separately, so only the small network runs eagerly.
    eager = bounds(centres[0]) if name == "mlp" else single
    for k, expected in enumerate(batched):
        np.testing.assert_allclose(mapped[k], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(eager[k], expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(single[k], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[("mlp", m) for m in ("interval", "crown", "fast-lin")],
        *[(n, "crown-ibp") for n in ("leaky", "clipped", "smooth")],
        # `test_windows.py` covers linear intermediate bounds.
        ("cnn", "crown-ibp"),
    ],
)
def test_gradients_equal_finite_differences(name, method):
    gradients_equal_finite_differences(BY_NAME[name], METHODS[method])


def test_gradient_of_relu_at_zero_is_zero():
    """It is 0, as for jax.nn.relu; an inlined max(x, 0) would give 0.5."""

    def ends(bias):
        bounds = bj.interval(lambda x: jax.nn.relu(x + bias))(bj.Box(jnp.zeros(1), jnp.zeros(1)))
        return bounds.lower.sum() + bounds.upper.sum()

    assert jax.grad(ends)(jnp.zeros(1)) == 0.0


# --- specifications, slopes, memory ---------------------------------------------------------------


@pytest.mark.xdist_group("mlp")
@pytest.mark.parametrize("method", METHODS)
@given(seed=SEEDS)
@pytest.mark.sampled(3)
def test_specification_merges_with_the_last_layer(method, seed):
    network = BY_NAME["mlp"]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, seed, 0.4)
        specification = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 3)))
        given_bounds, merged_bounds, separate = specified(method)(
            weights, lower, upper, specification
        )
        for ours, expected in zip(given_bounds, merged_bounds, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)
        rows = np.asarray(specification)
        if method == "interval":
            # Merging is never looser than combining the ends of the logits. Other methods intersect
            # each logit with its interval, which may be tighter than the bound of the whole row.
            apart = np.maximum(rows, 0) @ separate.lower + np.minimum(rows, 0) @ separate.upper
            assert (given_bounds.lower >= apart - 1e-9).all()

        inputs = points(np.random.default_rng(seed), np.asarray(lower), np.asarray(upper))
        outputs = values_function(network)(weights, jnp.asarray(inputs)) @ rows.T
        assert (outputs >= given_bounds.lower - 1e-9).all()
        assert (outputs <= given_bounds.upper + 1e-9).all()


@pytest.mark.parametrize("slopes", ["adaptive", "one", "zero", "parallel"])
@pytest.mark.sampled(3)
def test_a_row_is_never_looser_than_the_logits_combined(slopes):
    """Before the intersection with intervals, which may be tighter for a single logit."""
    network = BY_NAME["mlp"]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 0, 0.4)
        rows = np.random.default_rng(0).normal(size=(20, 3))
        relaxed = bj.relax(functools.partial(network.apply, weights), slopes=slopes)
        relaxation = relaxed(bj.Box(lower, upper))
        whole, logits = (
            relaxation.bounds(jnp.asarray(specification), has_aux=True)[1].linear
            for specification in (rows, np.eye(3))
        )
        apart = np.maximum(rows, 0) @ logits.lower + np.minimum(rows, 0) @ logits.upper
        gain = np.asarray(whole.lower - apart)
    assert (gain >= -1e-9).all()
    assert (gain > 1e-6).any()


@functools.cache
def specified(method: str):
    network = BY_NAME["mlp"]

    @on_host
    def run(weights, lower, upper, specification):
        box = bj.Box(lower, upper)
        apply = functools.partial(network.apply, weights)
        # The last layer, multiplied with the specification by hand.
        last = {name: value @ specification.T for name, value in weights[-1].items()}
        merged = functools.partial(network.apply, [*weights[:-1], last])
        transform = METHODS[method]
        return transform(apply)(box, specification), transform(merged)(box), transform(apply)(box)

    return run


@each_network("mlp", "cnn", "leaky", "pooling")
@given(seed=SEEDS)
@pytest.mark.sampled(4)
def test_any_slopes_in_the_unit_interval_are_sound(name, seed):
    network = BY_NAME[name]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, seed, 0.5)
        slopes = slopes_of(network)(weights, lower, upper)
        rng = np.random.default_rng(seed)
        drawn = jax.tree.map(lambda a: jnp.asarray(rng.uniform(size=a.shape)), slopes)
        bounds = bounds_with_slopes(network)(weights, lower, upper, drawn)
        inputs = points(rng, np.asarray(lower), np.asarray(upper))
        outputs = values_function(network)(weights, jnp.asarray(inputs))
        assert (outputs >= bounds.lower - 1e-10).all()
        assert (outputs <= bounds.upper + 1e-10).all()
        # Passing the policy's slopes by hand gives the policy's bounds.
        again = bounds_with_slopes(network)(weights, lower, upper, slopes)
        policy = bounds_function(network, "crown-ibp")(weights, lower, upper)
        for ours, expected in zip(again, policy, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


@functools.cache
def slopes_of(network: Network):
    @on_host
    def run(weights, lower, upper):
        flat = functools.partial(network.flat, weights)
        return bj.linear(flat, has_aux=True)(bj.Box(lower, upper))[1].slopes

    return run


@functools.cache
def bounds_with_slopes(network: Network):
    @on_host
    def run(weights, lower, upper, slopes):
        flat = functools.partial(network.flat, weights)
        return bj.linear(flat, slopes=slopes)(bj.Box(lower, upper))

    return run


@pytest.mark.parametrize("name", ["cnn", "residual"])
def test_a_small_byte_budget_gives_the_same_bounds(name):
    network = BY_NAME[name]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 0, 0.3)
        apply = functools.partial(network.apply, weights)
        results = [
            jax.jit(bj.linear(apply, intermediate="linear", max_bytes=budget))(bj.Box(lower, upper))
            for budget in (2**30, 4096)
        ]
    for ours, expected in zip(*map(flat_interval, results), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.xdist_group("mlp")
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("method", ["interval", "crown-ibp", "crown"])
@given(seed=SEEDS)
def test_bounds_over_other_norms_contain_samples(p, method, seed):
    network = BY_NAME["mlp"]
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        weights, centre = network.weights(seed, np.float64), rng.normal(size=3)
        eps = rng.uniform(0, 0.8, size=3)
        bounds = ball_bounds(p, method)(weights, jnp.asarray(centre), jnp.asarray(eps))
        inputs = ball_points(rng, centre, eps, p, (-1.5, 1.5))
        outputs = values_function(network)(weights, jnp.asarray(inputs))
    assert (outputs >= bounds.lower - 1e-12).all()
    assert (outputs <= bounds.upper + 1e-12).all()


@functools.cache
def ball_bounds(p: float, method: str):
    network = BY_NAME["mlp"]

    @on_host
    def run(weights, centre, eps):
        transform = METHODS[method](functools.partial(network.apply, weights))
        return transform(bj.LpBall(centre, eps, p=p, clip=(-1.5, 1.5)))

    return run


# --- NaN and infinity ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::boundjax.ops.domain.DomainWarning")
@each_pair("interval", "crown", but=SLOW)
@pytest.mark.sampled(4)
def test_nan_inputs_give_no_bound(network, method):
    # Nothing raises under jit, but no output that depends on the input may have a finite bound.
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 0, 0.1)
        bounds = bounds_function(network, method)(weights, lower * jnp.nan, upper)
        outputs = values_function(network)(weights, (lower * jnp.nan)[None])[0]
    # An output that does not depend on the input keeps its value.
    wild = np.isnan(outputs)
    assert wild.any()
    assert not np.isfinite(bounds.lower[wild]).any()
    assert not np.isfinite(bounds.upper[wild]).any()


@pytest.mark.xdist_group("mlp")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_weights_that_are_not_finite_certify_nothing(layer, bad, method):
    network = BY_NAME["mlp"]
    bad_weights_certify_nothing(network, bounds_function(network, method), layer, bad)
