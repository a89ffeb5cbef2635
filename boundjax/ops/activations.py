"""The elementwise functions of the table: each states its facts once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.ir.families import Expansion, Lines, Position, Scalar
from boundjax.ir.node import Node
from boundjax.ir.table import register
from boundjax.numerics import squarable
from boundjax.ops import piecewise, powers, smooth
from boundjax.ops.envelope import Function
from boundjax.ops.piecewise import Number
from boundjax.ops.smooth import Curve
from boundjax.sets.rounding import with_flushed

INFINITY = float("inf")


def _one_constant(node: Node) -> bool:
    return len(node.inputs) == 1


def _first_perturbed(node: Node) -> bool:
    return len(node.inputs) == 1 and node.perturbed[0]


# --- piecewise linear -----------------------------------------------------------------------------

_pieces = functools.partial(Scalar, pieces=True)
_increasing = functools.partial(
    _pieces, image=piecewise.monotone_image, lipschitz=piecewise.constant_slope(1.0)
)

register(
    _increasing(
        name="relu",
        note="gradient 0 at 0",
        traced_as=jax.nn.relu,
        lines=piecewise.relu_lines,
        kinks=piecewise.at_zero,
    )
)
register(
    _pieces(
        name="leaky_relu",
        traced_as=jax.nn.leaky_relu,
        note="any slope, also above 1 and negative",
        accepts=_first_perturbed,
        image=piecewise.leaky_image,
        lines=piecewise.leaky_lines,
        lipschitz=piecewise.leaky_lipschitz,
        kinks=piecewise.at_zero,
    )
)
register(
    _pieces(
        name="abs",
        elementwise=True,
        image=piecewise.abs_image,
        lines=piecewise.abs_lines,
        lipschitz=piecewise.constant_slope(1.0),
        kinks=piecewise.at_zero,
    )
)
register(
    _increasing(
        name="max",
        note="with a constant",
        elementwise=True,
        commutative=True,
        accepts=_one_constant,
        lines=piecewise.max_lines,
        kinks=piecewise.at_constants,
    )
)
register(
    _increasing(
        name="min",
        note="with a constant",
        elementwise=True,
        commutative=True,
        accepts=_one_constant,
        lines=piecewise.min_lines,
        kinks=piecewise.at_constants,
    )
)
for _name, _function, _ends in (
    ("relu6", jax.nn.relu6, (0.0, 6.0)),
    ("hard_tanh", jax.nn.hard_tanh, (-1.0, 1.0)),
):
    register(
        _increasing(
            name=_name,
            traced_as=_function,
            lines=piecewise.ramp(*_ends),
            kinks=lambda node, ends=_ends: ends,
        )
    )
register(
    _increasing(
        name="clip",
        traced_as=jnp.clip,
        note="jnp.clip with constant ends",
        accepts=lambda node: len(node.constants) == 2 and node.perturbed[0],
        lines=piecewise.clip_lines,
        kinks=piecewise.at_constants,
    )
)
register(
    _increasing(
        name="clamp",
        note="lax.clamp with constant ends",
        accepts=lambda node: len(node.constants) == 2 and node.perturbed[1],
        lines=piecewise.clip_lines,
        kinks=piecewise.at_constants,
    )
)


# --- steps ----------------------------------------------------------------------------------------


def _predicate(node: Node) -> bool:
    return node.input_shapes[0].dtype == np.bool_ and jnp.issubdtype(node.dtype, jnp.floating)


_step = functools.partial(
    _pieces, image=piecewise.monotone_image, lipschitz=piecewise.step_lipschitz, jumps=True
)


def _jump_at_zero(name: str, lines: Callable[[Node, Array, Array, Position], Lines]) -> Scalar:
    """A step at 0, where a runtime may read a subnormal operand as 0: both sides of it count."""

    def image(node: Node, lower: Array, upper: Array) -> tuple[Array, Array]:
        return piecewise.monotone_image(node, *with_flushed(lower, upper))

    def flushed_lines(node: Node, lower: Array, upper: Array, position: Position) -> Lines:
        return lines(node, *with_flushed(lower, upper), position)

    def lipschitz(node: Node, lower: Array, upper: Array) -> Array:
        return piecewise.step_lipschitz(node, *with_flushed(lower, upper))

    return _step(name=name, image=image, lines=flushed_lines, lipschitz=lipschitz)


register(_jump_at_zero("sign", piecewise.sign_lines))
register(_jump_at_zero("floor", piecewise.rounding_lines(-1.0, 0.0)))
register(_jump_at_zero("ceil", piecewise.rounding_lines(0.0, 1.0)))
register(
    _step(name="round", note="either rounding method", lines=piecewise.rounding_lines(-0.5, 0.5))
)
register(
    _step(
        name="convert_element_type",
        note="of a predicate to a number",
        accepts=_predicate,
        lines=piecewise.cast_lines,
    )
)


# --- smooth functions without a parameter ---------------------------------------------------------


# XLA computes some as exp(c x) or exp(-x * x), whose exponent is rounded by up to 0.5 ulp.


def _exponent_rounding(function: Function) -> Function:
    return lambda x: jnp.abs(function(x) * x) / 8.0


def _square_rounding(function: Function) -> Function:
    return lambda x: function(x) * jnp.square(jnp.maximum(x, 0.0)) / 8.0


_S_SHAPED = {"breakpoints": (0.0,), "curvatures": (1, -1)}
# These are x times a gate that opens around 0.
_GATED = {"curvatures": (-1, 1, -1), "monotone": 0, "rounding": jnp.abs}
_CONCAVE_CONVEX = {"breakpoints": (0.0,), "curvatures": (-1, 1)}

# Inflection points and minima are exact to the last digit: silu solves x tanh(x / 2) = 2, the exact
# gelu has sqrt(2), the rest come from bisecting the first and second derivative in float64.
_CURVES: dict[str, Curve] = {
    "tanh": Curve(**_S_SHAPED, low=-1.0, high=1.0),
    "logistic": Curve(**_S_SHAPED, low=0.0, high=1.0),
    "erf": Curve(**_S_SHAPED, low=-1.0, high=1.0),
    "erfc": Curve(
        **_CONCAVE_CONVEX, monotone=-1, low=0.0, high=2.0, rounding=_square_rounding(jax.lax.erfc)
    ),
    "atan": Curve(**_S_SHAPED),
    "asinh": Curve(**_S_SHAPED),
    "soft_sign": Curve(**_S_SHAPED, low=-1.0, high=1.0),
    "softplus": Curve(curvatures=(1,), low=0.0),
    "log_sigmoid": Curve(curvatures=(-1,), high=0.0),
    "sparse_plus": Curve(curvatures=(1,), low=0.0),
    "silu": Curve(
        breakpoints=(-2.3993572805154675, 2.3993572805154675),
        stationary=(-1.278464542761074,),
        **_GATED,
    ),
    "gelu": Curve(
        breakpoints=(-1.4185040087908283, 1.4185040087908283),
        stationary=(-0.7524614220710162,),
        **_GATED,
    ),
    "gelu_exact": Curve(
        breakpoints=(-math.sqrt(2.0), math.sqrt(2.0)),
        stationary=(-0.7517915246935644,),
        **_GATED,
    ),
    "mish": Curve(
        breakpoints=(-2.2563763963607926, 1.4905711794854284),
        stationary=(-1.1924312145154952,),
        **_GATED,
    ),
    "hard_silu": Curve(
        breakpoints=(-3.0, 3.0),
        curvatures=(0, 1, 0),
        stationary=(-1.5,),
        monotone=0,
        rounding=jnp.abs,
        kinks=((-3.0, 0.5), (3.0, 1.5)),
    ),
    # The right slope is 1.05, the left one at 0 is 1.76: a concave kink.
    "selu": Curve(breakpoints=(0.0,), curvatures=(1, 0), kinks=((0.0, 1.7580993408473768),)),
}

# Other fields of their entries.
_FACTS: dict[str, dict[str, Any]] = {
    "logistic": {"note": "sigmoid"},
    "soft_sign": {"traced_as": jax.nn.soft_sign},
    "softplus": {"traced_as": jax.nn.softplus},
    "log_sigmoid": {"traced_as": jax.nn.log_sigmoid},
    "sparse_plus": {"traced_as": jax.nn.sparse_plus},
    "silu": {"note": "also swish", "traced_as": jax.nn.silu},
    "gelu": {"note": "tanh approximation"},
    "gelu_exact": {"note": "with erf"},
    "mish": {"traced_as": jax.nn.mish},
    "hard_silu": {"note": "also hard_swish", "traced_as": jax.nn.hard_silu},
    "selu": {"traced_as": jax.nn.selu},
    # These occur in formulas that patterns compare.
    **{name: {"elementwise": True} for name in ("exp", "square", "sqrt", "rsqrt")},
}

for _name, _curve in _CURVES.items():
    register(smooth.entry(_name, _curve, **_FACTS.get(_name, {})))

# These overflow, or their domain has a lower end.
_PARTIAL_CURVES: dict[str, Curve] = {
    "exp": Curve(curvatures=(1,), low=0.0),
    "exp2": Curve(curvatures=(1,), low=0.0, rounding=_exponent_rounding(jnp.exp2)),
    "expm1": Curve(curvatures=(1,), low=-1.0),
    "sinh": Curve(**_CONCAVE_CONVEX, rounding=_exponent_rounding(jnp.sinh)),
    "cosh": Curve(
        curvatures=(1,),
        stationary=(0.0,),
        monotone=0,
        low=1.0,
        rounding=_exponent_rounding(jnp.cosh),
    ),
    "square": Curve(curvatures=(1,), stationary=(0.0,), monotone=0, low=0.0),
    "log": Curve(curvatures=(-1,), least=0.0, at_least=-INFINITY),
    "log1p": Curve(curvatures=(-1,), least=-1.0, at_least=-INFINITY),
    "sqrt": Curve(curvatures=(-1,), low=0.0, least=0.0, at_least=0.0),
    "rsqrt": Curve(curvatures=(1,), monotone=-1, low=0.0, least=0.0, at_least=INFINITY),
}

for _name, _curve in _PARTIAL_CURVES.items():
    _note = "" if _curve.least == -INFINITY else f"of values above {_curve.least:g}"
    register(smooth.entry(_name, _curve, note=_note, partial=True, **_FACTS.get(_name, {})))


# --- activations with a parameter -----------------------------------------------------------------


def _parameter(node: Node, default: float) -> Number:
    return piecewise.number(node) if node.constants else default


def _elu(node: Node) -> Curve:
    alpha = _parameter(node, 1.0)
    if isinstance(alpha, float) and 0 <= alpha <= 1:
        return Curve(curvatures=(1,), kinks=((0.0, 1.0),))
    bend = 1 if isinstance(alpha, float) and alpha > 0 else jnp.sign(alpha)
    steepest = jnp.maximum(jnp.abs(alpha), 1.0)
    # With a negative alpha the function decreases left of 0.
    return Curve(
        breakpoints=(0.0,),
        curvatures=(bend, 0),
        stationary=(0.0,),
        monotone=1 if isinstance(bend, int) else 0,
        kinks=((0.0, steepest),),
    )


def _celu(node: Node) -> Curve:
    alpha = _parameter(node, 1.0)
    if isinstance(alpha, float) and alpha > 0:
        return Curve(curvatures=(1,))
    return Curve(breakpoints=(0.0,), curvatures=(jnp.sign(alpha), 0))


def _squareplus(node: Node) -> Curve:
    b = _parameter(node, 4.0)

    def rounding(x: Array) -> Array:
        size = jnp.abs(x) + jnp.sqrt(jnp.abs(jnp.asarray(b, x.dtype)))
        # x^2 overflows there, even where the value is nearly 0.
        return jnp.where(size >= squarable(x.dtype), jnp.inf, size)

    return Curve(curvatures=(1,), low=0.0, rounding=rounding)


register(
    smooth.entry("elu", _elu, traced_as=jax.nn.elu, note="any alpha", accepts=_first_perturbed)
)
register(
    smooth.entry(
        "celu", _celu, traced_as=jax.nn.celu, note="any alpha but 0", accepts=_first_perturbed
    )
)
register(
    smooth.entry(
        "squareplus",
        _squareplus,
        traced_as=jax.nn.squareplus,
        note="any b >= 0",
        accepts=_first_perturbed,
    )
)


# --- powers and quotients -------------------------------------------------------------------------


def _integer_exponent(node: Node) -> bool:
    if node.perturbed[1]:
        return False
    exponent = piecewise.number(node)
    return isinstance(exponent, float) and exponent.is_integer() and exponent != 0


def _integer_power(node: Node) -> Callable[[Array, Array], Array]:
    exponent = piecewise.number(node)
    assert isinstance(exponent, float)  # `_integer_exponent` accepted it
    return lambda x, _: jax.lax.integer_pow(x, int(exponent))


register(
    smooth.entry(
        "integer_pow",
        powers.integer_curve,
        elementwise=True,
        note="positive exponents",
        accepts=lambda node: node.params["y"] > 0,
        partial=True,
    )
)
register(
    Expansion(
        name="integer_pow",
        note="x ** 0 is 1",
        accepts=lambda node: node.params["y"] == 0,
        expand=lambda node: jnp.ones_like,
    )
)
register(powers.RECIPROCAL)
register(
    Expansion(
        name="pow",
        note="constant integer exponent",
        accepts=_integer_exponent,
        expand=_integer_power,
    )
)
register(
    smooth.entry(
        "pow",
        powers.real_curve,
        note="of values above 0, constant exponent",
        accepts=_first_perturbed,
    )
)
register(
    Expansion(
        name="pow",
        note="of values above 0, perturbed exponent",
        expand=lambda node: lambda x, y: jnp.exp(y * jnp.log(x)),
    )
)
register(
    Expansion(
        name="div",
        note="by a perturbed value that is never 0",
        accepts=lambda node: node.perturbed[1],
        expand=lambda node: lambda x, y: x * jax.lax.integer_pow(y, -1),
    )
)


# --- sine and cosine ------------------------------------------------------------------------------

register(powers.sinusoid("sin", 0.0))
register(powers.sinusoid("cos", -0.5 * math.pi))
