"""Models that mix examples, read outside state or draw random keys."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import boundjax as bj

pytestmark = pytest.mark.quick

CLASSES = 4
EXAMPLES = 6


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(size=(EXAMPLES, 4, 4, 1)), jnp.float32)


def batch_normalised(x):
    """Like batch normalisation in train mode, which is constant on a batch of one."""
    x = x.reshape(len(x), -1)
    x = (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)
    return x @ jnp.asarray(np.random.default_rng(0).normal(size=(x.shape[1], CLASSES)), jnp.float32)


def masked_rows(x):
    """Masks at least two classes of each example, chosen by the example's own values."""
    first = x.reshape(len(x), -1)[:, :1] > 0.5
    return jnp.concatenate([first, ~first, first, ~first], axis=1)


MIXING = {
    "batch normalisation": batch_normalised,
    "a class masked": lambda x: batch_normalised(x).at[:, 2].set(-1e9),
    "a class masked by adding": lambda x: batch_normalised(x) + jnp.float32([[0, 0, -1e9, 0]]),
    "a class at minus infinity": lambda x: batch_normalised(x).at[:, 2].set(-jnp.inf),
    "masks of each example": lambda x: jnp.where(masked_rows(x), -1e9, batch_normalised(x)),
    "infinite masks of each": lambda x: jnp.where(masked_rows(x), -jnp.inf, batch_normalised(x)),
    "a large constant class": lambda x: batch_normalised(x).at[:, 1].set(3e6),
    "little": lambda x: 1e-3 * batch_normalised(x),
    "scaled by the largest": lambda x: x.reshape(len(x), -1)[:, :CLASSES] / jnp.max(x),
    "one class": lambda x: x.reshape(len(x), -1)[:, :CLASSES].at[:, 1].add(1e-3 * x.mean()),
    "centered": lambda x: (x - x.mean(0, keepdims=True)).reshape(len(x), -1)[:, :CLASSES],
    "neighbours": lambda x: (x + 0.1 * jnp.roll(x, 1, axis=0)).reshape(len(x), -1)[:, :CLASSES],
    "size of the batch": lambda x: x.reshape(len(x), -1)[:, :CLASSES] * len(x),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", MIXING)
def test_a_model_that_mixes_examples_is_refused(kind, count, images):
    # On a batch of one such a model is a different function; the normalised one is even constant.
    with pytest.raises(ValueError, match=r"examples of a batch independently.* change when"):
        bj.certify(MIXING[kind], images[:count], 0.1, labels=np.zeros(count, int))


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_mixing_shows_where_all_examples_are_equal(value):
    x = np.full((4, 5), value, np.float32)
    with pytest.raises(ValueError, match="independently"):
        bj.certify(batch_normalised, x, 0.1, labels=np.zeros(4, int))


def test_a_flax_module_in_train_mode_is_refused(images):
    module = nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=False), nn.Dense(3)])
    x = images.reshape(len(images), -1)
    weights = jax.jit(module.init)(jax.random.key(0), x)

    @jax.jit
    def mixing(x):
        return module.apply(weights, x, mutable=["batch_stats"])[0]

    with pytest.raises(ValueError, match=r"independently.*example 0 change when"):
        bj.certify(mixing, x, 0.1)

    # Random masks that depend on the position in the batch, which changes for an example alone.
    def dropping(x):
        kept = jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
        return jnp.where(kept, x, 0.0)[:, :CLASSES].at[:, 0].set(-1e9)

    with pytest.raises(ValueError, match=r"independently.*change when it is alone"):
        bj.certify(dropping, x, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("mask", [None, -1e9, -np.inf])
def test_rounding_is_not_mistaken_for_mixing(scale, mask):
    """Large logits, even ones that cancel, and masked classes are accepted in eval mode."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    head = jnp.asarray(scale * rng.normal(size=(32, CLASSES)), jnp.float32)

    def apply(x):
        logits = jax.nn.relu(x @ kernel) @ head
        return logits if mask is None else logits.at[:, 1].set(mask)

    for count in (1, 2, 5, 33):
        x = rng.uniform(size=(count, 64)).astype(np.float32)
        labels = np.asarray(apply(x)).argmax(1).astype(np.int32)
        certificate = bj.certify(apply, x, 0.0, labels=labels, method="interval")
        # A large margin is a bound, an infinite one is not.
        assert certificate.verified.any() == (mask != -np.inf)


CALLBACKS = {
    "pure": lambda read: jax.pure_callback(read, jax.ShapeDtypeStruct((), jnp.float32)),
    "pure in a jitted function": lambda read: jax.jit(
        lambda: jax.pure_callback(read, jax.ShapeDtypeStruct((), jnp.float32))
    )(),
    "pure of an array": lambda read: jax.pure_callback(
        lambda: np.full((1, CLASSES), read()), jax.ShapeDtypeStruct((1, CLASSES), jnp.float32)
    ),
    "pure in a branch": lambda read: jax.lax.cond(
        True,
        lambda: jax.pure_callback(read, jax.ShapeDtypeStruct((), jnp.float32)),
        lambda: jnp.float32(0.0),
    ),
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_what_a_callback_reads_is_never_stale(kind, images):
    state = {"scale": np.float32(1.0)}

    class Reading(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(CLASSES)(x) * CALLBACKS[kind](lambda: np.float32(state["scale"]))

    x = images.reshape(len(images), -1)
    module, labels = Reading(), np.zeros(len(x), int)
    weights = module.init(jax.random.key(0), x)
    for scale in (1.0, -3.0):
        state["scale"] = np.float32(scale)
        # Nobody knows how a callback rounds.
        certificate = bj.certify(
            (module, weights), x, 0.0, labels=labels, method="interval", rounding="nearest"
        )
        logits = np.asarray(module.apply(weights, x))
        np.testing.assert_allclose(certificate.margins, logits[:, :1] - logits, atol=1e-4)


class Recurrent(nnx.Module):
    """A recurrent network whose cell draws the first carry from its own random keys."""

    def __init__(self, cell, rngs):
        self.rnn, self.head = nnx.RNN(cell), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x)[:, -1])


@pytest.mark.slow
@pytest.mark.parametrize("cell", [nnx.GRUCell, nnx.OptimizedLSTMCell, nnx.SimpleCell])
def test_nnx_modules_that_draw_keys_while_they_are_traced(cell):
    module = Recurrent(cell(4, 5, rngs=nnx.Rngs(1)), nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(0), (2, 4, 4))
    graphdef, state = nnx.split(module)
    before = jax.tree.map(np.asarray, nnx.state(module, nnx.RngCount))
    certificate = bj.certify(module, x, 1e-3, method="interval")
    after = jax.tree.map(np.asarray, nnx.state(module, nnx.RngCount))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    expected = bj.certify(
        lambda z: nnx.merge(graphdef, state, copy=True)(z), x, 1e-3, method="interval"
    )
    np.testing.assert_allclose(certificate.margins, expected.margins, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(certificate.labels, np.asarray(module(x)).argmax(1))


def test_what_a_module_reads_from_elsewhere_is_never_stale(images):
    """Equal modules with equal variables are different programs if an object they read changes."""

    class Settings:
        scale = 1.0
        shift = np.zeros((1, CLASSES), np.float32)

    class Reading(nn.Module):
        settings: Settings

        @nn.compact
        def __call__(self, x):
            return self.settings.scale * nn.Dense(CLASSES)(x) + self.settings.shift

    settings = Settings()
    x = images.reshape(len(images), -1)
    module, labels = Reading(settings), np.zeros(len(x), int)
    weights = jax.jit(module.init)(jax.random.key(0), x)

    def check():
        certificate = bj.certify((module, weights), x, 0.0, labels=labels)
        logits = np.asarray(module.apply(weights, x))
        np.testing.assert_allclose(certificate.margins, logits[:, :1] - logits, atol=1e-4)

    check()
    settings.scale = -1.0
    check()
    settings.shift = np.arange(CLASSES, dtype=np.float32)[None]
    check()


class _Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        logits = nn.Dense(3)(x)
        return logits + jax.random.normal(self.make_rng("noise"), logits.shape)


class _NoisyNNX(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=False, rngs=rngs)

    def __call__(self, x):
        noise = jax.random.normal(self.dropout.rngs(), (len(x), 3))
        return self.dense(x) + noise


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_key_decides_the_draws_of_a_stochastic_model(kind):
    x, keys = jnp.ones((2, 4)), jax.random.split(jax.random.key(0))
    if kind == "linen":
        pure = bj.PureModel.of((_Noisy(), _Noisy().init(keys[0], x)))
    else:
        pure = bj.PureModel.of(_NoisyNNX(nnx.Rngs(0)))
    draws = [np.asarray(pure.apply(pure.variables, x, key)) for key in (keys[0], keys[0], keys[1])]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 0.1


def test_a_plain_callable_takes_no_key():
    pure = bj.PureModel.of(lambda x: x)
    with pytest.raises(TypeError, match="a plain callable takes no PRNG key"):
        pure.apply(pure.variables, jnp.ones((1, 2)), jax.random.key(0))


def test_a_pure_model_is_certified_as_it_is():
    x = jnp.ones((2, 4))
    pure = bj.PureModel.of((nn.Dense(3), nn.Dense(3).init(jax.random.key(1), x)))
    assert bj.PureModel.of(pure) is pure
    direct = bj.certify((nn.Dense(3), pure.variables), x, 0.1)
    np.testing.assert_array_equal(bj.certify(pure, x, 0.1).margins, direct.margins)
    one = pure.of_one_example(pure.variables)(x[0])
    np.testing.assert_allclose(one, pure.apply(pure.variables, x)[0], rtol=1e-6)
