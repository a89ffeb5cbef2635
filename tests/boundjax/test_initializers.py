import jax
import jax.numpy as jnp
import numpy as np
import pytest

from boundjax.training import ibp_normal

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("inputs", [64, 784, 4096])
def test_absolute_weights_of_a_unit_add_up_to_two(inputs):
    # A ReLU halves the width of bounds on average, so weights that double it keep it constant.
    kernel = np.asarray(ibp_normal()(jax.random.key(0), (inputs, 256)))
    sums = np.abs(kernel).sum(axis=0)
    # E|w| = sigma sqrt(2 / pi); the mean over 256 units has a relative deviation of .76 / sqrt(n).
    deviation = 2.0 * np.sqrt((np.pi / 2 - 1) / kernel.size)
    np.testing.assert_allclose(sums.mean(), 2.0, atol=4 * deviation)
    np.testing.assert_allclose(kernel.std() * inputs, np.sqrt(2 * np.pi), rtol=4 / 16 / inputs**0.5)
    assert abs(kernel.mean()) < 4 * kernel.std() / kernel.size**0.5


def test_fan_in_of_a_convolution_is_its_window():
    key = jax.random.key(1)
    dense = ibp_normal()(key, (3 * 3 * 8, 16))
    np.testing.assert_array_equal(ibp_normal()(key, (3, 3, 8, 16)).reshape(72, 16), dense)
    np.testing.assert_allclose(ibp_normal(0.5)(key, (72, 16)), 0.5 * dense, rtol=1e-6)


def test_dtype():
    kernel = ibp_normal()(jax.random.key(0), (4, 3), jnp.bfloat16)
    assert kernel.dtype == jnp.bfloat16


def test_bad_input_is_an_error():
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"scale must be positive and finite, got"):
            ibp_normal(scale)
    with pytest.raises(ValueError, match=r"needs a shape \[\.\.\., in, out\], got \(3,\)"):
        ibp_normal()(jax.random.key(0), (3,))
