"""certified_radius: the largest radius or factor of a pattern, and what it never claims."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from small_cnn import CLASSES, EXAMPLES, images_of, model_of, variables_of

import boundjax as bj
from boundjax.certification.certify import _weighted

# One worker compiles each method once, also for the tests of certify.
pytestmark = pytest.mark.xdist_group("certify")


@pytest.fixture(scope="module")
def images():
    return images_of()


@pytest.fixture(scope="module")
def model(images):
    return model_of(variables_of(images))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["interval", "crown-ibp"])
@pytest.mark.parametrize("norm", [2, jnp.inf])
def test_certified_radius_is_certified_and_nearly_the_largest(method, norm, model, images):
    steps, eps_max = 8, 0.5
    options = {"norm": norm, "clip": (0.0, 1.0), "method": method}
    radius = bj.certified_radius(model, images, eps_max=eps_max, steps=steps, **options)
    assert radius.shape == (EXAMPLES,)
    assert (radius > 0).any()
    step = eps_max / 2**steps
    for i, value in enumerate(np.asarray(radius)):
        image = images[i : i + 1]
        if value > 0:
            assert bj.certify(model, image, float(value), **options).verified.all()
        if value < eps_max:
            beyond = float(value) + 1.01 * step
            assert not bj.certify(model, image, beyond, **options).verified.any()


def test_certified_radius_is_zero_for_a_wrong_prediction_and_at_most_eps_max(model, images):
    wrong = (model(images).argmax(1) + 1) % CLASSES
    assert (bj.certified_radius(model, images, labels=wrong) == 0).all()
    # Two logits far apart, which are certified at every radius.
    easy = bj.certified_radius(
        lambda x: jnp.stack([x.sum((1, 2, 3)) + 1e3, 0.0 * x[:, 0, 0, 0]], 1), images
    )
    np.testing.assert_array_equal(easy, jnp.ones(EXAMPLES))


@pytest.mark.parametrize("norm", [pytest.param(2, marks=pytest.mark.slow), jnp.inf])
def test_certified_radius_of_a_pattern_is_a_factor(norm, model, images):
    options = {"norm": norm, "clip": (0.0, 1.0), "method": "interval"}
    patch = np.zeros(images.shape[1:], np.float32)
    patch[1:3, 1:3] = 1.0
    patch[0, 0] = 0.3
    factor = bj.certified_radius(model, images, pattern=patch, **options)
    everywhere = bj.certified_radius(model, images, **options)
    assert (factor >= everywhere).all()
    assert (factor > everywhere).any()
    eps = factor.reshape(-1, 1, 1, 1) * patch
    positive = factor > 0
    assert bj.certify(model, images, eps, **options).verified[positive].all()
    beyond = np.minimum(factor + 2.1 / 2**12, 1.0).reshape(-1, 1, 1, 1) * patch
    inside = factor < 1.0
    assert not bj.certify(model, images, beyond, **options).verified[inside].any()


def test_a_pattern_of_ones_is_the_radius_itself(model, images):
    options = {"method": "interval", "steps": 8}
    plain = bj.certified_radius(model, images, **options)
    for pattern in (1.0, np.ones(images.shape[1:]), np.ones(images.shape, np.float32)):
        same = bj.certified_radius(model, images, pattern=pattern, **options)
        np.testing.assert_array_equal(same, plain)
    # Another unit of the pattern: weights of 2 halve the factor.
    half = bj.certified_radius(model, images, pattern=2.0, eps_max=0.5, **options)
    np.testing.assert_array_equal(half, 0.5 * plain)


@pytest.mark.quick
def test_no_radius_of_a_pattern_is_rounded_down():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        for scale in (1.0, 1e-30, 1e-320, 0.1):
            radii = (scale * rng.uniform(size=(50, 1))).astype(dtype)
            weights = rng.uniform(size=(1, 40)) * 10 ** rng.uniform(-30, 0, size=(1, 40))
            eps = _weighted(radii, weights)
            assert eps.dtype == dtype
            exact = [
                [Fraction(float(r)) * Fraction(float(w)) for w in weights[0]] for r in radii[:, 0]
            ]
            assert all(
                Fraction(float(e)) >= v
                for row, values in zip(eps, exact, strict=True)
                for e, v in zip(row, values, strict=True)
            )
    assert (_weighted(np.zeros((2, 1), np.float32), weights) == 0).all()


def test_certified_radius_does_not_depend_on_batch_size(model, images):
    whole = bj.certified_radius(model, images, eps_max=0.2)
    parts = bj.certified_radius(model, images, eps_max=0.2, batch_size=4)
    np.testing.assert_array_equal(whole, parts)


def test_certified_radius_of_a_nan_model_is_zero(images):
    radius = bj.certified_radius(
        lambda x: jnp.nan * x.reshape(len(x), -1)[:, :3], images, labels=jnp.zeros(EXAMPLES, int)
    )
    assert (radius == 0).all()
