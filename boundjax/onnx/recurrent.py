"""Recurrent layers: RNN, GRU and LSTM, written as `lax.scan` over the steps of the sequence.

Products with the inputs of all steps are computed at once, so that only what depends on the state
is inside the scan. The tracer unrolls a scan up to a limit and bounds a longer one by intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from boundjax.onnx.node import Node, Value

Activation = Callable[[Value], Value]
# The state of a cell: (h,) or (h, c), each [batch, hidden].
State = tuple[Value, ...]

_EXACT = lax.Precision.HIGHEST


class _Parameters(NamedTuple):
    """What one direction of a layer computes with.

    Attributes:
      weights: of the state, `[gates hidden, hidden]`.
      bias: of the state, `[gates hidden]`, or None where it is in the inputs.
      peepholes: `[3 hidden]` or None.
      activations: one to three functions.
      clip: of the inputs of activations, None for no limit.
    """

    weights: Value
    bias: Value | None
    peepholes: Value | None
    activations: Sequence[Activation]
    clip: float | None

    def activated(self, k: int, x: Value) -> Value:
        """The value of an activation at clipped inputs."""
        if self.clip is not None:
            x = jnp.clip(x, np.float32(-self.clip), np.float32(self.clip))
        return self.activations[k](x)


class _Cell(NamedTuple):
    """A kind of layer.

    Attributes:
      gates: how many.
      activations: their names, in the order of the file.
      states: how many values a state has.
      step: (node, parameters, inputs `[batch, gates hidden]`, state) -> the next state.
    """

    gates: int
    activations: tuple[str, ...]
    states: int
    step: Callable[[Node, _Parameters, Value, State], State]


def _product(x: Value, weights: Value) -> Value:
    return jnp.matmul(x, weights.T, precision=_EXACT)


def _rnn_step(node: Node, of: _Parameters, inputs: Value, state: State) -> State:
    return (of.activated(0, inputs + _product(state[0], of.weights)),)


def _gru_step(node: Node, of: _Parameters, inputs: Value, state: State) -> State:
    (h,) = state
    size = h.shape[-1]
    weights = of.weights
    gates = of.activated(0, inputs[:, : 2 * size] + _product(h, weights[: 2 * size]))
    update, reset = gates[:, :size], gates[:, size:]
    if node.flag("linear_before_reset", False):
        hidden = _product(h, weights[2 * size :])
        hidden = reset * (hidden if of.bias is None else hidden + of.bias[None, 2 * size :])
    else:
        hidden = _product(reset * h, weights[2 * size :])
    new = of.activated(1, inputs[:, 2 * size :] + hidden)
    # The bounds of `new + update (h - new)` are up to three times as wide.
    return ((jnp.float32(1.0) - update) * new + update * h,)


def _lstm_step(node: Node, of: _Parameters, inputs: Value, state: State) -> State:
    h, c = state
    size = h.shape[-1]
    sums = inputs + _product(h, of.weights)
    entering, leaving, forgetting, new = (sums[:, k * size : (k + 1) * size] for k in range(4))
    peeps: list[Value | None] = [None] * 3
    if of.peepholes is not None:
        peeps = [of.peepholes[None, k * size : (k + 1) * size] for k in range(3)]
    entering = of.activated(0, entering if peeps[0] is None else entering + peeps[0] * c)
    if node.flag("input_forget", False):
        kept = jnp.float32(1.0) - entering
    else:
        kept = of.activated(0, forgetting if peeps[2] is None else forgetting + peeps[2] * c)
    c = kept * c + entering * of.activated(1, new)
    leaving = of.activated(0, leaving if peeps[1] is None else leaving + peeps[1] * c)
    return leaving * of.activations[2](c), c


_RNN = _Cell(1, ("Tanh",), 1, _rnn_step)
_GRU = _Cell(3, ("Sigmoid", "Tanh"), 1, _gru_step)
_LSTM = _Cell(4, ("Sigmoid", "Tanh", "Tanh"), 2, _lstm_step)


def rnn(node: Node, *operands: Value | None) -> tuple[Value, ...]:
    """RNN: `h = f(W x + R h + b)`."""
    return _layer(node, _RNN, *operands)


def gru(node: Node, *operands: Value | None) -> tuple[Value, ...]:
    """GRU, with the reset before or after the product (`linear_before_reset`)."""
    return _layer(node, _GRU, *operands)


def lstm(node: Node, *operands: Value | None) -> tuple[Value, ...]:
    """LSTM, perhaps with peepholes or coupled gates."""
    return _layer(node, _LSTM, *operands)


def _layer(
    node: Node,
    cell: _Cell,
    x: Value,
    weights: Value,
    recurrent: Value,
    bias: Value | None = None,
    lengths: np.ndarray | None = None,
    h: Value | None = None,
    c: Value | None = None,
    peepholes: Value | None = None,
) -> tuple[Value, ...]:
    """All outputs: those of every step, and the last value of each part of the state."""
    by_batch = node.flag("layout", False)
    activations = _activations(node, cell)
    clip = node.number("clip", None)
    node.integer("hidden_size", 0)
    if by_batch:  # [batch, steps, ...] and [batch, directions, ...]
        x, h, c = (None if v is None else jnp.swapaxes(v, 0, 1) for v in (x, h, c))
    size = _checked(node, cell, x, weights, recurrent, bias, h, c, peepholes)
    backwards = _directions(node, len(recurrent))
    steps, batch, _ = x.shape
    rows = _lengths(node, lengths, steps, batch)
    every, last = [], []
    for d, back in enumerate(backwards):
        inner, outer = _biases(node, cell, None if bias is None else bias[d], size)
        inputs = jnp.matmul(x, weights[d].T, precision=_EXACT)
        inputs = inputs if outer is None else inputs + outer[None, None]
        count = len(cell.activations)
        of = _Parameters(
            recurrent[d],
            inner,
            None if peepholes is None else peepholes[d],
            activations[count * d : count * (d + 1)],
            clip,
        )
        zeros = jnp.zeros((batch, size), jnp.float32)
        state = tuple(zeros if v is None else v[d] for v in (h, c)[: cell.states])
        y, state = _all_rows(node, cell, of, inputs, state, rows, back)
        every.append(y)
        last.append(state)
    first = jnp.stack(every, axis=1)
    states = [jnp.stack(parts, axis=0) for parts in zip(*last, strict=True)]
    if by_batch:  # [batch, steps, directions, hidden] and [batch, directions, hidden]
        first = jnp.transpose(first, (2, 0, 1, 3))
        states = [jnp.swapaxes(v, 0, 1) for v in states]
    return (first, *states)


def _all_rows(
    node: Node,
    cell: _Cell,
    of: _Parameters,
    inputs: Value,
    state: State,
    lengths: tuple[int, ...],
    back: bool,
) -> tuple[Value, State]:
    """One direction, where the sequences of a batch may have several lengths.

    Rows of one length are computed together. Behind the end of a sequence its outputs are 0.
    """
    steps = len(inputs)
    if set(lengths) == {steps}:
        return _run(node, cell, of, inputs, state, back)
    ys: list[Value] = [None] * len(lengths)
    ends: list[Any] = [None] * len(lengths)
    for length in sorted(set(lengths)):
        rows = [k for k, n in enumerate(lengths) if n == length]

        def taken(v: Value, axis: int, rows: Sequence[int] = rows) -> Value:
            return jnp.concatenate(
                [lax.slice_in_dim(v, k, k + 1, axis=axis) for k in rows], axis=axis
            )

        part = taken(inputs[:length], 1)
        y, end = _run(node, cell, of, part, tuple(taken(v, 0) for v in state), back)
        y = jnp.pad(y, ((0, steps - length), (0, 0), (0, 0)))
        for place, k in enumerate(rows):
            ys[k] = y[:, place : place + 1]
            ends[k] = [v[place : place + 1] for v in end]
    together = tuple(jnp.concatenate(parts, axis=0) for parts in zip(*ends, strict=True))
    return jnp.concatenate(ys, axis=1), together


def _run(
    node: Node, cell: _Cell, of: _Parameters, inputs: Value, state: State, back: bool
) -> tuple[Value, State]:
    """The outputs `[steps, batch, hidden]` of one direction, and its last state."""

    def step(state: State, row: Value) -> tuple[State, Value]:
        after = cell.step(node, of, row, state)
        return after, after[0]

    state, y = lax.scan(step, tuple(map(jnp.asarray, state)), inputs, reverse=back)
    return y, state


def _biases(
    node: Node, cell: _Cell, bias: Value | None, size: int
) -> tuple[Value | None, Value | None]:
    """The bias that is added to products with the state, and the one of the inputs."""
    if bias is None:
        return None, None
    width = cell.gates * size
    outer, inner = bias[:width], bias[width:]
    if cell is _GRU and node.flag("linear_before_reset", False):
        # The bias of the reset part stands inside of its product.
        both = jnp.add(outer[: 2 * size], inner[: 2 * size])
        return inner, jnp.concatenate([both, outer[2 * size :]])
    return None, jnp.add(outer, inner)


def _checked(
    node: Node,
    cell: _Cell,
    x: Value,
    weights: Value,
    recurrent: Value,
    bias: Value | None,
    h: Value | None,
    c: Value | None,
    peepholes: Value | None,
) -> int:
    """Checks the shapes of all operands; returns the hidden size."""
    if x.ndim != 3 or weights.ndim != 3 or recurrent.ndim != 3 or 0 in recurrent.shape:
        raise node.error(
            f"expected an operand [steps, batch, features] and weights of rank 3, got shapes "
            f"{x.shape}, {weights.shape} and {recurrent.shape}"
        )
    directions, _, size = recurrent.shape
    width, (steps, batch, features) = cell.gates * size, x.shape
    expected = {
        "weights": (weights, (directions, width, features)),
        "recurrent weights": (recurrent, (directions, width, size)),
        "bias": (bias, (directions, 2 * width)),
        "initial state": (h, (directions, batch, size)),
        "initial cell": (c, (directions, batch, size)),
        "peepholes": (peepholes, (directions, 3 * size)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and value.shape != shape:
            raise node.error(f"expected {name} of shape {shape}, got {value.shape}")
    declared = node.integer("hidden_size", size)
    if declared not in (size, 0) or steps < 1 or batch < 1:
        raise node.error(
            f"expected at least one step and a hidden size of {size}, got {steps} and {declared}"
        )
    node.check_size((steps, batch, directions, width))
    return size


def _directions(node: Node, count: int) -> tuple[bool, ...]:
    """Which directions run backwards."""
    direction = node.text("direction", "forward")
    reversals = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
    if direction not in reversals or len(reversals[direction]) != count:
        raise node.error(
            f"attribute direction: expected one of {', '.join(reversals)} for weights of {count} "
            f"directions, got {direction!r}"
        )
    return reversals[direction]


def _lengths(node: Node, lengths: np.ndarray | None, steps: int, batch: int) -> tuple[int, ...]:
    """The length of every sequence of the batch."""
    if lengths is None:
        return (steps,) * batch
    values = node.to_integers(lengths)
    if len(values) != batch or not all(1 <= value <= steps for value in values):
        raise node.error(f"expected {batch} lengths from 1 to {steps}, got {values[:8]}")
    return values


def _affine(alpha: float, beta: float) -> Activation:
    return lambda x: jnp.add(jnp.multiply(np.float32(alpha), x), np.float32(beta))


def _hard_sigmoid(alpha: float, beta: float) -> Activation:
    line = _affine(alpha, beta)
    return lambda x: jnp.clip(line(x), np.float32(0), np.float32(1))


def _scaled_tanh(alpha: float, beta: float) -> Activation:
    return lambda x: jnp.multiply(np.float32(alpha), jnp.tanh(jnp.multiply(np.float32(beta), x)))


# name -> what makes it of its parameters, and their defaults; None has to be given.
_ACTIVATIONS: dict[str, tuple[Callable[..., Activation], tuple[float | None, ...]]] = {
    "relu": (lambda: jax.nn.relu, ()),
    "tanh": (lambda: jnp.tanh, ()),
    "sigmoid": (lambda: jax.nn.sigmoid, ()),
    "softsign": (lambda: jax.nn.soft_sign, ()),
    "softplus": (lambda: jax.nn.softplus, ()),
    "leakyrelu": (lambda a: lambda x: jax.nn.leaky_relu(x, a), (0.01,)),
    "elu": (lambda a: lambda x: jax.nn.elu(x, a), (1.0,)),
    "hardsigmoid": (_hard_sigmoid, (0.2, 0.5)),
    "affine": (_affine, (None, None)),
    "scaledtanh": (_scaled_tanh, (None, None)),
}


def _activations(node: Node, cell: _Cell) -> list[Activation]:
    """The activations of all directions; parameters are taken in the order of the functions."""
    two = node.text("direction", "forward") == "bidirectional"
    count = len(cell.activations) * (2 if two else 1)
    names = node.texts("activations") or cell.activations * (2 if two else 1)
    if len(names) != count:
        raise node.error(f"attribute activations: expected {count} names, got {len(names)}")
    parameters = [iter(node.numbers(f"activation_{name}") or ()) for name in ("alpha", "beta")]
    functions = []
    for name in names:
        if name.lower() not in _ACTIVATIONS:
            raise node.error(f"attribute activations: {name[:40]!r} is not supported")
        make, defaults = _ACTIVATIONS[name.lower()]
        values = [next(rest, default) for rest, default in zip(parameters, defaults, strict=False)]
        if None in values:
            raise node.error(f"attribute activations: {name!r} needs its alpha and beta")
        functions.append(make(*values))
    if any(next(rest, None) is not None for rest in parameters):
        raise node.error("expected activation_alpha and activation_beta for activations alone")
    return functions
