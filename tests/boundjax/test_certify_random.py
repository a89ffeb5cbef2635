"""Certificates of random networks: of one draw, of the mean softmax of several, of none."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from certificate_files import run
from flax import nnx

import boundjax as bj
from boundjax.stochastic import GaussianNoise, GaussianWeights, mean_softmax

pytestmark = pytest.mark.quick

KEY = jax.random.key(0)
EPS = 0.02


class MLP(nn.Module):
    noise: float | None = None

    @nn.compact
    def __call__(self, x):
        x = x if self.noise is None else GaussianNoise(self.noise)(x)
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))


class Noisy(nn.Module):
    """Draws in a way of its own, which cannot be recorded."""

    @nn.compact
    def __call__(self, x):
        logits = nn.Dense(3)(GaussianNoise(0.1)(x))
        return logits + jax.random.normal(self.make_rng("noise"), (1, 3))


class NoisyNNX(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.rngs = nnx.Linear(4, 3, rngs=rngs), rngs

    def __call__(self, x):
        return self.dense(x) + jax.random.normal(self.rngs(), (1, 3))


def drawing_callable(x, key):
    return x @ jax.random.normal(key, (4, 3))


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(2), (3, 4))


@pytest.fixture(scope="module")
def gaussian(x):
    module = GaussianWeights(MLP(noise=0.1), prior_std=0.2)
    return bj.PureModel.of((module, jax.jit(module.init)(KEY, x)))


RANDOM = {
    "linen": lambda x: (Noisy(), Noisy().init(KEY, x)),
    "nnx": lambda x: NoisyNNX(nnx.Rngs(0)),
    "callable": lambda x: drawing_callable,
}


@pytest.mark.parametrize("kind", RANDOM)
def test_fresh_draws_are_refused_in_one_line(kind, x):
    model = RANDOM[kind](x)
    for ask in (
        lambda: bj.certify(model, x, EPS),
        lambda: bj.certified_radius(model, x, steps=1),
        lambda: bj.memory_estimate(model, x),
    ):
        with pytest.raises(
            ValueError, match=r"fresh draws for every query cannot be certified; .*fixed_draw"
        ) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_gaussian_weights_and_noise_are_refused_as_well(gaussian, x):
    with pytest.raises(ValueError, match=r"GaussianWeights draws random numbers .* no PRNG key"):
        bj.certify(gaussian, x, EPS)


@pytest.mark.parametrize("kind", RANDOM)
def test_draws_of_ones_own_get_the_key_and_have_no_proof(kind, x):
    pure = bj.PureModel.of(RANDOM[kind](x))
    fixed = pure.fixed_draw(KEY, x)
    expected = np.asarray(pure.apply(pure.variables, x, KEY))
    np.testing.assert_array_equal(fixed.apply(fixed.variables, x), expected)
    with pytest.warns(UserWarning, match="which computes a constant; compute it beforehand"):
        certificate = bj.certify(fixed, x, 0.0, labels=np.zeros(len(x), int), method="interval")
    assert certificate.arithmetic == "nearest"
    np.testing.assert_allclose(certificate.margins, expected[:, :1] - expected, atol=1e-5)


@pytest.mark.parametrize("method", ["interval", "crown-ibp", "crown"])
@pytest.mark.sampled(4)
def test_a_fixed_draw_is_certified_like_any_other_network(method, gaussian, x):
    """Its certificate is that of the deterministic network with the drawn weights and noise."""
    fixed = gaussian.fixed_draw(KEY, x)
    draws = fixed.variables["draws"]
    noise = draws["network"]["GaussianNoise_0"]["noise"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback: the proof is for real arithmetic
        certificate = bj.certify(fixed, x, EPS, method=method)
        plain = MLP()
        expected = bj.certify(
            lambda x: plain.apply({"params": draws["weights"]}, x + noise), x, EPS, method=method
        )
    assert certificate.arithmetic == "real"
    np.testing.assert_allclose(certificate.margins, expected.margins, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(certificate.labels, expected.labels)


def test_a_fixed_draw_needs_no_key_and_keeps_no_distribution(gaussian, x):
    fixed = gaussian.fixed_draw(KEY, x)
    logits = fixed.apply(fixed.variables, x)
    np.testing.assert_array_equal(logits, gaussian.apply(gaussian.variables, x, KEY))
    np.testing.assert_array_equal(logits, fixed.apply(fixed.variables, x, jax.random.key(9)))
    assert fixed.variables["params"] == {}
    assert set(gaussian.variables) == {"params"}  # unchanged
    other = gaussian.fixed_draw(jax.random.key(1), x)
    assert np.abs(np.asarray(other.apply(other.variables, x) - logits)).max() > 1e-2
    with pytest.raises(ValueError, match="record draws from variables without draws"):
        fixed.fixed_draw(KEY, x)


def test_without_deviation_certificates_are_those_of_the_deterministic_network(x):
    module = GaussianWeights(MLP(noise=0.0), prior_std=0.1, initial_std=0.0)
    pure = bj.PureModel.of((module, jax.jit(module.init)(KEY, x)))
    means = pure.variables["params"]["network"]["mean"]
    # `lmt` refuses weights that are not finite, which `log_std` is.
    options = {"method": "lmt", "norm": 2, "labels": np.zeros(len(x), int)}
    certificate = bj.certify(pure.fixed_draw(KEY, x), x, EPS, **options)
    expected = bj.certify((MLP(), {"params": means}), x, EPS, **options)
    np.testing.assert_allclose(certificate.margins, expected.margins, rtol=1e-5, atol=1e-6)


def test_a_deterministic_network_is_its_own_fixed_draw(x):
    pure = bj.PureModel.of((MLP(), MLP().init(KEY, x)))
    fixed = pure.fixed_draw(KEY, x)
    np.testing.assert_array_equal(fixed.apply(fixed.variables, x), pure.apply(pure.variables, x))
    mean = pure.mean_softmax(KEY, x, 2)
    np.testing.assert_allclose(
        mean.apply(mean.variables, x), jax.nn.softmax(pure.apply(pure.variables, x)), rtol=1e-6
    )


@pytest.mark.parametrize("method", ["interval", "crown-ibp"])
@pytest.mark.sampled(3)
def test_the_mean_softmax_of_fixed_draws_is_bounded_as_one_function(method, gaussian, x):
    draws = 3
    ensemble = gaussian.mean_softmax(KEY, x, draws)
    f = functools.partial(gaussian.apply, gaussian.variables)
    probabilities = np.asarray(mean_softmax(f, x, KEY, draws))
    np.testing.assert_allclose(ensemble.apply(ensemble.variables, x), probabilities, rtol=1e-5)
    labels = probabilities.argmax(-1)

    point = bj.certify(ensemble, x, 0.0, method=method)
    np.testing.assert_array_equal(point.labels, labels)
    own = probabilities[np.arange(len(x)), labels][:, None]
    np.testing.assert_allclose(point.margins, own - probabilities, atol=1e-4)

    certificate = bj.certify(ensemble, x, EPS, method=method)
    assert certificate.arithmetic == "real"
    offsets = jax.random.uniform(jax.random.key(8), (200, *x.shape), minval=-EPS, maxval=EPS)
    offsets = jnp.where(jax.random.bernoulli(jax.random.key(9), 0.5, offsets.shape), offsets, EPS)
    values = np.asarray(jax.vmap(lambda d: ensemble.apply(ensemble.variables, x + d))(offsets))
    attained = (values[:, np.arange(len(x)), labels][..., None] - values).min(0)
    assert np.all(certificate.margins <= attained + 1e-6)
    assert np.all(certificate.margins.sum(-1) > -1)  # not vacuous


@pytest.mark.parametrize("kind", RANDOM)
def test_the_mean_softmax_of_draws_of_ones_own(kind, x):
    pure = bj.PureModel.of(RANDOM[kind](x))
    ensemble = pure.mean_softmax(KEY, x, 2)
    f = functools.partial(pure.apply, pure.variables)
    np.testing.assert_allclose(
        ensemble.apply(ensemble.variables, x), mean_softmax(f, x, KEY, 2), rtol=1e-4, atol=1e-6
    )


def test_old_keys_serve_as_well(x):
    pure, key = bj.PureModel.of(drawing_callable), jax.random.PRNGKey(3)
    fixed = pure.fixed_draw(key, x)
    np.testing.assert_array_equal(fixed.apply(fixed.variables, x), drawing_callable(x, key))


def test_a_fixed_draw_is_proved_again_from_its_file(gaussian, x, tmp_path, capsys):
    fixed = gaussian.fixed_draw(KEY, x)
    certificate = bj.certify(fixed, x, 0.001)
    assert certificate.verified.any()
    certificate.save(tmp_path / "c.npz", fixed, x)
    bj.export_weights(fixed, x, tmp_path / "w.npz")
    status, lines = run(capsys, tmp_path / "c.npz", "--weights", tmp_path / "w.npz")
    assert status == 0, lines


@pytest.mark.parametrize("draws", [0, -3, 2.5])
def test_numbers_of_draws_out_of_range_are_refused(draws, gaussian, x):
    with pytest.raises(ValueError, match="draws must be an integer >= 1, got"):
        gaussian.mean_softmax(KEY, x, draws)


def test_a_callable_of_a_batch_alone_has_no_draws(x):
    with pytest.raises(TypeError, match="a plain callable takes no PRNG key") as caught:
        bj.PureModel.of(lambda x: x).fixed_draw(KEY, x)
    assert "\n" not in str(caught.value)
