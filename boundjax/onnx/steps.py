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

from boundjax.onnx.node import Node, quoted
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


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of the network.

    Attributes:
      name: of the value.
      shape: of one example.
      batched: whether the graph has a leading axis of length 1 that examples do not have.
    """

    name: str
    shape: tuple[int, ...]
    batched: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """An output of the network.

    Attributes:
      name: of the value.
      shape: of one example.
      constant: the output if it depends on no input, else None.
    """

    name: str
    shape: tuple[int, ...]
    constant: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """A network without the numbers of its weights.

    Attributes:
      inputs, outputs: in the order of arguments and results.
      steps: in evaluation order.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    steps: tuple[Step, ...]

    def apply(
        self, weights: Sequence[Array | np.ndarray], *examples: Float32[Array, ...]
    ) -> Array | tuple[Array, ...]:
        """The output of one example, or a tuple of the outputs if there are several.

        Args:
          weights: a float32 array for each index of a `Weight`, of its shape.
          *examples: an array for each input.

        Raises:
          ValueError: if an example has another shape or dtype, or for another number of them.
        """
        if len(examples) != len(self.inputs):
            names = ", ".join(quoted(source.name) for source in self.inputs[:8])
            raise ValueError(f"expected {len(self.inputs)} inputs ({names}), got {len(examples)}")
        values = {
            source.name: self._entering(source, jnp.asarray(x))
            for source, x in zip(self.inputs, examples, strict=True)
        }

        def value(operand: str | Weight | np.ndarray | None) -> Any:
            if isinstance(operand, Weight):
                return weights[operand.index]
            return values[operand] if isinstance(operand, str) else operand

        # A network that depends on no input computes nothing.
        for step in () if all(y.constant is not None for y in self.outputs) else self.steps:
            results = as_tuple(step.operator.function(step.node, *map(value, step.operands)))
            values.update(zip(step.node.outputs, results, strict=False))
        results = tuple(
            jnp.asarray(y.constant.reshape(y.shape))
            if y.constant is not None
            else _shaped(values[y.name], y.shape)
            for y in self.outputs
        )
        return results[0] if len(results) == 1 else results

    def _entering(self, source: Input, x: Array) -> Array:
        if x.shape != source.shape or x.dtype != jnp.float32:
            which = "one example" if len(self.inputs) == 1 else f"input {quoted(source.name)}"
            raise ValueError(
                f"{which} must be float32 of shape {source.shape}, got {x.dtype} of shape {x.shape}"
            )
        return jnp.expand_dims(x, 0) if source.batched else x

    @functools.cached_property
    def structure(self) -> Hashable:
        """All that `apply` depends on but its arguments; equal structures are one function.

        Values are numbered in the order in which they are computed, because exporters number names
        anew. Numbers count by their bits and their types: 0.0 equals -0.0, 1 and True in Python.
        """
        numbers = {source.name: k for k, source in enumerate(self.inputs)}
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
        inputs = tuple((source.shape, source.batched) for source in self.inputs)
        outputs = tuple(
            (y.shape, numbers[y.name] if y.constant is None else None, _exactly(y.constant))
            for y in self.outputs
        )
        return inputs, outputs, tuple(steps)


def _shaped(y: Array, shape: tuple[int, ...]) -> Array:
    return y if y.shape == shape else jnp.reshape(y, shape)


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
