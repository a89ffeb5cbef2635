"""Loss and gradient along an update: closed forms, NumPy again, and the theorems on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host

import boundjax as bj
from boundjax.diagnostics import MULTIPLES, landscape
from boundjax.training import robust_cross_entropy

# --- closed forms ---------------------------------------------------------------------------------


def _quadratic(theta, hessian, constant):
    return 0.5 * theta @ hessian @ theta + constant


def _symmetric(rng, *shape):
    matrix = rng.normal(size=(*shape, shape[-1]))
    return matrix + np.swapaxes(matrix, -1, -2)


def _cosine(first, second):
    return first @ second / np.linalg.norm(first) / np.linalg.norm(second)


def test_measures_of_a_quadratic_loss_are_closed_forms():
    rng = np.random.default_rng(0)
    hessian, theta, rate = _symmetric(rng, 7), rng.normal(size=7), 0.03
    with jax.enable_x64(True):
        measured = landscape(_quadratic)(theta, rate, hessian, 2.0)
        measured = jax.device_get(measured)
    gradient = hessian @ theta
    steps = np.array([0.0, *sorted([*np.geomspace(0.5, 5, 10), 1.0])])
    points = theta - rate * steps[:, None] * gradient
    losses = 0.5 * np.einsum("ki,ij,kj->k", points, hessian, points) + 2.0
    after = gradient - rate * hessian @ gradient
    change = rate * np.linalg.norm(hessian @ gradient)
    expected = {
        "multiples": steps,
        "losses": losses,
        "gradient_differences": steps * change,
        "gradient_norm": np.linalg.norm(gradient),
        "variation": losses.max() - losses.min(),
        "gradient_difference": change,
        "gradient_rmse": change / np.sqrt(7),
        "cosine_distance": 1 - _cosine(gradient, after),
        "gradient": gradient,
        "smoothness": np.linalg.norm(hessian @ gradient) / np.linalg.norm(gradient),
    }
    assert set(expected) == set(measured._fields)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(measured, name), value, rtol=1e-9, err_msg=name)
    assert measured.losses.argmin() > 0  # the step is a descent


def _softmax_loss(params, images, labels):
    logits = images @ params["kernel"] + params["bias"][None]
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


def _plain_softmax(flat, images, labels):
    """The loss and its gradient in NumPy, of the kernel `[4, 3]` and the bias in one vector."""
    logits = images @ flat[:12].reshape(4, 3) + flat[12:]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = odds / odds.sum(axis=1, keepdims=True)
    loss = -np.log(shares[np.arange(len(labels)), labels]).mean()
    residuals = (shares - np.eye(3)[labels]) / len(labels)
    return loss, np.concatenate([(images.T @ residuals).ravel(), residuals.sum(axis=0)])


def test_measures_of_a_pytree_along_another_direction_are_those_of_numpy():
    rng = np.random.default_rng(1)
    images, labels = rng.normal(size=(6, 4)), rng.integers(3, size=6)
    flat, direction, rate, multiples = rng.normal(size=15), rng.normal(size=15), 0.7, (2.0, 0.25)

    def tree(vector):
        return {"kernel": vector[:12].reshape(4, 3), "bias": vector[12:]}

    with jax.enable_x64(True):
        measure = landscape(_softmax_loss, multiples)
        ours = measure(tree(flat), rate, images, labels, direction=tree(direction))
        ours = jax.device_get(ours)
        inside = jax.jit(measure)(tree(flat), rate, images, labels, direction=tree(direction))
        inside = jax.device_get(inside)
    steps = np.array([0.0, 0.25, 1.0, 2.0])
    results = [_plain_softmax(flat - rate * k * direction, images, labels) for k in steps]
    losses = np.array([loss for loss, _ in results])
    gradients = np.array([gradient for _, gradient in results])
    changes = np.linalg.norm(gradients - gradients[0], axis=1)
    lengths = steps[1:] * rate * np.linalg.norm(direction)
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-12)
    np.testing.assert_allclose(ours.gradient_differences, changes, rtol=1e-10)
    np.testing.assert_allclose(ours.variation, losses.max() - losses.min(), rtol=1e-10)
    np.testing.assert_allclose(ours.gradient_difference, changes[2], rtol=1e-10)
    np.testing.assert_allclose(ours.gradient_rmse, changes[2] / np.sqrt(15), rtol=1e-10)
    np.testing.assert_allclose(ours.gradient_norm, np.linalg.norm(gradients[0]), rtol=1e-10)
    angle = 1 - _cosine(gradients[0], gradients[2])
    np.testing.assert_allclose(ours.cosine_distance, angle, rtol=1e-9)
    np.testing.assert_allclose(ours.smoothness, (changes[1:] / lengths).max(), rtol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), ours, inside)


def _certified_loss(params, x, eps, key):
    """CROWN-IBP with slopes that the key draws, on a tiny network."""

    def bound(image, part):
        network = lambda v: params[1] @ jax.nn.relu(params[0] @ v)  # noqa: E731
        slopes = bj.slopes.uniform(part)
        rows = jnp.asarray([[1.0, -1.0, 0.0], [1.0, 0.0, -1.0]])
        bounds = bj.linear(network, slopes=slopes, sides="lower", has_aux=True)
        return robust_cross_entropy(bounds(bj.LpBall(image, eps), rows)[1].linear.lower)

    return jnp.mean(jax.vmap(bound)(x, jax.random.split(key, len(x))))


def _certified_problem():
    keys = jax.random.split(jax.random.key(3), 3)
    shapes = ((6, 4), (3, 6), (2, 4))
    first, second, x = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    return (first, second), x


def test_the_loss_at_no_step_is_the_loss_bit_for_bit_and_all_points_share_the_key():
    params, x = _certified_problem()
    compiled = jax.jit(jax.value_and_grad(_certified_loss))
    measure = landscape(_certified_loss, (1.0,))
    at = {}
    for seed in (0, 1):
        key = jax.random.key(seed)
        at[seed] = measured = measure(params, 0.1, x, 0.2, key)
        loss, gradient = compiled(params, x, 0.2, key)
        assert float(measured.losses[0]) == float(loss)
        moved = jax.tree.map(lambda p, g: p - np.float32(0.1) * g, params, gradient)
        after = compiled(moved, x, 0.2, key)[0]
        np.testing.assert_allclose(measured.losses[1], after, rtol=1e-6)
    assert float(at[0].losses[0]) != float(at[1].losses[0])  # the key matters


def test_the_target_radius_is_measured_along_the_scheduled_update():
    params, x = _certified_problem()
    key, measure = jax.random.key(0), landscape(_certified_loss, (1.0,))
    gradient = jax.jit(jax.grad(_certified_loss))
    scheduled = gradient(params, x, 0.05, key)
    measured = measure(params, 0.1, x, 0.3, key, direction=scheduled)
    moved = jax.tree.map(lambda p, g: p - np.float32(0.1) * g, params, scheduled)
    change = jax.tree.map(jnp.subtract, gradient(moved, x, 0.3, key), gradient(params, x, 0.3, key))
    expected = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in change))
    np.testing.assert_allclose(measured.gradient_difference, expected, rtol=1e-4)
    assert measured.gradient_difference != measure(params, 0.1, x, 0.3, key).gradient_difference


def test_nan_shows_in_every_measure():
    def loss(theta):  # log has no value after the update
        return jnp.sum(jnp.log(theta))

    measured = jax.device_get(landscape(loss)(jnp.asarray([0.3, 3.0]), 1.0))
    for name in ("variation", "gradient_difference", "cosine_distance", "smoothness"):
        finite = np.isfinite(getattr(measured, name))
        assert finite == (name not in ("variation",)), name
    measured = jax.device_get(landscape(lambda t: jnp.sum(jnp.sqrt(t)))(jnp.asarray([0.1]), 1.0))
    for name in ("variation", "gradient_difference", "cosine_distance", "smoothness"):
        assert np.isnan(getattr(measured, name)), name


def test_the_step_lengths_of_the_paper():
    assert len(MULTIPLES) == 10
    np.testing.assert_allclose([MULTIPLES[0], MULTIPLES[-1]], [0.5, 5.0])
    ratios = np.array(MULTIPLES[1:]) / MULTIPLES[:-1]
    np.testing.assert_allclose(ratios, 10 ** (1 / 9))


@pytest.mark.parametrize(
    ("multiples", "message"),
    [
        ((), "multiples must hold at least one step length, got none"),
        ((1.0, 0.0), r"multiples must be positive and finite \(0 is added\), got 0.0"),
        ((float("nan"),), r"multiples must be positive and finite \(0 is added\), got nan"),
    ],
)
def test_step_lengths_that_are_none(multiples, message):
    with pytest.raises(ValueError, match=message):
        landscape(_quadratic, multiples)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan"), np.ones(2)])
def test_a_rate_that_is_none(rate):
    with pytest.raises(ValueError, match="rate must be a positive, finite scalar, got"):
        landscape(_quadratic)(jnp.ones(2), rate, jnp.eye(2), 0.0)


def test_a_direction_of_another_shape():
    with pytest.raises(ValueError, match=r"direction must have the structure and shapes of params"):
        landscape(_quadratic)(jnp.ones(2), 1.0, jnp.eye(2), 0.0, direction=jnp.ones(3))


# --- Lemma 3.3.1 and Theorem 3.3.1 of Lee's thesis ------------------------------------------------

# A step of these multiples of the best one proves the theorem's decrease (alpha = 2).
ENDS = 1 + np.sqrt(0.5) * np.array([-1.0, 1.0])


def _descents(count=5000, size=6):
    """Random quadratic losses of the target radius, and gradients of the scheduled one."""
    rng = np.random.default_rng(7)
    hessian, theta = _symmetric(rng, count, size), rng.normal(size=(count, size))
    other = rng.normal(size=(count, size))
    curvature = np.einsum("ki,kij,kj->k", other, hessian, other)
    # The theorem needs u^T H u > 0, an acute angle and a positive loss.
    hessian *= np.sign(curvature)[:, None, None]
    gradient = np.einsum("kij,kj->ki", hessian, theta)
    other *= np.sign(np.sum(gradient * other, axis=1))[:, None]
    value = 0.5 * np.sum(theta * gradient, axis=1)
    constant = np.maximum(-value, 0.0) + rng.uniform(0.1, 2.0, size=count)
    best = np.sum(gradient * other, axis=1) / abs(curvature)
    return rng, theta, hessian, constant, other, best


def _measure_many(theta, hessian, constant, other, rate):
    def one(theta, rate, hessian, constant, other):
        return landscape(_quadratic, (1.0,))(theta, rate, hessian, constant, direction=other)

    with jax.enable_x64(True):
        return on_host(jax.vmap(one))(theta, rate, hessian, constant, other)


def _promised(theta, hessian, constant, other, smoothness):
    """The right hand side of the theorem, with the largest mu that it allows."""
    gradient = np.einsum("kij,kj->ki", hessian, theta)
    loss = 0.5 * np.sum(theta * gradient, axis=1) + constant
    squared = np.sum(gradient**2, axis=1)
    mu = squared / (2 * loss)
    cosine = np.sum(gradient * other, axis=1) / np.sqrt(squared * np.sum(other**2, axis=1))
    return loss, loss * (1 - mu / 2 * cosine**2 / smoothness)


def test_lemma_3_3_1_the_smoothness_is_at_least_the_curvature():
    _, theta, hessian, constant, other, best = _descents()
    measured = _measure_many(theta, hessian, constant, other, best)
    u = other / np.linalg.norm(other, axis=1, keepdims=True)
    # (3.3.19): of a quadratic loss the difference of the gradients is that of the Hessian.
    lengths = np.linalg.norm(np.einsum("kij,kj->ki", hessian, u), axis=1)
    np.testing.assert_allclose(measured.smoothness, lengths, rtol=1e-6)
    curvatures = np.einsum("ki,kij,kj->k", u, hessian, u)
    assert (curvatures <= lengths * (1 + 1e-12)).all()
    eigenvalues, vectors = np.linalg.eigh(hessian[0])  # an eigenvector of a positive one is tight
    u = vectors[:, -1]
    np.testing.assert_allclose(u @ hessian[0] @ u, np.linalg.norm(hessian[0] @ u))
    assert eigenvalues[0] < 0 < eigenvalues[-1]


def test_theorem_3_3_1_bounds_the_loss_after_every_allowed_step():
    rng, theta, hessian, constant, other, best = _descents()
    problem = theta, hessian, constant, other
    factors = rng.uniform(*ENDS, size=len(best))
    factors[:1000], factors[1000:2000] = ENDS
    measured = _measure_many(*problem, best * factors)
    loss, promised = _promised(*problem, measured.smoothness)
    np.testing.assert_allclose(measured.losses[:, 0], loss, rtol=1e-9, atol=1e-9)
    scale = 1e-9 * (1 + abs(loss) + constant)
    assert (measured.losses[:, 1] <= promised + scale).all()
    assert (promised < loss).all()
    # Longer steps are outside of the theorem, and some of them break the bound.
    beyond = _measure_many(*problem, 2.2 * best)
    assert (beyond.losses[:, 1] > promised + scale).mean() > 0.5


def test_theorem_3_3_1_is_attained_along_an_eigenvector():
    theta, hessian = np.array([[2.0, 0.0]]), np.array([np.diag([3.0, 1.0])])
    other, constant, best = np.array([[6.0, 0.0]]), np.array([0.5]), 1 / 3
    for factor in ENDS:
        measured = _measure_many(theta, hessian, constant, other, np.array([factor * best]))
        _, promised = _promised(theta, hessian, constant, other, measured.smoothness)
        np.testing.assert_allclose(measured.losses[:, 1], promised, rtol=1e-12)


# --- Proposition 3.3.1 and Theorem 3.3.2 of Lee's thesis ------------------------------------------

SIZES, RADIUS = (4, 5, 3), 0.4
ROWS = np.array([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])  # s_m = z_m - z_y, for y = 0


def _relaxed(theta, x, slopes):
    """`s`, `g` and `b` of the upper bounds `s_m = max g_m x + b_m` over an l2 ball."""
    inputs, hidden, classes = SIZES
    first, theta = theta[: hidden * inputs].reshape(hidden, inputs), theta[hidden * inputs :]
    bias, theta = theta[:hidden], theta[hidden:]
    second, last = theta[: classes * hidden].reshape(classes, hidden), theta[classes * hidden :]
    network = lambda v: second @ jax.nn.relu(first @ v + bias) + last  # noqa: E731
    bounds = bj.linear(network, slopes=slopes, sides="upper", has_aux=True)
    _, aux = bounds(bj.LpBall(x, RADIUS, 2.0), jnp.asarray(ROWS))
    return aux.linear.upper, aux.coefficients.upper_coefficients, aux.coefficients.upper_bias


def _pairs_of_parameters(count=300):
    """Parameters before and after a step, of many lengths, and inputs."""
    rng = np.random.default_rng(11)
    inputs, hidden, classes = SIZES
    size = hidden * inputs + hidden + classes * hidden + classes
    first = 0.5 * rng.normal(size=(count, size))
    step = rng.normal(size=(count, size)) * np.geomspace(1e-3, 1, count)[:, None]
    return first, first + step, rng.normal(size=(count, inputs))


def _jacobians(slopes, first, second, x):
    """At both parameters: `s [m]`, and the Jacobians of `s`, `g` and `b`."""

    def both(theta, x):
        jacobians = jax.jacrev(lambda t: _relaxed(t, x, slopes))(theta)
        return _relaxed(theta, x, slopes), jacobians

    with jax.enable_x64(True):
        run = on_host(jax.vmap(both))
        return run(first, x), run(second, x)


def _terms(slopes):
    """Per example and margin: the change of `grad s`, and the three terms that bound it."""
    first, second, x = _pairs_of_parameters()
    ((s1, g1, _), (js1, jg1, jb1)), ((s2, g2, _), (js2, jg2, jb2)) = _jacobians(
        slopes, first, second, x
    )
    largest = np.linalg.norm(x, axis=1) + RADIUS
    spectral = lambda j: np.linalg.norm(j, ord=2, axis=(-2, -1))  # noqa: E731
    change = np.linalg.norm(js1 - js2, axis=-1)
    terms = (
        [2 * RADIUS * spectral(jg) for jg in (jg1, jg2)],
        largest[:, None] * spectral(jg1 - jg2),
        np.linalg.norm(jb1 - jb2, axis=-1),
    )
    return (s1, s2), (js1, js2), (g1, g2), change, terms


@pytest.mark.parametrize("slopes", ["adaptive", "parallel", "zero", "one"])
@pytest.mark.sampled(4)
def test_proposition_3_3_1_bounds_the_change_of_the_gradient_of_a_bound(slopes):
    *_, change, (zeroth, first_order, bias) = _terms(slopes)
    for term in zeroth:  # at either of the two parameters
        assert (change <= (term + first_order + bias) * (1 + 1e-9) + 1e-12).all()
    assert (change > bias * (1 + 1e-6)).any()  # the bias alone does not explain it


def test_proposition_3_3_1_of_interval_bounds_has_only_its_last_term():
    _, _, gradients, change, (zeroth, first_order, bias) = _terms("constant")
    assert not np.any(gradients)
    assert not np.any(zeroth)
    assert not np.any(first_order)
    np.testing.assert_allclose(change, bias, rtol=1e-9, atol=1e-12)
    assert change.max() > 0.1


@pytest.mark.parametrize("slopes", ["constant", "adaptive", "one"])
@pytest.mark.sampled(4)
def test_theorem_3_3_2_bounds_the_gradient_difference_of_the_loss(slopes):
    """Of `log(1 + sum exp s_m)`, with measured terms in place of Lipschitz constants."""
    (s1, s2), (js1, js2), _, _, (zeroth, first_order, bias) = _terms(slopes)

    def probabilities(s):
        return np.exp(s) / (1 + np.exp(s).sum(axis=1, keepdims=True))

    p1, p2 = probabilities(s1), probabilities(s2)
    gradients = [np.einsum("km,kmp->kp", p, j) for p, j in ((p1, js1), (p2, js2))]
    difference = np.linalg.norm(gradients[0] - gradients[1], axis=1)
    moved = np.linalg.norm(p1 - p2, axis=1)
    norms = [np.linalg.norm(j, ord=2, axis=(1, 2)) for j in (js1, js2)]
    for term, norm in zip(zeroth, norms, strict=True):
        promised = (term + first_order + bias).max(axis=1) + norm * moved
        assert (difference <= promised * (1 + 1e-9) + 1e-12).all()
    assert difference.max() > 0.1

    # The gradient of that loss is the one that training takes.
    first, _, x = _pairs_of_parameters()
    with jax.enable_x64(True):
        loss = lambda t, x: robust_cross_entropy(-_relaxed(t, x, slopes)[0])  # noqa: E731
        ours = on_host(jax.vmap(jax.grad(loss)))(first, x)
    np.testing.assert_allclose(ours, gradients[0], rtol=1e-8, atol=1e-10)
