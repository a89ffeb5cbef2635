"""Random networks: their draws, their divergence from the prior, their predictions."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.stochastic import (
    GaussianNoise,
    GaussianWeights,
    adv_bnn_means,
    drawn,
    gaussian_draw,
    gaussian_kl,
    mean_softmax,
    use_of_key,
)

pytestmark = pytest.mark.quick

KEY = jax.random.key(0)


class Small(nn.Module):
    """Dense, batch normalisation, ReLU, dense."""

    noise: float | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(len(x), -1)
        x = x if self.noise is None else GaussianNoise(self.noise)(x)
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.relu(x))


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(5), (4, 2, 3))


def created(module, x):
    return jax.jit(module.init)(KEY, x)


def parts(variables):
    """The deterministic network's variables, and the standard deviations, of `GaussianWeights`."""
    stored = variables["params"]["network"]
    return (
        {"params": stored["mean"], "batch_stats": variables["batch_stats"]["network"]},
        stored["log_std"],
    )


@pytest.mark.parametrize("prior", [0.05, 0.1, 0.15])
def test_divergence_has_the_golden_values(prior):
    s = jnp.float32(math.log(prior))
    zeros = jnp.zeros((3, 2))
    assert float(gaussian_kl(zeros, jnp.full_like(zeros, s), prior)) == 0.0
    one_off = gaussian_kl(jnp.full_like(zeros, prior), jnp.full_like(zeros, s), prior)
    np.testing.assert_allclose(one_off, 6 * 0.5, rtol=1e-6)
    twice = jnp.full_like(zeros, math.log(2 * prior))
    np.testing.assert_allclose(gaussian_kl(zeros, twice, prior), 6 * 0.80685282, rtol=1e-5)
    assert gaussian_kl(zeros, jnp.full_like(zeros, -jnp.inf), prior) == jnp.inf


def test_divergence_agrees_with_numerical_integration():
    prior = 0.1
    for mean, std in [(0.3, 0.02), (-0.05, 0.1), (0.0, 0.5)]:
        w = np.linspace(mean - 12 * std, mean + 12 * std, 40_001)
        log_q = -0.5 * ((w - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
        log_p = -0.5 * (w / prior) ** 2 - np.log(prior * np.sqrt(2 * np.pi))
        integral = np.trapezoid(np.exp(log_q) * (log_q - log_p), w)
        value = gaussian_kl(jnp.float32(mean), jnp.float32(math.log(std)), prior)
        np.testing.assert_allclose(value, integral, rtol=1e-5)


def test_divergence_has_the_golden_gradient():
    mean, s = jnp.array([0.3, -0.02]), jnp.array([-1.0, -3.0])
    by_mean, by_s = jax.grad(gaussian_kl, argnums=(0, 1))(mean, s, 0.1)
    np.testing.assert_allclose(by_mean, mean / 0.01, rtol=1e-6)
    np.testing.assert_allclose(by_s, np.exp(2 * np.asarray(s)) / 0.01 - 1, rtol=1e-4)


def test_divergence_of_a_network_sums_over_every_parameter(x):
    network = GaussianWeights(Small(), prior_std=0.1, initial_std=0.03)
    variables = created(network, x)
    plain, _ = parts(variables)
    expected, count = 0.0, 0
    for mu in map(np.asarray, jax.tree.leaves(plain["params"])):
        d = (0.03**2 + mu.astype(float) ** 2) / (2 * 0.1**2)
        expected += np.sum(math.log(0.1 / 0.03) + d - 0.5)
        count += mu.size
    assert count == 6 * 5 + 5 + 5 + 5 + 5 * 3 + 3
    np.testing.assert_allclose(network.apply(variables, method="kl"), expected, rtol=1e-5)


def test_draws_have_the_moments_of_their_parameters():
    mean = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.0])}
    log_std = {"a": jnp.log(jnp.array([0.5, 0.1])), "b": jnp.array([-jnp.inf])}
    keys = jax.random.split(KEY, 20_000)
    samples = jax.vmap(lambda key: gaussian_draw(mean, log_std, key))(keys)
    a = np.asarray(samples["a"])
    np.testing.assert_allclose(a.mean(0), mean["a"], atol=0.02)
    np.testing.assert_allclose(a.std(0), [0.5, 0.1], rtol=0.03)
    assert abs(np.corrcoef(a.T)[0, 1]) < 0.03
    np.testing.assert_array_equal(samples["b"], np.zeros((20_000, 1)))


def test_leaves_of_equal_shape_are_drawn_independently():
    zeros = {"a": jnp.zeros(1000), "b": jnp.zeros(1000)}
    sample = gaussian_draw(zeros, zeros, KEY)
    assert abs(np.corrcoef(sample["a"], sample["b"])[0, 1]) < 0.15


def test_noise_is_one_draw_for_the_batch_with_its_standard_deviation():
    layer, x = GaussianNoise(0.2), jnp.ones((3, 50, 40))
    noise = np.asarray(layer.apply({}, x, rngs={"noise": KEY}) - x)
    np.testing.assert_array_equal(noise[0], noise[1])
    np.testing.assert_allclose(noise[0].std(), 0.2, rtol=0.05)
    assert abs(noise[0].mean()) < 0.02
    other = layer.apply({}, x, rngs={"noise": jax.random.key(1)})
    assert np.abs(np.asarray(other - x)[0] - noise[0]).max() > 0.1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_without_deviation_a_random_network_is_the_deterministic_one_bit_for_bit(
    train, compiled, x
):
    network = GaussianWeights(Small(noise=0.0), prior_std=0.1, initial_std=0.0)
    variables = created(network, x)
    plain, _ = parts(variables)

    def random(variables, x):
        options = {"train": train, "rngs": {"noise": KEY}, "mutable": ["batch_stats"]}
        return network.apply(variables, x, **options)

    def deterministic(variables, x):
        return Small().apply(variables, x, train=train, mutable=["batch_stats"])

    if compiled:
        random, deterministic = jax.jit(random), jax.jit(deterministic)
    logits, state = random(variables, x)
    expected, expected_state = deterministic(plain, x)
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(
        np.testing.assert_array_equal,
        state["batch_stats"]["network"],
        expected_state["batch_stats"],
    )


def test_the_variables_at_first_are_those_of_the_network(x):
    network = GaussianWeights(Small(noise=0.1), prior_std=0.1)
    variables = created(network, x)
    assert set(variables) == {"params", "batch_stats"}  # no draw is fixed unasked
    plain, log_std = parts(variables)
    shapes = jax.tree.map(jnp.shape, created(Small(), x))
    assert jax.tree.map(jnp.shape, plain) == shapes
    assert {float(leaf.reshape(-1)[0]) for leaf in jax.tree.leaves(log_std)} == {
        float(jnp.float32(math.log(0.1)))
    }
    noisy, quiet = created(Small(noise=0.1), x), created(Small(), x)
    jax.tree.map(np.testing.assert_array_equal, noisy, quiet)


def test_a_pass_is_one_draw_of_the_key(x):
    network = GaussianWeights(Small(noise=0.1), prior_std=0.1)
    variables = created(network, x)

    def logits(x, seed):
        return np.asarray(network.apply(variables, x, rngs={"noise": jax.random.key(seed)}))

    np.testing.assert_array_equal(logits(x, 1), logits(x, 1))
    assert np.abs(logits(x, 1) - logits(x, 2)).max() > 1e-3
    alone = np.concatenate([logits(x[i : i + 1], 1) for i in range(len(x))])
    np.testing.assert_allclose(alone, logits(x, 1), rtol=1e-5, atol=1e-6)


def test_every_parameter_is_drawn_from_its_own_distribution(x):
    """The recorded draw is `mean + exp(log_std) * xi`, and the pass computes with it."""
    network = GaussianWeights(Small(), prior_std=0.1)
    variables = created(network, x)
    plain, log_std = parts(variables)
    logits, recorded = network.apply(variables, x, rngs={"noise": KEY}, mutable=["draws"])
    weights = recorded["draws"]["weights"]
    xi = jax.tree.map(lambda w, mu, s: (w - mu) / jnp.exp(s), weights, plain["params"], log_std)
    normals = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(xi)])
    assert np.all(normals != 0)
    assert 0.8 < normals.std() < 1.2
    np.testing.assert_array_equal(logits, Small().apply({**plain, "params": weights}, x))


def test_gradients_reach_means_and_deviations(x):
    network = GaussianWeights(Small(), prior_std=0.1)
    variables = created(network, x)

    def loss(params):
        return jnp.sum(network.apply({**variables, "params": params}, x, rngs={"noise": KEY}) ** 2)

    gradient = jax.jit(jax.grad(loss))(variables["params"])["network"]
    for name in ("mean", "log_std"):
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient[name]))


def test_means_of_adv_bnn(x):
    network = GaussianWeights(Small(), prior_std=0.1, initial_mean=adv_bnn_means)
    means, _ = parts(created(network, x))
    first, last, norm = (means["params"][name] for name in ("Dense_0", "Dense_1", "BatchNorm_0"))
    for layer, fan_in in ((first, 6), (last, 5)):
        values = np.concatenate([np.ravel(layer["kernel"]), layer["bias"]])
        assert np.abs(values).max() <= 1 / math.sqrt(fan_in)
        assert np.abs(values).max() > 0.7 / math.sqrt(fan_in)
        assert len(set(values.tolist())) == values.size
    np.testing.assert_array_equal(norm["bias"], np.zeros(5))
    assert 0 <= np.min(norm["scale"]) < np.max(norm["scale"]) <= 1
    assert adv_bnn_means(KEY, {"embedding": x})["embedding"] is x


def test_the_prediction_is_the_mean_of_the_softmax_of_each_draw(x):
    network = GaussianWeights(Small(noise=0.2), prior_std=0.3)
    pure = bj.PureModel.of((network, created(network, x)))
    f = functools.partial(pure.apply, pure.variables)
    expected = np.mean([jax.nn.softmax(f(x, key)) for key in jax.random.split(KEY, 5)], axis=0)
    prediction = mean_softmax(f, x, KEY, 5)
    np.testing.assert_allclose(prediction, expected, rtol=1e-5)
    np.testing.assert_allclose(prediction.sum(-1), 1.0, rtol=1e-6)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = GaussianNoise(0.1)
        return layer(layer(x))


class Own(nn.Module):
    """A layer of one's own, with a draw in it."""

    @nn.compact
    def __call__(self, x):
        return x * drawn(self, "gain", lambda key: jax.random.uniform(key, (1, *x.shape[1:])))


def test_a_layer_of_ones_own_records_its_draw(x):
    _, recorded = Own().apply({}, x, rngs={"noise": KEY}, mutable=["draws"])
    np.testing.assert_array_equal(Own().apply(recorded, x), x * recorded["draws"]["gain"])


def test_a_layer_called_twice_draws_twice_and_cannot_be_recorded(x):
    noise = Twice().apply({}, x, rngs={"noise": KEY}) - x
    first = GaussianNoise(0.1).apply({}, x, rngs={"noise": KEY}) - x
    assert np.abs(np.asarray(noise - 2 * first)).max() > 1e-3
    with pytest.raises(ValueError, match="would record the draw 'noise' twice") as caught:
        Twice().apply({}, x, rngs={"noise": KEY}, mutable=["draws"])
    assert "\n" not in str(caught.value)


def test_what_a_function_does_with_a_key():
    assert use_of_key(lambda x: x) == "none"
    assert use_of_key(lambda x, key: x) == "required"
    assert use_of_key(lambda x, key=None: x) == "optional"
    assert use_of_key(lambda x, train=False: x) == "none"
    assert use_of_key(lambda *arguments: arguments) == "optional"
    assert use_of_key(jax.jit(lambda x, key: x)) == "required"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(-0.1), "std must be a finite standard deviation >= 0, got -0.1"),
        (lambda: GaussianNoise(math.nan), "std must be a finite .* got nan"),
        (lambda: GaussianWeights(nn.Dense(2), 0.0), "prior_std must be a finite .* > 0, got 0.0"),
        (lambda: GaussianWeights(nn.Dense(2), 0.1, -1.0), "initial_std must be .* >= 0, got -1.0"),
    ],
)
def test_standard_deviations_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make().init(KEY, jnp.ones((1, 2)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("draws", [0, -1, 1.5, True])
def test_numbers_of_draws_out_of_range_are_refused(draws):
    with pytest.raises(ValueError, match=r"draws must be an integer >= 1, got"):
        mean_softmax(lambda x, key: x, jnp.ones((1, 2)), KEY, draws)


@pytest.mark.parametrize("prior", [0.0, -1.0, math.inf])
def test_a_divergence_needs_a_prior_and_parameters(prior):
    with pytest.raises(ValueError, match="prior_std must be"):
        gaussian_kl(jnp.zeros(1), jnp.zeros(1), prior)
    with pytest.raises(ValueError, match="at least one parameter"):
        gaussian_kl({}, {}, 1.0)


class Inside(nn.Module):
    """Gaussian weights as a part of a network."""

    adopts: bool = False

    @nn.compact
    def __call__(self, x):
        network = Small() if self.adopts else Small(parent=None)
        return nn.Dense(2)(GaussianWeights(network, prior_std=0.1, name="random")(x))


def test_gaussian_weights_may_be_a_part_of_a_network(x):
    variables = created(Inside(), x)
    pure = bj.PureModel.of((Inside(), variables))
    fixed = pure.fixed_draw(KEY, x)
    np.testing.assert_array_equal(
        fixed.apply(fixed.variables, x), pure.apply(pure.variables, x, KEY)
    )
    assert set(fixed.variables["params"]["Dense_0"]) == {"kernel", "bias"}
    assert fixed.variables["params"]["random"] == {}
    with pytest.raises(ValueError, match=r"the network Small belongs to another .* parent=None"):
        Inside(adopts=True).init(KEY, x)
