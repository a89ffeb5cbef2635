"""Models as their users write them: certified as they are, and never past a sample or an attack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.attacks import pgd
from boundjax.certification.presets import METHODS
from experiments.models.zoo import EXAMPLES, ZOO

# An op of theirs has no Lipschitz constant: products of perturbed values, and exponentials.
NOT_LIPSCHITZ = ("linen_vit", "linen_tagger", "linen_lstm", "linen_ensemble")
DAY = ("interval", "crown-ibp", "crown")
# Unrolled, these are programs of thousands of ops, which alpha-CROWN compiles for many minutes.
UNROLLED = ("linen_lstm", "neural_ode")


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """Flax's own layers promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def least_margins(entry):
    """The labels `[B, ...]`, margins `[B, ..., C]` of the inputs, and the least that were reached.

    By random corners of the box and by an attack.
    """
    constants = entry.options.get("constants")

    @jax.jit
    def logits(x):
        return entry.logits(x, constants)

    labels = np.asarray(logits(entry.x)).argmax(-1)
    rng = np.random.default_rng(0)
    corners = [entry.x + entry.eps * np.sign(rng.normal(size=entry.x.shape)) for _ in range(40)]
    points = jnp.asarray([entry.x, *corners], jnp.float32)
    if labels.ndim == 1:
        attack = jax.jit(
            lambda x: pgd(logits, x, labels, entry.eps, key=jax.random.key(0), steps=8, restarts=2)
        )
        points = jnp.concatenate([points, attack(jnp.asarray(entry.x))[None]])
    outputs = np.asarray(jax.lax.map(logits, points))  # [n, B, ..., C]
    margins = np.take_along_axis(outputs, labels[None, ..., None], axis=-1) - outputs
    return labels, margins[0], margins.min(axis=0)


def check(entry, methods, rounding):
    labels, margins, reached = least_margins(entry)
    for method in methods:
        certificate = bj.certify(
            entry.model, entry.x, entry.eps, method=method, rounding=rounding, **entry.options
        )
        np.testing.assert_array_equal(certificate.labels, labels)
        assert (certificate.margins <= reached + 1e-5).all(), method
        assert not (certificate.verified & (reached < 0).any(axis=-1)).any()
        assert np.isfinite(certificate.margins).all()
    assert len(labels) == EXAMPLES
    return margins


@pytest.mark.sampled(8)
@pytest.mark.parametrize("kind", ZOO)
def test_a_model_of_the_zoo_is_certified_against_samples_and_attacks(kind):
    entry = ZOO[kind]()
    margins = check(entry, DAY, "nearest")
    # Bounds of the point itself are its margins, so something was computed.
    exact = bj.certify(
        entry.model, entry.x, 0.0, method="interval", rounding="nearest", **entry.options
    )
    np.testing.assert_allclose(exact.margins, margins, atol=1e-4)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("kind", ZOO)
def test_certificates_that_hold_for_every_program(kind):
    check(ZOO[kind](), ["crown-ibp"], "float32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ZOO)
def test_every_other_method_that_applies(kind):
    methods = [name for name in METHODS if name not in DAY]
    if kind in NOT_LIPSCHITZ:
        entry = ZOO[kind]()
        with pytest.raises(ValueError, match="has no Lipschitz constant"):
            bj.certify(entry.model, entry.x, entry.eps, method="lmt", **entry.options)
        methods.remove("lmt")
    if kind in UNROLLED:
        methods.remove("alpha-crown")
    check(ZOO[kind](), methods, "nearest")
