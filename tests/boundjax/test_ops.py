"""Facts of single ops that networks do not single out."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host
from networks import points

import boundjax as bj
from boundjax.ir import table
from boundjax.ir.families import Expansion
from boundjax.ir.table import all_ops
from boundjax.ops import convolution, extremum
from boundjax.tracing.trace import trace


def pure_linear(function, slopes="adaptive"):
    """The linear bounds alone, since intersection with interval bounds could hide an error."""

    def bounds(input_set):
        with_aux = bj.linear(function, slopes=slopes, has_aux=True)
        result, aux = with_aux(input_set)
        return bj.Interval(*(end.reshape(result.lower.shape) for end in aux.linear))

    return bounds


def contains_samples(function, lower, upper, methods=(bj.interval, pure_linear), slack=1e-5):
    """Checks every method's bounds on samples of the box; returns those of the last method."""
    lower, upper = np.asarray(lower), np.asarray(upper)
    inputs = points(np.random.default_rng(0), lower, upper)

    @on_host
    def run(input_set, inputs):
        return [method(function)(input_set) for method in methods], jax.vmap(function)(inputs)

    result, outputs = run(bj.Box(lower, upper), inputs)
    for bounds in result:
        assert (outputs >= bounds.lower - slack).all()
        assert (outputs <= bounds.upper + slack).all()
    return bounds


def box(*shape, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    centre, radius = rng.normal(size=shape), scale * rng.uniform(size=shape)
    return (centre - radius).astype(np.float32), (centre + radius).astype(np.float32)


def test_a_cast_to_the_same_dtype_is_the_identity_and_a_widening_one_is_refused():
    weak = jnp.asarray(0.5)
    assert weak.weak_type
    bounds = bj.linear(lambda x: jax.lax.convert_element_type(x, jnp.float32))(
        bj.LpBall(weak, 0.25)
    )
    np.testing.assert_allclose((bounds.lower, bounds.upper), (0.25, 0.75))
    with jax.enable_x64(True), pytest.raises(bj.UnsupportedOpError, match="convert_element_type"):
        bj.linear(lambda x: x.astype(jnp.float64))(bj.Box(*box(4)))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_inputs_are_refused(dtype):
    with pytest.raises(TypeError, match="must be float32 or float64"):
        bj.interval(jax.nn.relu)(bj.LpBall(jnp.zeros(2, dtype), 0.1))


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
@pytest.mark.parametrize("reduction", [jnp.max, jnp.min, jnp.sum, jnp.mean])
def test_reductions(reduction, axis):
    contains_samples(lambda x: 2.0 * reduction(x - 0.1, axis=axis), *box(3, 4))


@pytest.mark.parametrize("padding", ["VALID", "SAME", ((1, 1), (0, 1))])
@pytest.mark.parametrize(("window", "strides"), [((2, 2), (2, 2)), ((3, 2), (1, 2))])
@pytest.mark.parametrize("pool", ["max", "min", "avg"])
def test_pooling(pool, window, strides, padding):
    def function(x):
        pooling = {"max": nn.max_pool, "min": nn.pooling.min_pool, "avg": nn.avg_pool}[pool]
        with jax.numpy_dtype_promotion("standard"):
            return pooling(x[None], window, strides, padding)[0]

    contains_samples(function, *box(5, 4, 2))


def test_max_pool_over_dilated_windows_and_inputs():
    def function(x):
        return jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (2, 2), (1, 2), "VALID", (2, 1), (1, 2)
        )

    contains_samples(function, *box(5, 4))


def test_a_window_with_a_clear_winner_is_exact():
    lower, upper = np.array([0.0, 3.0, 1.0], np.float32), np.array([1.0, 4.0, 2.5], np.float32)
    # The middle entry is always the maximum, so linear bounds of x[1] - max(x) are exactly 0.
    bounds = bj.linear(lambda x: x[1] - x.max())(bj.Box(jnp.asarray(lower), jnp.asarray(upper)))
    np.testing.assert_allclose([bounds.lower, bounds.upper], 0.0, atol=1e-6)


def test_gradient_of_bounds_through_a_max_pool_equals_finite_differences():
    rng = np.random.default_rng(0)
    x, scale, direction = (rng.normal(size=(2, 6)) for _ in range(3))

    @jax.jit
    @jax.value_and_grad
    def total(t):
        def function(x):
            batch = ((scale + t * direction) * x)[None, ..., None]
            return nn.max_pool(batch, (2, 2), (1, 2), "SAME").ravel()

        bounds = bj.linear(function)(bj.LpBall(x, 0.3))
        return bounds.lower.sum() + 2.0 * bounds.upper.sum()

    with jax.enable_x64(True):
        (_, gradient), (ahead, _), (behind, _) = total(0.0), total(1e-6), total(-1e-6)
        np.testing.assert_allclose(gradient, (ahead - behind) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("transform", [bj.interval, bj.linear, bj.forward_linear, bj.lipschitz])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.sampled(4)
def test_bounds_have_a_gradient_behind_dilated_windows(sign, transform):
    """JAX cannot differentiate these poolings; their bounds' gradient equals finite differences."""
    rng = np.random.default_rng(0)
    x, scale, direction = (rng.normal(size=(5, 4)) for _ in range(3))
    start, function = (-jnp.inf, jax.lax.max) if sign > 0 else (jnp.inf, jax.lax.min)
    dilations = [((2, 1), (1, 2)), ((1, 1), (2, 1))]

    @jax.jit
    @jax.value_and_grad
    def total(t):
        result = 0.0
        for base, window in dilations:

            def pooled(x, base=base, window=window):
                return jax.lax.reduce_window(
                    (scale + t * direction) * x,
                    np.asarray(start, x.dtype),
                    function,
                    (2, 2),
                    (1, 2),
                    ((1, 0), (0, 1)),
                    base,
                    window,
                )

            bounds = transform(pooled)(bj.LpBall(x, 0.3))
            result += bounds.lower.sum() + 2.0 * bounds.upper.sum()
        return result

    with jax.enable_x64(True):
        (_, gradient), (ahead, _), (behind, _) = total(0.0), total(1e-6), total(-1e-6)
        np.testing.assert_allclose(gradient, (ahead - behind) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_window_lines_at_ties_and_points(sign):
    op = next(op for op in all_ops() if op.name == "reduce_max" and op.sign == 1)
    op = op if sign > 0 else next(op for op in all_ops() if op.name == "reduce_min")
    ends = [(-1.0, 1.0), (-1.0, -1.0), (0.0, 1.0), (1.0, 1.0)]
    for intervals in itertools.product(ends, repeat=3):
        lower, upper = (np.array(end, np.float32) for end in zip(*intervals, strict=True))
        lines = jax.device_get(
            extremum.window_lines(op, jnp.asarray(lower), jnp.asarray(upper), None)
        )
        inputs = points(np.random.default_rng(0), lower, upper, 200)
        values = sign * (sign * inputs).max(1)
        assert (inputs @ lines.lower_slope + lines.lower_intercept <= values + 1e-6).all()
        assert (inputs @ lines.upper_slope + lines.upper_intercept >= values - 1e-6).all()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.take(x, jnp.array([0, 2, 2, 5]), mode="fill", fill_value=5.0),
        lambda x: jnp.take(x, jnp.array([0, 3, 7]), mode="clip"),
        lambda x: x.at[jnp.array([1, 9])].get(mode="fill", fill_value=-3.0),
        lambda x: jax.lax.dynamic_slice(x, (2,), (2,)),
        lambda x: jax.lax.dynamic_slice(x, (9,), (2,)),
        lambda x: jnp.pad(x, 1, mode="edge"),
        lambda x: jnp.pad(x, 2, mode="reflect"),
        lambda x: jax.lax.pad(x, jnp.float32(7.0), [(1, -1, 2)]),
        lambda x: jnp.where(jnp.array([True, False, True, False]), x, 9.0),
        lambda x: jnp.where(jnp.array([True, False, True, False]), 9.0, -x),
        lambda x: jnp.concatenate([x, jnp.full(2, 8.0), x[::-1]]),
        lambda x: jnp.diff(x, prepend=1.0),
        lambda x: jnp.cumsum(x[::-1]),
        lambda x: jnp.repeat(x, 2),
        lambda x: jnp.flip(jnp.roll(x, 1)),
        lambda x: jnp.outer(x, jnp.arange(3.0)),
        lambda x: jnp.triu(jnp.outer(jnp.ones(4), x)),
        lambda x: x / jnp.array([2.0, -3.0, 0.5, 1e-3]),
        lambda x: 3.0 - x,
        lambda x: jnp.float32(2.0) * -x + 1.0,
        lambda x: jax.image.resize(x, (7,), "linear"),
        lambda x: jax.lax.stop_gradient(x) - x[::-1],
    ],
)
def test_linear_ops_with_constants_keep_their_offset(function):
    """Fails if the backward walk forgets an offset: a pad or fill value, or an addend."""
    lower, upper = box(4)
    contains_samples(lambda x: jax.nn.relu(function(x)) + function(x), lower, upper)


@pytest.mark.parametrize("left", [True, False])
def test_products_with_a_constant_on_either_side(left):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)

    def function(x):
        return jnp.einsum("ab,bc->ac", matrix, x) if left else jnp.einsum("ab,cb->ac", x, matrix)

    contains_samples(lambda x: jax.nn.relu(function(x)).sum(0), *box(4, 4))


CONVOLUTIONS = [
    {"window_strides": (1, 1), "padding": "VALID"},
    {"window_strides": (2, 2), "padding": ((1, 1), (1, 1))},
    {"window_strides": (2, 1), "padding": ((0, 2), (1, 0))},
    {"window_strides": (1, 2), "padding": "SAME", "rhs_dilation": (2, 1)},
    {"window_strides": (3, 3), "padding": ((-1, 0), (0, 0))},
    {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    {"window_strides": (1, 1), "padding": ((1, 1), (0, 1)), "lhs_dilation": (2, 2)},
]


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        *[(options, ("NHWC", "HWIO", "NHWC")) for options in CONVOLUTIONS],
        *[(options, ("NCHW", "OIHW", "NCHW")) for options in CONVOLUTIONS[1:3]],
    ],
    ids=str,
)
@pytest.mark.sampled(6)
def test_convolution_lowerings_agree_in_value_and_gradient(options, layout):
    """The sub-pixel form of a transposed convolution agrees with XLA's own."""
    rng = np.random.default_rng(0)
    groups = options.get("feature_group_count", 1)
    kernel = rng.normal(size=(3, 2, 4 // groups, 6)).astype(np.float32)
    x = rng.normal(size=(7, 6, 4)).astype(np.float32)
    if layout[0] == "NCHW":
        kernel, x = kernel.transpose(3, 2, 0, 1), x.transpose(2, 0, 1)

    def total(lowering):
        def bound(kernel, x):
            def function(x):
                y = jax.lax.conv_general_dilated(
                    x[None], kernel, dimension_numbers=layout, **options
                )[0]
                return jax.nn.relu(y).reshape(-1, 2).sum(0)

            with convolution.transposed_convolution(lowering):
                bounds = bj.linear(function, sides="lower")(bj.LpBall(x, 0.3))
            return (bounds.lower * jnp.array([1.0, -2.0])).sum()

        return jax.jit(jax.value_and_grad(bound, argnums=(0, 1)))(
            jnp.asarray(kernel), jnp.asarray(x)
        )

    def close(ours, expected):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)

    jax.tree.map(close, total("subpixel"), total("native"))


def test_precision_is_full_whatever_the_model_was_traced_with():
    """Products in TF32 or bfloat16 would make wrong certificates on accelerators."""

    def function(x):
        return jnp.dot(x, jnp.ones((3, 2)), precision="fastest")

    text = str(jax.make_jaxpr(bj.interval(function))(bj.Box(jnp.zeros(3), jnp.ones(3))))
    assert "HIGHEST" in text
    assert "DEFAULT" not in text


@pytest.mark.parametrize("position", [-0.5, 1.5, 1e6])
def test_a_slope_policy_outside_its_range_cannot_make_a_wrong_bound(position):
    def policy(lower, upper):
        return jnp.full_like(lower, position)

    lower, upper = box(5, scale=2.0)

    def function(x):
        return jax.nn.relu(x) - 0.5 * x

    contains_samples(function, lower, upper, [lambda f: pure_linear(f, policy)])


def test_lipschitz_constants_bound_the_slope():
    """The table's Lipschitz constant against difference quotients."""
    functions = {
        "relu": jax.nn.relu,
        "leaky_relu": lambda x: jax.nn.leaky_relu(x, -1.7),
        "tanh": jnp.tanh,
        "logistic": jax.nn.sigmoid,
        "softplus": jax.nn.softplus,
        "abs": jnp.abs,
    }
    with jax.enable_x64(True):
        lower, upper = np.array([-3.0, -1.0, 0.5, -2.0]), np.array([-1.0, 2.0, 3.0, 0.1])
        grid = lower + np.linspace(0.0, 1.0, 400)[:, None] * (upper - lower)
        for name, function in functions.items():
            node = trace(function, jnp.asarray(lower)).nodes[-1]
            assert node.primitive == name
            constant = node.op.lipschitz(node, jnp.asarray(lower), jnp.asarray(upper))
            values = np.asarray(function(jnp.asarray(grid)))
            slopes = np.abs(np.diff(values, axis=0) / np.diff(grid, axis=0)).max(0)
            assert (slopes <= np.asarray(constant) + 1e-9).all(), name


def test_slopes_that_were_used_give_the_same_bounds_again():
    """A clip has two free lines, each with its own entry."""
    weights = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)

    def function(x):
        return jnp.clip(x @ weights, -1.0, 1.0) @ weights.T

    ball = bj.LpBall(jnp.zeros(4), 0.7)

    @on_host
    def twice(ball):
        bounds, aux = bj.linear(function, has_aux=True)(ball)
        return bounds, bj.linear(function, slopes=aux.slopes)(ball), aux.slopes

    bounds, again, slopes = twice(ball)
    assert sorted(slopes) == ["clip", "clip:below"]
    np.testing.assert_allclose(again, bounds, rtol=1e-6)
    with pytest.raises(KeyError, match=r"entry 'relu' for no op; known: clip"):
        bj.linear(function, slopes={**slopes, "relu": 1.0})(ball)


def test_bounds_that_contradict_each_other_are_nan():
    known, wrong = bj.Interval(jnp.zeros(2), jnp.ones(2)), bj.Interval(jnp.full(2, 1.1), 2.0)
    assert np.isnan(known.intersect(wrong)).all()
    rounded = bj.Interval(jnp.full(2, 1.0 + 1e-6), jnp.full(2, 2.0))
    lower, upper = known.intersect(rounded)
    assert (lower <= upper).all()


NAMED = [op for op in all_ops() if op.traced_as is not None and not isinstance(op, Expansion)]


@pytest.mark.parametrize("op", NAMED, ids=lambda op: op.name)
def test_a_function_of_jax_is_recognised_by_its_entry(op):
    knots = np.float32([0.0, 1.0])
    ends_of = {"clip": (-0.5, 0.5), "_interp": (knots, knots)}
    ends = ends_of.get(op.name, (3.0,) if op.name in ("remainder", "floor_divide") else ())
    if "right of them" in op.note:
        ends = (*ends, np.float32(2.0))
    (_, node) = trace(lambda x: op.traced_as(x, *ends), jnp.zeros(2)).nodes
    assert node.op is op

    # A user's function that happens to have the name is inlined.
    def other(x):
        return 3.0 * x

    other.__name__ = op.name
    nodes = trace(jax.jit(other), jnp.zeros(2)).nodes
    assert [node.primitive for node in nodes] == ["input", "mul"]


def test_the_facts_of_ops_hold():
    rng = np.random.default_rng(0)
    commutative = {op.name for op in all_ops() if op.commutative}
    assert commutative == {"add", "mul", "max", "min"}
    x, y = rng.normal(size=(2, 5)).astype(np.float32)
    for name in commutative:
        primitive = getattr(jax.lax, f"{name}_p")
        np.testing.assert_array_equal(primitive.bind(x, y), primitive.bind(y, x))
    assert {op.name for op in all_ops() if op.moves_only} == {
        *("broadcast_in_dim", "reshape", "squeeze", "transpose", "copy", "stop_gradient")
    }


def test_an_op_that_is_refused_today_can_be_added(monkeypatch):
    def function(x):
        return jax.lax.linalg.cholesky(x.reshape(1, 1), symmetrize_input=False)

    box = bj.Box(jnp.array([1.0]), jnp.array([4.0]))
    with pytest.raises(bj.UnsupportedOpError, match="factors or inverts a matrix"):
        bj.interval(function)(box)
    monkeypatch.setattr(table, "_TABLE", {k: list(v) for k, v in table._TABLE.items()})
    # Of one number it is the square root, which is monotone.
    bj.ops.register(
        bj.ops.Scalar(
            name="cholesky",
            image=lambda node, lower, upper: (node.apply(lower), node.apply(upper)),
            lines=None,
            lipschitz=None,
        )
    )
    bounds = bj.interval(function)(box)
    np.testing.assert_allclose(bounds.lower, [[1.0]], rtol=1e-6)
    np.testing.assert_allclose(bounds.upper, [[2.0]], rtol=1e-6)
