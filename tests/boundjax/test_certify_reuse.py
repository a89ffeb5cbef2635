"""Compiled code is used again for every model of the same program, and never for another one."""

import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import boundjax as bj
from boundjax.tracing.programs import trace_program
from experiments.models.zoo.functions import Batched, tree_module
from experiments.models.zoo.registry import weights

pytestmark = [pytest.mark.quick, pytest.mark.xdist_group("certify reuse"), pytest.mark.sampled(3)]
X = np.random.default_rng(0).uniform(size=(3, 5)).astype(np.float32)
LABELS = np.zeros(3, int)


class Named:
    """Settings and weights that a model reads from elsewhere."""

    scale = np.float32(1.0)


def closure(seed):
    first, last = weights(5, 8, seed=seed), jnp.asarray(weights(8, 3, seed=seed + 1))
    bias = weights(3, seed=seed + 2)
    return lambda x: jnp.maximum(x @ first, 0.0) @ last + bias[None]


def partial_with_keyword(seed):
    def apply(params, x, *, scale):
        return scale * jnp.maximum(x @ params["a"], 0.0) @ params["b"]

    params = {"a": weights(5, 8, seed=seed), "b": weights(8, 3, seed=seed + 1)}
    return functools.partial(apply, params, scale=np.float32(2.0))


class Module(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(8)(x)))
        return nn.Dense(3)(x)


def linen(seed):
    variables = Module().init(jax.random.key(seed), X, train=False)
    return functools.partial(Module().apply, variables, train=False)


class ModuleNNX(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


MODELS = {
    "a closure": closure,
    "a jitted closure": lambda seed: jax.jit(closure(seed)),
    "a jitted closure in another": lambda seed: functools.partial(
        lambda f, x: jax.jit(lambda x: f(x))(x), jax.jit(closure(seed))
    ),
    "a mapped function of one example": lambda seed: jax.vmap(tree_module(seed)),
    "a partial with a keyword": partial_with_keyword,
    "a pytree": lambda seed: Batched(tree_module(seed)),
    "linen": linen,
    "nnx": lambda seed: ModuleNNX(nnx.Rngs(seed)),
}


def logits_of(model):
    pure = bj.PureModel.of(model)
    return np.asarray(pure.apply(pure.variables, jnp.asarray(X)))


def margins(model, **options):
    """The margins of the points themselves, which are differences of logits."""
    options = {"method": "interval", "rounding": "nearest", "labels": LABELS, **options}
    return bj.certify(model, X, 0.0, **options).margins


@pytest.fixture
def compiled(caplog):
    """What JAX compiles, by name."""

    def names():
        texts = [record.getMessage() for record in caplog.records]
        return [text.split()[1] for text in texts if text.startswith("Compiling ")]

    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        yield names


@pytest.mark.parametrize("kind", MODELS)
def test_equal_models_and_other_weights_compile_nothing(kind, compiled, caplog):
    make = MODELS[kind]
    expected = [logits_of(make(seed)) for seed in (1, 1, 2)]
    np.testing.assert_allclose(margins(make(1)), expected[0][:, :1] - expected[0], atol=1e-5)
    assert {"margins", "logits"} <= {name.removeprefix("jit(").rstrip(")") for name in compiled()}
    for seed, logits in zip((1, 2), expected[1:], strict=True):
        model = make(seed)
        caplog.clear()
        again = margins(model)
        assert compiled() == []
        # Bounds are not traced again, either. jax 0.9 says it also of a trace that it has.
        assert "margins" not in caplog.text or jax.__version_info__ < (0, 10)
        np.testing.assert_allclose(again, logits[:, :1] - logits, atol=1e-5)
    assert np.abs(expected[0] - expected[2]).max() > 0.1


def test_other_methods_and_questions_compile_only_what_they_need(compiled, caplog):
    margins(closure(1))
    caplog.clear()
    margins(closure(2), labels=None)
    bj.certified_radius(closure(3), X, method="interval", rounding="nearest", steps=2)
    bj.memory_estimate(closure(3), X, method="interval", rounding="nearest")
    assert compiled() == []


def scaled(value):
    return lambda x: value * x[:, :3]


def column(value):
    return lambda x: x[:, value]


def masked(value):
    return lambda x: jnp.where(value, x, -x)[:, :3]


def branching(value):
    return lambda x: jax.lax.cond(value, lambda z: z, lambda z: -z, x[:, :3])


def looping(value):
    return lambda x: jax.lax.fori_loop(0, value, lambda _, z: np.float32(2.0) * z, x[:, :3])


def applying(value):
    return lambda x: value(x[:, :3])


def differentiated(value):
    return lambda x: jax.vmap(jax.grad(lambda z: jnp.sum(value(z))))(x[:, :3])


def column_of_partial(value):
    return functools.partial(lambda columns, x: x[:, columns], value)


ONES = np.ones((1, 3), np.float32)
CHANGES = {
    "a number": (scaled, np.float32(1.0), np.float32(-1.0)),
    "a python number": (scaled, 1.0, -1.0),
    "filled arrays": (scaled, ONES, -ONES),
    "indices": (column, np.array([0, 1, 2]), np.array([2, 1, 0])),
    "a mask": (masked, np.array([[True] * 5]), np.array([[False, True, False, True, False]])),
    "a branch": (branching, True, False),
    "a number of steps": (looping, 1, 3),
    "a function": (applying, jnp.sin, jnp.cos),
    "a derivative": (differentiated, jnp.sin, jnp.exp),
    "a leaf that is no weight": (column_of_partial, np.array([0, 1, 2]), np.array([1, 2, 3])),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("jitted", [False, True])
def test_what_a_model_captures_is_never_stale(kind, jitted):
    make, *values = CHANGES[kind]
    for value in (*values, values[0]):
        model = jax.jit(make(value)) if jitted else make(value)
        logits = np.asarray(model(jnp.asarray(X)))
        np.testing.assert_allclose(margins(model), logits[:, :1] - logits, atol=1e-5)


def test_arrays_that_change_in_place_and_attributes_are_never_stale():
    kernel, settings = weights(5, 3), Named()

    def model(x):
        return settings.scale * (x @ jnp.asarray(kernel))

    first = margins(model)
    kernel *= 2.0
    np.testing.assert_allclose(margins(model), 2.0 * first, rtol=1e-5)
    settings.scale = np.float32(-1.0)
    np.testing.assert_allclose(margins(model), -2.0 * first, rtol=1e-5)
    kernel[:] = 0.0  # filled with one number: a constant now
    np.testing.assert_array_equal(margins(model), 0.0)


def test_a_batch_of_one_is_not_taken_from_another_program():
    """A model may read something else for one example alone, which is what is bounded."""
    settings = Named()

    def model(x):
        return x[:, :3] * (settings.scale if len(x) == 1 else np.float32(1.0))

    margins(model)
    settings.scale = np.float32(-1.0)
    with pytest.raises(ValueError, match="change when it is alone"):
        margins(model)


def test_settings_of_jax_belong_to_a_program():
    function, x = (lambda x: x @ weights(5, 3)), jnp.asarray(X)
    keys = [trace_program(function, x).program.key]
    with jax.default_matmul_precision("highest"):
        keys.append(trace_program(function, x).program.key)
    with jax.enable_x64(True):
        keys.append(trace_program(function, x).program.key)
    with bj.unroll_limit(3):
        keys.append(trace_program(function, x).program.key)
    keys.append(trace_program(function, jax.ShapeDtypeStruct((2, 5), jnp.float32)).program.key)
    keys.append(trace_program(lambda x: (function(x),), x).program.key)
    assert len(set(keys)) == len(keys)
    assert trace_program(function, x).program.key == keys[0]


def test_programs_hold_no_weights():
    """Compiled code is kept; the weights of the models that it was made for are not."""
    kernel = jnp.asarray(weights(5, 3))
    for model in (lambda x: x @ kernel, jax.jit(lambda x: x @ kernel)):
        trace = trace_program(model, jnp.asarray(X))
        assert [np.shape(array) for array in trace.captured] == [(5, 3)]
        assert all(np.size(value) < 2 for value in trace.program._kept if value is not None)
        np.testing.assert_allclose(
            trace.program([2.0 * kernel], jnp.asarray(X)), 2.0 * X @ np.asarray(kernel), rtol=1e-5
        )


def test_random_keys_are_arguments_of_a_program():
    def drawing(key):
        return lambda x: x @ jax.random.normal(key, (5, 3))

    for seed in (0, 1):
        model = drawing(jax.random.key(seed))
        logits = np.asarray(model(jnp.asarray(X)))
        np.testing.assert_allclose(margins(model), logits[:, :1] - logits, atol=1e-5)
