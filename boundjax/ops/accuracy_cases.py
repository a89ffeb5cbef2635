"""The functions with stated errors beside their values in float64, and the comparison of both.

`CASES` holds every elementwise function of the table, with examples of exponents and parameters.
`check_on_this_machine` compares 2^20 operands; `experiments.benchmarks.ulps` compares all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from boundjax.ir.node import Node, NoProofError
from boundjax.ops import accuracy, piecewise
from boundjax.ops.accuracy import EXACT


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of one operand with its stated error and its values in float64.

    Attributes:
      op: the name in the table of ops.
      stated: the error in float32.
      function: an elementwise JAX function.
      reference: float64 values -> float64 values of NumPy, with an error far below that of float32.
    """

    op: str
    stated: accuracy.Accuracy
    function: Callable[[Any], Array]
    reference: Callable[[np.ndarray], np.ndarray]

    def shares(self, operand: np.ndarray, computed: np.ndarray) -> np.ndarray:
        """Computed errors as shares of the stated ones.

        The proven loss by underflow counts neither for nor against a function.

        Args:
          operand: float32, any shape.
          computed: float32, the function's values.

        Returns:
          float64 of the same shape: 0 where nothing is stated, infinite where the computed value is
          not finite but should be, or where an exact function is off.
        """
        with np.errstate(all="ignore"):
            exact = self.reference(operand.astype(np.float64))
            return self.shares_of(operand, computed, exact)

    def shares_of(self, operand: np.ndarray, computed: np.ndarray, exact: np.ndarray) -> np.ndarray:
        """`shares` with the reference's values."""
        x = operand.astype(np.float64)
        holds = self.stated.holds(x, x, exact, accuracy.SINGLE)
        of_rounding = self.stated._replace(underflow=0.0).error(x, exact, accuracy.SINGLE)
        with np.errstate(all="ignore"):
            lost = self.stated.underflow * accuracy.SINGLE.underflow
            excess = np.maximum(np.abs(computed.astype(np.float64) - exact) - lost, 0.0)
            share = np.where(excess == 0.0, 0.0, excess / of_rounding)
        return np.where(holds, np.where(np.isnan(share), np.inf, share), 0.0)


def _each(function: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of Python numbers, for every element."""
    return lambda x: np.fromiter(map(function, x.ravel().tolist()), np.float64, x.size).reshape(
        x.shape
    )


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def _logistic(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def _x_log_x(x: np.ndarray) -> np.ndarray:
    positive = x > 0
    value = x * np.log(np.where(positive, x, 1.0))
    return np.where(positive | (x == 0), value, np.nan)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * _logistic(math.sqrt(8.0 / math.pi) * (x + 0.044715 * x**3))


_erfc = _each(math.erfc)
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848, 1.0507009873554804934


def _negative_expm1(x: np.ndarray, alpha: float = 1.0, scale: float = 1.0) -> np.ndarray:
    """`x` right of 0, `alpha expm1(x / scale)` left of it."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0) / scale))


def _squareplus_reference(b: float) -> Callable[[np.ndarray], np.ndarray]:
    def reference(x: np.ndarray) -> np.ndarray:
        root = np.sqrt(x * x + b)
        # Without cancellation: (x + root) (root - x) = b.
        return np.where(x > 0, 0.5 * (x + root), 0.5 * b / np.maximum(root - x, 1e-300))

    return reference


def _case(
    op: str,
    stated: accuracy.Accuracy | None,
    function: Callable[[Any], Array],
    reference: Callable[[np.ndarray], np.ndarray],
) -> Case:
    if stated is None:
        raise ValueError(f"expected a constant for which {op} has a stated error, got another one")
    return Case(op, stated, function, reference)


def _power_case(exponent: float) -> Case:
    """`x ** exponent` as one function; the exponent is a constant of the program."""
    rounded = float(np.float32(exponent))
    return _case(
        "pow",
        accuracy.of_power(rounded),
        lambda x: jnp.power(x, jnp.asarray(rounded, x.dtype)),
        lambda x: np.power(x, rounded),
    )


def _integer_power_case(exponent: int) -> Case:
    return _case(
        "integer_pow",
        accuracy.of_integer_power(exponent),
        lambda x: jax.lax.integer_pow(x, exponent),
        lambda x: np.power(x, float(exponent)),
    )


def _plain(
    name: str, function: Callable[..., Array], reference: Callable[[np.ndarray], np.ndarray]
) -> dict[str, Case]:
    return {name: Case(name, accuracy.STATED[name], function, reference)}


def _interpolation_case() -> Case:
    knots = np.asarray([-1.0, -0.5, 0.1, 0.3, 2.2], np.float32)
    values = np.asarray([0.3, 1.0, -0.5, 7.1, 2.0], np.float32)
    return _case(
        "_interp",
        accuracy.of_interpolation(knots, values),
        lambda x: jnp.interp(x, knots, values),
        lambda x: np.interp(x, knots.astype(np.float64), values.astype(np.float64)),
    )


_ALPHA = float(np.float32(1.7))

# By a readable name. Predicates, and maxima and minima that are written `relu` and `clip` here, are
# left out. Exponents of `pow` are examples.
CASES: Mapping[str, Case] = {
    **_plain("abs", jnp.abs, np.abs),
    **_plain("round", jnp.round, np.round),
    **_plain("relu", jax.nn.relu, lambda x: np.maximum(x, 0.0)),
    **_plain("relu6", jax.nn.relu6, lambda x: np.clip(x, 0.0, 6.0)),
    **_plain("hard_tanh", jax.nn.hard_tanh, lambda x: np.clip(x, -1.0, 1.0)),
    **_plain("clip", lambda x: jnp.clip(x, -0.5, 2.0), lambda x: np.clip(x, -0.5, 2.0)),
    **_plain("exp", jnp.exp, np.exp),
    **_plain("exp2", jnp.exp2, np.exp2),
    **_plain("expm1", jnp.expm1, np.expm1),
    **_plain("log", jnp.log, np.log),
    **_plain("log1p", jnp.log1p, np.log1p),
    **_plain("tanh", jnp.tanh, np.tanh),
    **_plain("logistic", jax.lax.logistic, _logistic),
    **_plain("erf", jax.lax.erf, _each(math.erf)),
    **_plain("erfc", jax.lax.erfc, _erfc),
    **_plain("sin", jnp.sin, np.sin),
    **_plain("cos", jnp.cos, np.cos),
    **_plain("sinh", jnp.sinh, np.sinh),
    **_plain("cosh", jnp.cosh, np.cosh),
    **_plain("asinh", jnp.asinh, np.arcsinh),
    **_plain("atan", jnp.atan, np.arctan),
    **_plain("asin", jnp.arcsin, np.arcsin),
    **_plain("acos", jnp.arccos, np.arccos),
    **_plain("acosh", jnp.arccosh, np.arccosh),
    **_plain("atanh", jnp.arctanh, np.arctanh),
    **_plain("tan", jnp.tan, np.tan),
    **_plain("sinc", jnp.sinc, np.sinc),
    **_plain("x_log_x", lambda x: jax.scipy.special.xlogy(x, x), _x_log_x),
    **_plain("rem", lambda x: jnp.fmod(x, 0.75), lambda x: np.fmod(x, 0.75)),
    **_plain("sqrt", jnp.sqrt, np.sqrt),
    **_plain("rsqrt", jax.lax.rsqrt, lambda x: 1.0 / np.sqrt(x)),
    **_plain("square", jnp.square, np.square),
    **_plain("softplus", jax.nn.softplus, _softplus),
    **_plain("log_sigmoid", jax.nn.log_sigmoid, lambda x: -_softplus(-x)),
    **_plain("silu", jax.nn.silu, lambda x: x * _logistic(x)),
    **_plain("gelu", functools.partial(jax.nn.gelu, approximate=True), _gelu),
    **_plain(
        "gelu_exact",
        functools.partial(jax.nn.gelu, approximate=False),
        lambda x: 0.5 * x * _erfc(-x / math.sqrt(2.0)),
    ),
    **_plain("mish", jax.nn.mish, lambda x: x * np.tanh(_softplus(x))),
    **_plain("selu", jax.nn.selu, lambda x: _SELU_SCALE * _negative_expm1(x, _SELU_ALPHA)),
    **_plain("soft_sign", jax.nn.soft_sign, lambda x: x / (1.0 + np.abs(x))),
    **_plain("hard_silu", jax.nn.hard_silu, lambda x: x * np.clip(x + 3.0, 0.0, 6.0) / 6.0),
    **_plain(
        "sparse_plus",
        jax.nn.sparse_plus,
        lambda x: np.where(x >= 1.0, x, 0.25 * np.square(np.maximum(x, -1.0) + 1.0)),
    ),
    "leaky_relu": Case(
        "leaky_relu",
        accuracy.of_slopes(0.01),
        jax.nn.leaky_relu,
        lambda x: np.where(x < 0, 0.01 * x, x),
    ),
    "elu": Case("elu", accuracy.of_scaled_expm1(1.0), jax.nn.elu, _negative_expm1),
    "elu(1.7)": Case(
        "elu",
        accuracy.of_scaled_expm1(_ALPHA),
        lambda x: jax.nn.elu(x, _ALPHA),
        lambda x: _negative_expm1(x, _ALPHA),
    ),
    "celu(1.7)": Case(
        "celu",
        accuracy.of_scaled_expm1(_ALPHA),
        lambda x: jax.nn.celu(x, _ALPHA),
        lambda x: _negative_expm1(x, _ALPHA, _ALPHA),
    ),
    "squareplus": _case(
        "squareplus", accuracy.of_squareplus(4.0), jax.nn.squareplus, _squareplus_reference(4.0)
    ),
    "squareplus(0)": _case(
        "squareplus",
        accuracy.of_squareplus(0.0),
        lambda x: jax.nn.squareplus(x, 0.0),
        lambda x: np.maximum(x, 0.0),
    ),
    "interp": _interpolation_case(),
    **{f"integer_pow({y})": _integer_power_case(y) for y in (-3, -2, -1, 3, 4, 7, 20)},
    **{
        f"pow({y:.5g})": _power_case(y)
        for y in (-2.7, -1.5, -0.5, 0.1, 1.0 / 3.0, 0.5, 1.5, 2.5, 17.3)
    },
}


# Magnitudes of operands at which the largest errors of `experiments.benchmarks.ulps` were seen.
_WORST = (
    0.00024399166, 0.0019887688, 0.0032546669, 0.0039629052, 0.0082850698, 0.0160708688,
    0.0333079174, 0.155437529, 0.227503434, 0.371810347, 0.406298518, 0.409905374, 0.414275587,
    0.491501808, 0.497700989, 0.69812781, 0.718483813, 0.723110080, 0.774568617, 0.785236418,
    0.8750717, 0.877667844, 0.970771790, 0.979995608, 0.995939374, 1.00109208, 1.00360608,
    1.22372568, 1.37286866, 1.41583729, 2.28374457, 2.99999952, 3.20596504, 3.76837754, 3.80015850,
    4.36392164, 4.53201914, 4.58461761, 5.05393744, 5.51007986, 5.89122487, 5.93656683, 6.57103157,
    6.91100121, 7.47616291, 8.0805531, 8.11295605, 8.49597454, 8.69359398, 15.7993898, 15.9347878,
    16.6473103, 59.9725418, 82.855957, 92.3727951, 122.540489, 1355.07349, 4200.8501, 12259.0,
)  # fmt: skip


def special_inputs() -> np.ndarray:
    """Operands `[N]` in float32 at which functions and their approximations change their ways.

    Zeros, subnormal numbers, the ends of the range, powers of two, multiples of pi / 2 and of
    log(2) / 2, integers, the operands at which exp, tanh and erf saturate and those of the largest
    errors that were seen; each of both signs and with the three next numbers on either side.
    """
    powers = np.ldexp(1.0, np.arange(-149, 128))
    steps = np.arange(1, 513, dtype=np.float64)
    centers = np.concatenate(
        [
            np.asarray(_WORST),
            [0.0, np.finfo(np.float32).max, 1.5, 6.0, 16.635532, 17.328680, 18.0, 5.8637, 3.8325],
            powers,
            steps * (math.pi / 2.0),
            steps * (math.log(2.0) / 2.0),
            steps,
            0.1 * steps,
            math.pi * np.ldexp(1.0, np.arange(8, 120)),
        ]
    ).astype(np.float32)
    # Adding 1 to the bits of a number gives the next one away from 0.
    bits = centers.view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32)
    bits = np.unique(bits[(bits >= 0) & (bits < 0x7F800000)])
    positive = bits.astype(np.int32).view(np.float32)
    return np.concatenate([positive, -positive])


_SAMPLES = 2**20


@functools.cache
def random_inputs(count: int, seed: int = 0) -> np.ndarray:
    """Random finite operands `[count]` in float32: half of any magnitude, half of 2^-10 to 2^7."""
    generator = np.random.default_rng(seed)
    signs = generator.integers(0, 2, count, dtype=np.uint32) << np.uint32(31)
    everywhere = np.arange(count) % 2 == 0
    least = np.where(everywhere, 0, np.float32(2.0**-10).view(np.uint32))
    most = np.where(everywhere, 0x7F800000, np.float32(2.0**7).view(np.uint32))
    bits = generator.integers(least, most, dtype=np.uint32)
    return (bits | signs).view(np.float32)


def largest_share(case: Case) -> float:
    """The largest computed error on 2^20 operands, as a share of the stated one; see `Case`.

    Where nothing is stated the function is evaluated at 1 instead, so that debugging flags of JAX
    find no NaN. It is evaluated at once, also while JAX traces another function.
    """
    special = special_inputs()
    operand = np.concatenate([special, random_inputs(_SAMPLES - special.size)])
    x = operand.astype(np.float64)
    with np.errstate(all="ignore"):
        exact = case.reference(x)
    holds = case.stated.holds(x, x, exact, accuracy.SINGLE)
    operand = np.where(holds, operand, np.float32(1.0))
    with np.errstate(all="ignore"):
        exact = np.where(holds, exact, case.reference(np.ones(1)))
    with jax.ensure_compile_time_eval():
        computed = np.asarray(jax.jit(case.function)(operand))
    return float(np.max(case.shares_of(operand, computed, exact)))


@functools.cache
def _keeps(name: str, exponent: float | None, backend: str) -> bool:
    if exponent is None:
        cases = [case for case in CASES.values() if case.op == name]
    else:
        integer = name == "integer_pow"
        cases = [_integer_power_case(int(exponent)) if integer else _power_case(exponent)]
    return all(largest_share(case) <= 1.0 for case in cases)


def check_on_this_machine(name: str, exponent: float | None = None) -> bool:
    """Whether this machine's functions of this name keep within the stated errors in float32.

    It evaluates 2^20 operands, those of `special_inputs` among them, on JAX's default device. The
    answer is kept for the rest of the process. Ops that compare and select need no check.

    Args:
      name: of an op with a stated error.
      exponent: that of `pow` or `integer_pow`; by default those of `CASES` are checked.

    Raises:
      ValueError: the op has no stated error, or takes no exponent.
    """
    if name not in accuracy.STATED and name not in accuracy.BY_CONSTANTS:
        raise ValueError(
            f"expected an op with a stated error, got {name!r}; see boundjax.ops.accuracy"
        )
    if exponent is not None and name not in ("pow", "integer_pow"):
        raise ValueError(f"expected an exponent of pow or integer_pow only, got one of {name!r}")
    if exponent is not None and name == "integer_pow" and not float(exponent).is_integer():
        raise ValueError(f"expected an integer exponent of integer_pow, got {exponent}")
    return _keeps(name, exponent, jax.default_backend())


# `experiments.benchmarks.ulps` measured their functions, see docs/results/functions.md.
MEASURED_JAXLIBS = frozenset(["0.9.0", "0.10.2", "0.12.0.1"])
# Functions that joint ops call.
_PARTS: Mapping[str, Sequence[str]] = dict.fromkeys(("log_softmax", "logsumexp"), ("exp", "log"))


def _jaxlib_version() -> str:
    return importlib.metadata.version("jaxlib")


def require_kept(node: Node) -> None:
    """Checks once per process, for a jaxlib that nobody measured, that a node's functions are kept.

    Args:
      node: with a stated error.

    Raises:
      NoProofError: if this machine's functions do not keep within the stated errors.
    """
    version = _jaxlib_version()
    if version in MEASURED_JAXLIBS or node.dtype != np.float32:
        return
    exponent = None
    if node.primitive in ("pow", "integer_pow"):
        exponent = float(node.params["y"] if node.constants == () else piecewise.number(node))
    for name in _PARTS.get(node.primitive, (node.primitive,)):
        checked = name in accuracy.BY_CONSTANTS or accuracy.STATED.get(name, EXACT) != EXACT
        if checked and not check_on_this_machine(name, exponent):
            raise NoProofError(
                f"'{name}' of jaxlib {version} is less accurate on this machine than "
                "boundjax.ops.accuracy states; install a measured jaxlib "
                f"({', '.join(sorted(MEASURED_JAXLIBS))}), or take rounding='nearest'"
            )
