"""Rows in windows against complete rows, on convolutional graphs of every shape."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax import windows
from boundjax.ops import channels_last, matmul
from boundjax.tracing.trace import trace
from boundjax.transforms import backward

NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")


def conv(x, kernel, stride=1, padding="SAME", layout=NHWC, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 2, padding, dimension_numbers=layout, **options
    )


def kernels(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s) / np.sqrt(np.prod(s[:-1]))) for s in shapes]


def strided(x):
    a, b, c = kernels((3, 3, 2, 4), (4, 4, 4, 3), (3, 3, 3, 5))
    x = jax.nn.relu(conv(x[None], a))
    x = jax.nn.relu(conv(x, b, 2, [(1, 1), (1, 1)]) + 0.1)
    return conv(x, c)[0]


def wide_padding(x):
    a, b = kernels((3, 2, 2, 3), (3, 3, 3, 4))
    x = jnp.tanh(conv(x[None], a, 2, [(0, 3), (2, 1)]))
    return jnp.abs(conv(x, b, 1, [(4, 3), (3, 4)]))[0] - 0.5


def grouped_and_dilated(x):
    a, b = kernels((3, 3, 2, 4), (2, 3, 2, 6))
    x = jax.nn.leaky_relu(conv(x[None], a, rhs_dilation=(2, 1)), 0.2)
    return conv(x, b, 2, "VALID", feature_group_count=2)[0]


def residual(x):
    a, b, c, d = kernels((3, 3, 2, 4), (3, 3, 4, 4), (3, 3, 4, 4), (1, 1, 4, 4))
    x = conv(x[None], a)
    y = conv(jax.nn.relu(x), b, 2)
    y = conv(jax.nn.relu(y), c) - conv(x, d, 2, [(0, 0), (0, 0)])
    return jax.nn.relu(y)[0]


def normalised(x):
    a, b, scale = *kernels((3, 3, 2, 4), (3, 3, 4, 3)), jnp.arange(-1.0, 3.0)
    x = (conv(x[None], a) - 0.3) * scale[None, None, None] + 0.2
    return conv(jax.nn.relu(x) * jnp.linspace(0.5, 1.0, 6)[None, :, None, None], b)[0]


def channels_first(x):
    a, b = kernels((4, 2, 3, 3), (3, 4, 2, 3))
    x = jnp.transpose(x, (2, 0, 1))[None]
    x = jax.nn.relu(conv(x, a, 1, "SAME", NCHW))
    return jnp.transpose(conv(x, b, 2, "SAME", NCHW)[0], (2, 1, 0))


def pooled(x):
    a, b = kernels((3, 3, 2, 4), (2, 2, 6, 3))
    y = jax.nn.relu(conv(x[None], a))
    y = jnp.concatenate([y, -y[..., :2]], axis=-1)
    window = (1, 3, 2, 1)
    y = jax.lax.reduce_window(y, 0.0, jax.lax.add, window, (1, 2, 1, 1), "SAME") / 6.0
    y = jnp.pad(y, ((0, 0), (1, 0), (2, 1), (0, 0)))
    return conv(jax.nn.relu(y - 0.1), b, 1, "VALID")[0]


def maximum_pooled(x):
    a, b = kernels((3, 3, 2, 4), (3, 3, 4, 3))
    y = conv(x[None], a)
    y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return conv(y, b)[0]


def one_axis(x):
    a, b = kernels((3, 2, 4), (3, 4, 3))
    layout, x = ("NWC", "WIO", "NWC"), x.reshape(1, 36, 2)
    y = jax.lax.conv_general_dilated(x, a, (2,), "SAME", dimension_numbers=layout)
    y = jax.nn.relu(y)
    return jax.lax.conv_general_dilated(y, b, (1,), "SAME", dimension_numbers=layout)[0]


FUNCTIONS = (
    strided,
    wide_padding,
    grouped_and_dilated,
    residual,
    normalised,
    channels_first,
    pooled,
    maximum_pooled,
    one_axis,
)
SHAPE = (6, 6, 2)
X = np.ones(SHAPE, np.float32)
# One worker runs all tests of a function, which share its bounds.
named = pytest.mark.parametrize(
    "function",
    [pytest.param(f, marks=pytest.mark.xdist_group(f"windows {f.__name__}")) for f in FUNCTIONS],
    ids=lambda f: f.__name__,
)


def ball(seed, eps=0.1):
    rng = np.random.default_rng(seed)
    return bj.LpBall(jnp.asarray(rng.normal(size=SHAPE)), eps, clip=(-2.0, 2.0))


@functools.cache
def bounds(function, **options):
    with jax.enable_x64(True):
        run = jax.jit(bj.linear(function, intermediate="linear", **options))
        return jax.device_get([run(ball(seed)) for seed in range(3)])


def bounds_of_complete_rows(function, **options):
    """Bounds with windows disabled: none counts as smaller than complete rows."""
    with mock.patch.object(windows, "smaller", return_value=False):
        return bounds.__wrapped__(function, **options)


@named
@pytest.mark.sampled(4)
def test_windows_give_the_bounds_of_complete_rows(function):
    ours = bounds(function)
    expected = bounds_of_complete_rows(function)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


@named
@pytest.mark.sampled(4)
def test_blocks_give_the_same_bounds(function):
    ours = bounds(function, max_bytes=2000)
    np.testing.assert_allclose(ours, bounds(function), rtol=1e-9, atol=1e-9)


@named
def test_rows_are_the_derivatives_of_linear_parts(function):
    """Compares coefficients, not only bounds, up to the first nonlinear op."""
    with jax.enable_x64(True):
        traced = trace(function, jnp.zeros(SHAPE))
        first = next(n for n in traced.nodes[1:] if not hasattr(n.op, "local"))
        node = traced.nodes[first.inputs[0]]
        indices = jnp.arange(0, node.size, 3)

        def linear_part(x):
            values = [x]
            for inner in traced.nodes[1 : node.index + 1]:
                values.append(inner.apply(*(values[i] for i in inner.inputs)))
            return values[-1].reshape(-1)[indices]

        @jax.jit
        def rows_and_jacobian(x):
            starts = windows.Windowed.of_units(indices, node.shape, node.dtype)
            zeros = [jnp.zeros(n.shape) for n in traced.nodes]
            result = backward.pull_back(traced, zeros, {node.index: starts}, None, "lower").below
            return windows.dense(result.coefficients), jax.jacobian(linear_part)(x)

        rows, expected = rows_and_jacobian(jnp.ones(SHAPE))
    np.testing.assert_allclose(rows, expected, rtol=1e-12, atol=1e-12)


def test_windows_are_small_and_frames_tell_their_size():
    with jax.enable_x64(True):
        traced = trace(strided, jnp.zeros(SHAPE))
        last = max(n.index for n in traced.nodes if n.primitive == "conv_general_dilated")
        middle = traced.nodes[last].inputs[0]
        frames = backward.frames_of(traced, middle)
        sizes = [[axis.size for axis in frames[i]] for i in sorted(frames)]
    assert sizes[-1] == [1, 1, 1, 1]  # a unit of the second convolution
    assert [1, 4, 4, 4] in sizes  # its patch of the first
    assert sizes[0] == [6, 6, 2]  # the whole image, where a window would not pay


@pytest.mark.xdist_group("windows strided")
def test_a_budget_of_rows_bounds_the_widest_units():
    everything, nothing = bounds(strided), bounds(strided, max_rows=1)
    some = bounds(strided, max_rows=20)
    all_rows = bounds(strided, max_rows=10_000)
    np.testing.assert_allclose(all_rows, everything, rtol=1e-9, atol=1e-9)
    for tight, middle, loose in zip(everything, some, nothing, strict=True):
        widths = [np.mean(result.upper - result.lower) for result in (tight, middle, loose)]
        assert widths[0] < widths[1] < widths[2]


@pytest.mark.parametrize("options", [{"max_bytes": 2000}, {"max_rows": 20}], ids=str)
@pytest.mark.sampled(3)
def test_blocks_under_vmap_and_grad(options):
    with jax.enable_x64(True):
        balls = [ball(seed) for seed in range(2)]
        together = jax.tree.map(lambda *leaves: jnp.stack(jnp.broadcast_arrays(*leaves)), *balls)

        def total(scale, input_set, options):
            def scaled(x):
                return scale * strided(x * scale)

            result = bj.linear(scaled, intermediate="linear", sides="lower", **options)(input_set)
            return result.lower.sum()

        run = functools.partial(total, options=options)
        mapped = jax.jit(jax.vmap(run, in_axes=(None, 0)))(1.0, together)
        single = jax.jit(jax.value_and_grad(run))
        for value, input_set in zip(mapped, balls, strict=True):
            expected, slope = single(1.0, input_set)
            np.testing.assert_allclose(value, expected, rtol=1e-9)
            ahead, behind = (single(1.0 + h, input_set)[0] for h in (1e-6, -1e-6))
            np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize("optimize_intermediate", [False, True])
@pytest.mark.sampled(3)
def test_slopes_of_windows_are_those_of_complete_rows(optimize_intermediate):
    slopes = bj.optimized(1, per_spec=True, optimize_intermediate=optimize_intermediate)
    ours = bounds(strided, slopes=slopes)
    expected = bounds_of_complete_rows(strided, slopes=slopes)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


def logarithmic(x):
    a, b = kernels((3, 3, 2, 4), (3, 3, 4, 3))
    x = jnp.log(jnp.abs(conv(x[None], a)) + 0.5)
    return jax.nn.relu(conv(x, b))[0].sum((0, 1))


@pytest.mark.slow
def test_functions_with_a_domain_at_the_border():
    # Windows extend beyond the border, where there are no intervals and coefficients are 0.
    slopes = bj.optimized(1, optimize_intermediate=True)
    ours = bounds(logarithmic, slopes=slopes)
    expected = bounds_of_complete_rows(logarithmic, slopes=slopes)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [((0, 0), (1, 2)), ((3, 1), (2, 4))], ids=str)
def test_channels_last_convolutions_and_their_derivatives(groups, padding):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        rows = jnp.asarray(rng.normal(size=(3, 6, 5, 4)))
        (kernel,) = kernels((3, 2, 4 // groups, 6))
        how = {"padding": padding, "dilation": (1, 2), "groups": groups}

        def plain(rows, kernel):
            return conv(rows, kernel, 1, padding, rhs_dilation=(1, 2), feature_group_count=groups)

        def ours(rows, kernel):
            return channels_last.convolution(rows, kernel, **how)

        def derivatives(f):
            def total(rows, kernel):
                return jnp.sum(jnp.sin(f(rows, kernel)))

            mapped = jax.vmap(f, in_axes=(0, None))(jnp.stack([rows, -rows]), kernel)
            both = jax.vmap(f)(jnp.stack([rows, -rows]), jnp.stack([kernel, 2 * kernel]))
            return total(rows, kernel), jax.grad(total, (0, 1))(rows, kernel), mapped, both

        result, expected = (jax.jit(derivatives, static_argnums=0)(f) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), result, expected)


def test_absolute_weights_in_parts(monkeypatch):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        values, weights = jnp.asarray(rng.normal(size=(3, 8))), jnp.asarray(rng.normal(size=(8, 5)))

        def results(parts):
            monkeypatch.setattr(matmul, "_CACHED_BYTES", weights.nbytes // parts)
            monkeypatch.setattr(matmul, "_WORTHWHILE_PARTS", 2)

            def total(values, weights):
                return jnp.sum(jnp.sin(matmul.absolute_product(values, weights)))

            text = str(jax.make_jaxpr(total)(values, weights))
            assert ("scan" in text) == (parts in (2, 4))  # 8 is no multiple of 3
            return jax.jit(jax.value_and_grad(total, (0, 1)))(values, weights)

        whole = results(1)
        expected = np.sin(values @ np.abs(weights)).sum()
        np.testing.assert_allclose(whole[0], expected, rtol=1e-12)
        for parts in (2, 3, 4):
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-9), results(parts), whole
            )


def test_values_without_elements():
    def function(x):
        y = jax.nn.relu(conv(x[None, :2], jnp.ones((3, 3, 2, 2), x.dtype), 1, "VALID"))
        return y.sum() + x.sum(), y

    ends, empty = jax.jit(bj.linear(function, intermediate="linear"))(bj.Box(-X, X))
    np.testing.assert_allclose(ends, (-72.0, 72.0))
    assert empty.lower.size == 0


@pytest.mark.parametrize("operation", [jax.lax.mul, jax.lax.div])
@pytest.mark.parametrize("channels", [np.arange(1.0, 5.0), np.full(4, 2.0)], ids=["each", "one"])
def test_a_factor_that_repeats_the_value_is_not_folded(operation, channels):
    (kernel,) = kernels((6, 6, 2, 4))
    kernel, channels = np.float32(kernel), jnp.asarray(channels, jnp.float32)

    def function(x):
        y = conv(x[None], kernel, 1, "VALID")
        return operation(y, jnp.broadcast_to(channels, (1, 3, 5, 4))).sum()

    for transform in (bj.interval, bj.linear):
        bounds = jax.jit(transform(function))(bj.Box(X, X))
        np.testing.assert_allclose(bounds, [function(X)] * 2, rtol=1e-5)


def test_batch_normalisation_is_folded():
    primitives = [node.primitive for node in trace(normalised, jnp.zeros(SHAPE)).nodes]
    # A factor per row of the image, unlike one per channel, cannot be folded.
    assert primitives.count("mul") == 1
