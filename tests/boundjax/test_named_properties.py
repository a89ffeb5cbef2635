"""Output ranges, equivalence and monotonicity by name, beside what dense samples attain."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

import boundjax as bj
from boundjax import properties
from boundjax.ops import UnsupportedOpError

pytestmark = [pytest.mark.xdist_group("named properties"), pytest.mark.quick]

LOWER, UPPER = np.float32([-1.0, -0.5]), np.float32([0.5, 1.0])
GRID = np.stack(np.meshgrid(*np.linspace(LOWER, UPPER, 81).T, indexing="ij"), -1).reshape(-1, 2)
RNG = np.random.default_rng(3)
KERNELS = [np.float32(RNG.normal(size=shape)) for shape in ((2, 6), (6, 2))]


def network(x, kernels=KERNELS):
    """`[..., 2] -> [..., 2]`, of numpy in float64 or of JAX."""
    relu = nn.relu if isinstance(x, jax.Array) else lambda v: np.maximum(v, 0.0)
    return relu(x @ kernels[0] + np.float32(0.1)) @ kernels[1]


def nearby(x):
    return network(x, [KERNELS[0] + np.float32(0.01), KERNELS[1]])


def rising(x):
    """Weights that are not negative, so the outputs rise in every input."""
    return network(x, [np.abs(k) for k in KERNELS]) + np.float32(0.125) * x.sum()


VALUES, OTHERS = network(GRID), nearby(GRID)
LEAST, MOST = VALUES.min(axis=0), VALUES.max(axis=0)
GAP = np.abs(VALUES - OTHERS).max()


@pytest.fixture(scope="module", params=["a box", "a point"])
def box(request):
    return bj.Box(jnp.asarray(LOWER), jnp.asarray(UPPER if request.param == "a box" else LOWER))


def decided(function, box, property):
    return bj.prove(lambda x: function(jnp.asarray(x)), box, property, timeout=120.0)


def inside(x, box):
    return (np.asarray(box.lower) <= x).all() and (x <= np.asarray(box.upper)).all()


# --- ranges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "property",
    [
        properties.within(LEAST - 0.2, MOST + 0.2),
        properties.within(LEAST - 0.2, None),
        properties.within(None, MOST.max() + 0.2, (2,)),
    ],
)
def test_a_range_is_proved(box, property):
    assert decided(network, box, property).proved


@pytest.mark.parametrize(
    "limits",
    [(LEAST + 0.2, None), (None, MOST - 0.2), (LEAST - 0.2, MOST - [-9.0, 0.2])],
)
def test_what_leaves_a_range_is_shown(limits):
    box = bj.Box(jnp.asarray(LOWER), jnp.asarray(UPPER))
    result = decided(network, box, properties.within(*limits))
    assert result.verdict == "sat"
    x = result.counterexample.inputs
    y, (lower, upper) = network(x.astype(np.float64)), limits
    np.testing.assert_allclose(result.counterexample.outputs, y, rtol=1e-5, atol=1e-5)
    assert inside(x, box)
    below = lower is not None and (y < np.asarray(lower) + 1e-5).any()
    assert below or (upper is not None and (y > np.asarray(upper) - 1e-5).any())


def test_limits_belong_to_the_range():
    property = properties.within([0.0, -1.0], 0.1)
    assert property.holds(np.float32([0.0, -1.0]))
    assert not property.holds(np.float32([-1e-30, 0.0]))
    # float32(0.1) is larger than 0.1.
    assert not property.holds(np.float32([0.1, 0.0]))
    assert property.holds(np.nextafter(np.float32([0.1, 0.1]), np.float32(0.0)))
    assert not property.holds(np.float32([np.nan, 0.0]))
    assert not property.holds(np.float32([np.inf, 0.0]))
    assert (property & properties.predicts(0, 2)).holds(np.float32([0.0, -1.0]))


def test_a_limit_that_is_attained_is_neither_broken_nor_proved():
    box = bj.Box(jnp.asarray(LOWER), jnp.asarray(UPPER))
    property = properties.within(0.0, 1.0, (2,))
    assert bj.prove(lambda x: x - x, box, property, max_split_inputs=0).verdict == "unknown"


def test_limits_of_outputs_with_several_axes():
    upper = np.array([[1.0], [2.0]])
    property = properties.within(None, upper, (2, 3))
    assert property.output_size == 6
    assert property.holds(np.broadcast_to(np.float32(upper), (2, 3)))
    assert not property.holds(np.float32([[1, 1, 1.5], [2, 2, 2]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None), "a lower or an upper limit, got neither"),
        ((np.nan, 1.0), "must be finite numbers, got NaN or infinity; None is no limit"),
        ((0.0, [1.0, np.inf]), "must be finite numbers"),
        (([0.0, 2.0], 1.0), "lower must be at most upper"),
        (([0.0, 2.0], [1.0, 2.0, 3.0]), r"broadcast to the outputs' shape, got \(2,\) and \(3,\)"),
        (([0.0, 2.0], 3.0, (3,)), r"got \(2,\) and \(\) for \(3,\)"),
        (([0.0, 2.0], None, ()), r"got \(2,\) for \(\)"),
        (([], None), r"got \(0,\) for \(0,\)"),
    ],
)
def test_limits_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        properties.within(*arguments)
    assert "\n" not in str(caught.value)


# --- equivalence ----------------------------------------------------------------------------------


def test_equivalent_networks(box):
    pair = lambda x: (network(x), nearby(x))  # noqa: E731
    assert decided(pair, box, properties.equivalent(1.2 * GAP)).proved
    trees = lambda x: [{"a": f(x)[0], "b": f(x)[1:]} for f in (network, nearby)]  # noqa: E731
    assert decided(trees, box, properties.equivalent(1.2 * GAP)).proved


def test_where_two_networks_differ_is_shown():
    box = bj.Box(jnp.asarray(LOWER), jnp.asarray(UPPER))
    pair = lambda x: (network(x), nearby(x))  # noqa: E731
    result = decided(pair, box, properties.equivalent(0.8 * GAP))
    assert result.verdict == "sat"
    x = result.counterexample.inputs
    assert inside(x, box)
    first, second = (f(x.astype(np.float64)) for f in (network, nearby))
    assert np.abs(first - second).max() > 0.8 * GAP - 1e-5
    np.testing.assert_allclose(result.counterexample.outputs[1], second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, np.nan, np.inf, [0.1, 0.2]])
def test_tolerances_are_positive_numbers(tolerance):
    with pytest.raises(ValueError, match="tolerance must be a positive finite number, got"):
        properties.equivalent(tolerance)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (jnp.ones(2), "a pair of outputs, as of .*, got one output"),
        ((jnp.ones(2),) * 3, "got 3 outputs"),
        ((jnp.ones(2), jnp.ones(3)), r"one structure and shape, got \['\(2,\)'\] and \['\(3,\)'\]"),
        ((jnp.ones(2), {"a": jnp.ones(2)}), "one structure and shape"),
        (((), ()), "one structure and shape"),
    ],
)
def test_equivalence_needs_a_pair(outputs, message):
    with pytest.raises(ValueError, match=message) as caught:
        properties.equivalent(0.1)(outputs)
    assert "\n" not in str(caught.value)


# --- monotonicity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", [0, 1])
def test_a_network_that_rises(box, argument):
    slope = bj.directional_derivative(rising, jnp.eye(2)[argument])
    assert decided(slope, box, properties.within(0.0, None, (2,))).proved


def test_where_a_network_falls_is_shown():
    box = bj.Box(jnp.asarray(LOWER), jnp.asarray(UPPER))
    slope = bj.directional_derivative(network, jnp.eye(2)[1])
    result = decided(slope, box, properties.within(-1e-5, None, (2,)))
    assert result.verdict == "sat"
    x = result.counterexample.inputs.astype(np.float64)
    step = np.array([0.0, 1e-6])
    change = (network(x + step) - network(x - step)) / 2e-6
    np.testing.assert_allclose(result.counterexample.outputs, change, atol=1e-3)
    assert change.min() < 0.0


@pytest.mark.parametrize(
    "activation",
    [nn.relu, nn.leaky_relu, nn.gelu, nn.softplus, nn.silu, jnp.tanh, jnp.abs, nn.relu6, nn.elu],
)
def test_derivatives_of_activations_beside_differences(activation):
    """Bounds hold for derivatives in float64 by differences, wherever no kink is near."""
    kernels = [jnp.asarray(k) for k in KERNELS]
    function = lambda x: activation(x @ kernels[0]) @ kernels[1]  # noqa: E731
    direction = np.float32([0.5, -1.0])
    derivative = bj.directional_derivative(function, direction)
    bounds = bj.linear(derivative, rounding="nearest")(bj.Box(LOWER, UPPER))
    with jax.enable_x64(True):
        first, second = map(np.float64, KERNELS)
        exact = jax.vmap(lambda x: activation(x @ first) @ second)
        step = 1e-6 * np.float64(direction)
        change = np.asarray(exact(np.float64(GRID) + step) - exact(GRID - step)) / 2e-6
    assert (change >= np.asarray(bounds.lower) - 1e-3).all()
    assert (change <= np.asarray(bounds.upper) + 1e-3).all()


def dishonest():
    @jax.custom_jvp
    def falls(x):
        return -x

    falls.defjvp(lambda primals, tangents: (falls(*primals), tangents[0]))
    return falls


@pytest.mark.parametrize(
    "function",
    [
        dishonest(),
        lambda x: jax.lax.stop_gradient(-x),
        lambda x: x - jax.lax.stop_gradient(2.0 * x),
        jax.jit(lambda x: jax.checkpoint(dishonest())(x)),
    ],
)
def test_custom_rules_do_not_count(function):
    """A function that falls does not pass for one that rises, whatever its gradient says."""
    slope = bj.directional_derivative(function, jnp.ones(2))
    np.testing.assert_array_equal(slope(jnp.ones(2)), [-1.0, -1.0])


JUMPS = {
    "floor": lambda x: jnp.floor(x),
    "sign": lambda x: jnp.sign(x),
    "comparison": lambda x: jnp.where(x > 0.0, -1.0, x),
    "cast": lambda x: -x.astype(jnp.int32).astype(jnp.float32),
    "half precision": lambda x: x - x.astype(jnp.bfloat16).astype(jnp.float32),
    "fewer bits": lambda x: x - jax.lax.reduce_precision(x, 8, 2),
    "quotient": lambda x: 1.0 / x,
    "power": lambda x: x**-2,
    "root": lambda x: jnp.sqrt(x),
    "argmax": lambda x: jnp.eye(2)[jnp.argmax(x)],
    "index": lambda x: jax.lax.dynamic_slice(jnp.arange(4.0), (x[0].astype(jnp.int32),), (2,)),
}


@pytest.mark.parametrize("name", JUMPS)
def test_what_may_jump_is_refused_in_one_line(name):
    slope = bj.directional_derivative(JUMPS[name], jnp.ones(2))
    message = r"'\w+' at .*test_named_properties.py.* does not see jumps; bound the difference"
    with pytest.raises(UnsupportedOpError, match=message) as caught:
        bj.prove(slope, bj.Box(jnp.ones(2), 2.0 * jnp.ones(2)), properties.within(0, None, (2,)))
    assert "\n" not in str(caught.value)


def test_what_does_not_move_may_jump():
    """A comparison, an index and a quotient of another input."""

    def function(inputs):
        x, z = inputs["x"], inputs["z"]
        scaled = jnp.where(z > 0.5, x / (1.0 + z), 0.25 * x)
        return scaled * jnp.arange(1.0, 4.0)[inputs["k"]] + jnp.floor(z)

    sets = {
        "k": jnp.array(2),
        "x": bj.Box(-jnp.ones(2), jnp.ones(2)),
        "z": bj.LpBall(jnp.float32(0.5), 0.5),
    }
    slope = bj.directional_derivative(function, {"k": None, "x": jnp.array([1.0, 0.0]), "z": None})
    point = {"k": jnp.array(2), "x": jnp.zeros(2), "z": jnp.float32(1.0)}
    np.testing.assert_array_equal(slope(point), [1.5, 0.0])
    result = bj.prove(slope, sets, lambda y: y[0] >= 0.7, rounding="nearest")
    assert result.proved


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (jnp.ones(3), r"shape of the .* input that it moves, got \(3,\) for float32\[2\]"),
        (None, "structure of the input"),
        ((jnp.ones(2),), "structure of the input"),
        (np.array([1.0, np.nan]), "direction must be finite numbers"),
    ],
)
def test_directions_that_do_not_fit(direction, message):
    with pytest.raises(ValueError, match=message) as caught:
        bj.directional_derivative(network, direction)(jnp.ones(2))
    assert "\n" not in str(caught.value)


def test_a_derivative_in_every_direction_is_the_gradient():
    function = functools.partial(network)
    x = jnp.float32([0.3, 0.4])
    jacobian = jax.jacobian(function)(x)
    for k, j in itertools.product(range(2), range(2)):
        slope = bj.directional_derivative(function, jnp.eye(2)[k])
        np.testing.assert_allclose(slope(x)[j], jacobian[j, k], rtol=1e-6)
