"""The precision of products: full in bounds, lower where training asks for it."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import boundjax as bj
from boundjax.certification import presets
from boundjax.search.programs import Programs


class _Net(nn.Module):
    """A strided convolution, a dense layer and a product of two perturbed values."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, padding=1)(x)).reshape(len(x), -1)
        return nn.Dense(3)(x) * nn.Dense(3)(x)


@pytest.fixture(scope="module")
def net():
    model = _Net()
    x = jnp.ones((2, 6, 6, 1))
    return model, model.init(jax.random.key(0), x), x


def _precisions(function, *arguments):
    """The precisions of all products of a program, such as `HIGHEST`."""
    text = jax.jit(function).lower(*arguments).as_text()
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*", text)
    assert products
    precisions = set()
    for product in products:
        named = re.search(r"precision\w* = \[([^\]]*)\]", product)
        parts = named[1].replace("#stablehlo<precision ", "").replace(">", "") if named else ""
        precisions |= {part.strip() for part in parts.split(",")} if parts else {"DEFAULT"}
    return precisions


BOUNDS = {
    "interval": bj.interval,
    "crown-ibp": bj.linear,
    "crown": lambda f: bj.linear(f, intermediate="linear"),
    "forward": bj.forward_linear,
}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("precision", ["highest", "high", "default"])
@pytest.mark.sampled(7)
def test_bounds_and_their_gradients_run_at_the_precision_asked_for(net, name, precision):
    model, variables, x = net

    def loss(variables):
        with bj.training_precision(precision):
            bounds = BOUNDS[name](lambda image: model.apply(variables, image[None])[0])
            lower = jax.vmap(lambda image: bounds(bj.LpBall(image, 0.1)).lower)(x)
        return jnp.sum(lower)

    def gradient(variables):
        with bj.training_precision(precision):
            return jax.grad(loss)(variables)

    exact = {"HIGHEST"}  # of selections of windows, and their transposes
    assert _precisions(gradient, variables) - exact <= {precision.upper()}
    assert precision.upper() in _precisions(gradient, variables)


def test_without_being_asked_bounds_are_exact(net):
    model, variables, x = net
    with jax.default_matmul_precision("bfloat16"):

        def bounds(variables):
            function = bj.linear(lambda image: model.apply(variables, image[None])[0])
            return function(bj.LpBall(x[0], 0.1)).lower

        assert _precisions(bounds, variables) == {"HIGHEST"}


@pytest.mark.parametrize("method", ["interval", "crown-ibp", "crown", "bcp"])
def test_certificates_are_exact_whoever_asks(net, method):
    model, variables, x = net
    apply = bj.PureModel.of((model, variables)).apply
    with bj.training_precision("default"):
        # Trace the loss first: a certificate must not reuse what was traced for it.
        bounds = presets.METHODS[method](
            lambda image: model.apply(variables, image[None])[0], 2**28
        )
        assert "DEFAULT" in _precisions(lambda image: bounds(bj.LpBall(image, 0.1)).lower, x[0])
        compiled = presets.compiled_margins(apply, method, 3, 2**28, one_by_one=False)
        eps, labels = jnp.full(2, 0.1), jnp.zeros(2, jnp.int32)
        assert _precisions(compiled, variables, bj.Threat(0.0), x, eps, labels) == {"HIGHEST"}


def test_proofs_are_exact_whoever_asks(net):
    model, variables, x = net
    box, rows = jnp.ravel(x[0]), jnp.ones((1, 3))
    many = [jnp.stack([a] * 2) for a in (box, box, rows, jnp.ones(1))]
    open_ones = (*many, jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1), bool))

    def programs():
        programs_of_net = Programs(
            lambda image: model.apply(variables, image[None])[0], x.shape[1:]
        )
        bounds = programs_of_net.bounds("crown").lower(box, box, rows)
        return bounds.as_text(), programs_of_net.split("crown").lower(*open_ones).as_text()

    expected = programs()
    assert all("HIGHEST" in text for text in expected)
    with bj.training_precision("default"):
        assert programs() == expected


def test_the_context_ends_with_its_block_and_knows_its_names():
    from boundjax import precision

    with pytest.raises(RuntimeError), bj.training_precision("default"):
        raise RuntimeError
    assert precision.of_products() == jax.lax.Precision.HIGHEST
    with (
        pytest.raises(ValueError, match=r"one of highest, high, default, got 'tf32'"),
        bj.training_precision("tf32"),
    ):
        pass
