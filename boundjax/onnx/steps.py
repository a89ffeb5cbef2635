"""The steps of a network, apart from its weights: a JAX function that many networks may share."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from boundjax.onnx.node import Node
from boundjax.onnx.operators import Operator


@dataclasses.dataclass(frozen=True)
class Weight:
    """An operand that is one of the network's weights.

    Attributes:
      index: which one.
      shape: its shape.
    """

    index: int
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A node that depends on the input, or that rounds a constant.

    Attributes:
      node, operator: what is computed.
      operands: the name of what an earlier step computes, a weight, a constant whose numbers belong
        to the program, or None if omitted.
      shapes: of its values.
      constant: whether it depends on no input.
    """

    node: Node
    operator: Operator
    operands: tuple[str | Weight | np.ndarray | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    constant: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """A network without the numbers of its weights.

    Attributes:
      input_name, output_name: names of values.
      input_shape, output_shape: shapes of one example.
      batched: whether the graph has a leading axis of length 1 that examples do not have.
      steps: in evaluation order.
      constant: the output of a network that does not depend on its input, else None.
    """

    input_name: str
    output_name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    batched: bool
    steps: tuple[Step, ...]
    constant: np.ndarray | None

    def apply(
        self, weights: Sequence[Array | np.ndarray], x: Float32[Array, "*input_shape"]
    ) -> Float32[Array, "*output_shape"]:
        """The output `[*output_shape]` of one example `[*input_shape]`.

        Args:
          weights: a float32 array for each index of a `Weight`, of its shape.
          x: the example.

        Raises:
          ValueError: if `x` has another shape or dtype.
        """
        x = jnp.asarray(x)
        if x.shape != self.input_shape or x.dtype != jnp.float32:
            raise ValueError(
                f"one example must be float32 of shape {self.input_shape}, "
                f"got {x.dtype} of shape {x.shape}"
            )
        if self.constant is not None:
            return jnp.asarray(self.constant.reshape(self.output_shape))
        values = {self.input_name: jnp.expand_dims(x, 0) if self.batched else x}

        def value(operand: str | Weight | np.ndarray | None) -> Any:
            if isinstance(operand, Weight):
                return weights[operand.index]
            return values[operand] if isinstance(operand, str) else operand

        for step in self.steps:
            results = as_tuple(step.operator.function(step.node, *map(value, step.operands)))
            values.update(zip(step.node.outputs, results, strict=False))
        y = values[self.output_name]
        return y if y.shape == self.output_shape else jnp.reshape(y, self.output_shape)

    @functools.cached_property
    def structure(self) -> Hashable:
        """All that `apply` depends on but its arguments; equal structures are one function.

        Values are numbered in the order in which they are computed, because exporters number names
        anew. Numbers count by their bits and their types: 0.0 equals -0.0, 1 and True in Python.
        """
        numbers = {self.input_name: 0}
        steps = []
        for step in self.steps:
            node, operands = step.node, []
            for operand in step.operands:
                if isinstance(operand, str):
                    operands.append(("value", numbers[operand]))
                elif isinstance(operand, Weight):
                    operands.append(("weight", operand.index, operand.shape))
                else:
                    operands.append(_exactly(operand))
            for name in node.outputs:
                numbers[name] = len(numbers)
            outputs = tuple(numbers[name] for name in node.outputs)
            attributes = (
                (name, _exactly(node.attributes[name])) for name in sorted(node.attributes)
            )
            facts = node.operator, node.opset, node.max_bytes, node.kinds, node.xp.__name__
            steps.append((facts, tuple(attributes), tuple(operands), outputs))
        shapes = self.input_shape, self.output_shape, self.batched
        output = None if self.constant is not None else numbers[self.output_name]
        return shapes, tuple(steps), output, _exactly(self.constant)


def _exactly(value: Any) -> Hashable:
    """Tells values apart by their types and bits."""
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, value.tobytes()
    if value is None or type(value) in (int, float, str):
        return type(value).__name__, repr(value)
    if type(value) is tuple:
        return "tuple", tuple(map(_exactly, value))
    raise TypeError(f"expected a number, a text, an array or a tuple, got {type(value).__name__}")


def separated(steps: Sequence[Step]) -> tuple[tuple[Step, ...], tuple[np.ndarray, ...]]:
    """Takes the weights out of the operands of steps.

    Bounds look for ops that a graph spells out (softmax, layer norm, gelu), and compare constants
    with numbers and with each other. Such a comparison needs a number while it is traced, and equal
    constants must remain one. A constant is therefore a weight only where

    * the operator computes with its numbers and decides nothing by them (`Operator.weights`);
    * it is float32 and not a carried integer, whose exactness is proved;
    * it is not one number throughout, like a 0 of biases or the eps of a norm;
    * no step makes a single number of it, which would stand for such a constant;

    and constants that are equal bit by bit are one weight.

    Returns:
      The steps, and the weights that they refer to.
    """
    # The names of constants from which a single number is computed.
    numbers: set[str] = set()
    fixed: set[int] = set()
    for k, step in reversed(list(enumerate(steps))):
        one = any(math.prod(shape) <= 1 for shape in step.shapes)
        if step.constant and (one or not numbers.isdisjoint(step.node.outputs)):
            fixed.add(k)
            numbers.update(operand for operand in step.operands if isinstance(operand, str))
    weights = _Weights()
    separate = [
        step if k in fixed else dataclasses.replace(step, operands=weights.of(step))
        for k, step in enumerate(steps)
    ]
    return tuple(separate), tuple(weights.arrays)


class _Weights:
    """Numbers arrays in the order in which they come up.

    Attributes:
      arrays: those so far, all of them different.
    """

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self._indices: dict[Hashable, list[int]] = {}

    def of(self, step: Step) -> tuple[str | Weight | np.ndarray | None, ...]:
        """The operands of a step, with weights in the place of their arrays."""
        kinds = step.node.kinds or ("",) * len(step.operands)
        return tuple(
            self._weight(operand)
            if isinstance(operand, np.ndarray) and _is_weight(step.operator, k, operand, kinds[k])
            else operand
            for k, operand in enumerate(step.operands)
        )

    def _weight(self, array: np.ndarray) -> Weight:
        content = array.tobytes()
        same = self._indices.setdefault((array.shape, hash(content)), [])
        for index in same:
            if self.arrays[index].tobytes() == content:
                return Weight(index, array.shape)
        same.append(len(self.arrays))
        self.arrays.append(array)
        return Weight(same[-1], array.shape)


def _is_weight(operator: Operator, position: int, operand: np.ndarray, kind: str) -> bool:
    if not operator.weights or operand.dtype != np.float32 or kind == "i":
        return False
    if position in operator.constant_operands and position not in operator.numbers:
        return False
    return bool((operand != operand.reshape(-1)[:1]).any())


def as_tuple(values: Any) -> tuple[Any, ...]:
    """The values of an operator's function, which may be one."""
    return tuple(values) if isinstance(values, tuple | list) else (values,)
