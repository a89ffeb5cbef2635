"""Networks over smooth activations and elementwise functions.

Each applies its functions side by side to a few units and mixes all of their values: a long chain
would add up the rounding by which bounds move outward, in float32 more than the tests allow.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import entr, xlogy
from network import Network, affine, dense, normal

UNITS = 3  # per function


def _side_by_side(name, *functions, inputs=3):
    """`x -> head @ concatenate(f_k(x @ W_k + b_k))`."""
    units = UNITS * len(functions)

    def draw(rng):
        head = {"kernel": 0.2 * normal(rng, units, 2), "bias": rng.normal(size=2)}
        return [dense(rng, inputs, units), head]

    def apply(layers, x):
        parts = jnp.split(affine(layers[0], x), len(functions))
        values = [function(part) for function, part in zip(functions, parts, strict=True)]
        return affine(layers[1], jnp.concatenate(values))

    return Network(name, (inputs,), draw, apply)


def _above_zero(function):
    """The function of values in its domain, whatever the box."""
    return lambda x: function(jax.nn.softplus(x) + 0.5)


def _tame(function):
    return lambda x: function(2.0 * jnp.tanh(x))


def _in_the_disc(function):
    return lambda x: function(0.9 * jnp.tanh(x))


def _exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def _ratio(x):
    return jnp.tanh(x) / (jax.nn.softplus(x[::-1]) + 0.5)


def _power(x):
    return jnp.power(jax.nn.softplus(x) + 0.5, jnp.tanh(x[::-1]))


NETWORKS: tuple[Network, ...] = (
    _side_by_side("gates", jax.nn.gelu, _exact_gelu, jax.nn.silu, jax.nn.mish, jax.nn.hard_silu),
    _side_by_side(
        "bent",
        jax.nn.selu,
        jax.nn.elu,
        lambda x: jax.nn.elu(x, 2.5),
        jax.nn.celu,
        jax.nn.squareplus,
    ),
    _side_by_side(
        "saturating", jax.lax.erf, jax.lax.erfc, jnp.arctan, jnp.arcsinh, jax.nn.soft_sign
    ),
    _side_by_side("soft", jax.nn.log_sigmoid, jax.nn.sparse_plus, jax.nn.hard_sigmoid),
    _side_by_side("growing", *map(_tame, (jnp.exp, jnp.exp2, jnp.expm1, jnp.sinh, jnp.cosh))),
    _side_by_side("powers", jnp.square, *map(_tame, (lambda x: x**3, lambda x: x**4))),
    _side_by_side("roots", *map(_above_zero, (jnp.log, jnp.log1p, jnp.sqrt, jax.lax.rsqrt))),
    _side_by_side(
        "quotients",
        *map(_above_zero, (jnp.reciprocal, lambda x: x**-2, lambda x: x**0.7, lambda x: x**-1.5)),
        lambda x: -1.0 / (jax.nn.relu(x) + 1.0),
        _ratio,
        _power,
        lambda x: 0.5 ** jnp.tanh(x),
    ),
    _side_by_side("waves", jnp.sin, jnp.cos),
    _side_by_side(
        "inverses",
        *map(_in_the_disc, (jnp.arcsin, jnp.arccos, jnp.arctanh, jnp.tan)),
        lambda x: jnp.arccosh(jax.nn.softplus(x) + 1.5),
        jnp.sinc,
    ),
    # JAX's gradient of the entropy is NaN where a saturated sigmoid is 0, and so are attacks.
    _side_by_side(
        "entropies",
        lambda x: entr(0.1 + 0.8 * jax.nn.sigmoid(x)),
        lambda x: xlogy(2.0, x**2 + 1.0),
    ),
    _side_by_side(
        "wrapped",
        lambda x: jnp.mod(x, 0.75),
        lambda x: jnp.fmod(x, -0.5),
        lambda x: x // 0.4,
        lambda x: jnp.where(x > 0.2, x, 0.1),
        lambda x: jnp.where(jnp.abs(x) <= 0.5, 0.5 * x**2, 0.5 * (jnp.abs(x) - 0.25)),
    ),
    _side_by_side(
        "steps",
        jnp.sign,
        jnp.floor,
        jnp.ceil,
        jnp.round,
        lambda x: (x > 0.25).astype(x.dtype),
    ),
)
