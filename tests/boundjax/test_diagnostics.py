"""Measures of slopes, ReLUs and layers: golden values, NumPy again, and claims of the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host

import boundjax as bj
from boundjax import diagnostics, training

WIDTHS = (4, 6, 5, 3)


def _weights(seed=0):
    rng = np.random.default_rng(seed)
    pairs = zip(WIDTHS[1:], WIDTHS[:-1], strict=True)
    return [rng.normal(size=shape).astype(np.float32) for shape in pairs]


def _network(weights, x):
    for weight in weights[:-1]:
        x = jax.nn.relu(weight @ x)
    return weights[-1] @ x


def _relaxed(slopes, batch=8, eps=0.3, **options):
    """Bounds and auxiliary values of a batch, `[B, 3]`, as NumPy arrays."""
    x = np.random.default_rng(1).normal(size=(batch, 4)).astype(np.float32)
    network = functools.partial(_network, _weights())
    bounds = bj.linear(network, slopes=slopes, sides="lower", has_aux=True, **options)
    return on_host(jax.vmap(lambda x: bounds(bj.LpBall(x, eps), jnp.eye(3))))(x)


def _interval(*bounds):
    return bj.Interval(*np.array(bounds, np.float32).T)


# --- slopes ---------------------------------------------------------------------------------------


def _plain_shares(pre_activations, slopes):
    """Fractions of slopes 0, between and 1 among the unstable ReLUs, in NumPy."""
    lower, upper, positions = (
        np.concatenate([np.ravel(part[label]) for label in slopes])
        for part in (
            {k: b.lower for k, b in pre_activations.items()},
            {k: b.upper for k, b in pre_activations.items()},
            slopes,
        )
    )
    used = positions[(lower < 0) & (upper > 0)]
    zero, one = np.mean(used == 0), np.mean(used == 1)
    return zero, 1 - zero - one, one


@pytest.mark.parametrize(
    ("slopes", "expected"),
    [
        ("adaptive", None),
        ("parallel", (0.0, 1.0, 0.0)),
        ("zero", (1.0, 0.0, 0.0)),
        ("one", (0.0, 0.0, 1.0)),
        (0.25, (0.0, 1.0, 0.0)),
        (bj.optimized(1), None),
    ],
)
def test_shares_of_slopes(slopes, expected):
    _, aux = _relaxed(slopes)
    shares = on_host(diagnostics.slope_shares)(aux.pre_activations, aux.slopes)
    plain = _plain_shares(aux.pre_activations, aux.slopes)
    np.testing.assert_allclose(shares, plain, rtol=1e-6, atol=1e-7)
    if expected is None:
        assert shares.zero > 0.1
        assert shares.one > 0.05
    else:
        np.testing.assert_allclose(shares, expected, atol=1e-7)
    states = training.relu_states(aux.pre_activations)
    assert 0.1 < states.unstable < 0.9  # slopes of stable ReLUs are not counted


def test_shares_are_undefined_without_unstable_relus_and_with_nan():
    stable = {"relu": _interval((1, 2), (-2, -1), (0, 3))}
    assert np.isnan(diagnostics.slope_shares(stable, {"relu": np.zeros(3, np.float32)})).all()
    bounds = {"relu": _interval((-1, 2), (-2, 1), (1, 3))}
    slopes = np.array([0.0, 1.0, np.nan], np.float32)  # NaN at a stable ReLU is not used
    np.testing.assert_array_equal(
        diagnostics.slope_shares(bounds, {"relu": slopes}), (0.5, 0.0, 0.5)
    )
    assert np.isnan(diagnostics.slope_shares(bounds, {"relu": slopes[::-1]})).all()
    bounds["relu"].upper[0] = np.nan
    assert np.isnan(diagnostics.slope_shares(bounds, {"relu": slopes})).all()


def test_methods_without_slopes_have_no_shares():
    _, aux = _relaxed("constant")
    with pytest.raises(ValueError, match="slopes must hold the positions of at least one ReLU"):
        diagnostics.slope_shares(aux.pre_activations, aux.slopes)
    linear = bj.linear(lambda x: _weights()[0] @ x, has_aux=True)
    _, aux = linear(bj.LpBall(jnp.ones(4), 0.1), jnp.eye(6))
    with pytest.raises(ValueError, match="slopes must hold the positions of at least one ReLU"):
        diagnostics.slope_shares(aux.pre_activations, aux.slopes)


def test_slopes_that_do_not_match_the_bounds():
    bounds = {"relu": _interval((-1, 2), (-2, 1))}
    with pytest.raises(ValueError, match=r"slopes has an entry 'elu' without bounds, got .* relu"):
        diagnostics.slope_shares(bounds, {"elu": np.zeros(2)})
    with pytest.raises(ValueError, match=r"relu: slopes must have the shape \(2,\) of the bounds"):
        diagnostics.slope_shares(bounds, {"relu": np.zeros((3, 2))})


# --- relaxed gradients ----------------------------------------------------------------------------


def test_changes_of_relaxed_gradients_are_those_of_numpy():
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(5, 3, 4)).astype(np.float32) for _ in range(2))
    first[0, 0, 0], second[0, 1, 0] = 0.0, 0.0
    change = on_host(diagnostics.relaxed_gradient_change)(first, second)
    signs = np.abs(np.sign(first) - np.sign(second)) / 2
    np.testing.assert_allclose(change.flipped, signs.reshape(5, -1).mean(axis=1), rtol=1e-6)
    lengths = np.linalg.norm((first - second).reshape(5, -1), axis=1)
    np.testing.assert_allclose(change.distance, lengths, rtol=1e-6)
    golden = diagnostics.relaxed_gradient_change(
        np.array([[1.0, -1.0, 0.0, 2.0]]), np.array([[-2.0, -1.0, 4.0, 2.0]])
    )
    np.testing.assert_array_equal(golden.flipped, [(1 + 0.5) / 4])
    np.testing.assert_array_equal(golden.distance, [5.0])


def test_relaxed_gradients_of_linear_functions_are_constant_and_of_intervals_zero():
    bounds = bj.linear(lambda x: _weights()[0] @ x, sides="lower", has_aux=True)
    first, second = (
        bounds(bj.LpBall(jnp.full((4,), value), eps), jnp.eye(6))[1].coefficients.lower_coefficients
        for value, eps in ((1.0, 0.1), (-3.0, 0.7))
    )
    change = diagnostics.relaxed_gradient_change(first, second)
    assert not np.any(change.flipped)
    assert not np.any(change.distance)
    _, aux = _relaxed("constant")
    assert not np.any(aux.coefficients.lower_coefficients)
    _, aux = _relaxed("adaptive")
    assert np.all(aux.coefficients.lower_coefficients)


def test_relaxed_gradients_of_two_shapes():
    with pytest.raises(ValueError, match=r"first and second must have one shape \[m, \*input\]"):
        diagnostics.relaxed_gradient_change(jnp.ones((2, 3)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"first and second must have one shape \[m, \*input\]"):
        diagnostics.relaxed_gradient_change(jnp.ones(3), jnp.ones(3))


# --- ReLUs ----------------------------------------------------------------------------------------


def test_states_and_histograms_by_layer_are_those_of_numpy():
    _, aux = _relaxed("adaptive", batch=40)
    bounds = aux.pre_activations
    states = on_host(diagnostics.relu_states_by_layer)(bounds)
    histograms = on_host(functools.partial(diagnostics.slope_histograms, bins=7))(bounds)
    assert list(states) == list(histograms) == ["relu", "relu_1"]
    for label, (lower, upper) in bounds.items():
        dead, active = upper <= 0, (upper > 0) & (lower >= 0)
        unstable = ~dead & ~active
        plain = active.mean(), unstable.mean(), dead.mean()
        np.testing.assert_allclose(states[label], plain, atol=1e-6)
        slopes = upper[unstable] / (upper - lower)[unstable]
        counts, _ = np.histogram(slopes, bins=7, range=(0, 1))
        np.testing.assert_array_equal(histograms[label], counts)
        assert counts.sum() == unstable.sum() > 40
    together = training.relu_states(bounds)
    sizes = np.array([bounds[label].lower.size for label in states])
    mean = sizes @ np.array(list(states.values())) / sizes.sum()
    np.testing.assert_allclose(together, mean, atol=1e-6)


def test_the_histogram_of_known_slopes():
    # Every unit has bounds [-1, 3], so every slope is 3 / 4, in the bin [0.74, 0.76).
    (counts,) = diagnostics.slope_histograms({"relu": _interval(*[(-1, 3)] * 12)}).values()
    np.testing.assert_array_equal(np.flatnonzero(counts), [37])
    assert counts[37] == 12
    extreme = _interval((-1e-30, 1), (-1, 1e-30), (0, 1), (-1, 0), (-np.inf, 1), (np.nan, 1))
    (counts,) = diagnostics.slope_histograms({"relu": extreme}, bins=2).values()
    np.testing.assert_array_equal(counts, [1, 1])  # 1 is in the last bin


def test_warmup_measures_are_those_of_numpy_and_have_no_gradient():
    rng = np.random.default_rng(5)
    box = bj.Interval(-rng.uniform(size=(6, 4)), rng.uniform(size=(6, 4)))
    middle = 2 * rng.normal(size=(6, 3)) + 1
    bounds = {
        "relu": bj.Interval(-rng.uniform(-1, 4, size=(6, 5)), rng.uniform(2, 5, size=(6, 5))),
        "relu_1": bj.Interval(middle - 0.5, middle + 0.5),
    }

    def short(part, whole):
        return max(0.8 - part / whole, 0) / 0.8

    tight, balance = [], []
    for lower, upper in bounds.values():
        tight.append(short(np.mean(box.upper - box.lower), np.mean(upper - lower)))
        center, active, dead = (lower + upper) / 2, lower > 0, upper < 0
        total = 0.0
        for values in (abs(center), (center - center.mean()) ** 2):
            sums = sorted((values[active].sum(), values[dead].sum()))
            total += short(*sums) if active.any() and dead.any() else 0.0
        balance.append(total)
    assert balance[0] == 0 < balance[1]
    with jax.enable_x64(True):
        measures = on_host(functools.partial(diagnostics.warmup_measures, tau=0.8))(box, bounds)
        gradient = jax.grad(
            lambda scale: sum(
                diagnostics.warmup_measures(box, jax.tree.map(lambda b: scale * b, bounds))
            )
        )(1.0)
    np.testing.assert_allclose(measures, (np.mean(tight), np.mean(balance)), rtol=1e-9)
    assert gradient == 0


@pytest.mark.parametrize(
    "measure",
    [
        diagnostics.relu_states_by_layer,
        diagnostics.slope_histograms,
        diagnostics.mean_widths,
        functools.partial(diagnostics.width_gains, bj.Interval(jnp.zeros(2), jnp.ones(2))),
        functools.partial(diagnostics.warmup_measures, bj.Interval(jnp.zeros(2), jnp.ones(2))),
    ],
)
def test_no_relus_is_an_error(measure):
    with pytest.raises(ValueError, match="pre_activations must hold the bounds of at least one"):
        measure({})


def test_a_histogram_without_bins():
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        diagnostics.slope_histograms({"relu": _interval((-1, 1))}, bins=0)


# --- layers ---------------------------------------------------------------------------------------

GAINS = {
    "ibp": (training.ibp_normal(), lambda n: 1.0),
    "pytorch": (
        jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        lambda n: np.sqrt(n) / 4,
    ),
    "kaiming": (
        jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
        lambda n: np.sqrt(n / np.pi),
    ),
    "normal": (
        jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
        lambda n: np.sqrt(n / (2 * np.pi)),
    ),
    "orthogonal": (jax.nn.initializers.orthogonal(), lambda n: np.sqrt(n / (2 * np.pi))),
}


@pytest.mark.parametrize("name", GAINS)
def test_difference_gains_of_initial_weights(name):
    initializer, expected = GAINS[name]
    for shape in ((64, 64), (784, 40), (3, 3, 32, 64)):
        if name == "orthogonal" and shape[-1] != shape[0]:
            continue  # the rows of a tall matrix with orthogonal columns are not unit vectors
        kernel = initializer(jax.random.key(0), shape)
        gain = float(diagnostics.difference_gain(kernel))
        n = np.prod(shape[:-1])
        assert gain == pytest.approx(expected(n), rel=0.02), shape
        plain = np.abs(np.asarray(kernel, np.float64)).reshape(n, -1).sum(axis=0).mean() / 2
        assert gain == pytest.approx(plain, rel=1e-5)


def test_the_gain_that_the_paper_names():
    initializer, expected = GAINS["pytorch"]
    assert expected(32768) == pytest.approx(45.25, abs=0.01)
    kernel = initializer(jax.random.key(1), (32768, 8))
    assert float(diagnostics.difference_gain(kernel)) == pytest.approx(45.25, rel=0.01)


@pytest.mark.parametrize(("name", "exact"), [("ibp", 1.0), ("pytorch", np.sqrt(400) / 4)])
def test_gains_of_widths_are_those_of_weights(name, exact):
    """Figure 1: interval bounds keep their width from IBP's weights, and explode from others."""
    initializer, _ = GAINS[name]
    kernels = [initializer(k, (400, 400)) for k in jax.random.split(jax.random.key(2), 3)]

    def network(x):
        for kernel in kernels:
            x = jax.nn.relu(x @ kernel)
        return x

    x = jax.random.normal(jax.random.key(3), (400,))
    bounds = bj.interval(network, has_aux=True)
    box = bj.LpBall(x, 1e-3)
    _, pre_activations = jax.jit(lambda: bounds(box))()
    widths = diagnostics.mean_widths(pre_activations)
    for label, (lower, upper) in pre_activations.items():
        np.testing.assert_allclose(widths[label], np.mean(upper - lower), rtol=1e-5)
    gains = diagnostics.width_gains(box.interval(), pre_activations)
    # No ReLU precedes the first layer. Bounds of later layers grow wide, and half of them is lost.
    np.testing.assert_allclose(gains["relu"], 2 * exact, rtol=0.05)
    for label in ("relu_1", "relu_2"):
        np.testing.assert_allclose(gains[label], exact, rtol=0.2)
    plain = widths["relu_1"] / widths["relu"]
    np.testing.assert_allclose(gains["relu_1"], plain, rtol=1e-6)


def test_the_order_of_layers_can_be_stated():
    box = _interval((0, 1))
    bounds = {"relu_10": _interval((0, 6)), "relu_2": _interval((0, 2))}
    gains = diagnostics.width_gains(box, bounds, ["relu_2", "relu_10"])
    assert gains == {"relu_2": 2.0, "relu_10": 3.0}
    assert list(gains) == ["relu_2", "relu_10"]
    with pytest.raises(ValueError, match=r"labels must be those of pre_activations \(relu_10, rel"):
        diagnostics.width_gains(box, bounds, ["relu_2"])


def test_the_product_of_norms_is_that_of_the_singular_values():
    weights = _weights()
    network = functools.partial(_network, weights)
    norms = bj.spectral_norms(network, jnp.ones(4))
    plain = sum(np.log(np.linalg.norm(weight, ord=2)) for weight in weights)
    product = float(on_host(diagnostics.log_norm_product)(norms))
    assert product == pytest.approx(plain, abs=1e-4)
    # Without branches it is the Lipschitz constant.
    constant = float(bj.global_lipschitz(network, jnp.ones(4)))
    assert np.exp(product) == pytest.approx(constant, rel=1e-4)
    assert diagnostics.log_norm_product({"a": jnp.float32(0), "b": jnp.float32(2)}) == -np.inf
    with pytest.raises(ValueError, match="norms must hold the norm of at least one layer"):
        diagnostics.log_norm_product({})


@pytest.mark.parametrize("shape", [(3,), (0, 3)])
def test_a_kernel_that_is_none(shape):
    with pytest.raises(ValueError, match=r"a kernel needs a shape \[..., in, out\], got"):
        diagnostics.difference_gain(jnp.ones(shape))


# --- REG: Claim 1 and (11) ------------------------------------------------------------------------

# -|x_1| + x_2, which is positive on S_1 = {x_2 >= |x_1| + b}.
FIRST = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
SECOND = np.array([[-1, -1, 1, -1]], np.float32)


@functools.cache
def _regularizers(slopes):
    """`(x, eps, row) -> (bound, d, r, unstable)` of the network of Claim 1, compiled."""

    def network(x):
        return jnp.asarray(SECOND) @ jax.nn.relu(jnp.asarray(FIRST) @ x)

    def measured(x, eps, row):
        bounds = bj.linear(network, slopes=slopes, sides="lower", has_aux=True)
        _, aux = bounds(bj.LpBall(x, eps), row)
        worst = aux.worst_input
        attained = row @ network(worst[0])
        (label,) = aux.pre_activations
        values = {label: worst @ jnp.asarray(FIRST).T}
        gap = training.gap_to_attained(aux.linear.lower, attained)
        slack = training.relaxation_slack(aux.pre_activations, values, aux.rows)
        unstable = diagnostics.relu_states_by_layer(aux.pre_activations)[label].unstable
        return aux.linear.lower[0], gap[0], slack[0], 4 * unstable

    return on_host(measured)


@pytest.mark.parametrize("slopes", ["parallel", "adaptive"])
def test_claim_1_a_relaxation_with_unstable_relus_can_be_tight(slopes):
    """For all of S_1 and every eps < b, in numbers that float32 represents exactly.

    (The row `C_t W_(2:1)` is printed as [-1, 1]; from the slopes above it follows [-a / eps, 1],
    which has the same signs. The margin is positive for eps < b / 2, not for all eps < b.)
    """
    measured = _regularizers(slopes)
    b, row = 0.5, np.ones((1, 1), np.float32)
    unstable_seen = set()
    for eps in (0.125, 0.25):
        for a in (0.0625, 0.1875, 0.3125, 0.5):
            for above in (0.0, 0.25):
                for sign in (1, -1):
                    c = b + a + above
                    x = np.array([sign * a, c], np.float32)
                    bound, gap, slack, unstable = measured(x, np.float32(eps), row)
                    assert bound == c - a - 2 * eps
                    assert gap == 0
                    assert slack == 0
                    assert unstable == (2 if a < eps else 0)
                    unstable_seen.add(int(unstable))
    assert unstable_seen == {0, 2}


@pytest.mark.parametrize("slopes", ["parallel", "adaptive"])
def test_the_other_bound_of_that_network_is_not_tight(slopes):
    x, row = np.array([0.0625, 1.0], np.float32), -np.ones((1, 1), np.float32)
    bound, gap, slack, unstable = _regularizers(slopes)(x, np.float32(0.25), row)
    assert unstable == 2
    assert bound < -1.25  # the largest value is x_2 + eps, at x_1 = 0
    assert gap > 0.1
    assert slack > 0.01


def test_equation_11_relates_l2_and_linf_radii_of_interval_bounds():
    """A 3x3 kernel on 3 channels: boxes of the l2 ball contain those of eps / (3 sqrt 3)."""
    assert 0.25 / (3 * np.sqrt(3)) == pytest.approx(0.04811, abs=1e-5)
    assert 36 / (3 * np.sqrt(3)) == pytest.approx(6.9282, abs=1e-4)
    rng = np.random.default_rng(0)
    image, eps = rng.uniform(size=(5, 5, 3)).astype(np.float32), np.float32(0.25)
    equal = rng.choice(np.array([-0.5, 0.5], np.float32), size=(3, 3, 3, 1))
    kernel = np.concatenate([rng.normal(size=(3, 3, 3, 4)).astype(np.float32), equal], axis=-1)

    def layer(x):
        return jax.lax.conv_general_dilated(
            x[None], kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[0]

    wide = bj.interval(layer)(bj.LpBall(image, eps, 2.0))
    narrow = bj.interval(layer)(bj.LpBall(image, eps / np.float32(np.sqrt(27))))
    radii = np.asarray(wide.radius), np.asarray(narrow.radius)
    flat = kernel.reshape(27, 5)
    lengths = eps * np.linalg.norm(flat, axis=0)
    np.testing.assert_allclose(radii[0], np.broadcast_to(lengths, (3, 3, 5)), rtol=1e-4)
    sums = eps / np.sqrt(27) * np.abs(flat).sum(axis=0)
    np.testing.assert_allclose(radii[1], np.broadcast_to(sums, (3, 3, 5)), rtol=1e-4)
    assert (radii[1][..., :4] < radii[0][..., :4]).all()
    np.testing.assert_allclose(radii[1][..., 4], radii[0][..., 4], rtol=1e-4)  # attained
