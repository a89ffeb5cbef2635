"""Patterns: functions that are or are not recognised by their equations, and their values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host
from flax import nnx
from graphs import graph_values
from graphs import primitives as primitives_at

import boundjax as bj
from boundjax.ir import table
from boundjax.tracing.trace import trace

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
POINTS = jnp.asarray(RNG.normal(size=(5, 3, 4)) * np.array([0.1, 1, 3, 10, 30])[:, None, None])


def primitives(function, x=X):
    return primitives_at(function, x)


def linen(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), X[None])
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    drawn = [jnp.asarray(rng.uniform(0.5, 2.0, size=leaf.shape), leaf.dtype) for leaf in leaves]
    variables = jax.tree.unflatten(tree, drawn)
    return lambda x: module.apply(variables, x[None])[0]


def train_mode_batch_norm(x):
    module = nn.BatchNorm(use_running_average=False)
    variables = module.init(jax.random.key(0), X)
    return module.apply(variables, x, mutable=["batch_stats"])[0]


def centred(x, axis=-1):
    return x - x.mean(axis, keepdims=True)


def by_hand(x):
    return 2.0 * centred(x) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def by_reciprocal(x):
    variance = jnp.mean(centred(x) ** 2, -1, keepdims=True)
    return 3.0 * centred(x) * jnp.reciprocal(jnp.sqrt(1e-3 + variance)) * 0.5


def fast_variance(x):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.mean(x * x, -1, keepdims=True) - mean**2
    return (x - mean) * jax.lax.rsqrt(variance + 1e-3)


def inverse_count(x):
    mean = x.sum(-1, keepdims=True) * 0.25
    variance = jnp.square(x - mean).sum(-1, keepdims=True) * 0.25
    return (x - mean) * jax.lax.rsqrt(variance + 1e-3)


def flax_attention(x):
    heads = x[None, :, None, :]
    return nn.dot_product_attention(heads, heads, heads)[0, :, 0]


def shared_exponential(x):
    weights = jnp.exp(x - jax.lax.stop_gradient(x.max(0, keepdims=True)))
    return weights / weights.sum(0, keepdims=True)


NAMED = {
    "softmax": (jax.nn.softmax, ["log_softmax", "exp"]),
    "softmax of axis 0": (lambda x: jax.nn.softmax(x, axis=0), ["log_softmax", "exp"]),
    "softmax of two axes": (lambda x: jax.nn.softmax(x, axis=(0, 1)), ["log_softmax", "exp"]),
    "softmax by hand": (shared_exponential, ["log_softmax", "exp"]),
    "softmax of two exponentials": (
        lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True),
        ["log_softmax", "exp"],
    ),
    "softmax, shifted twice": (
        lambda x: jax.nn.softmax(x + jnp.arange(3.0)[:, None] - x[:, :1]),
        ["log_softmax", "exp"],
    ),
    "log_softmax": (jax.nn.log_softmax, ["log_softmax"]),
    "log_softmax of axis 0": (lambda x: jax.nn.log_softmax(x, axis=0), ["log_softmax"]),
    "log_softmax by hand": (
        lambda x: x - jax.nn.logsumexp(x, axis=1, keepdims=True),
        ["log_softmax"],
    ),
    "logsumexp": (lambda x: jax.nn.logsumexp(x, axis=0), ["logsumexp"]),
    "logsumexp of all": (jax.nn.logsumexp, ["logsumexp"]),
    "logsumexp by hand": (lambda x: jnp.log(jnp.exp(x).sum(1)), ["logsumexp"]),
    "gelu": (jax.nn.gelu, ["gelu"]),
    "gelu, exact": (lambda x: jax.nn.gelu(x, approximate=False), ["gelu_exact", "copy"]),
    "silu by hand": (lambda x: jax.nn.sigmoid(x) * x, ["silu"]),
    "where": (lambda x: jnp.where(x > 0, x, 0.3 * x), ["hinge"]),
    "where, turned over": (lambda x: jnp.where(jnp.less(0.0, x), -x, x / 4.0), ["hinge"]),
    "where and 0": (lambda x: jnp.where(x < 0, 0.0, x), ["hinge"]),
}


@pytest.mark.parametrize("case", NAMED)
def test_functions_are_named_by_their_equations(case):
    function, expected = NAMED[case]
    result = primitives(function)
    assert [name for name in result if name in expected] == expected
    assert not {"reduce_sum", "div", "sub", "tanh", "erfc", "logistic", "select_n"} & set(result)
    same_values(function)


MASK = jnp.asarray(np.tri(3, 4, 1, dtype=bool))
LEAST = float(jnp.finfo(jnp.float32).min)
MASKED = {
    "softmax": (lambda x: jax.nn.softmax(x, where=MASK), ["log_softmax", "exp"]),
    "softmax, a row for all": (
        lambda x: jax.nn.softmax(x, where=MASK[:1]),
        ["log_softmax", "exp"],
    ),
    "softmax by hand": (
        lambda x: jax.nn.softmax(jnp.where(MASK, x, -jnp.inf)),
        ["log_softmax", "exp"],
    ),
    "softmax, masked twice": (
        lambda x: jax.nn.softmax(jnp.where(MASK, x, -jnp.inf), where=jnp.arange(4)[None] > 0),
        ["log_softmax", "exp"],
    ),
    "softmax of masked exponentials": (
        lambda x: (
            jnp.where(MASK, jnp.exp(x), 0.0)
            / jnp.where(MASK, jnp.exp(x), 0.0).sum(-1, keepdims=True)
        ),
        ["log_softmax", "exp"],
    ),
    "softmax, turned over": (
        lambda x: (
            jnp.where(~MASK, 0.0, jnp.exp(x))
            / jnp.where(~MASK, 0.0, jnp.exp(x)).sum(-1, keepdims=True)
        ),
        ["log_softmax", "exp"],
    ),
    "softmax of a filled mask": (
        lambda x: jax.nn.softmax(jnp.where(MASK, x, -1e9)),
        ["log_softmax", "exp"],
    ),
    "softmax, filled twice, a row entirely": (
        lambda x: jax.nn.softmax(
            jnp.where(jnp.arange(3)[:, None] > 0, jnp.where(~MASK, LEAST, x), LEAST)
        ),
        ["log_softmax", "exp"],
    ),
    "softmax of a filled log_softmax": (
        lambda x: jax.nn.softmax(jax.nn.log_softmax(jnp.where(MASK, x, -1e5))),
        ["log_softmax", "exp"],
    ),
    "log_softmax": (lambda x: jax.nn.log_softmax(x, where=MASK), ["log_softmax"]),
    "logsumexp": (lambda x: jax.nn.logsumexp(x, axis=1, where=MASK), ["logsumexp"]),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("case", MASKED)
def test_masked_functions_are_named_by_their_equations(case, jit):
    function, expected = MASKED[case]
    if jit:  # the mask's broadcasts are tracers

        @jax.jit
        def traced(x):
            result.extend(primitives(function, x))
            return x

        result = []
        traced(X)
    else:
        result = primitives(function)
        same_values(function)
    assert [name for name in result if name in expected] == expected
    assert not {"reduce_sum", "div"} & set(result)


def test_other_masks_of_exponentials_stay():
    functions = (
        # The sum and the exponentials have different masks.
        lambda x: jnp.exp(x) / jnp.where(MASK, jnp.exp(x), 0.0).sum(-1, keepdims=True),
        lambda x: jnp.where(MASK, jnp.exp(x), 1.0) / jnp.exp(x).sum(-1, keepdims=True),
    )
    for function in functions:
        assert "reduce_sum" in primitives(function)
        same_values(function)


NORMALIZED = {
    "layer": linen(nn.LayerNorm()),
    "layer, two passes": linen(nn.LayerNorm(use_fast_variance=False)),
    "layer, plain": linen(nn.LayerNorm(use_scale=False, use_bias=False)),
    "RMS": linen(nn.RMSNorm()),
    "group": linen(nn.GroupNorm(2)),
    "instance": linen(nn.InstanceNorm()),
    "batch, training": train_mode_batch_norm,
    "nnx layer": nnx.LayerNorm(4, rngs=nnx.Rngs(0)),
    "nnx RMS": nnx.RMSNorm(4, rngs=nnx.Rngs(0)),
    "nnx group": lambda x: nnx.GroupNorm(4, 2, rngs=nnx.Rngs(0))(x[None])[0],
    "var": by_hand,
    "reciprocal": by_reciprocal,
    "fast variance": fast_variance,
    "inverse count": inverse_count,
}


@pytest.mark.parametrize("case", NORMALIZED)
def test_normalisation_is_one_op(case):
    function = NORMALIZED[case]
    result = primitives(function)
    assert result.count("normalize") == 1
    # The fast variance's difference of two means is gone: all sums of squares are of d.
    assert result.count("reduce_sum") <= 3
    assert result.count("square") + result.count("integer_pow") == 1
    # The parameters of Flax's modules are float32.
    own = case in ("var", "reciprocal", "fast variance", "inverse count")
    same_values(function, (np.float64, np.float32) if own else (np.float32,))


def both_values(function):
    """The values that the traced graph computes, and the function's own."""
    return on_host(lambda x: (graph_values(function, x), function(x)))


def same_values(function, dtypes=(np.float64, np.float32)):
    for dtype in dtypes:
        slack = 1e-9 if dtype == np.float64 else 2e-3
        with jax.enable_x64(dtype == np.float64):
            run = both_values(function)
            for x in np.asarray(POINTS, dtype):
                # The function itself loses digits that the pattern keeps.
                ours, theirs = run(x)
                assert ours.dtype == dtype
                np.testing.assert_allclose(ours, theirs, rtol=slack, atol=slack)


def test_patterns_are_found_under_jit():
    seen = []

    def look(x):
        for function, _ in NAMED.values():
            seen.append(primitives(function, x))
        for function in (linen(nn.LayerNorm()), linen(nn.RMSNorm()), by_hand, by_reciprocal):
            assert "normalize" in primitives(function, x)
        return x

    jax.jit(look)(X)
    assert seen == [primitives(function) for function, _ in NAMED.values()]


def test_weights_of_a_norm_may_be_traced():
    module = nn.LayerNorm()
    variables = jax.jit(module.init)(jax.random.key(0), X)

    @jax.jit
    def result(variables):
        assert "normalize" in primitives(lambda x: module.apply(variables, x))
        return variables

    result(variables)


def test_prelu_with_a_traced_slope():
    def widths(slope):
        def function(x):
            return jnp.where(x >= 0, x, slope * x)

        assert primitives(function) == ["hinge"]
        return bj.linear(function)(bj.Box(-jnp.ones(2), 2.0 * jnp.ones(2))).width.sum()

    np.testing.assert_allclose(jax.jit(widths)(-0.5), 4.0, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(widths))(0.5), 2.0, rtol=1e-6)


# Functions that differ from a pattern in one place, and the op that must not be recognised.
NEAR_MISSES = {
    "sum over another axis": (
        lambda x: jnp.exp(x[:, :3]) / jnp.exp(x[:, :3]).sum(0)[:, None],
        "log_softmax",
    ),
    "sum of another exponential": (
        lambda x: jnp.exp(x) / jnp.exp(2.0 * x).sum(-1, keepdims=True),
        "log_softmax",
    ),
    "sum of a part": (
        lambda x: jnp.exp(x) / jnp.exp(x[:, :2]).sum(-1, keepdims=True),
        "log_softmax",
    ),
    "sums of other rows": (
        lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)[::-1],
        "log_softmax",
    ),
    "logarithm of a sum and one": (lambda x: jnp.log(1.0 + jnp.exp(x).sum(-1)), "logsumexp"),
    "wrong count": (
        lambda x: centred(x) * jax.lax.rsqrt(jnp.square(centred(x)).sum(-1)[:, None] / 3 + 1e-3),
        "normalize",
    ),
    "mean over another axis": (
        lambda x: centred(x) * jax.lax.rsqrt(jnp.square(centred(x, 0)).mean(0)[None] + 1e-3),
        "normalize",
    ),
    "another numerator": (
        lambda x: x * jax.lax.rsqrt(jnp.square(centred(x)).mean(-1)[:, None] + 1e-3),
        "normalize",
    ),
    "means of other rows": (
        lambda x: x * jax.lax.rsqrt(jnp.square(x).mean(-1)[::-1, None] + 1e-3),
        "normalize",
    ),
    "negative eps": (
        lambda x: x * jax.lax.rsqrt(jnp.square(x).mean(-1)[:, None] - 1e-3),
        "normalize",
    ),
    "quotient turned over": (
        lambda x: jnp.sqrt(jnp.square(x).mean(-1)[:, None] + 1e-3) / x,
        "normalize",
    ),
    "another constant in gelu": (
        lambda x: 0.5 * x * (1.0 + jnp.tanh(0.79 * (x + 0.044715 * x**3))),
        "gelu",
    ),
    "two leaves in silu": (lambda x: x[:, 0] * jax.nn.sigmoid(x[:, 1]), "silu"),
    "another threshold": (lambda x: jnp.where(x > 1.0, x, 0.3 * x), "hinge"),
    "a branch of another value": (lambda x: jnp.where(x > 0, x, 0.3 * x[::-1]), "hinge"),
    "a branch that is a constant": (lambda x: jnp.where(x > 0, x, 1.0), "hinge"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_are_left_alone(case):
    function, name = NEAR_MISSES[case]
    try:
        assert name not in primitives(function)
    except bj.UnsupportedOpError:
        return
    ours, theirs = both_values(function)(X)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_variance_needs_one_value_and_one_set_of_axes():
    for function in (
        lambda x: jnp.mean(x**2, -1) - jnp.mean(2.0 * x, -1) ** 2,
        lambda x: jnp.mean(x[:, :3] ** 2, 0) - jnp.mean(x[:, :3], 1) ** 2,
        lambda x: jnp.mean(x**2, -1) - jnp.mean(x, -1)[::-1] ** 2,
        lambda x: jnp.sum(x**2, -1) / 3.0 - jnp.mean(x, -1) ** 2,
    ):
        assert primitives(function)[-1] == "sub"
        np.testing.assert_allclose(*both_values(function)(X), rtol=1e-5)


def test_fast_variance_does_not_explode():
    """A difference of intervals of squares would be wide; a sum of squares is not."""
    x = 100.0 + X
    box = bj.Box(x - 0.01, x + 0.01)
    fast = on_host(bj.interval(lambda x: jnp.mean(x**2, -1) - jnp.mean(x, -1) ** 2))(box)
    slow = on_host(bj.interval(lambda x: jnp.mean(centred(x) ** 2, -1)))(box)
    np.testing.assert_allclose(fast, slow, rtol=1e-4)


def test_softmax_forgets_what_was_subtracted():
    """The maximum is not in the graph, so shifting the logits costs nothing."""
    box = bj.Box(X - 0.3, X + 0.3)
    functions = (jax.nn.softmax, lambda x: jax.nn.softmax(x - 3.0 * jnp.sum(x, -1, keepdims=True)))
    plain, shifted = (on_host(bj.linear(function))(box) for function in functions)
    np.testing.assert_allclose(plain, shifted, rtol=1e-5, atol=1e-6)


def test_attention_and_its_softmax():
    assert {"log_softmax", "exp"} <= set(primitives(flax_attention))
    same_values(flax_attention)


def test_an_op_that_is_missing_from_the_table_is_not_named(monkeypatch):
    monkeypatch.setitem(table._TABLE, "gelu", [])
    monkeypatch.setitem(table._TABLE, "normalize", [])
    assert "tanh" in primitives(jax.nn.gelu)
    assert "normalize" not in primitives(by_hand)


@pytest.mark.parametrize("function", [jax.nn.softmax, jax.nn.log_softmax, jax.nn.logsumexp])
def test_rows_that_an_added_mask_removes_have_no_finite_bounds(function):
    """Bounds stay NaN or infinite, even though subtracting the maximum would cancel infinities."""
    mask = jnp.asarray([[0.0, 0.0, 0.0], [-jnp.inf] * 3])

    def masked(x):
        return function(x + mask, axis=-1)

    wild = ~np.isfinite(masked(jnp.ones((2, 3))))
    assert wild.any()
    for transform in (bj.interval, bj.linear, bj.forward_linear):
        bounds = on_host(transform(masked))(bj.LpBall(jnp.ones((2, 3)), 0.1))
        assert not np.isfinite(bounds.lower[wild]).any()
        assert not np.isfinite(bounds.upper[wild]).any()


@pytest.mark.parametrize("rounding", ["nearest", "real", "float32"])
@pytest.mark.parametrize("fill", [-jnp.inf, -1e4, -1e9, LEAST])
def test_the_number_that_fills_a_mask_does_not_widen_bounds(fill, rounding):
    box = bj.Box(X - 0.3, X + 0.3)

    def shares(x):
        return jax.nn.softmax(jnp.where(MASK, x, fill))

    for transform in (bj.interval, bj.linear):
        bounds = on_host(transform(shares, rounding=rounding))(box)
        free = on_host(transform(lambda x: jax.nn.softmax(x, where=MASK), rounding=rounding))(box)
        for ours, theirs in zip(bounds, free, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_row_that_is_filled_entirely_is_uniform():
    mask = jnp.asarray([[False] * 4, [True] * 4])
    box = bj.Box(X[:2] - 1.0, X[:2] + 1.0)
    bounds = on_host(bj.linear(lambda x: jax.nn.softmax(jnp.where(mask, x, -1e9))))(box)
    np.testing.assert_allclose(bounds.lower[0], 0.25, rtol=1e-5)
    np.testing.assert_allclose(bounds.upper[0], 0.25, rtol=1e-5)


@pytest.mark.parametrize("transform", [bj.interval, bj.linear, bj.forward_linear])
def test_a_value_below_the_number_that_fills_a_mask(transform):
    """With a value of -2e4 beside a fill of -1e4 the masked entry has all of the weight."""
    box = bj.Box(2e4 * X[:1, :2] - 3e4, 2e4 * X[:1, :2] + 1e2)

    def shares(x):
        return jax.nn.softmax(jnp.where(jnp.asarray([[True, False]]), x, -1e4))

    bounds = on_host(transform(shares))(box)
    for end in box.interval():
        value = np.asarray(shares(end))
        # They may be NaN.
        assert not (bounds.lower > value + 1e-6).any()
        assert not (value > bounds.upper + 1e-6).any()


def test_two_fills_of_one_mask_stay_numbers():
    def shares(x):
        return jax.nn.softmax(jnp.where(MASK, jnp.where(MASK[:, ::-1], x, -1e5), -1e6))

    same_values(shares)
    assert not any("least" in node.params for node in trace(shares, X).nodes)
