"""How far a computed elementwise function may lie from the real one, as stated errors.

Runtimes do not round exp, log, tanh, erf, sin or pow correctly, and each computes them in its own
way. A bound that shall hold for what a program computes therefore needs a *stated* error of every
function. Nothing proves these numbers: they are a promise on a condition. **A bound holds for every
runtime whose functions keep within them**, so certificates name them. In float32 they are at least
twice what `experiments.benchmarks.ulps` measured of XLA (on the CPU, with vectors and scalars,
alone and fused, with and without AVX) and of onnxruntime; `docs/results/functions.md` has the
numbers, and `boundjax.ops.accuracy_cases` compares this machine with them. In float64 they are an
assumption: 8 ulp or what is stated in float32, if that is more; except for log1p, which XLA
computes with an error of up to 129 ulp near -0.41 (github.com/jax-ml/jax/issues/39707).

The errors are those of the mathematical function with exact constants, such as `sqrt(2 / pi)` in
gelu, and with the parameters that the node holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from boundjax.ir.families import Scalar
from boundjax.ir.node import Node
from boundjax.ops import piecewise
from boundjax.sets.rounding import Arithmetic

_INFINITY = float("inf")
SINGLE = Arithmetic.of(np.float32)
_FLOAT64_ULP: Mapping[str, float] = {"log1p": 512.0}


class Accuracy(NamedTuple):
    """The stated error of an implementation of a function `f` of one floating-point operand.

    For every floating-point number `z` of the domain with `|f(z)| <= 1 / (2 nu)`, an eighth of the
    largest number, the computed value is finite and off by at most

        2u (ulp + exponent |z|) |f(z)|  +  2u operand |z|  +  u absolute  +  nu underflow

    where u is the unit roundoff (half the spacing of the numbers from 1 to 2) and nu the smallest
    normal number. `2u |f(z)|` lies between one and two spacings of the numbers around `f(z)`.

    Attributes:
      ulp: the relative error.
      absolute: for functions that are rounded relative to 1, such as `exp(x) - 1` near 0.
      operand: for functions in which numbers of the operand's size cancel: `x (1 + tanh x)`.
      exponent: for functions that compute `exp` of a rounded multiple or sum of their operand.
      underflow: at least the slope around 0, because a runtime may treat a subnormal operand as 0,
        and at least what intermediate results may lose.
      domain: the least and the largest operand for which the error is stated.
    """

    ulp: float = 4.0
    absolute: float | Array = 0.0
    operand: float | Array = 0.0
    exponent: float = 0.0
    underflow: float | Array = 2.0
    domain: tuple[float, float] = (-_INFINITY, _INFINITY)

    def error(self, operand: Any, value: Any, arithmetic: Arithmetic) -> Any:
        """The stated error where operand and value are at most this large; see the class.

        Args:
          operand: the operand `z`, or an upper bound on `|z|`; a number or an array.
          value: `f(z)`, or an upper bound on its magnitude, of the same shape.
          arithmetic: of the dtype in which the function is computed.

        Returns:
          A number or an array that broadcasts to that shape, rounded to nearest like any sum of
          five terms. It does not ask whether the error is stated at all; `holds` does.
        """
        # Coefficients of 0 are left out so that 0 times an infinite size is not NaN.
        share = abs(value) * self.ulp if self.ulp else 0.0
        if self.exponent:
            share = share + abs(value) * (abs(operand) * self.exponent)
        if not isinstance(self.operand, float) or self.operand:
            share = share + abs(operand) * self.operand
        unit, underflow = arithmetic.unit, arithmetic.underflow
        return share * (2.0 * unit) + (self.absolute * unit + self.underflow * underflow)

    def holds(self, lower: Any, upper: Any, value: Any, arithmetic: Arithmetic) -> Any:
        """Where the error is stated for all operands of `[lower, upper]`; False at NaN.

        Args:
          lower, upper: the least and the largest operand.
          value: an upper bound on the magnitude of the function's values.
          arithmetic: of the dtype in which the function is computed.
        """
        inside = (lower >= self.domain[0]) & (upper <= self.domain[1])
        return inside & (abs(value) <= 0.5 / arithmetic.underflow)


EXACT = Accuracy(ulp=0.0)

_POSITIVE = (SINGLE.underflow, _INFINITY)
# A subnormal square is treated as 0, and its root is not small.
_ROOT_OF_UNDERFLOW = math.sqrt(SINGLE.underflow) / SINGLE.unit
# The squares and reciprocals of these neither over- nor underflow.
_LARGEST_PARAMETER = 2.0**60


def of_scaled_expm1(scale: float | Array) -> Accuracy:
    """Of `scale expm1(x)` for negative x; some runtimes compute `exp(x) - 1`, rounded near 1."""
    return Accuracy(8.0, absolute=4.0 * abs(scale), underflow=2.0 + 2.0 * abs(scale))


def of_squareplus(b: float) -> Accuracy | None:
    """Of `(x + sqrt(x^2 + b)) / 2`, where `x` and the root cancel and `x^2` may over- or underflow.

    In units of u the root is off by 3/2 of itself, and the sum of both by 1/2 of itself.
    """
    if not 0.0 <= b <= _LARGEST_PARAMETER:
        return None
    absolute = 4.0 * math.sqrt(b) + 4.0 * _ROOT_OF_UNDERFLOW
    domain = (-_LARGEST_PARAMETER, _LARGEST_PARAMETER)
    return Accuracy(absolute=absolute, operand=2.0, domain=domain)


# By the name of a primitive or composite whose error depends on no constant operand, in float32.
STATED: Mapping[str, Accuracy] = {
    # Comparisons and selections do not round. The rules of steps at 0 allow for subnormal operands,
    # which a runtime may treat as 0.
    **dict.fromkeys(
        (
            "abs", "ceil", "clamp", "clip", "convert_element_type", "floor", "hard_tanh", "max",
            "min", "relu", "relu6", "round", "sign", "trunc", "whole",
        ),
        EXACT,
    ),
    # XLA (jaxlib 0.10) computes exp(a) exp(b) and exp(a) / exp(b) as exp of a rounded sum.
    "exp": Accuracy(exponent=1.0),
    "exp2": Accuracy(exponent=1.0),
    "expm1": Accuracy(10.0),
    "log": Accuracy(6.0, domain=_POSITIVE),
    "log1p": Accuracy(6.0, domain=(-1.0, _INFINITY)),
    "tanh": Accuracy(10.0),
    "logistic": Accuracy(absolute=8.0),
    "erf": Accuracy(10.0),
    "erfc": Accuracy(8.0, absolute=4.0),
    # Runtimes that reduce their operand in float32 are off by a few u at zeros far from 0.
    "sin": Accuracy(absolute=2.0),
    "cos": Accuracy(absolute=2.0),
    "sinh": Accuracy(10.0, exponent=1.0),
    "cosh": Accuracy(exponent=1.0),
    "asinh": Accuracy(6.0),
    "atan": Accuracy(6.0),
    "asin": Accuracy(8.0, domain=(-1.0, 1.0)),
    "acos": Accuracy(absolute=8.0, domain=(-1.0, 1.0)),
    "acosh": Accuracy(10.0, absolute=4.0, domain=(1.0, _INFINITY)),
    "atanh": Accuracy(10.0, domain=(-1.0, 1.0)),
    "tan": Accuracy(10.0, domain=(-1e3, 1e3)),
    "sinc": Accuracy(absolute=8.0, domain=(-(2.0**100), 2.0**100)),
    "x_log_x": Accuracy(8.0, operand=2.0, underflow=256.0, domain=(0.0, _INFINITY)),
    # Remainders are exact, but for one sum that moves a negative one to the other sign.
    "rem": Accuracy(1.0),
    "remainder": Accuracy(2.0),
    "floor_divide": Accuracy(),
    "sqrt": Accuracy(6.0, absolute=4.0 * _ROOT_OF_UNDERFLOW, domain=(0.0, _INFINITY)),
    "rsqrt": Accuracy(6.0, domain=_POSITIVE),
    "square": Accuracy(2.0),
    "softplus": Accuracy(8.0),
    "log_sigmoid": Accuracy(8.0),
    "silu": Accuracy(operand=4.0),
    "gelu": Accuracy(operand=4.0),
    "gelu_exact": Accuracy(operand=3.0),
    "mish": Accuracy(10.0, operand=1.0),
    "selu": Accuracy(10.0, absolute=8.0, underflow=8.0),
    "soft_sign": Accuracy(6.0),
    "hard_silu": Accuracy(absolute=4.0),
    "sparse_plus": Accuracy(),
}  # fmt: skip


def of_integer_power(exponent: int) -> Accuracy | None:
    """Of `x ** exponent`: half an ulp per product, doubled; None beyond 2^24 factors."""
    size = abs(exponent)
    return Accuracy(1.0 + size, underflow=max(2.0, size)) if size <= 2**24 else None


def of_power(exponent: float, dtype: Any = np.float32) -> Accuracy | None:
    """Of `x ** exponent` for `x >= 0` and any constant exponent; None if that is not finite.

    Around 0 roots are steep, and a subnormal operand may be treated as 0: the whole value at the
    smallest normal number is then lost. That is paid by `absolute`.
    """
    if not math.isfinite(exponent):
        return None
    if exponent == 0.0:
        return EXACT
    if exponent < 0:
        return Accuracy(8.0, domain=_POSITIVE)
    arithmetic = Arithmetic.of(dtype)
    at_underflow = arithmetic.underflow**exponent / arithmetic.unit
    return Accuracy(8.0, absolute=4.0 * at_underflow, domain=(0.0, _INFINITY))


def _parameter(node: Node, default: float) -> float | Array:
    return piecewise.number(node) if node.constants else default


def _leaky(node: Node) -> Accuracy:
    return of_slopes(_parameter(node, 0.01))


def of_slopes(*slopes: float | Array) -> Accuracy:
    """One product, which is rounded correctly; the default slope 0.01 is a rounded number."""
    return Accuracy(2.0, underflow=2.0 + sum(abs(slope) for slope in slopes))


def _chooses(slope: Any, offset: Any) -> bool:
    """Whether `slope x + offset` rounds nothing, for the terms of a piece."""
    (factor, by), (number, constant) = slope, offset
    if by is not None:
        return False
    return factor == 0.0 or (abs(factor) == 1.0 and number == 0.0 and constant is None)


def _pieces(node: Node) -> Accuracy:
    """One product and one sum, both rounded correctly, in the steepest piece.

    Pieces that are `x`, `-x` or a number only choose, unless a threshold is computed and rounds.
    """
    if not node.formulas and all(
        _chooses(part.slope, part.offset) for part in node.params["parts"]
    ):
        return EXACT
    steepest: float | Array = 0.0
    for part in node.params["parts"]:
        factor, operand = part.slope
        value = 1.0 if operand is None else piecewise.number(node, operand)
        size = abs(factor * value)
        both = isinstance(size, float) and isinstance(steepest, float)
        steepest = max(steepest, size) if both else jnp.maximum(steepest, size)
    return Accuracy(2.0, operand=steepest, underflow=2.0 + steepest)


def _celu(node: Node) -> Accuracy | None:
    alpha = _parameter(node, 1.0)
    # With a negative alpha the value grows like exp, whose exponent is a rounded quotient.
    usable = isinstance(alpha, float) and 1.0 / _LARGEST_PARAMETER <= alpha <= _LARGEST_PARAMETER
    return of_scaled_expm1(alpha) if usable else None


def _squareplus(node: Node) -> Accuracy | None:
    b = _parameter(node, 4.0)
    return of_squareplus(b) if isinstance(b, float) else None


def _power(node: Node) -> Accuracy | None:
    exponent = piecewise.number(node)
    return of_power(exponent, node.dtype) if isinstance(exponent, float) else None


def of_interpolation(knots: Any, values: Any) -> Accuracy | None:
    """Of `jnp.interp`: six roundings of a rise, which is at most twice the largest value.

    None for knots that are no plain numbers, too close or too far apart for their differences.
    """
    at, height = np.asarray(knots, np.float64), np.asarray(values, np.float64)
    steps = np.diff(at)[np.diff(at) != 0]
    sizes = np.abs(np.concatenate([at, height]))
    if not (np.all(sizes <= _LARGEST_PARAMETER) and np.all(steps >= 2.0**-30)):
        return None
    largest, steepest = float(np.max(np.abs(height))), 2.0 / float(np.min(steps, initial=1.0))
    return Accuracy(1.0, absolute=32.0 * largest, underflow=2.0 + 2.0 * largest * steepest)


def _interpolation(node: Node) -> Accuracy | None:
    if any(isinstance(constant, Tracer) for constant in node.constants):
        return None
    knots, *values = node.constants
    if len(values) > 1 or np.any(np.diff(np.asarray(knots)) == 0):
        return None  # a runtime may read a subnormal operand as 0, beyond a jump
    return of_interpolation(knots, np.concatenate([np.ravel(v) for v in values]))


# The errors that depend on constant operands or parameters.
BY_CONSTANTS: Mapping[str, Callable[[Node], Accuracy | None]] = {
    "leaky_relu": _leaky,
    "hinge": lambda node: of_slopes(*(piecewise.number(node, k) for k in (0, 1))),
    "pieces": _pieces,
    "elu": lambda node: of_scaled_expm1(_parameter(node, 1.0)),
    "celu": _celu,
    "squareplus": _squareplus,
    "integer_pow": lambda node: of_integer_power(node.params["y"]),
    "pow": _power,
    "_interp": _interpolation,
}


def accuracy(node: Node) -> Accuracy | None:
    """The stated error of an elementwise node.

    Args:
      node: of a traced graph, or one like it.

    Returns:
      None if there is no stated error: the op is not elementwise, its constant operand is out of
      range (a negative alpha of celu) or only known when the program runs, or the dtype is neither
      float32 nor float64.
    """
    if not isinstance(node.op, Scalar) or node.dtype not in (np.float32, np.float64):
        return None
    by_constants = BY_CONSTANTS.get(node.primitive)
    stated = by_constants(node) if by_constants else STATED.get(node.primitive)
    if stated is None or node.dtype == np.float32 or not stated.ulp:
        return stated
    return stated._replace(ulp=max(stated.ulp, _FLOAT64_ULP.get(node.primitive, 8.0)))
