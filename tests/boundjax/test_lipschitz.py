"""Ball and box: sound on every network, no looser than either alone, exact in known cases."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import BY_NAME, SEEDS, each_network, on_host, values_function
from hypothesis import given
from networks import ball_points

import boundjax as bj

# Networks without products of perturbed values, so that they have Lipschitz constants.
WITH_CONSTANTS = ("mlp", "cnn", "transposed", "residual", "linen", "pooling", "leaky", "rare")


@functools.cache
def bounds_over_ball(name, p, clip, box):
    network = BY_NAME[name]

    @on_host
    def run(weights, center, eps):
        function = functools.partial(network.flat, weights)
        ball = bj.LpBall(center, eps, p=p, clip=clip)
        size = function(center).size
        rows = jnp.concatenate([jnp.eye(size), jnp.ones((1, size))]).astype(center.dtype)
        result, aux = bj.lipschitz(function, box=box, has_aux=True)(ball, rows)
        return result, aux.output, aux.output.interval()

    return run


def ball_of(rng, shape):
    return jnp.asarray(rng.normal(size=shape)), float(rng.choice([0.0, 0.05, 0.3, 2.0]))


@each_network(*BY_NAME)
@given(seed=SEEDS)
@pytest.mark.sampled(7)
def test_balls_and_boxes_contain_samples(name, seed):
    check_ball(name, 2, None, True, seed)


@each_network(*WITH_CONSTANTS)
@given(seed=SEEDS)
@pytest.mark.sampled(4)
def test_balls_alone_contain_samples(name, seed):
    check_ball(name, 2, None, False, seed)


@pytest.mark.parametrize("p", [1, 3, np.inf])
@given(seed=SEEDS)
@pytest.mark.sampled(3)
def test_bounds_over_other_balls_contain_samples(p, seed):
    check_ball("mlp", p, (-1.5, 1.5), True, seed)


def check_ball(name, p, clip, box, seed):
    network, rng = BY_NAME[name], np.random.default_rng(seed)
    with jax.enable_x64(True):
        weights = network.weights(seed, np.float64)
        center, eps = ball_of(rng, network.input_shape)
        center = center if clip is None else jnp.clip(center, *clip)
        margins, ball, interval = bounds_over_ball(name, p, clip, box)(weights, center, eps)
        inputs = ball_points(rng, np.ravel(center), eps, p, clip)
        inputs = jnp.asarray(inputs.reshape(-1, *network.input_shape))
        outputs = values_function(network)(weights, inputs)
    slack = 1e-10 * (1 + np.abs(outputs).max())
    offsets = np.linalg.norm(outputs - ball.center, axis=1)
    assert (offsets <= ball.radius + slack).all()
    rows = np.concatenate([outputs, outputs.sum(1, keepdims=True)], axis=1)
    for ends, values in ((interval, outputs), (margins, rows)):
        assert (values >= ends.lower - slack).all()
        assert (values <= ends.upper + slack).all()


@functools.cache
def compared(name):
    """Lower bounds on outputs: intervals over a ball, BCP, and intervals over the enclosing box."""
    network = BY_NAME[name]

    @on_host
    def run(weights, center, eps):
        function = functools.partial(network.flat, weights)
        rows = jnp.eye(function(center).size, dtype=center.dtype)
        ball, box = bj.LpBall(center, eps, p=2), bj.Box(center - eps, center + eps)
        pairs = (bj.interval, ball), (bj.lipschitz, box), (bj.interval, box)
        return [transform(function)(input_set, rows).lower for transform, input_set in pairs]

    return run


@each_network("mlp", "cnn", "residual", "rare")
@given(seed=SEEDS)
@pytest.mark.sampled(4)
def test_ball_and_box_are_no_looser_than_either(name, seed):
    network, rng = BY_NAME[name], np.random.default_rng(seed)
    with jax.enable_x64(True):
        center, eps = ball_of(rng, network.input_shape)
        weights = network.weights(seed, np.float64)
        interval, of_box, interval_of_box = compared(name)(weights, center, eps)
        # The last row is the sum of the outputs.
        both, ball = (
            bounds_over_ball(name, 2, None, box)(weights, center, eps)[0].lower[:-1]
            for box in (True, False)
        )
    slack = 1e-9 * (1 + np.abs(interval).max() + np.abs(ball).max())
    assert (both >= ball - slack).all()
    assert (both >= interval - slack).all()
    assert (of_box >= interval_of_box - slack).all()


def dense_net(seed, *widths):
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=s) / np.sqrt(s[0]) for s in itertools.pairwise(widths)]
    biases = [0.3 * rng.normal(size=n) for n in widths[1:]]

    def function(x):
        for w, b in zip(weights[:-1], biases[:-1], strict=True):
            x = jax.nn.relu(x @ w + b)
        return x @ weights[-1] + biases[-1]

    return function, weights, rng.normal(size=widths[0])


def test_without_a_box_it_is_the_margin_of_lipschitz_constants():
    with jax.enable_x64(True):
        function, weights, x = dense_net(0, 6, 40, 30, 4)
        eps, specification = 0.3, bj.margin_specification(jnp.int32(2), 4, dtype=jnp.float64)
        norms = [np.linalg.norm(w, 2) for w in weights]
        rows = np.asarray(specification) @ weights[-1].T
        expected = specification @ function(x) - eps * norms[0] * norms[1] * np.linalg.norm(
            rows, axis=1
        )
        run = jax.jit(bj.lipschitz(function, box=False))
        bounds = run(bj.LpBall(x, eps, p=2), specification)
        np.testing.assert_allclose(bounds.lower, expected, rtol=1e-2)
        assert (bounds.lower <= expected + 1e-12).all()  # the norms behind it are upper bounds
        given = dict(zip(bj.spectral_norms(function, x), norms[:3], strict=True))
        exact = jax.jit(bj.lipschitz(function, box=False, norms=given))
        bounds = exact(bj.LpBall(x, eps, p=2), specification)
        np.testing.assert_allclose(bounds.lower, expected, rtol=1e-12)
        np.testing.assert_allclose(
            bj.global_lipschitz(function, x, given), np.prod(norms), rtol=1e-12
        )


@pytest.mark.parametrize("transform", [bj.lipschitz, bj.interval, bj.linear])
def test_first_layer_of_a_ball_is_exact(transform):
    with jax.enable_x64(True):
        function, weights, x = dense_net(1, 5, 7, 3)
        ball = bj.LpBall(x, 0.2, p=2)
        # After a normalisation of the input, too.
        run = transform(lambda x: function((3.0 * x - 1.0) / 1.5), has_aux=True)

        @on_host
        def first_of(ball):
            aux = run(ball, jnp.eye(3)[:1])[1]
            (first,) = (aux if transform is bj.interval else aux.pre_activations).values()
            return first.interval() if transform is bj.lipschitz else first

        first = first_of(ball)
        reach = 0.2 * 2.0 * np.linalg.norm(weights[0], axis=0)
        middle = 0.5 * (first.lower + first.upper)
        np.testing.assert_allclose(first.upper - middle, reach, rtol=1e-12)


def image_net(x):
    rng = np.random.default_rng(0)
    a, b, c = (
        jnp.asarray(rng.normal(size=s) / 6, x.dtype) for s in ((3, 3, 2, 4), (4, 4, 4, 6), (54, 3))
    )
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=numbers)
    x = jax.nn.relu(conv(x[None], a, (1, 1), "SAME"))
    x = jax.nn.relu(conv(x, b, (2, 2), ((1, 1), (1, 1))))
    return x.reshape(-1) @ c


def test_power_iteration_approaches_the_bounds_from_below():
    x = jnp.zeros((6, 6, 2))
    labels = []

    @jax.jit
    def start(x):
        bounds = bj.spectral_norms(image_net, x)
        labels.extend(bounds)
        return bounds, bj.power_vectors(image_net, x, jax.random.key(0))

    bounds, vectors = start(x)
    assert labels == ["conv_general_dilated", "conv_general_dilated_1", "dot_general"]
    step = jax.jit(lambda vectors: bj.power_iteration(image_net, x, vectors))
    for _ in range(100):
        norms, vectors = step(vectors)
        assert all(norms[k] <= bounds[k] for k in bounds)
    for label, norm in norms.items():
        np.testing.assert_allclose(norm, bounds[label], rtol=0.01)
        np.testing.assert_allclose(np.linalg.norm(vectors[label]), 1.0, rtol=1e-5)


def test_gradients_of_norms_and_of_margins():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        weights = [jnp.asarray(rng.normal(size=s)) for s in ((4, 5), (5, 3))]
        x = jnp.asarray(rng.normal(size=4))

        def function(weights, x):
            return jnp.tanh(x @ weights[0]) @ weights[1]

        def total(weights, eps):
            apply = functools.partial(function, weights)
            vectors = bj.power_vectors(apply, x, jax.random.key(0))
            vectors = jax.lax.fori_loop(
                0, 59, lambda _, v: bj.power_iteration(apply, x, v)[1], vectors
            )
            norms, _ = bj.power_iteration(apply, x, vectors)
            bounds = bj.lipschitz(apply, norms=norms)
            rows = bj.margin_specification(jnp.int32(1), 3, dtype=x.dtype)
            return bounds(bj.LpBall(x, eps, p=2), rows).lower.sum()

        slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(weights, 0.1)
        value = jax.jit(total)
        for k, (row, column) in ((0, (1, 2)), (1, (3, 0))):
            ahead, behind = (
                value(
                    [w.at[row, column].add(h) if i == k else w for i, w in enumerate(weights)], 0.1
                )
                for h in (1e-6, -1e-6)
            )
            np.testing.assert_allclose(
                slopes[0][k][row, column], (ahead - behind) / 2e-6, rtol=1e-4
            )
        slope = (value(weights, 0.1 + 1e-6) - value(weights, 0.1 - 1e-6)) / 2e-6
        np.testing.assert_allclose(slopes[1], slope, rtol=1e-5)


def test_what_has_no_constant_is_named():
    x = jnp.ones(3)
    with pytest.raises(ValueError, match=r"'exp' at .*test_lipschitz.* has no Lipschitz constant"):
        bj.global_lipschitz(lambda x: jnp.exp(x).sum(), x)
    with pytest.raises(ValueError, match=r"has no Lipschitz constant.*'bcp'"):
        bj.lipschitz(lambda x: x * x[::-1], box=False)(bj.LpBall(x, 0.1, p=2))
    np.testing.assert_allclose(bj.global_lipschitz(lambda x: jnp.tanh(2 * x), x), 2.0, rtol=1e-6)
    np.testing.assert_allclose(bj.global_lipschitz(lambda x: x.sum(), x), 3**0.5, rtol=1e-6)
    assert bj.global_lipschitz(lambda x: jnp.ones(2), x) == 0.0


def test_bad_arguments():
    function, _, x = dense_net(0, 6, 40, 4)
    x = x.astype(np.float32)
    with pytest.raises(
        ValueError, match=r"one entry per linear layer \(dot_general, dot_general_1"
    ):
        bj.lipschitz(function, norms={"dense": 1.0})(bj.LpBall(x, 0.1, p=2))
    with pytest.raises(ValueError, match="layer without units"):
        bj.lipschitz(lambda x: x @ jnp.zeros((6, 0)) @ jnp.ones((0, 2)))(bj.LpBall(x, 0.1, p=2))
    with pytest.raises(ValueError, match="p must be a norm's order"):
        bj.LpBall(x, 0.1, p=0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("method", ["bcp", "lmt"])
@pytest.mark.sampled(4)
def test_weights_that_are_not_finite_certify_nothing(method, layer, bad):
    _, weights, x = dense_net(0, 6, 40, 4)
    weights = [w.astype(np.float32) for w in weights]
    weights[layer][0, 0] = bad

    def model(xs):
        return jax.nn.relu(xs @ weights[0]) @ weights[1]

    certificate = bj.certify(
        model, x[None].astype(np.float32), 1e-6, labels=np.array([0]), norm=2, method=method
    )
    assert not certificate.verified.any()


def test_certify_refuses_weights_that_are_not_finite(tiny_model):
    module, variables, xs = tiny_model
    broken = jax.tree.map(lambda a: a.at[(0,) * a.ndim].set(jnp.nan), variables)
    with pytest.raises(ValueError, match=r"the weights \['params'\].* must be finite, got nan"):
        bj.certify((module, broken), xs, 0.1, norm=2, method="bcp")


@pytest.fixture
def tiny_model():
    import flax.linen as nn

    module = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3)])
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    return module, module.init(jax.random.key(0), xs), xs


@pytest.mark.slow
def test_certify_in_l2(tiny_model):
    module, variables, xs = tiny_model
    certificate = {
        method: bj.certify((module, variables), xs, 0.05, norm=2, method=method).margins
        for method in ("lmt", "bcp", "crown", "best")
    }
    assert (certificate["bcp"] >= certificate["lmt"] - 1e-5).all()
    for method in ("lmt", "bcp", "crown"):
        assert (certificate["best"] >= certificate[method] - 1e-5).all()
    assert (certificate["bcp"] > -10).all()


@pytest.mark.parametrize("box", [True, False])
def test_tau_of_a_linear_function_is_known(box):
    # Without a clip range <w_i - w_j, x> grows by at most eps ||w_i - w_j||.
    matrix = jax.random.normal(jax.random.key(0), (3, 6))
    ball = bj.LpBall(jax.random.normal(jax.random.key(1), (6,)), 0.7, 2.0)
    translation = functools.partial(bj.diagnostics.mean_translation, lambda x: matrix @ x, box=box)
    result = jax.jit(translation)(ball)
    lengths = [np.linalg.norm(matrix[i] - matrix[j]) for i in range(3) for j in range(3) if i != j]
    # BCP also uses the box around the ball, which does not help here.
    assert float(result) == pytest.approx(0.7 * np.mean(lengths), rel=1e-4)


# --- functions of whole rows ----------------------------------------------------------------------


def _unit(x):
    return x / (jnp.linalg.norm(x) + 0.5)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (jax.nn.softmax, 0.5),
        (lambda x: jax.nn.softmax(x.reshape(2, 2), axis=0), 0.5),
        (jax.nn.log_softmax, 2.0),
        (jax.nn.logsumexp, 1.0),
        (lambda x: jax.nn.logsumexp(x.reshape(2, 2), axis=1), 1.0),
        (jnp.linalg.norm, 1.0),
        (_unit, 2.0),
        (lambda x: x / jnp.maximum(jnp.linalg.norm(x), 0.5), 2.0),
        (lambda x: x * jax.lax.rsqrt(jnp.sum(x * x) + 0.25), 2.0),
        (lambda x: x * jax.lax.rsqrt(jnp.mean(x * x) + 0.25), 2.0),
    ],
)
@pytest.mark.sampled(4)
def test_constants_of_rows_are_the_largest_slopes(function, expected):
    constant = float(bj.global_lipschitz(function, jnp.zeros(4)))
    np.testing.assert_allclose(constant, expected, rtol=1e-6)
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(2000, 4)), 1e-4 * rng.normal(size=(50, 4)), 9 * np.eye(4)])
    x = np.concatenate([x, [[3.0, 3.0, -9.0, -9.0], [3.0, -9.0, 3.0, -9.0]]])
    jacobians = jax.jit(jax.vmap(jax.jacobian(function)))(jnp.asarray(x, jnp.float32))
    sampled = np.linalg.norm(np.reshape(jacobians, (len(x), -1, 4)), 2, axis=(1, 2)).max()
    assert sampled <= constant * (1.0 + 1e-5)
    assert sampled >= 0.97 * constant  # no constant is better


def test_a_softmax_without_an_operand_bound_has_a_ball():
    def function(x):
        return jax.nn.softmax(2.0 * x)

    ball = bj.lipschitz(function, box=False)(bj.LpBall(jnp.zeros(4), 0.1, p=2))
    np.testing.assert_allclose(ball.radius, 0.1, rtol=1e-5)
    rounded = bj.lipschitz(function, rounding="float32")(bj.LpBall(jnp.zeros(4), 0.1, p=2))
    assert 0.05 <= rounded.radius <= 0.1001


def test_a_unit_vector_without_eps_has_no_constant():
    with pytest.raises(ValueError, match=r"'integer_pow' at .* has no Lipschitz constant"):
        bj.global_lipschitz(lambda x: x / jnp.linalg.norm(x), jnp.zeros(3))
