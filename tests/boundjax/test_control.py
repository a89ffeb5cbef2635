"""Control flow: loops, branches and indices, unrolled or refused."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host
from graphs import graph_values, traced_aux
from graphs import primitives as primitives_at
from jax import lax

import boundjax as bj
from boundjax.tracing.jaxprs import unroll_limit
from boundjax.tracing.programs import trace_program

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
MIX = jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32)
BOX = bj.Box(X - 0.2, X + 0.2)


def primitives(function, x=X):
    return primitives_at(function, x)


def step(state, x):
    state = jnp.tanh(state @ MIX + x)
    return state, 2.0 * state


def scanned(x):
    return lax.scan(step, jnp.zeros(4), x)


def in_python(x):
    state, outputs = jnp.zeros(4), []
    for row in x:
        state, output = step(state, row)
        outputs.append(output)
    return state, jnp.stack(outputs)


def backwards(x):
    return lax.scan(step, jnp.ones(4), x, reverse=True)


def counting(x):
    """Constant and perturbed carries side by side, with constant and perturbed inputs."""

    def body(carry, inputs):
        count, state, unused = carry
        row, weight = inputs
        state = jnp.tanh(weight * state + row * (count + 1).astype(x.dtype))
        return (count + 1, state, unused), (state, count, weight)

    return lax.scan(body, (jnp.int32(0), x[0], x[1]), (x, jnp.arange(3.0)))


def late(x):
    """A carry that depends on the input only from the third step on."""

    def body(carry, _):
        first, second, third = carry
        return (second, jnp.tanh(third), 0.5 * x[0]), first

    return lax.scan(body, (jnp.zeros(4), jnp.ones(4), jnp.ones(4)), None, length=4)


def nested(x):
    def body(state, row):
        inner, _ = lax.scan(step, state, row[None] * jnp.ones((2, 1)))
        return inner, inner.sum()

    return lax.scan(body, jnp.zeros(4), x)


def mapped(x):
    return lax.map(lambda row: jax.nn.relu(row @ MIX), x)


LOOPS = {f.__name__: f for f in (scanned, backwards, counting, late, nested, mapped)}


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, bj.Interval))


def check_samples(function, *transforms, box=BOX):
    share = np.random.default_rng(1).uniform(size=(200, *X.shape)).astype(np.float32)

    @on_host
    def run(box, share):
        inputs = box.lower[None] + share * (box.upper - box.lower)[None]
        return jax.vmap(function)(inputs), [transform(function)(box) for transform in transforms]

    values, result = run(box, share)
    for tree in result:
        for bounds, value in zip(leaves(tree), jax.tree.leaves(values), strict=True):
            assert (value >= bounds.lower - 1e-5).all()
            assert (value <= bounds.upper + 1e-5).all()


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("limit", [2, 128])
@pytest.mark.sampled(7)
def test_loops_are_sound_and_compute_the_function(name, limit):
    function = LOOPS[name]
    with unroll_limit(limit):
        # Two of the loops contain one that stays below the limit.
        assert ("scan" in primitives(function)) == (limit == 2)
        assert "while" not in primitives(function)
        result = jax.jit(lambda x: (graph_values(function, x), function(x)))(X)
        for ours, theirs in zip(*map(leaves, result), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        check_samples(function, bj.interval, bj.linear)


@pytest.mark.parametrize("name", LOOPS)
def test_a_long_loop_has_the_interval_bounds_of_the_unrolled_one(name):
    function = LOOPS[name]
    written_out = jax.jit(bj.interval(function))(BOX)
    with unroll_limit(0):
        assert "scan" in primitives(function)
        in_a_loop = jax.jit(bj.interval(function))(BOX)
        compiled = jax.jit(jax.vmap(bj.interval(function)))(jax.tree.map(lambda a: a[None], BOX))
    for ours, loop, batch in zip(*map(leaves, (written_out, in_a_loop, compiled)), strict=True):
        np.testing.assert_allclose(loop, ours, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(jax.tree.map(lambda a: a[0], batch), ours, rtol=1e-6, atol=1e-6)


def test_a_scan_is_the_loop_in_python():
    for transform in (bj.interval, bj.linear):
        ours, expected = (jax.jit(transform(f))(BOX) for f in (scanned, in_python))
        for one, other in zip(leaves(ours), leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit", [2, 128])
def test_gradients_through_a_loop(limit):
    def width(mix, radius):
        def function(x):
            return lax.scan(lambda s, r: (jnp.tanh(s @ mix + r), None), x[0], x)[0]

        x = jnp.asarray(X, jnp.float64)
        return bj.interval(function)(bj.Box(x - radius, x + radius)).width.sum()

    with jax.enable_x64(True), unroll_limit(limit):
        mix, direction = np.asarray(MIX, np.float64), RNG.normal(size=(4, 4))
        run = jax.jit(lambda t, r: width(jnp.asarray(mix + t * direction), r))
        result = jax.grad(run, argnums=(0, 1))(0.0, 0.1)
        h = 1e-6
        np.testing.assert_allclose(result[0], (run(h, 0.1) - run(-h, 0.1)) / (2 * h), rtol=1e-4)
        np.testing.assert_allclose(
            result[1], (run(0.0, 0.1 + h) - run(0.0, 0.1 - h)) / (2 * h), rtol=1e-4
        )


def test_labels_and_pre_activations_around_a_long_loop():
    def function(x):
        return jax.nn.relu(scanned(jax.nn.relu(x))[0] @ MIX)

    with unroll_limit(2):
        for intermediate in ("interval", "linear"):
            transform = bj.linear(function, intermediate=intermediate, has_aux=True)
            aux = traced_aux(transform, BOX)
            assert list(aux.pre_activations) == ["relu", "scan", "relu_1"]
            # A loop is bounded by constants, so no op before it needs slopes of its own.
            assert "relu_1" in aux.slopes


def test_a_loop_that_grows_without_end_warns():
    def function(x):
        return lax.fori_loop(0, 200, lambda k, v: 1e3 * (v - 0.5 * v[::-1]), x)

    with pytest.warns(UserWarning, match=r"'scan'.*test_control\.py:\d+.*200 steps"):
        bounds = bj.interval(function)(BOX)
    assert not np.isfinite(bounds.lower).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bj.interval(lambda x: lax.fori_loop(0, 200, lambda k, v: jnp.tanh(v), x))(BOX)


def test_the_unroll_limit():
    assert primitives(lambda x: lax.fori_loop(0, 128, lambda k, v: -v, x)) == ["neg"] * 128
    assert primitives(lambda x: lax.fori_loop(0, 129, lambda k, v: -v, x))[0] == "scan"
    with pytest.raises(ValueError, match="must be >= 0 steps, got -1"), unroll_limit(-1):
        pass
    keys = [trace_program(scanned, X).program.key]
    with unroll_limit(1):
        keys.append(trace_program(scanned, X).program.key)
    assert keys[0] != keys[1]
    assert keys[0] == trace_program(scanned, X).program.key


def test_a_loop_over_no_steps():
    def function(x):
        return lax.scan(step, x[0], x[:0])

    state, outputs = jax.jit(bj.interval(function))(BOX)
    np.testing.assert_array_equal(state.lower, BOX.lower[0])
    assert outputs.lower.shape == (0, 4)


# --- while and cond -------------------------------------------------------------------------------


@jax.jit
def repeated(x, times):
    return lax.fori_loop(0, times, lambda k, v: jnp.tanh(2.0 * v) + x[k], x[0])


def test_a_while_loop_with_a_known_count_is_written_out():
    for wrap in (lambda f: f, jax.jit):
        bounds = []
        wrap(lambda x: bounds.append(primitives(lambda x: repeated(x, 3), x)) or x)(X)  # noqa: B023
        assert bounds[0].count("tanh") == 3
    check_samples(lambda x: repeated(x, 3), bj.linear)
    plain = lambda x: lax.fori_loop(0, 3, lambda k, v: jnp.tanh(2.0 * v) + x[k], x[0])  # noqa: E731
    bounds = [jax.jit(bj.interval(f))(BOX) for f in (lambda x: repeated(x, 3), plain)]
    for one, other in zip(*bounds, strict=True):
        np.testing.assert_array_equal(one, other)


def test_branches():
    branches = [lambda v: v, lambda v: jnp.tanh(v), lambda v: -v]
    assert primitives(lambda x: lax.switch(jnp.int32(1), branches, x)) == ["tanh"]
    assert primitives(lambda x: lax.switch(jnp.int32(7), branches, x)) == ["neg"]
    assert primitives(lambda x: lax.cond(MIX.sum() > -1e9, jnp.tanh, jnp.negative, x)) == ["tanh"]

    @jax.jit
    def bounds(which):
        function = lambda x: lax.switch(which, branches, x)  # noqa: E731
        assert primitives(function) == ["tanh", "neg", "select_n"]
        return bj.linear(function)(BOX)

    alone = jax.jit(lambda box: [bj.linear(branch)(box) for branch in branches])(BOX)
    for which, branch in ((-3, 0), (0, 0), (1, 1), (2, 2), (9, 2)):
        for one, other in zip(bounds(which), alone[branch], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_branch_on_a_perturbed_predicate_is_a_select():
    def function(x):
        return lax.cond(x[0, 0] > 0.0, lambda v: v.sum(0), lambda v: 2.0 * v[0], x)

    assert primitives(function)[-1] == "select_n"
    for box in (BOX, bj.Box(X - 2.0, X + 2.0)):  # decided, undecided
        check_samples(function, bj.interval, bj.linear, box=box)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.relu(nn.Dense(4)(carry)), None


@pytest.mark.slow
def test_flax_loops():
    layers = nn.scan(
        nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    variables = jax.jit(layers.init)(jax.random.key(0), X[0], None)
    assert primitives(lambda x: layers.apply(variables, x[0], None)[0]).count("relu") == 3
    for cell in (nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell):
        model = nn.RNN(cell(2))
        weights = jax.jit(model.init)(jax.random.key(0), X[None])

        def function(x, model=model, weights=weights):
            return model.apply(weights, x[None])[0]

        ours, theirs = jax.jit(lambda x, f=function: (graph_values(f, x), f(x)))(X)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
        check_samples(function, bj.interval)
        written_out = jax.jit(bj.interval(function))(BOX)
        with unroll_limit(2):
            assert "scan" in primitives(function)
            in_a_loop = jax.jit(bj.interval(function))(BOX)
        np.testing.assert_allclose(in_a_loop, written_out, rtol=1e-5, atol=1e-6)


# --- indices --------------------------------------------------------------------------------------

PLACES = np.array([2, 0, 2])
INDEXING = {
    "gather": lambda x: x[PLACES],
    "set": lambda x: x.at[PLACES].set(2.0 * x),
    "set, distinct": lambda x: x.at[np.array([1, 2])].set(x[:2], unique_indices=True),
    "set constants": lambda x: x.at[np.array([0, 2])].set(1.0),
    "set in constants": lambda x: jnp.ones((5, 4)).at[PLACES + 1].set(-x),
    "set out of range": lambda x: x.at[np.array([1, 7])].set(2.0 * x[:2]),
    "add": lambda x: x.at[PLACES].add(-2.0 * x),
    "add out of range": lambda x: x.at[np.array([1, 7])].add(x[:2], mode="drop"),
    "subtract": lambda x: x.at[PLACES].subtract(x),
    "subtract from constants": lambda x: jnp.ones((3, 4)).at[PLACES].subtract(x),
    "multiply": lambda x: x.at[PLACES].multiply(np.float32([[2.0], [-1.0], [3.0]])),
    "segments": lambda x: jax.ops.segment_sum(x, jnp.array([0, 1, 0]), 2),
    "update": lambda x: lax.dynamic_update_slice(x, 2.0 * x[:1], (1, 0)),
}


@pytest.mark.parametrize("case", INDEXING)
def test_constant_indices_are_linear(case):
    """Linear functions: both walks are exact, against the Jacobian."""
    function = INDEXING[case]

    @on_host
    def run(x, box):
        both = bj.linear(function)(BOX), bj.linear(function)(box)
        return function(x), jax.jacfwd(function)(x), graph_values(function, x), both

    centre, jacobian, values, both = run(X, BOX)
    radius = np.abs(jacobian).sum((-2, -1)) * 0.2
    for bounds in both:
        np.testing.assert_allclose(bounds.lower, centre - radius, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(bounds.upper, centre + radius, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(values, centre, rtol=1e-6)
    check_samples(function, bj.interval)


def integer(x):
    return x[0, 0].astype(jnp.int32)


REFUSED = {
    "while": (
        lambda x: lax.while_loop(lambda v: v.sum() < 10.0, lambda v: 2.0 * v, x),
        r"'while'.*trip count depends on the perturbed input; use jax\.lax\.scan",
    ),
    "long while": (
        lambda x: repeated(x, 1000),
        r"'while'.*more than 128 steps",
    ),
    "scatter": (
        lambda x: x.at[integer(x)].set(1.0),
        r"'scatter'.*index depends on the perturbed input",
    ),
    "remainder": (lambda x: integer(x) % 3, r"'rem'.*integers that depend on the perturbed input"),
    "two keys": (lambda x: jnp.lexsort((x[0], x[1])), r"'sort'.*one perturbed key"),
    "approximate order": (
        lambda x: lax.approx_max_k(x, 2)[0],
        r"'approx_top_k' at .*in jax\.lax\.approx_max_k.*use jax\.lax\.top_k",
    ),
    "matrix": (
        lambda x: jnp.linalg.solve(x[:3, :3], jnp.ones(3)),
        r"'lu' at .*in jnp\.linalg\.solve.*a matrix that depends on the perturbed input",
    ),
    "knots": (
        lambda x: jnp.interp(0.5, jnp.sort(x[0]), jnp.arange(4.0)),
        r"in jnp\.(interp|searchsorted)\)",
    ),
    "inside a scan": (
        lambda x: lax.scan(lambda c, r: (c, 2.0 % (r + 9.0)), x[0], jnp.tile(x, (99, 1)))[1],
        r"'rem'.*only remainders by a constant",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_bounds_is_refused_with_a_reason(case):
    function, message = REFUSED[case]
    with pytest.raises(bj.UnsupportedOpError, match=message) as raised:
        bj.interval(function)(BOX)
    assert "\n" not in str(raised.value)
    assert "test_control.py:" in str(raised.value)


def test_a_while_loop_whose_count_is_a_weight_is_refused():
    @jax.jit
    def bounds(times):
        return bj.interval(lambda x: repeated(x, times))(BOX)

    with pytest.raises(bj.UnsupportedOpError, match="trip count is not known while tracing"):
        bounds(3)


def test_what_no_output_depends_on_is_not_refused():
    def function(x):
        sorted_rows = jnp.sort(x)
        count = lax.while_loop(lambda v: v.sum() < 10.0, lambda v: 2.0 * v, x)
        return {"used": 2.0 * x, "unused": (sorted_rows, count)}["used"]

    assert primitives(function) == ["mul"]


def test_one_value_at_two_operands_of_a_scatter():
    """The equation uses one variable twice, but its two bounds are different values."""
    bounds = bj.interval(lambda x: x.at[np.arange(3)].subtract(x))(BOX)
    np.testing.assert_allclose(bounds.upper, 0.4, rtol=1e-5)
    np.testing.assert_allclose(bounds.lower, -0.4, rtol=1e-5)
