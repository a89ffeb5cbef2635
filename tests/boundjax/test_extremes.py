"""Intervals near the ends of the floating-point range, where products, squares and widths overflow.

Expected values are computed in float64, where nothing here overflows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host
from scalar_lines import scalar_node

import boundjax as bj
from boundjax import verify, vnnlib

# Upper ends of x0 and x1 >= 0. The functions see x0 - x1, each behind its own relu.
BOXES = [
    (3.0, 3e38),
    (1e-2, 1e37),
    (2e38, 2e38),
    (1.0, 1e18),
    (1.0, 1e20),
    (1e20, 1.0),
    (1e30, 1e30),
]
FUNCTIONS = {
    "relu": (jax.nn.relu, lambda z: np.maximum(z, 0)),
    "leaky_relu": (jax.nn.leaky_relu, lambda z: np.where(z > 0, z, 0.01 * z)),
    "hinge": (
        lambda z: jnp.where(z > 0, 0.5 * z, -2.0 * z),
        lambda z: np.where(z > 0, z / 2, -2 * z),
    ),
    "minimum": (lambda z: jnp.minimum(z, 1.0), lambda z: np.minimum(z, 1)),
    "clip": (lambda z: jnp.clip(z, -1.0, 2.0), lambda z: np.clip(z, -1, 2)),
    "relu6": (jax.nn.relu6, lambda z: np.clip(z, 0, 6)),
    "tanh": (jnp.tanh, np.tanh),
    "soft_sign": (jax.nn.soft_sign, lambda z: z / (1 + np.abs(z))),
    "asinh": (jnp.arcsinh, np.arcsinh),
    # In a form without cancellation left of 0.
    "squareplus": (
        jax.nn.squareplus,
        lambda z: np.maximum(z, 0) + 2 / (np.abs(z) + np.hypot(z, 2)),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.sampled(4)
def test_elementwise_functions_of_huge_intervals(name):
    function, expected = FUNCTIONS[name]

    def composed(x):
        return function(x[0] - jax.nn.relu(x[1]))

    @on_host
    def run(upper):
        box = bj.Box(jnp.zeros(2), upper)
        alone = bj.linear(composed, intersect=False)(box)
        return bj.interval(composed)(box), bj.linear(composed)(box), alone

    for upper in BOXES:
        ends = np.float32(upper).astype(np.float64)
        shares = np.array([0.0, 1e-38, 1e-20, 1e-10, 1e-3, 0.5, 1.0])
        points = np.stack(np.meshgrid(shares, shares), -1).reshape(-1, 2) * ends
        values = expected(points[:, 0] - points[:, 1])
        slack = 1e-5 * np.abs(values).max() + 1e-6
        bounds = run(jnp.asarray(upper, jnp.float32))
        assert not np.isnan(bounds[0]).any()
        for result in bounds:
            if np.isnan(result.lower):
                continue  # lines may give no bound
            assert result.lower <= values.min() + slack, upper
            assert result.upper >= values.max() - slack, upper


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lines_on_huge_intervals(name):
    """Lines alone, without interval bounds; only smooth functions may give none (NaN)."""
    function, expected = FUNCTIONS[name]
    node = scalar_node(function, jnp.zeros(5))
    ends = np.array(
        [(-1e20, 1.0), (-1.0, 1e20), (-1e30, 1e25), (1e19, 1e21), (-3e38, 1e-2)], np.float32
    )

    def position(lower, upper, default=None):
        return jnp.full_like(lower, 0.5) if default is None else default

    @on_host
    def run(lower, upper):
        return node.op.lines(node, lower, upper, position)

    lines = [0.0 if a is None else np.float64(a) for a in run(*ends.T)]
    lower, upper = np.float64(ends).T
    shares = np.concatenate([np.linspace(0, 1, 101), 10.0 ** np.linspace(-38, 0, 200)])[:, None]
    reach = (upper - lower) * shares
    x = np.clip(np.concatenate([lower + reach, upper - reach]), lower, upper)
    below, above = lines[0] * x + lines[1], lines[2] * x + lines[3]
    values = expected(x)
    slack = 1e-5 * (1 + np.abs(values).max(0))
    assert (below <= values + slack).all()
    assert (above >= values - slack).all()


def test_the_larger_of_two_huge_values():
    def function(x):
        return jnp.maximum(x[0] - jax.nn.relu(x[1]), x[2])

    for high, far in ((3.0, 3e38), (1e-2, 1e37), (2e38, 2e38)):
        ends = jnp.asarray([high, far, high / 2], jnp.float32)
        bounds = on_host(bj.linear(function))(bj.Box(jnp.zeros(3), ends))
        assert bounds.upper >= ends[0]
        assert bounds.lower <= 0


@pytest.mark.parametrize("scale", [1.0, 1e18, 1e20, 1e24])
@pytest.mark.sampled(4)
def test_norms_of_values_whose_squares_overflow(scale):
    lower, upper = np.array([0.4, 0.5, 0.3]), np.array([0.6, 1.1, 1.2])

    def length(x):
        return jnp.sqrt(jnp.sum(x * x))

    def root_mean_square_norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, keepdims=True))

    @on_host
    def run(lower, upper):
        box = bj.Box(scale * lower, scale * upper)
        bounds = (bj.interval, bj.linear)
        return [[f(g)(box) for f in bounds] for g in (length, root_mean_square_norm)]

    points = np.random.default_rng(0).uniform(lower, upper, (1000, 3))
    points = np.concatenate([points, [lower, upper]])
    lengths = np.sqrt(np.sum(points**2, axis=1, keepdims=True))
    of_length, of_norm = run(jnp.asarray(lower, jnp.float32), jnp.asarray(upper, jnp.float32))
    for result in of_length:
        # NaN is no bound.
        assert not result.lower / scale > lengths.min() + 1e-4
        assert not result.upper / scale < lengths.max() - 1e-4
    for result in of_norm:
        values = 3**0.5 * points / lengths
        assert np.isfinite(result.lower).all()
        assert (result.lower <= values.min(0) + 1e-4).all()
        assert (result.upper >= values.max(0) - 1e-4).all()


@pytest.mark.parametrize("magnitude", [10.0, 1e3, 1e4, 1e5, 1e7, 1e10])
def test_planes_of_log_sum_exp_of_wide_rows(magnitude):
    """Far from the middle the error of a slope is multiplied by the width of the row."""
    rng = np.random.default_rng(0)
    center = magnitude * rng.normal(size=(200, 3))
    radius = magnitude * np.abs(rng.normal(size=(200, 3))) * (rng.uniform(size=(200, 3)) < 0.8)
    # Entries close to one another after a common shift, so that several weights matter.
    center[100:] = magnitude + rng.normal(size=(100, 3))
    radius[100:] = 0.9 * magnitude
    lower, upper = ((center + s * radius).astype(np.float32) for s in (-1, 1))
    corners = np.stack(np.meshgrid(*[[0.0, 0.5, 1.0]] * 3), -1).reshape(-1, 1, 3)

    @on_host
    def planes(lower, upper):
        def of_row(lower, upper):
            _, aux = bj.linear(jax.nn.logsumexp, has_aux=True)(bj.Box(lower, upper))
            return jax.tree.map(lambda a: a[0], aux.coefficients)

        return jax.vmap(of_row)(lower, upper)

    bounds = [np.asarray(part, np.float64) for part in planes(lower, upper)]
    x = lower.astype(np.float64) * (1 - corners) + upper.astype(np.float64) * corners
    most = x.max(-1)
    values = most + np.log(np.exp(x - most[..., None]).sum(-1))
    slack = 1e-6 * np.abs(x).max(-1)  # of a plane's evaluation
    assert ((x * bounds[0]).sum(-1) + bounds[1] <= values + slack).all()
    assert ((x * bounds[2]).sum(-1) + bounds[3] >= values - slack).all()


@pytest.mark.parametrize(("inputs", "method", "seed"), [(24, "crown", 4), (14, "alpha-crown", 2)])
@pytest.mark.sampled(3)
def test_no_proof_where_values_inside_are_large_off_the_points_that_are_looked_at(
    inputs, method, seed
):
    """Weights of 1e5 cancel to about 1, as do pairs of inputs at the centre and at equal ends."""
    rng = np.random.default_rng(seed)
    half = (rng.uniform(0.1, 1, (inputs // 2, 64)) * 1e5).astype(np.float32)
    exact = half.astype(np.float64)
    second = rng.normal(size=64)
    second -= exact.T @ np.linalg.lstsq(exact.T, second, rcond=None)[0]
    second += np.linalg.lstsq(exact, np.ones(inputs // 2), rcond=None)[0]
    first, second = np.repeat(half, 2, axis=0), second.astype(np.float32)
    first[1::2] *= -1
    slopes = first.astype(np.longdouble) @ second.astype(np.longdouble)
    threshold = np.float32(np.abs(slopes).sum() - 0.01)
    # Unsafe at a corner, where the relu is active by 0.01.
    assert np.abs(slopes).sum() - threshold > 0.005

    def model(x):
        return 1.0 - 1000.0 * jax.nn.relu((x @ first) @ second[:, None] - threshold)

    lines = [
        f"(declare-const X_{i} Real) (assert (>= X_{i} -1.0)) (assert (<= X_{i} 1.0))"
        for i in range(inputs)
    ]
    case = vnnlib.parse(" ".join([*lines, "(declare-const Y_0 Real) (assert (<= Y_0 0))"]))
    assert verify.verify(model, case, method=method, timeout=10).verdict != "unsat"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["one-step", "best"])
def test_slopes_are_optimised_in_networks_with_ops_that_have_no_free_line(method):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 3)).astype(np.float32)

    def model(x):
        h = jax.nn.relu(x @ weights[:, :2] + 0.1)
        return jnp.maximum(h, -h[:, ::-1]) @ weights[:2] + jnp.sign(x[:, :3])

    x = rng.normal(size=(3, 4)).astype(np.float32)
    margins, by_intervals = (
        bj.certify(model, x, 0.01, method=name).margins for name in (method, "interval")
    )
    assert np.isfinite(margins).all()
    assert (margins >= by_intervals - 1e-5).all()


def test_a_policy_gives_slopes_between_those_of_the_pieces():
    def function(x):
        return jax.nn.relu(x) - 2.5 * x

    bounds = on_host(bj.linear(function, slopes=lambda lower, upper: 3.0 + 0.0 * lower))(
        bj.Box(-jnp.ones(1), jnp.ones(1))
    )
    assert bounds.lower <= function(1.0)


def test_selections_of_constant_arrays():
    fill = np.ones(3, np.float32)
    bounds = bj.interval(lambda x: jnp.where(x > 0, x, fill))(bj.Box(-jnp.ones(3), jnp.ones(3)))
    np.testing.assert_array_equal(bounds.upper, fill)
