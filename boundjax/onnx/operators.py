"""The table of operators: function, constant operands and types of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from boundjax.onnx import (
    activations,
    elementwise,
    indexing,
    layers,
    normalization,
    recurrent,
    reductions,
    resizing,
    shaping,
)
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


def _power(node: Node, kinds: Sequence[str]) -> str:
    """The type of the base; the exponent may have another."""
    _numbers(node, kinds[1:])
    return _numbers(node, kinds[:1])


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

_reduce, _compose = reductions.reduction, reductions.composed
_by_axes: dict[str, Any] = {"constant_operands": (1,), "operands": (1, 2)}
_affine: dict[str, Any] = {"operands": (2, 3), "weights": True}
_with_bias: dict[str, Any] = {"operands": (3, 3), "weights": True}

OPERATORS: Mapping[str, Operator] = {
    # Constants and shapes.
    "Constant": Operator(shaping.constant, operands=(0, 0), selects=True),
    "ConstantOfShape": Operator(shaping.constant_of_shape, constant_operands=(0,), selects=True),
    "EyeLike": Operator(indexing.eye_like, indexing.eye_like_kind, selects=True),
    "Range": Operator(shaping.arange, constant_operands=(0, 1, 2), operands=(3, 3)),
    "Shape": Operator(shaping.shape, shape_only=True, selects=True),
    "Size": Operator(shaping.size, shape_only=True, selects=True),
    # Data movement.
    "Identity": Operator(shaping.identity, _any, selects=True),
    "Dropout": Operator(shaping.dropout, _floats, (1, 2), (1, 3), selects=True),
    "Cast": Operator(shaping.cast, _cast, selects=True),
    "Compress": Operator(indexing.compress, _any, (1,), _PAIR, selects=True),
    "Concat": Operator(shaping.concat, _any, operands=(1, _MANY), selects=True, weights=True),
    "DepthToSpace": Operator(shaping.depth_to_space, _any, selects=True),
    "Expand": Operator(shaping.expand, _any, (1,), _PAIR, selects=True),
    "Flatten": Operator(shaping.flatten, _any, selects=True),
    "Gather": Operator(indexing.gather, _any, (1,), _PAIR, selects=True),
    "GatherElements": Operator(indexing.gather_elements, _any, (1,), _PAIR, selects=True),
    "GatherND": Operator(indexing.gather_nd, _any, (1,), _PAIR, selects=True),
    "OneHot": Operator(indexing.one_hot, _one_hot, (1,), (3, 3), selects=True),
    "Pad": Operator(shaping.pad, _numbers, (1, 2, 3), (1, 4), numbers=(2,), selects=True),
    "Reshape": Operator(shaping.reshape, _any, (1,), _PAIR, selects=True),
    "Resize": Operator(resizing.resize, _floats, (1, 2, 3), (1, 4)),
    "ReverseSequence": Operator(indexing.reverse_sequence, _any, (1,), _PAIR, selects=True),
    "Scatter": Operator(indexing.scatter_elements, _any, (1,), (3, 3)),
    "ScatterElements": Operator(indexing.scatter_elements, _any, (1,), (3, 3)),
    "ScatterND": Operator(indexing.scatter_nd, _any, (1,), (3, 3)),
    "Slice": Operator(shaping.slice_, _any, (1, 2, 3, 4), (1, 5), selects=True),
    "SpaceToDepth": Operator(shaping.space_to_depth, _any, selects=True),
    "Split": Operator(shaping.split, _any, (1,), (1, 2), selects=True),
    "Squeeze": Operator(shaping.squeeze, _any, (1,), (1, 2), selects=True),
    "Tile": Operator(shaping.tile, _any, (1,), _PAIR, selects=True),
    "Transpose": Operator(shaping.transpose, _any, selects=True),
    "Trilu": Operator(indexing.trilu, _any, (1,), (1, 2), selects=True),
    "Upsample": Operator(resizing.resize, _floats, (1,), (1, 2)),
    "Unsqueeze": Operator(shaping.unsqueeze, _any, (1,), (1, 2), selects=True),
    # Arithmetic.
    "Add": Operator(_add, _numbers, operands=_PAIR, weights=True),
    "Sub": Operator(_subtract, _numbers, operands=_PAIR, weights=True),
    "Mul": Operator(_multiply, _numbers, operands=_PAIR, weights=True),
    "Div": Operator(
        elementwise.divide, _numbers, operands=_PAIR, constant_integers=True, weights=True
    ),
    "Mod": Operator(elementwise.modulo, _numbers, operands=_PAIR),
    "Pow": Operator(elementwise.power, _power, operands=_PAIR),
    "Sum": Operator(elementwise.variadic(_add), _numbers, operands=(1, _MANY), weights=True),
    "Mean": Operator(elementwise.mean, operands=(1, _MANY), weights=True),
    "Max": Operator(elementwise.variadic(_maximum), _numbers, operands=(1, _MANY), selects=True),
    "Min": Operator(elementwise.variadic(_minimum), _numbers, operands=(1, _MANY), selects=True),
    "Abs": Operator(_arithmetic(elementwise.unary("abs")), _numbers, selects=True),
    "Neg": Operator(_arithmetic(elementwise.unary("negative")), _numbers, selects=True),
    "Sign": Operator(elementwise.unary("sign"), _numbers, selects=True),
    # Predicates.
    "Equal": Operator(elementwise.comparison("equal"), _equality, operands=_PAIR),
    "Greater": Operator(elementwise.comparison("greater"), _comparison, operands=_PAIR),
    "GreaterOrEqual": Operator(
        elementwise.comparison("greater_equal"), _comparison, operands=_PAIR
    ),
    "Less": Operator(elementwise.comparison("less"), _comparison, operands=_PAIR),
    "LessOrEqual": Operator(elementwise.comparison("less_equal"), _comparison, operands=_PAIR),
    "And": Operator(elementwise.binary("logical_and"), _logical, operands=_PAIR),
    "Or": Operator(elementwise.binary("logical_or"), _logical, operands=_PAIR),
    "Xor": Operator(elementwise.binary("logical_xor"), _logical, operands=_PAIR),
    "Not": Operator(elementwise.unary("logical_not"), _logical),
    "Where": Operator(elementwise.where, _selection, operands=(3, 3), selects=True),
    # Reductions.
    "ReduceSum": Operator(_reduce("sum"), _numbers, **_by_axes),
    "ReduceMean": Operator(_reduce("mean"), **_by_axes),
    "ReduceMax": Operator(_reduce("max"), _numbers, selects=True, **_by_axes),
    "ReduceMin": Operator(_reduce("min"), _numbers, selects=True, **_by_axes),
    "ReduceProd": Operator(_arithmetic(_reduce("prod")), _numbers, **_by_axes),
    "ReduceL1": Operator(_compose(reductions.l1), **_by_axes),
    "ReduceL2": Operator(_compose(reductions.l2), **_by_axes),
    "ReduceSumSquare": Operator(_compose(reductions.sum_of_squares), **_by_axes),
    "ReduceLogSum": Operator(_compose(reductions.log_of_sum), **_by_axes),
    "ReduceLogSumExp": Operator(_compose(reductions.logsumexp), **_by_axes),
    "ArgMax": Operator(reductions.argument(1), _index),
    "ArgMin": Operator(reductions.argument(-1), _index),
    "CumSum": Operator(reductions.cumulative_sum, _numbers, (1,), _PAIR),
    "TopK": Operator(reductions.top_k, _numbers, (1,), (1, 2), selects=True),
    # Smooth functions and activations.
    "Acos": _unary(jnp.arccos),
    "Acosh": _unary(jnp.arccosh),
    "Asin": _unary(jnp.arcsin),
    "Asinh": _unary(jnp.arcsinh),
    "Atan": _unary(jnp.arctan),
    "Atanh": _unary(jnp.arctanh),
    "Ceil": _unary(jnp.ceil, selects=True),
    "Cos": _unary(jnp.cos),
    "Cosh": _unary(jnp.cosh),
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
    "Sinh": _unary(jnp.sinh),
    "Softplus": _unary(jax.nn.softplus),
    "Softsign": _unary(jax.nn.soft_sign),
    "Sqrt": _unary(jnp.sqrt),
    "Tan": _unary(jnp.tan),
    "Tanh": _unary(jnp.tanh),
    "Celu": Operator(activations.celu),
    "Clip": Operator(elementwise.clip, _floats, (1, 2), (1, 3), numbers=(1, 2), selects=True),
    "Elu": Operator(activations.elu),
    "Gelu": Operator(activations.gelu),
    "HardSigmoid": Operator(activations.hard_sigmoid),
    "HardSwish": _unary(jax.nn.hard_swish),
    "LeakyRelu": Operator(activations.leaky_relu),
    "PRelu": Operator(activations.prelu, _floats, (1,), _PAIR, numbers=(1,)),
    "Selu": Operator(activations.selu),
    "Shrink": Operator(activations.shrink),
    "Swish": Operator(activations.swish),
    "ThresholdedRelu": Operator(activations.thresholded_relu, selects=True),
    # Layers.
    "AveragePool": Operator(layers.average_pool),
    "Conv": Operator(layers.conv, **_affine),
    "ConvTranspose": Operator(layers.conv_transpose, **_affine),
    "Gemm": Operator(layers.gemm, **_affine),
    "GlobalAveragePool": Operator(layers.global_average_pool),
    "GlobalMaxPool": Operator(layers.global_max_pool, selects=True),
    "LogSoftmax": Operator(layers.softmax(jax.nn.log_softmax)),
    "MatMul": Operator(layers.matmul, operands=_PAIR, weights=True),
    "MaxPool": Operator(layers.max_pool, selects=True),
    "Softmax": Operator(layers.softmax(jax.nn.softmax)),
    # Normalisation.
    "BatchNormalization": Operator(
        normalization.batch_normalization,
        _floats,
        (1, 2, 3, 4),
        (5, 5),
        numbers=(1, 2, 3, 4),
        weights=True,
    ),
    "GroupNormalization": Operator(normalization.group_normalization, **_with_bias),
    "InstanceNormalization": Operator(normalization.instance_normalization, **_with_bias),
    "LRN": Operator(normalization.local_response_normalization),
    "LayerNormalization": Operator(normalization.layer_normalization, **_affine),
    "LpNormalization": Operator(normalization.lp_normalization),
    "MeanVarianceNormalization": Operator(normalization.mean_variance_normalization),
    "RMSNormalization": Operator(normalization.rms_normalization, operands=_PAIR, weights=True),
    "SimplifiedLayerNormalization": Operator(
        normalization.rms_normalization, operands=_PAIR, weights=True
    ),
    # Recurrent layers.
    "GRU": Operator(recurrent.gru, _floats, (4,), (3, 6), weights=True),
    "LSTM": Operator(recurrent.lstm, _floats, (4,), (3, 8), weights=True),
    "RNN": Operator(recurrent.rnn, _floats, (4,), (3, 6), weights=True),
}
