import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host

import boundjax as bj
from boundjax.training import (
    cc_ibp_margins,
    exp_ibp_loss,
    margins_of,
    mtl_ibp_loss,
    rectified_link,
    robust_cross_entropy,
    scaled_product,
    small_box,
)

pytestmark = pytest.mark.quick

# --- De Palma et al. 2024 -------------------------------------------------------------------------


@on_host
def _losses(adversarial, ibp, alpha):
    """Values of MTL-IBP and EXP-IBP, and their gradients in both losses."""

    def pair(loss):
        return jax.value_and_grad(lambda a, b: jnp.sum(loss(a, b, alpha)), argnums=(0, 1))

    values = mtl_ibp_loss(adversarial, ibp, alpha), exp_ibp_loss(adversarial, ibp, alpha)
    return values, [pair(loss)(adversarial, ibp)[1] for loss in (mtl_ibp_loss, exp_ibp_loss)]


@pytest.mark.parametrize("alpha", [0.0, 0.004, 0.5, 1.0])
def test_losses_are_their_definitions(alpha):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        adversarial = np.exp(rng.normal(size=6))
        ibp = adversarial + np.exp(rng.normal(size=6))
        (mtl, exp), gradients = _losses(adversarial, ibp, alpha)
        np.testing.assert_allclose(mtl, (1 - alpha) * adversarial + alpha * ibp, rtol=1e-13)
        np.testing.assert_allclose(exp, adversarial ** (1 - alpha) * ibp**alpha, rtol=1e-13)
        for which, (ours, step) in enumerate(itertools.product((0, 1), np.eye(2) * 1e-6)):
            ahead, behind = (
                _losses(adversarial + sign * step[0], ibp + sign * step[1], alpha)[0][ours]
                for sign in (1, -1)
            )
            np.testing.assert_allclose(
                gradients[ours][which % 2], (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-9
            )


def test_exp_ibp_of_learned_examples():
    # Cross-entropies underflow to 0 in float32; the smallest normal number is the next one.
    tiny = np.finfo(np.float32).tiny
    adversarial = np.array([0.0, 0.0, 2.0, tiny, tiny, tiny / 4, 1e-30], np.float32)
    ibp = np.array([0.0, 2.0, 0.0, tiny, 2.0, tiny / 4, 1e-20], np.float32)
    for alpha in (0.0, 0.004, 0.5, 1.0):
        (_, exp), gradients = _losses(adversarial, ibp, np.float32(alpha))
        flushed = [np.where(a < tiny, 0.0, np.float64(a)) for a in (adversarial, ibp)]
        expected = flushed[0] ** (1 - alpha) * flushed[1] ** alpha
        np.testing.assert_allclose(exp, expected, rtol=1e-4, atol=1e-37)
        assert np.isfinite(gradients[1]).all()
        assert not np.any(np.array(gradients[1])[:, [0, 5]])


def test_exp_ibp_shows_what_is_wrong():
    _, exp = _losses(np.array([np.nan, 1.0, -1.0]), np.array([1.0, np.nan, 1.0]), 0.5)[0]
    assert np.isnan(exp).all()


def test_cc_ibp_joins_margins():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(4, 5)).astype(np.float32), np.array([0, 4, 2, 2], np.int32)
    attacked = np.asarray(margins_of(jnp.asarray(logits), jnp.asarray(labels)))
    bounds = attacked - rng.uniform(size=(4, 4)).astype(np.float32)
    for alpha in (0.0, 0.3, 1.0):
        margins = cc_ibp_margins(jnp.asarray(attacked), jnp.asarray(bounds), alpha)
        np.testing.assert_allclose(margins, attacked - alpha * (attacked - bounds), rtol=1e-5)
    losses = [robust_cross_entropy(m) for m in (attacked, margins, bounds)]
    assert (losses[0] < losses[2]).all()
    np.testing.assert_array_equal(losses[1], losses[2])


# --- Mueller et al. 2023: SABR --------------------------------------------------------------------


@on_host
def _small_box(adversarial, center, eps):
    """For each fraction: the box, the box cut to [0, 1], and that of the cut ball."""

    def ends(*args, **options):
        box = small_box(adversarial, center, eps, *args, **options)
        return box.lower, box.upper

    return [
        (ends(f), ends(f, (0.0, 1.0)), ends(f, (0.0, 1.0), of_clipped=True))
        for f in (0.0, 0.1, 0.9, 1.0)
    ]


def test_small_boxes_lie_in_the_ball():
    rng = np.random.default_rng(2)
    eps = np.float32(0.3)
    center = rng.choice([0.0, 0.2, 0.5, 1.0], size=400).astype(np.float32)
    shift = rng.choice([-1.0, -0.5, 0.0, 0.95, 1.0], size=400).astype(np.float32)
    adversarial = np.clip(center + eps * shift, 0.0, 1.0)
    result = _small_box(adversarial, center, eps)
    lower, upper = center - eps, center + eps
    cut = np.clip(lower, 0, 1), np.clip(upper, 0, 1)
    for fraction, (plain, clipped, of_clipped) in zip((0.0, 0.1, 0.9, 1.0), result, strict=True):
        middle = np.clip(adversarial, center - (1 - fraction) * eps, center + (1 - fraction) * eps)
        expected = middle - fraction * eps, middle + fraction * eps
        np.testing.assert_allclose(plain, expected, atol=1e-6)
        np.testing.assert_allclose(clipped, np.clip(expected, 0, 1), atol=1e-6)
        radius = fraction * (cut[1] - cut[0]) / 2
        middle = np.clip(adversarial, cut[0] + radius, np.maximum(cut[1] - radius, cut[0] + radius))
        np.testing.assert_allclose(of_clipped, (middle - radius, middle + radius), atol=1e-6)
        for box, (least, most) in ((plain, (lower, upper)), (clipped, cut), (of_clipped, cut)):
            # Exactly, not merely up to rounding.
            assert (least <= box[0]).all()
            assert (box[0] <= box[1]).all()
            assert (box[1] <= most).all()
            if box is not plain or fraction < 1:
                np.testing.assert_array_less(box[0], adversarial + 1e-6)
                np.testing.assert_array_less(adversarial - 1e-6, box[1])


def test_no_gradient_reaches_the_attack():
    def width_and_middle(adversarial, center, eps):
        box = small_box(adversarial, center, eps, 0.25, (-1.0, 1.0))
        assert isinstance(box, bj.Box)
        return jnp.stack([box.lower, box.upper])

    at = jnp.array([0.5, 0.52]), jnp.array([0.3, 0.5]), jnp.float32(0.2)
    adversarial, center, eps = jax.jacrev(width_and_middle, argnums=(0, 1, 2))(*at)
    assert not np.any(adversarial)
    # The first element is projected, so its box moves with the center; the second is not.
    np.testing.assert_allclose(center.sum(axis=-1), [[1, 0], [1, 0]], atol=1e-6)
    np.testing.assert_allclose(eps, [[0.5, -0.25], [1.0, 0.25]], atol=1e-6)


# --- Mao et al. 2023: TAPS ------------------------------------------------------------------------


def test_rectified_link_is_its_definition():
    lower = np.array([0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 2.0, 1.0], np.float32)
    upper = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 2.0, 1.0 + 1e-7], np.float32)
    latent = np.array([0.0, 0.125, 0.5, 0.75, 1.0, 2.5, 2.0, 1.0], np.float32)

    for c in (0.25, 0.5, 1.0):
        width = upper - lower
        safe = np.where(width > 0, c * width, 1.0)
        expected = [np.maximum(0, 1 - abs(latent - end) / safe) for end in (lower, upper)]
        expected = [np.where(width > 0, e, 0.5) for e in expected]

        def link(latent, lower, upper, c=c):
            return rectified_link(latent, lower, upper, c)

        tangents = jax.jit(jax.jacfwd(link, argnums=(0, 1, 2)))(latent, lower, upper)
        cotangents = jax.jit(jax.jacrev(link, argnums=(0, 1, 2)))(latent, lower, upper)
        for result in (tangents, cotangents):
            assert not np.any(result[0])
            for k in (0, 1):
                np.testing.assert_allclose(result[k + 1], np.diag(expected[k]), atol=1e-6)
        np.testing.assert_array_equal(link(latent, lower, upper), latent)
    assert np.isnan(rectified_link(jnp.ones(1), jnp.full((1,), jnp.nan), jnp.ones(1))).all()


def test_scaled_product_leans_to_taps():
    at = jnp.array([2.0, 0.0, 3.0]), jnp.array([5.0, 4.0, 0.0])
    for scale in (0.0, 1.0, 4.0):
        a = scale / (1 + scale)
        value, (of_ibp, of_taps) = jax.value_and_grad(
            lambda ibp, taps, scale=scale: jnp.sum(scaled_product(ibp, taps, scale)),
            argnums=(0, 1),
        )(*at)
        np.testing.assert_array_equal(value, 10.0)
        np.testing.assert_allclose(of_ibp, (2 - 2 * a) * at[1], rtol=1e-6)
        np.testing.assert_allclose(of_taps, 2 * a * at[0], rtol=1e-6)


def test_bad_input_is_an_error():
    three, four = jnp.ones(3), jnp.ones(4)
    for call in (
        lambda: mtl_ibp_loss(three, four, 0.5),
        lambda: exp_ibp_loss(three, four, 0.5),
        lambda: cc_ibp_margins(three, four, 0.5),
        lambda: small_box(three, four, 0.1, 0.5),
        lambda: rectified_link(three, four, three),
        lambda: rectified_link(three, three, four),
        lambda: scaled_product(three, four, 1.0),
    ):
        with pytest.raises(ValueError, match=r"must have one shape, got \(3,\) and \(4,\)"):
            call()
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\], got"):
            small_box(three, three, 0.1, fraction)
    with pytest.raises(ValueError, match=r"eps must be finite and >= 0, got -0\.1"):
        small_box(three, three, -0.1, 0.5)
    with pytest.raises(ValueError, match=r"eps must be a scalar or have the input's shape \(3,\)"):
        small_box(three, three, four, 0.5)
    with pytest.raises(ValueError, match=r"clip must be \(low, high\) with low <= high"):
        small_box(three, three, 0.1, 0.5, (1.0, 0.0))
    for c in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"c must lie in \(0, 1\], got"):
            rectified_link(three, three, three, c)
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"scale must be >= 0 and finite, got"):
            scaled_product(three, three, scale)
