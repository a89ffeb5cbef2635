"""Models as their users write them: certified as they are, and never past a sample or an attack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import EXAMPLES, ZOO

import boundjax as bj
from boundjax.attacks import pgd

METHODS = ("interval", "crown-ibp", "crown")


@pytest.mark.sampled(8)
@pytest.mark.parametrize("kind", ZOO)
def test_a_model_of_the_zoo_is_certified_against_samples_and_attacks(kind):
    animal = ZOO[kind]()
    constants = animal.options.get("constants")

    @jax.jit
    def logits(x):
        return animal.logits(x, constants)

    labels = np.asarray(logits(animal.x)).argmax(-1)
    points = jnp.asarray(
        [animal.x]
        + [
            animal.x + animal.eps * np.sign(np.random.default_rng(k).normal(size=animal.x.shape))
            for k in range(40)
        ],
        jnp.float32,
    )
    attacked = jax.jit(
        lambda x: pgd(logits, x, labels, animal.eps, key=jax.random.key(0), steps=8, restarts=2)
    )(jnp.asarray(animal.x))
    points = jnp.concatenate([points, attacked[None]])
    outputs = np.asarray(jax.lax.map(logits, points))  # [n, B, C]
    reached = np.take_along_axis(outputs, labels[None, :, None], axis=-1) - outputs
    for method in METHODS:
        certificate = bj.certify(
            animal.model, animal.x, animal.eps, method=method, rounding="nearest", **animal.options
        )
        np.testing.assert_array_equal(certificate.labels, labels)
        assert (certificate.margins <= reached.min(axis=0) + 1e-5).all(), method
        assert not (certificate.verified & (reached.min(axis=0) < 0).any(axis=-1)).any()
        assert np.isfinite(certificate.margins).all()
    # Bounds of the point itself are its margins, so something was computed.
    exact = bj.certify(
        animal.model, animal.x, 0.0, method="interval", rounding="nearest", **animal.options
    )
    np.testing.assert_allclose(exact.margins, reached[0], atol=1e-4)
    assert exact.margins.shape == (EXAMPLES, 3)
