"""Curves between networks: golden values of METHODS 6.2, and when a loss has a barrier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from boundjax.diagnostics import barrier, bezier, spread_over_batches
from boundjax.training import cross_entropy


def _params(rng):
    return {"kernel": rng.normal(size=(3, 4)), "layer": {"bias": rng.normal(size=4)}}


def _float32(tree):
    return jax.tree.map(jnp.float32, tree)


def _equal_bits(tree, other):
    def same(a, b):
        a, b = np.asarray(a), np.asarray(b)
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()

    return jax.tree.all(jax.tree.map(same, tree, other))


# --- the curve ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_a_curve_has_its_ends_bit_for_bit(compiled):
    rng = np.random.default_rng(0)
    start, control, end = (_float32(_params(rng)) for _ in range(3))
    start["kernel"] = start["kernel"].at[0, 0].set(-0.0)
    end["kernel"] = end["kernel"].at[0, 1].set(-0.0)
    control["kernel"] = control["kernel"].at[1, 1].set(jnp.inf)
    at = jax.jit(bezier) if compiled else bezier
    assert _equal_bits(at(jnp.float32(0), start, control, end), start)
    assert _equal_bits(at(jnp.float32(1), start, control, end), end)
    assert not _equal_bits(at(jnp.float32(1e-3), start, control, end), start)


def test_the_middle_of_a_curve():
    rng = np.random.default_rng(1)
    start, control, end = (_params(rng) for _ in range(3))
    with jax.enable_x64(True):
        middle = jax.device_get(bezier(0.5, start, control, end))
    expected = jax.tree.map(lambda a, c, b: a / 4 + c / 2 + b / 4, start, control, end)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-15), middle, expected)


def test_a_curve_between_equal_networks_stays_there():
    params = _float32(_params(np.random.default_rng(2)))
    for t in np.linspace(0, 1, 7):
        point = bezier(float(t), params, params, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-7), point, params)


def test_the_middle_of_the_ends_gives_the_straight_segment():
    rng = np.random.default_rng(3)
    start, end = _params(rng), _params(rng)
    control = jax.tree.map(lambda a, b: 0.5 * (a + b), start, end)
    with jax.enable_x64(True):
        for t in (0.2, 0.7):
            point = jax.device_get(bezier(t, start, control, end))
            line = jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, start, end)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), point, line)


@pytest.mark.parametrize("opposite", [True, False])
def test_the_best_control_point_of_a_quadratic_loss(opposite):
    """`E_t |phi(t)|^2 / 2` is least at `-(3/4) (w0 + w1)`, which is 0 for opposite ends."""
    rng = np.random.default_rng(4)
    start = rng.normal(size=5)
    end = -start if opposite else rng.normal(size=5)
    # Five points integrate polynomials of degree 9 exactly; this one has degree 4.
    nodes, weights = np.polynomial.legendre.leggauss(5)

    def mean_loss(control):
        points = jnp.stack([bezier(0.5 + 0.5 * node, start, control, end) for node in nodes])
        return jnp.sum(0.5 * weights * 0.5 * jnp.sum(points**2, axis=-1))

    best = -0.75 * (start + end)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.grad(mean_loss)(best), np.zeros(5), atol=1e-14)
        hessian = jax.hessian(mean_loss)(best)
    # E 4 t^2 (1 - t)^2 = 2/15: the loss is convex, so there is no other minimiser.
    np.testing.assert_allclose(hessian, 2 / 15 * np.eye(5), atol=1e-14)
    if opposite:
        np.testing.assert_array_equal(best, np.zeros(5))
    else:
        assert np.abs(best).min() > 1e-2


def test_the_gradient_in_the_control_point():
    start, control, end = np.random.default_rng(5).normal(size=(3, 4))
    for t in (0.0, 0.3, 1.0):
        with jax.enable_x64(True):
            gradient = jax.grad(lambda c, t=t: jnp.sum(jnp.sin(bezier(t, start, c, end))))(control)
            point = bezier(t, start, control, end)
        np.testing.assert_allclose(gradient, 2 * t * (1 - t) * np.cos(point), atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1, 0.2], [1.0], [1.0], [1.0]), r"t must be a scalar, got the shape \(2,\)"),
        ((0.5, [1.0], [1.0, 2.0], [1.0]), "control must have the structure and shapes of start"),
        ((0.5, [1.0], [1.0], {"w": 1.0}), "end must have the structure and shapes of start"),
    ],
)
def test_curves_that_do_not_exist(arguments, message):
    t, *points = arguments
    with pytest.raises(ValueError, match=message):
        bezier(np.float32(t), *(jax.tree.map(np.float32, point) for point in points))


# --- barriers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "spread", "exists", "height", "index"),
    [
        ([1.0, 1.5, 0.5], 0.2, True, 0.5, 1),
        ([1.0, 1.5, 0.5], 0.25, False, 0.5, 1),  # exactly twice the spread
        ([1.0, 0.9, 1.5], 0.0, False, 0.0, 2),  # rises, but not above both ends
        ([1.5, 1.4, 1.6, 1.0], 0.01, True, 0.1, 2),
        ([1.0, 1.0], 0.0, False, 0.0, 0),
    ],
)
def test_a_barrier_is_above_both_ends_by_twice_the_spread(losses, spread, exists, height, index):
    losses = np.array(losses, np.float32)
    for order, place in ((losses, index), (losses[::-1], len(losses) - 1 - index)):
        measured = barrier(order, np.full_like(order, spread))
        assert bool(measured.exists) is exists
        np.testing.assert_allclose(measured.height, height, rtol=1e-5, atol=1e-7)
        if height:
            assert int(measured.index) == place


def test_the_noisiest_of_the_three_points_counts():
    losses = np.array([0.0, 1.0, 1.0, 0.0, 0.0], np.float32)
    for noisy, exists in ((0, False), (1, False), (2, True), (3, True), (4, False)):
        spreads = np.zeros(5, np.float32)
        spreads[noisy] = 0.6
        assert bool(barrier(losses, spreads).exists) is exists, noisy


def test_nan_is_no_barrier_and_no_height():
    measured = barrier(np.array([0.0, np.nan, 0.0], np.float32), np.zeros(3, np.float32))
    assert not measured.exists
    assert np.isnan(measured.height)


def test_a_straight_path_of_a_convex_loss_has_no_barrier():
    rng = np.random.default_rng(6)
    images, labels = rng.normal(size=(20, 6)), jnp.asarray(rng.integers(0, 3, 20))
    start, end = rng.normal(size=(2, 6, 3))
    control = 0.5 * (start + end)
    with jax.enable_x64(True):
        at = jax.jit(
            lambda t: jnp.mean(cross_entropy(images @ bezier(t, start, control, end), labels))
        )
        losses = np.array([at(t) for t in np.linspace(0, 1, 61)])
    assert not barrier(losses, np.zeros(61)).exists
    assert losses.min() < losses[[0, -1]].min()  # it is no line


def test_a_detour_of_a_convex_loss_has_a_barrier():
    start, control, end = (np.array([value]) for value in (-1.0, 9.0, 1.0))
    losses = [float(jnp.sum(bezier(t, start, control, end) ** 2)) for t in np.linspace(0, 1, 9)]
    measured = barrier(np.array(losses), np.zeros(9))
    assert measured.exists
    assert float(measured.height) == pytest.approx(max(losses) - 1.0, rel=1e-6)


def test_the_spread_of_a_mean_over_batches():
    values = np.random.default_rng(7).normal(size=9).astype(np.float32)
    expected = np.std(values, ddof=1) / 3
    np.testing.assert_allclose(spread_over_batches(values), expected, rtol=1e-5)
    # The standard error of all examples, up to chance, whatever the size of the batches.
    examples = np.random.default_rng(8).normal(size=4000).astype(np.float32)
    spreads = [float(spread_over_batches(examples.reshape(-1, k).mean(1))) for k in (1, 10, 40)]
    np.testing.assert_allclose(spreads, np.std(examples) / np.sqrt(4000), rtol=0.2)


@pytest.mark.parametrize(
    ("losses", "spreads"), [([1.0], [0.0]), ([1.0, 2.0], [0.0]), ([[1.0], [2.0]], [[0.0], [0.0]])]
)
def test_paths_without_two_ends(losses, spreads):
    with pytest.raises(ValueError, match=r"one shape \[T\] with T >= 2, got"):
        barrier(np.array(losses), np.array(spreads))


def test_a_spread_needs_two_batches():
    with pytest.raises(ValueError, match=r"two batches or more, got \(1,\)"):
        spread_over_batches(np.zeros(1))
