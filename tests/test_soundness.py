"""Every method on every network: bounds contain samples and attacks and are as tight as defined.

float64 finds a wrong rule (slack 1e-12 of the magnitudes met), float32 a wrong precision.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import METHODS, NETWORKS, Network, ascend, ball_points, points

import boundjax as bj
from boundjax import graph
from boundjax.ops import registry

SEEDS = st.integers(0, 2**32 - 1)
BY_NAME = {network.name: network for network in NETWORKS}
RELATIVE_SLACK = {np.float32: 1e-5, np.float64: 1e-12}

# One worker compiles all of a network's functions and shares them.
each_network = pytest.mark.parametrize(
    "network",
    [pytest.param(n, marks=pytest.mark.xdist_group(n.name)) for n in NETWORKS],
    ids=lambda network: network.name,
)


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


def on_host(function):
    """`function` compiled, its results as numpy arrays: those broadcast, JAX's here must not."""
    compiled = jax.jit(function)
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


@each_network
@pytest.mark.parametrize("method", METHODS)
@given(seed=SEEDS)
def test_bounds_contain_samples_and_attacks(network, method, seed):
    with jax.enable_x64(True):
        check_network(network, method, seed, np.float64)


@each_network
@pytest.mark.parametrize("method", ["interval", "crown"])
@given(seed=SEEDS)
def test_bounds_contain_samples_and_attacks_in_float32(network, method, seed):
    check_network(network, method, seed, np.float32)


def test_every_op_of_the_table_occurs_in_a_network():
    used = set()
    for network in NETWORKS:
        apply = functools.partial(network.apply, network.weights(0))
        nodes = graph.trace(apply, jnp.zeros(network.input_shape)).nodes
        used |= {id(node.op) for node in nodes}
    # Only a weakly typed input is cast to its own dtype; test_ops.py bounds one.
    cast = graph.trace(lambda x: jax.lax.convert_element_type(x, jnp.float32), jnp.asarray(0.5))
    used |= {id(node.op) for node in cast.nodes}
    missing = [f"{op.name} ({op.note})" for op in registry.all_ops() if id(op) not in used]
    assert not missing, f"add these ops to a network in tests/networks.py: {missing}"


# --- scalar relaxations -----------------------------------------------------------------------

SCALARS = {
    "relu": jax.nn.relu,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.1),
    "leaky_relu_convex_falling": lambda x: jax.nn.leaky_relu(x, -0.5),
    "leaky_relu_concave": lambda x: jax.nn.leaky_relu(x, 1.5),
    "relu6": jax.nn.relu6,
    "clip": lambda x: jnp.clip(x, -0.5, 0.7),
    "clip_to_a_point": lambda x: jnp.clip(x, 0.25, 0.25),
    "abs": jnp.abs,
    "maximum": lambda x: jnp.maximum(x, -0.3),
    "minimum": lambda x: jnp.minimum(0.4, x),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
}


def scalar_intervals() -> tuple[np.ndarray, np.ndarray]:
    """Intervals of all magnitudes, with and without a kink inside, at an end, and without width."""
    shapes = np.array(
        [
            *[(-1, 1), (0, 1), (-1, 0), (1, 1), (-1, -1), (1, 2), (-2, -1)],
            *[(-1, 1e-3), (-1e-3, 1), (-1, 2), (-2, 1), (0.5, 0.5 + 1e-7)],
        ]
    )
    scaled = [10.0**k * shapes for k in (-6, -3, -1, 0, 1, 3)]
    # The kinks of relu6 and clip, and the far tails of sigmoid.
    kinks = [[(5, 7), (6, 7), (6, 6), (-0.5, 0.7), (-0.5, -0.5), (0.2, 0.7), (-9, 0.7), (0.6, 9)]]
    thin = [[(c, c + w) for c in (-90, -30, -3, 0.7, 3, 30) for w in (1e-9, 1e-6, 1e-3)]]
    return np.concatenate([*scaled, *kinks, *thin]).astype(np.float64).T


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *[
            (m, np.float64)
            for m in ("interval", "crown-ibp", "fast-lin", "zero", "one", "constant")
        ],
        *[(m, np.float32) for m in ("interval", "crown-ibp")],
    ],
)
@pytest.mark.parametrize("name", SCALARS)
def test_scalar_relaxations_contain_a_dense_grid(name, method, dtype):
    # f(x) - c x: for c != 0 the interval bounds are loose and the lines themselves are seen.
    lower, upper = (
        np.repeat(end[:, None], 5, 1).ravel().astype(dtype) for end in scalar_intervals()
    )
    slopes = np.tile(np.array([-1.0, -0.3, 0.0, 0.5, 2.0], dtype), lower.size // 5)
    share = np.linspace(0, 1, 401)[:, None]
    grid = np.clip(lower + share * (upper - lower), lower, upper).astype(dtype)

    with jax.enable_x64(dtype == np.float64):
        c = jnp.asarray(slopes)

        def function(x):
            return SCALARS[name](x) - c * x

        transform = METHODS[method](function)

        @on_host
        def run(lower, upper, grid):
            # A gradient must exist, at kinks too.
            gradient = jax.grad(
                lambda ends: sum(end.sum() for end in transform(bj.Box(*ends))),
            )((lower, upper))
            return transform(bj.Box(lower, upper)), gradient, jax.vmap(function)(grid)

        bounds, gradient, values = run(lower, upper, grid)

    relative = 1e-14 if dtype == np.float64 else 5e-6
    slack = relative * (1 + (1 + np.abs(slopes)) * np.maximum(np.abs(lower), np.abs(upper)))
    for gap in (values.min(0) - bounds.lower, bounds.upper - values.max(0)):
        worst = np.argmin(gap / slack)
        case = f"[{lower[worst]}, {upper[worst]}], c = {slopes[worst]}: {gap[worst]}"
        assert (gap >= -slack).all(), case
    degenerate = lower == upper
    assert (bounds.width[degenerate] <= 4 * slack[degenerate]).all()
    assert all(np.isfinite(end).all() for end in gradient)


# --- tightness: no looser than the method's definition ------------------------------------------


@pytest.mark.parametrize("name", [n.name for n in NETWORKS if n.sequential])
@given(seed=SEEDS)
def test_constant_lines_equal_interval_bounds(name, seed):
    """Interval bounds are linear bounds with zero slopes and constant lines (METHODS 13 c)."""
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


def random_box(network: Network, seed: int, scale: float):
    """Random float64 weights and a random box, as numpy arrays."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=network.input_shape)
    radius = scale * rng.uniform(size=network.input_shape)
    return network.weights(seed, np.float64), centre - radius, centre + radius


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "linen", "leaky", "clipped"])
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


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "smooth"])
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
    """CROWN for a ReLU MLP in numpy, written from METHODS 2.2 and 2.3 alone."""

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


# --- transforms of transforms -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [("mlp", "interval"), ("mlp", "crown"), ("cnn", "crown-ibp")],
)
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
    eager = bounds(centres[0])
    single = jax.jit(bounds)(centres[0])
    for k, expected in enumerate(batched):
        np.testing.assert_allclose(mapped[k], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(eager[k], expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(single[k], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[("mlp", m) for m in ("interval", "crown-ibp", "crown", "fast-lin")],
        *[(n, "crown-ibp") for n in ("leaky", "clipped", "smooth")],
        ("cnn", "crown"),
    ],
)
def test_gradients_equal_finite_differences(name, method):
    network = BY_NAME[name]
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        weights, x = (
            network.weights(1, np.float64),
            jnp.asarray(rng.normal(size=network.input_shape)),
        )
        direction = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), weights)
        weight = jnp.asarray(rng.normal(size=2 * network.flat(weights, x).size))

        def objective(t, eps, shift):
            moved = jax.tree.map(lambda w, d: w + t * d, weights, direction)
            transform = METHODS[method](functools.partial(network.apply, moved))
            bounds = flat_interval(transform(bj.LpBall(x + shift, eps, clip=(-2.0, 2.0))))
            return weight @ jnp.concatenate(bounds)

        at = (0.0, 0.1, 0.0)
        run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2)))
        for k, ours in enumerate(run(*at)[1]):
            h = 1e-6 * np.eye(3)[k]
            ahead, behind = run(*(at + h))[0], run(*(at - h))[0]
            np.testing.assert_allclose(ours, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)


def test_gradient_of_relu_at_zero_is_zero():
    """As jax.nn.relu's; the inlined max(x, 0) would give 0.5."""

    def ends(bias):
        bounds = bj.interval(lambda x: jax.nn.relu(x + bias))(bj.Box(jnp.zeros(1), jnp.zeros(1)))
        return bounds.lower.sum() + bounds.upper.sum()

    assert jax.grad(ends)(jnp.zeros(1)) == 0.0


# --- specifications, slopes, memory ---------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@given(seed=SEEDS)
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
        # METHODS 13 o: merging is never looser than combining the ends of the logits.
        rows = np.asarray(specification)
        apart = np.maximum(rows, 0) @ separate.lower + np.minimum(rows, 0) @ separate.upper
        assert (given_bounds.lower >= apart - 1e-9).all()

        inputs = points(np.random.default_rng(seed), np.asarray(lower), np.asarray(upper))
        outputs = values_function(network)(weights, jnp.asarray(inputs)) @ rows.T
        assert (outputs >= given_bounds.lower - 1e-9).all()
        assert (outputs <= given_bounds.upper + 1e-9).all()


@functools.cache
def specified(method: str):
    network = BY_NAME["mlp"]

    @on_host
    def run(weights, lower, upper, specification):
        box = bj.Box(lower, upper)
        apply = functools.partial(network.apply, weights)
        # The last layer with the specification multiplied in by hand.
        last = {name: value @ specification.T for name, value in weights[-1].items()}
        merged = functools.partial(network.apply, [*weights[:-1], last])
        transform = METHODS[method]
        return transform(apply)(box, specification), transform(merged)(box), transform(apply)(box)

    return run


@pytest.mark.parametrize("name", ["mlp", "cnn", "leaky", "pooling"])
@given(seed=SEEDS)
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
        # The policy's own slopes, passed by hand, give the policy's bounds.
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


# --- numbers that are not numbers ---------------------------------------------------------------


@each_network
@pytest.mark.parametrize("method", ["interval", "crown-ibp", "crown"])
def test_nan_inputs_give_no_bound(network, method):
    # Under jit nothing raises; then no output that depends on the input may have a finite bound.
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 0, 0.1)
        bounds = bounds_function(network, method)(weights, lower * jnp.nan, upper)
    assert not np.isfinite(bounds.lower).any()
    assert not np.isfinite(bounds.upper).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_weights_that_are_not_finite_certify_nothing(layer, bad, method):
    network = BY_NAME["mlp"]
    with jax.enable_x64(True):
        weights, lower, upper = random_box(network, 0, 0.1)
        weights[layer]["kernel"] = weights[layer]["kernel"].at[0].set(bad)
        bounds = bounds_function(network, method)(weights, lower, upper)
        outputs = network.flat(weights, (lower + upper) / 2)
    # Where the network's own output is not a number no bound may claim that it is one.
    wild = np.isnan(outputs)
    assert not np.isfinite(bounds.lower[wild]).any()
    assert not np.isfinite(bounds.upper[wild]).any()
