"""Folds batch normalisation and other per-channel factors into the convolution before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from boundjax.ir.node import Node, Perturbed
from boundjax.tracing.matching import GraphView, times_constant
from boundjax.tracing.patterns.rule import Rewrite


def folded(view: GraphView, node: Node) -> Rewrite | None:
    """`(conv(x, K) + b) c = conv(x, K c) + b c` for a factor per output channel.

    A walk then meets one op instead of two, and none whose factors have to be looked up. Dense
    layers are left alone, because their kernels are larger than their values.
    """
    operand = times_constant(node)
    if operand is None:
        return None
    factor = next(o for o in node.operands if not isinstance(o, Perturbed))
    walked = view.walk(operand, _shifts)
    layer = view.node(walked.operand)
    if layer is None or layer.primitive != "conv_general_dilated" or not layer.perturbed[0]:
        return None
    if layer.shape != node.shape:  # the factor also repeats the value
        return None
    numbers = layer.params["dimension_numbers"]
    channels, outputs = numbers.out_spec[1], numbers.rhs_spec[0]
    factors = view.along(factor, channels)
    if factors is None:
        return None
    shifts = [_shift(shift) for shift in walked.path]
    scale = jnp.multiply if node.primitive == "mul" else jnp.divide

    def function(
        x: Array, kernel: Array, factors: Array, factor: Array, *constants: Array
    ) -> Array:
        shape = [1] * kernel.ndim
        if factors.ndim:
            shape[outputs] = -1
        value = layer.evaluate(x, scale(kernel, factors.reshape(shape)))
        if not shifts:
            return value
        offset = jnp.zeros((), node.dtype)
        for move, constant in zip(shifts, constants, strict=True):
            offset = move(offset, constant)
        return value + scale(offset, factor)

    constants = [o for shift in walked.path for o in shift.constants]
    return Rewrite(function, [*layer.operands, factors, factor, *constants])


def _shifts(node: Node) -> Any | None:
    """The perturbed operand of a sum with a constant, or of a difference that subtracts one."""
    if len(node.inputs) != 1 or node.input_shapes[0].shape != node.shape:
        return None
    if node.primitive == "add":
        return node.operands[node.perturbed.index(True)]
    return node.operands[0] if node.primitive == "sub" and node.perturbed[0] else None


def _shift(node: Node) -> Callable[[Array, Array], Array]:
    return jnp.add if node.primitive == "add" else jnp.subtract
