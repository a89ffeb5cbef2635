"""The table of operators: function, constant operands and types of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from boundjax.onnx import elementwise, layers, recurrent, shaping
from boundjax.onnx.node import KINDS, Node

# Kinds of values, see `node.KINDS`.
Kinds = Callable[[Node, Sequence[str]], str]


def _floats(node: Node, kinds: Sequence[str]) -> str:
    return _one_of(node, kinds, "f")


def _numbers(node: Node, kinds: Sequence[str]) -> str:
    return _one_of(node, kinds, "fi")


def _any(node: Node, kinds: Sequence[str]) -> str:
    return _one_of(node, kinds, "fibqh")


def _logical(node: Node, kinds: Sequence[str]) -> str:
    return _one_of(node, kinds, "b")


def _one_of(node: Node, kinds: Sequence[str], allowed: str) -> str:
    if len(set(kinds)) != 1 or kinds[0] not in allowed:
        raise node.error(
            f"expected operands of one type ({' or '.join(KINDS[k] for k in allowed)}), "
            f"got {', '.join(KINDS[k] for k in kinds)}"
        )
    return kinds[0]


def _comparison(node: Node, kinds: Sequence[str]) -> str:
    _numbers(node, kinds)
    return "b"


def _equality(node: Node, kinds: Sequence[str]) -> str:
    _any(node, kinds)
    return "b"


def _index(node: Node, kinds: Sequence[str]) -> str:
    _floats(node, kinds)
    return "i"


def _cast(node: Node, kinds: Sequence[str]) -> str:
    return shaping.cast_kind(node)


def _selection(node: Node, kinds: Sequence[str]) -> str:
    _logical(node, kinds[:1])
    return _any(node, kinds[1:])


def _one_hot(node: Node, kinds: Sequence[str]) -> str:
    _numbers(node, kinds[:1])
    return _any(node, kinds[1:])


@dataclasses.dataclass(frozen=True)
class Operator:
    """One entry of the table.

    Attributes:
      function: maps a node and its operands (None if omitted) to its value or values. Operands are
        arrays of `node.xp`, but constants are numpy arrays unless they are rounded results.
      kinds: maps the kinds of the operands outside `constant_operands` to the kind of the values.
      constant_operands: positions of operands that must not depend on the network's input.
      numbers: those of them whose numbers enter the value; they may be JAX's arrays.
      selects: whether every number of the value is one of an operand, or exact by definition.
      operands: the least and the largest number of operands.
      shape_only: whether the function takes the operand's shape instead of its value.
      constant_integers: whether integer operands must not depend on the input, because the
        function would treat them as floating-point numbers.
      weights: whether the numbers of a constant operand, other than of `constant_operands` without
        `numbers`, enter the value by arithmetic alone, so that JAX's arrays may stand for them.
    """

    function: Callable[..., Any]
    kinds: Kinds = _floats
    constant_operands: tuple[int, ...] = ()
    operands: tuple[int, int] = (1, 1)
    shape_only: bool = False
    constant_integers: bool = False
    numbers: tuple[int, ...] = ()
    selects: bool = False
    weights: bool = False


_MANY = 2**31
_PAIR = (2, 2)


def _unary(function: Callable[[Any], Any], selects: bool = False) -> Operator:
    return Operator(lambda node, x: function(x), selects=selects)


_arithmetic = elementwise.arithmetic
_add, _subtract, _multiply = (
    _arithmetic(elementwise.binary(name)) for name in ("add", "subtract", "multiply")
)
_maximum, _minimum = (elementwise.binary(name) for name in ("maximum", "minimum"))

OPERATORS: Mapping[str, Operator] = {
    # Constants and shapes.
    "Constant": Operator(shaping.constant, operands=(0, 0), selects=True),
    "ConstantOfShape": Operator(shaping.constant_of_shape, constant_operands=(0,), selects=True),
    "Range": Operator(shaping.arange, constant_operands=(0, 1, 2), operands=(3, 3), selects=True),
    "Shape": Operator(shaping.shape, shape_only=True, selects=True),
    "Size": Operator(shaping.size, shape_only=True, selects=True),
    # Data movement.
    "Identity": Operator(shaping.identity, _any, selects=True),
    "Dropout": Operator(shaping.dropout, _floats, (1, 2), (1, 3), selects=True),
    "Cast": Operator(shaping.cast, _cast, selects=True),
    "Concat": Operator(shaping.concat, _any, operands=(1, _MANY), selects=True, weights=True),
    "Expand": Operator(shaping.expand, _any, (1,), _PAIR, selects=True),
    "Flatten": Operator(shaping.flatten, _any, selects=True),
    "Gather": Operator(shaping.gather, _any, (1,), _PAIR, selects=True),
    "OneHot": Operator(shaping.one_hot, _one_hot, (1,), (3, 3), selects=True),
    "Pad": Operator(shaping.pad, _numbers, (1, 2, 3), (1, 4), numbers=(2,), selects=True),
    "Reshape": Operator(shaping.reshape, _any, (1,), _PAIR, selects=True),
    "Resize": Operator(shaping.resize, _floats, (1, 2, 3), (1, 4), selects=True),
    "Slice": Operator(shaping.slice_, _any, (1, 2, 3, 4), (1, 5), selects=True),
    "Split": Operator(shaping.split, _any, (1,), (1, 2), selects=True),
    "Squeeze": Operator(shaping.squeeze, _any, (1,), (1, 2), selects=True),
    "Tile": Operator(shaping.tile, _any, (1,), _PAIR, selects=True),
    "Transpose": Operator(shaping.transpose, _any, selects=True),
    "Upsample": Operator(shaping.resize, _floats, (1,), _PAIR, selects=True),
    "Unsqueeze": Operator(shaping.unsqueeze, _any, (1,), (1, 2), selects=True),
    # Arithmetic.
    "Add": Operator(_add, _numbers, operands=_PAIR, weights=True),
    "Sub": Operator(_subtract, _numbers, operands=_PAIR, weights=True),
    "Mul": Operator(_multiply, _numbers, operands=_PAIR, weights=True),
    "Div": Operator(
        elementwise.divide, _numbers, operands=_PAIR, constant_integers=True, weights=True
    ),
    "Pow": Operator(elementwise.power, operands=_PAIR),
    "Sum": Operator(elementwise.variadic(_add), _numbers, operands=(1, _MANY), weights=True),
    "Max": Operator(elementwise.variadic(_maximum), _numbers, operands=(1, _MANY), selects=True),
    "Min": Operator(elementwise.variadic(_minimum), _numbers, operands=(1, _MANY), selects=True),
    "Abs": Operator(_arithmetic(elementwise.unary("abs")), _numbers, selects=True),
    "Neg": Operator(_arithmetic(elementwise.unary("negative")), _numbers, selects=True),
    "Sign": Operator(elementwise.unary("sign"), _numbers, selects=True),
    # Predicates.
    "Equal": Operator(elementwise.binary("equal"), _equality, operands=_PAIR),
    "Greater": Operator(elementwise.binary("greater"), _comparison, operands=_PAIR),
    "GreaterOrEqual": Operator(elementwise.binary("greater_equal"), _comparison, operands=_PAIR),
    "Less": Operator(elementwise.binary("less"), _comparison, operands=_PAIR),
    "LessOrEqual": Operator(elementwise.binary("less_equal"), _comparison, operands=_PAIR),
    "And": Operator(elementwise.binary("logical_and"), _logical, operands=_PAIR),
    "Or": Operator(elementwise.binary("logical_or"), _logical, operands=_PAIR),
    "Not": Operator(elementwise.unary("logical_not"), _logical),
    "Where": Operator(elementwise.where, _selection, operands=(3, 3), selects=True),
    # Reductions.
    "ReduceSum": Operator(elementwise.reduction("sum"), _numbers, (1,), (1, 2)),
    "ReduceMean": Operator(elementwise.reduction("mean"), _floats, (1,), (1, 2)),
    "ReduceMax": Operator(elementwise.reduction("max"), _numbers, (1,), (1, 2), selects=True),
    "ReduceMin": Operator(elementwise.reduction("min"), _numbers, (1,), (1, 2), selects=True),
    "ReduceProd": Operator(_arithmetic(elementwise.reduction("prod")), _numbers, (1,), (1, 2)),
    "ArgMax": Operator(elementwise.argmax, _index),
    # Smooth functions and activations.
    "Atan": _unary(jnp.arctan),
    "Ceil": _unary(jnp.ceil, selects=True),
    "Cos": _unary(jnp.cos),
    "Erf": _unary(jax.scipy.special.erf),
    "Exp": _unary(jnp.exp),
    "Floor": _unary(jnp.floor, selects=True),
    "Log": _unary(jnp.log),
    "Mish": _unary(jax.nn.mish),
    "Reciprocal": _unary(elementwise.reciprocal),
    "Relu": _unary(jax.nn.relu, selects=True),
    "Round": _unary(jnp.round, selects=True),
    "Sigmoid": _unary(jax.nn.sigmoid),
    "Sin": _unary(jnp.sin),
    "Softplus": _unary(jax.nn.softplus),
    "Softsign": _unary(jax.nn.soft_sign),
    "Sqrt": _unary(jnp.sqrt),
    "Tanh": _unary(jnp.tanh),
    "Clip": Operator(elementwise.clip, _floats, (1, 2), (1, 3), numbers=(1, 2), selects=True),
    "Elu": Operator(elementwise.elu),
    "Gelu": Operator(elementwise.gelu),
    "HardSigmoid": Operator(elementwise.hard_sigmoid),
    "HardSwish": _unary(jax.nn.hard_swish),
    "LeakyRelu": Operator(elementwise.leaky_relu),
    "PRelu": Operator(elementwise.prelu, _floats, (1,), _PAIR, numbers=(1,)),
    "Selu": Operator(elementwise.selu),
    # Layers.
    "AveragePool": Operator(layers.average_pool),
    "BatchNormalization": Operator(
        layers.batch_normalization,
        _floats,
        (1, 2, 3, 4),
        (5, 5),
        numbers=(1, 2, 3, 4),
        weights=True,
    ),
    "Conv": Operator(layers.conv, operands=(2, 3), weights=True),
    "ConvTranspose": Operator(layers.conv_transpose, operands=(2, 3), weights=True),
    "Gemm": Operator(layers.gemm, operands=(2, 3), weights=True),
    "GlobalAveragePool": Operator(layers.global_average_pool),
    "GlobalMaxPool": Operator(layers.global_max_pool, selects=True),
    "LogSoftmax": Operator(layers.softmax(jax.nn.log_softmax)),
    "MatMul": Operator(layers.matmul, operands=_PAIR, weights=True),
    "MaxPool": Operator(layers.max_pool, selects=True),
    "Softmax": Operator(layers.softmax(jax.nn.softmax)),
    # Recurrent layers.
    "GRU": Operator(recurrent.gru, _floats, (4,), (3, 6), weights=True),
    "LSTM": Operator(recurrent.lstm, _floats, (4,), (3, 8), weights=True),
    "RNN": Operator(recurrent.rnn, _floats, (4,), (3, 6), weights=True),
}
