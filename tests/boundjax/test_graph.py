"""Tracing: inlining, constant folding, names and refusals."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graphs import traced_aux

import boundjax as bj
from boundjax.tracing.trace import trace

pytestmark = pytest.mark.quick


def primitives(function, x=None):
    """The perturbed ops of a function, in order, without the input."""
    x = jnp.ones(3) if x is None else x
    return [node.primitive for node in trace(function, x).nodes[1:]]


@jax.custom_vjp
def straight_through(x):
    return jax.nn.relu(x)


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))


@pytest.mark.parametrize(
    "wrap",
    [
        jax.jit,
        jax.checkpoint,
        lambda f: jax.jit(jax.jit(f)),
        lambda f: jax.checkpoint(jax.jit(f)),
        lambda f: functools.partial(jax.jit(f)),
    ],
    ids=["jit", "remat", "nested", "remat of jit", "partial"],
)
def test_calls_are_inlined(wrap):
    function = wrap(lambda x: jax.nn.relu(x + 1.0))
    assert primitives(function) == ["add", "relu"]


def test_custom_derivatives_do_not_hide_the_function():
    assert primitives(straight_through) == ["relu"]
    bounds = bj.interval(straight_through)(bj.Box(-jnp.ones(2), jnp.ones(2)))
    np.testing.assert_allclose(bounds.lower, 0.0)
    np.testing.assert_allclose(bounds.upper, 1.0)


def test_what_does_not_depend_on_the_input_is_folded():
    matrix = jnp.eye(3)

    def function(x):
        # A chain of unsupported ops, on weights only.
        weight = jnp.linalg.norm(jnp.exp(matrix) / jnp.sqrt(matrix + 2.0), axis=0)
        return x * jnp.where(weight > 1.0, weight, 0.0)

    assert primitives(function) == ["mul"]


def test_batch_normalisation_is_affine_in_its_input():
    module = nn.BatchNorm(use_running_average=True)
    variables = module.init(jax.random.key(0), jnp.ones((1, 3)))
    names = primitives(lambda x: module.apply(variables, x[None])[0])
    assert not {"rsqrt", "max", "relu"} & set(names)


def test_unused_ops_are_not_looked_at():
    def function(x):
        jnp.exp(x)
        return 2.0 * x

    assert primitives(function) == ["mul"]


def test_only_the_activations_of_jax_are_taken_by_name():
    """A user's function may be called relu; its equations decide what it is, not its name."""

    @jax.jit
    def relu(x):
        return jnp.minimum(x, 0.0)

    @jax.jit
    def leaky_relu(x, slope):
        return jnp.maximum(x, slope)

    @jax.jit
    def softplus(x):
        return -x

    @functools.partial(jax.jit, static_argnames="high")
    def clip(x, low, high):
        return jnp.maximum(x, low) - high

    assert "relu" not in primitives(relu)
    assert "leaky_relu" not in primitives(lambda x: leaky_relu(x, 0.1))
    assert "softplus" not in primitives(softplus)
    assert "clip" not in primitives(lambda x: clip(x, 0.0, 2.0))
    box = bj.Box(-jnp.ones(1), 2.0 * jnp.ones(1))
    for transform in (bj.interval, bj.linear):
        assert transform(relu)(box).lower == -1.0
        assert transform(relu)(box).upper == 0.0
        assert transform(softplus)(box).lower == -2.0
        assert transform(softplus)(box).upper == 1.0
        assert transform(lambda x: clip(x, 0.0, 2.0))(box).lower <= -2.0


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", jax.nn.relu),
        ("relu6", jax.nn.relu6),
        ("leaky_relu", jax.nn.leaky_relu),
        ("leaky_relu", lambda x: jax.nn.leaky_relu(x, 0.3)),
        ("hard_tanh", jax.nn.hard_tanh),
        ("softplus", jax.nn.softplus),
        ("clip", lambda x: jnp.clip(x, -1.0, 0.5)),
        ("clip", lambda x: jnp.clip(x, jnp.zeros(3), 0.5)),
    ],
)
def test_composite_activations_are_named(name, function):
    assert primitives(function) == [name]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_casts_that_lose_digits_are_refused(dtype):
    """`linear_transpose` accepts them silently, but truncated values have no linear bounds."""

    def function(x):
        return x.astype(dtype).astype(jnp.float32)

    with pytest.raises(bj.UnsupportedOpError, match="convert_element_type"):
        bj.interval(function)(bj.Box(jnp.zeros(2), jnp.ones(2)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.lexsort((x, x[::-1])),
        lambda x: x.at[jnp.argmax(x)].set(0.0),
        lambda x: jax.lax.reduce_precision(x, 8, 7),
        lambda x: x.astype(jnp.int32) // 2,
        lambda x: jnp.fft.fft(x).real,
        lambda x: jnp.linalg.eigvalsh(jnp.outer(x, x)),
    ],
)
@pytest.mark.parametrize("transform", [bj.interval, bj.linear])
def test_other_ops_are_refused_rather_than_bounded_wrongly(function, transform):
    with pytest.raises(bj.UnsupportedOpError):
        transform(function)(bj.Box(jnp.ones(3), 2.0 * jnp.ones(3)))


def test_the_error_names_op_line_and_registration():
    def function(x):
        return jax.lax.reduce_precision(x, 8, 7)  # the line that the message must name

    with pytest.raises(bj.UnsupportedOpError) as raised:
        bj.interval(function)(bj.Box(jnp.zeros(2), jnp.ones(2)))
    message = str(raised.value)
    here = pathlib.Path(__file__)
    lines = here.read_text().splitlines()
    line = 1 + next(k for k, text in enumerate(lines) if "the line that the message must" in text)
    assert f"{here.name}:{line}" in message
    assert "'reduce_precision'" in message
    assert "register" in message
    assert "\n" not in message


def test_the_error_names_the_line_inside_a_flax_module():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3, name="hidden")(x)
            return jax.lax.reduce_precision(x, 8, 7)

    variables = Net().init(jax.random.key(0), jnp.ones((1, 2)))
    message = r"'reduce_precision'.*test_graph\.py:\d+ \(.*__call__.*\)"
    with pytest.raises(bj.UnsupportedOpError, match=message):
        bj.certify((Net(), variables), jnp.ones((2, 2)), 0.1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(4)(x))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4)(x))
        x = nn.tanh(nn.Dense(4)(x))
        return nn.Dense(2)(Block(name="block")(x))


def test_names_come_from_flax_scopes():
    variables = jax.jit(Net().init)(jax.random.key(0), jnp.ones((1, 3)))
    transform = bj.linear(lambda x: Net().apply(variables, x[None])[0], has_aux=True)
    aux = traced_aux(transform, bj.LpBall(jnp.zeros(3), 0.1))
    assert list(aux.pre_activations) == ["Dense_0/relu", "Dense_1/tanh", "block/Dense_0/relu"]
    relus = {"Dense_0/relu", "block/Dense_0/relu"}
    assert aux.slopes.keys() == relus | {"Dense_1/tanh", "Dense_1/tanh:below"}
    # Shapes are those inside the model: a batch of one example.
    assert aux.pre_activations["Dense_0/relu"].lower.shape == (1, 4)


def test_names_are_unique_without_scopes():
    def function(x):
        return jax.nn.relu(jax.nn.relu(x) - 1.0) + jax.nn.relu(x)

    aux = traced_aux(bj.linear(function, has_aux=True), bj.LpBall(jnp.zeros(3), 0.1))
    assert len(aux.pre_activations) == 3


def test_one_operand_used_twice_is_one_value():
    box = bj.Box(-jnp.ones(2), jnp.ones(2))
    # Unlike intervals, linear bounds know that both operands are the same value.
    functions = (lambda x: x - x, lambda x: jnp.maximum(x, x), lambda x: x + x)
    bounds = jax.jit(lambda box: [bj.linear(function)(box).upper for function in functions])(box)
    for upper, expected in zip(bounds, (0.0, 1.0, 2.0), strict=True):
        np.testing.assert_allclose(upper, expected)


def test_outputs_that_do_not_depend_on_the_input():
    bounds = bj.interval(lambda x: (x, jnp.arange(3.0)))(bj.Box(jnp.zeros(2), jnp.ones(2)))
    np.testing.assert_allclose(bounds[1].lower, [0.0, 1.0, 2.0])
    np.testing.assert_allclose(bounds[1].upper, [0.0, 1.0, 2.0])
    bounds = bj.linear(lambda x: jnp.arange(3.0))(bj.Box(jnp.zeros(2), jnp.ones(2)))
    np.testing.assert_allclose(bounds.upper, [0.0, 1.0, 2.0])


def test_the_identity():
    box = bj.Box(jnp.zeros(2), jnp.ones(2))
    for transform in (bj.interval, bj.linear):
        bounds = transform(lambda x: x)(box)
        np.testing.assert_allclose(bounds.lower, 0.0)
        np.testing.assert_allclose(bounds.upper, 1.0)


def test_closed_over_tracers_are_weights():
    def width(scale):
        return bj.linear(lambda x: jax.nn.relu(scale * x))(
            bj.Box(-jnp.ones(2), jnp.ones(2))
        ).width.sum()

    np.testing.assert_allclose(jax.jit(jax.grad(width))(jnp.float32(3.0)), 2.0)


def test_supported_ops_prints_every_entry_of_the_table(capsys):
    bj.supported_ops()
    table = capsys.readouterr().out
    for name in ("conv_general_dilated", "dot_general", "relu", "reduce_window_max", "logistic"):
        assert name in table
    assert len(table.splitlines()) == 1 + len(list(bj.ops.all_ops()))
